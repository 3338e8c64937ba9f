"""The loss alone: loss, gradient and buffer update, ours against what people run today.

    python -m benchmarks.bench_last_batch --device cpu --seconds 4 --out benchmarks/results/cpu.jsonl
    python -m benchmarks.bench_last_batch --device cuda --out benchmarks/results/gpu.jsonl
    python -m benchmarks.bench_last_batch --sweep classes --variants eager compile cpu --out sweep.jsonl

The contenders are those of `loss_variants.py`: eager, the official two-tensor form, torch.compile (default and
reduce-overhead), Liger's CE and KL, and ours. Every one includes keeping the new half's logits for the next step.
`ce-NAME` is plain cross entropy, for which there is quack as well. Each gradient is held against float64 before it is
timed; what computes something else is listed as missing, and is an error where it is ours.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import harness, memory, shapes
from .loss_variants import CE_NAMES, NAMES, OURS, PATHS, right, variants

SMALL = 1 << 22  # logits up to which a step is also timed warm and as a graph


def minimal_bytes(shape: shapes.Shape, dtype: torch.dtype) -> int:
    """Read the logits, read and write half of them as teacher, write the gradient: 3 units per logit."""
    return 3 * shape.rows * shape.classes * dtype.itemsize


def facts(shape: shapes.Shape, dtype: torch.dtype, median_us: float, roof: float) -> dict[str, float]:
    """What a time means in bytes. ``copy_bytes_per_logit``: what a copy on this machine moves in that time."""
    logits, least = shape.rows * shape.classes, minimal_bytes(shape, dtype)
    moved = median_us * 1e-6 * roof
    return {
        "copy_bandwidth": roof,
        "least_bytes_per_logit": least / logits,
        "copy_bytes_per_logit": moved / logits,
        "of_copy_bandwidth": least / moved,
    }


def measure(shape: shapes.Shape, dtype_name: str, args: argparse.Namespace, roof: float) -> list[dict[str, Any]]:
    """A record per kind of timing and contender, for one shape and dtype."""
    dtype = getattr(torch, dtype_name)
    torch._dynamo.reset()
    work, missing, problem = variants(shape, dtype, args.device, args.variants, args.paths)
    work, wrong = right(work, problem)
    missing += wrong
    if not work and wrong:
        raise RuntimeError(", ".join(wrong))
    if not work:
        raise SystemExit(f"bench_last_batch: nothing to time; missing: {', '.join(missing) or 'nothing'}")
    small = shape.rows * shape.classes <= SMALL
    times = harness.all_times(work, args.device, seconds=args.seconds, small=small)
    inside = {key: {"peak_bytes": memory.peak_bytes(step, args.device)} for key, step in work.items()}
    if args.device == "cuda":
        for key, count in harness.launches(work).items():
            inside[key]["launches"] = count
    shared = {"dtype": dtype_name, "rows": shape.rows, "classes": shape.classes, "missing": missing, "wrong": wrong}
    if args.sweep:
        shared["sweep"] = args.sweep
    return [
        {
            "bench": "last_batch", "kind": kind, "variant": variant, "path": path, **time, **shared,
            **inside[variant, path], **facts(shape, dtype, time["median_us"], roof),
        }
        for kind, found in times.items()
        for (variant, path), time in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_last_batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", help="default: float32 bfloat16; in a sweep one of them")
    parser.add_argument(
        "--variants", nargs="+", choices=(*NAMES, *CE_NAMES), help="default: all but ce-* that this device can run"
    )
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--classes", nargs="+", type=int, help="only these numbers of classes")
    parser.add_argument("--sweep", choices=tuple(shapes.SWEEPS), help="over numbers of classes or rows instead")
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and kind of timing (default: 4)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no shape and dtype after this time, s")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args, began = parser.parse_args(), time.perf_counter()
    on_gpu = args.device == "cuda"
    if args.variants is None:
        args.variants = [name for name in NAMES if name not in (("cpu",) if on_gpu else ("cuda", "triton"))]
    sizes = [shape for shape in shapes.of(args.device, args.sweep) if not args.classes or shape.classes in args.classes]
    if not sizes:
        there = sorted({shape.classes for shape in shapes.of(args.device, args.sweep)})
        parser.error(f"--classes: expected some of {there}, got {args.classes}")
    both = ["bfloat16", "float32"] if on_gpu else ["float32", "bfloat16"]
    dtypes = args.dtypes or (both[:1] if args.sweep else both)
    env = harness.environment(args.device)
    roof = harness.copy_bandwidth(args.device, min(1.0, args.seconds))
    print(f"{env['hardware']}, {env['threads']} threads, torch {env['versions']['torch']}; copy {roof / 1e9:.1f} GB/s")
    failed = []
    # By dtype first: a run that is cut has one dtype whole.
    for dtype_name, shape in itertools.product(dtypes, sizes):
        name = f"{shape.rows} x {shape.classes} {dtype_name}"
        if time.perf_counter() - began > args.limit:
            print(f"\n{name}: left out, {args.limit:.0f} s are over")
            continue
        try:
            records = measure(shape, dtype_name, args, roof)
        except Exception:  # the other shapes are worth having; the exit status tells
            traceback.print_exc()
            failed.append(name)
            continue
        finally:
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        harness.write(args.out, [{**record, **env} for record in records])
        report(records)
        if any(text.removeprefix("ce-").startswith(OURS) for text in records[0]["wrong"]):
            failed.append(name)
    if failed:
        raise SystemExit(f"bench_last_batch: failed at {', '.join(failed)}")


def report(records: list[dict[str, Any]]) -> None:
    """One line per variant: its time, how many times ours is faster by the same path, and its memory."""
    first = records[0]
    missing = ", ".join(first["missing"]) or "nothing"
    print(f"\n{first['rows']} x {first['classes']} {first['dtype']}   missing: {missing}")
    best: dict[tuple[str, str, bool], float] = {}
    for r in records:
        if r["variant"].removeprefix("ce-") in OURS:
            key = (r["kind"], r["path"], r["variant"].startswith("ce-"))
            best[key] = min(best.get(key, r["median_us"]), r["median_us"])
    for r in sorted(records, key=lambda r: (r["kind"], r["path"], r["median_us"])):
        ours = best.get((r["kind"], r["path"], r["variant"].startswith("ce-")))
        print(
            f"  {r['kind']:<12}{r['path']:<9} {r['variant']:<11}{r['median_us']:>11.1f} us "
            f"[{r['p20_us']:.1f}, {r['p80_us']:.1f}]  n={r['n']}  "
            + (f"{r['median_us'] / ours:6.2f} x ours  " if ours else "")
            + f"peak {r['peak_bytes'] / 1e6:.2f} MB"
            + (f"  {r['launches']} launches" if "launches" in r else "")
        )


if __name__ == "__main__":
    main()
