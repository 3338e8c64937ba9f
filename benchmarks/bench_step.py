"""What a whole training step costs with DLB, beside plain cross entropy over the same number of rows.

    python -m benchmarks.bench_step --device cpu --seconds 200 --out benchmarks/results/step-cpu.jsonl
    python -m benchmarks.bench_step --device cuda --models resnet18_imagenet resnet50 --modes eager compile

The variants (`benchmarks/step_variants.py`) run in turn, in shuffled order, in one process. One percent is less than
what a shared machine varies from minute to minute, so the verdict comes from paired differences: every round gives one
ratio of a variant's time to that round's CE, and the median of the ratios has a 95 % interval by bootstrap over the
rounds. `ce_again` is CE once more: its ratio shows what the method reads where nothing differs, and where that
strays as far as the bar there is no verdict. On the CPU the ratios are of CPU time (one thread by default), which
leaves out what other processes took; `wall_ratio` is recorded beside it. Peak memory is all that is allocated from
before the model is made until its steps are done: parameters, momentum, batch, buffer, activations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from . import harness, memory
from .step_variants import VARIANTS, Rig, Setting, build
from .tables import verdicts


def measure(setting: Setting, wanted: list[str], seconds: float) -> list[dict[str, Any]]:
    """A record per variant; the first of ``wanted`` is what the others are divided by."""
    calls = 2
    peaks: dict[str, int] = {}
    for _ in range(2 if setting.device == "cuda" else 1):  # the first time libraries try algorithms and keep workspaces
        for name in wanted:
            peaks[name] = memory.peak_of(
                lambda name=name: build(name, setting, Rig(setting)), setting.device, calls  # type: ignore[misc]
            )
    rig = Rig(setting)
    steps = {name: build(name, setting, rig) for name in peaks}
    for step in steps.values():
        for _ in range(calls):
            step()
    samples = harness.in_rounds(steps, setting.device, seconds=seconds)
    base = wanted[0]
    shape = {"model": setting.model, "rows": setting.rows, "classes": setting.classes, "size": setting.size}
    how = {"mode": setting.mode, "dtype": "bfloat16" if setting.bf16 else "float32"}
    return [
        {
            "bench": "step", "variant": name, **harness.spread(times.wall), **shape, **how, "base": base,
            **ratios(times, samples[base], setting.device), "peak_bytes": peaks[name],
            "peak_ratio": peaks[name] / peaks[base],
        }
        for name, times in samples.items()
    ]  # fmt: skip


def ratios(times: harness.Times, base: harness.Times, device: str) -> dict[str, Any]:
    """The paired ratios that are judged, by the clock that fits the device, and the wall clock's."""
    wall = harness.paired(times.wall, base.wall)
    judged = harness.paired(times.cpu, base.cpu) if device == "cpu" else wall
    clock = "cpu" if device == "cpu" else "wall"
    return {"clock": clock, **judged, **{f"wall_{name}": value for name, value in wall.items()}}


def report(records: list[dict[str, Any]]) -> None:
    """A line per variant, and DLB's two verdicts."""
    first = records[0]
    size = f"{first['size']}x{first['size']}"
    print(f"\n{first['model']} {size}, {first['rows']} rows, {first['dtype']}, {first['mode']}")
    for r in records:
        ratio = f"{r['ratio']:.4f} [{r['ratio_low']:.4f}, {r['ratio_high']:.4f}]"
        print(
            f"  {r['variant']:<10}{r['median_us'] / 1e3:>10.2f} ms [{r['p20_us'] / 1e3:.2f}, {r['p80_us'] / 1e3:.2f}]  "
            f"n={r['n']}  {r['clock']} time over {r['base']} {ratio}  "
            f"peak {r['peak_bytes'] / 1e6:.1f} MB, {r['peak_ratio']:.4f}"
        )
        if r["variant"] == "dlb" and r["base"] == "ce":
            print(f"{'':12}{verdicts(r, records)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", help="default: resnet32; on a GPU resnet18_imagenet and resnet50")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"), help="default: all on a GPU")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rows", type=int, default=128, help="the model sees, half of them repeated (default: 128)")
    parser.add_argument("--classes", type=int, help="default: 100; on a GPU 1000")
    parser.add_argument("--size", type=int, help="pixels (default: 32; on a GPU 224)")
    parser.add_argument(
        "--threads", type=int, help="of the CPU (default: 1 there, so that its clock counts no waiting)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of timed steps per model and mode (default: 60)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no model and mode after this time, s")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    gpu, began = args.device == "cuda", time.perf_counter()
    modes = args.modes or (["eager", "compile"] if gpu else ["eager"])
    if args.rows < 2 or args.rows % 2:
        parser.error(f"--rows must be even and at least 2, got {args.rows}")
    if args.threads is not None or not gpu:
        torch.set_num_threads(args.threads or 1)
    torch.backends.cudnn.benchmark = True
    for mode in modes:
        for model in args.models or (["resnet18_imagenet", "resnet50"] if gpu else ["resnet32"]):
            if time.perf_counter() - began > args.limit:
                print(f"\n{model}, {mode}: left out, {args.limit:.0f} s are over")
                continue
            torch._dynamo.reset()
            shape = {"rows": args.rows, "classes": args.classes or (1000 if gpu else 100)}
            size = args.size or (224 if gpu else 32)
            setting = Setting(model, **shape, size=size, device=args.device, mode=mode, bf16=gpu)
            records = measure(setting, args.variants, args.seconds)
            report(records)
            env = harness.environment(args.device)
            harness.write(args.out, [{**record, **env} for record in records])


if __name__ == "__main__":
    main()
