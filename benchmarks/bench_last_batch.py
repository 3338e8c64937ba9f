"""The loss alone: loss, gradient and buffer roll, ours against what people run today.

    python -m benchmarks.bench_last_batch --device cpu --out benchmarks/results/cpu.jsonl
    python -m benchmarks.bench_last_batch --device cuda --out benchmarks/results/gpu.jsonl

Variants: `eager` (timm's and the official code's formula on one tensor), `official` (the official code's two tensors,
concatenated), `compile` and `compile-ro` (torch.compile, default and reduce-overhead), `liger` (Liger's CE and KL where
installed), and ours by implementation. Every variant includes keeping the new half's logits for the next step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fast import LastBatchLoss, _backends, ops

from . import harness, memory, shapes

TAU = 3.0


def eager_loss(logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """The formula as written everywhere: float32 losses, as autocast does it."""
    half = teacher.shape[0]
    z, t = logits.float(), teacher.float()
    kl = F.kl_div(F.log_softmax(z[:half] / TAU, 1), F.softmax(t / TAU, 1), reduction="batchmean")
    return F.cross_entropy(z, target) + kl * TAU**2


def official_loss(old: Tensor, new: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    """The official code's form: two forwards give two tensors."""
    z = torch.cat([old, new]).float()
    kl = F.kl_div(F.log_softmax(old.float() / TAU, 1), F.softmax(teacher.float() / TAU, 1), reduction="batchmean")
    return F.cross_entropy(z, target) + kl * TAU**2


def variants(
    shape: shapes.Shape, dtype: torch.dtype, device: str, wanted: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Name -> one full step of the loss (forward, backward, buffer), and the names that are missing here."""
    generator = torch.Generator().manual_seed(0)
    rows, classes, half = shape.rows, shape.classes, shape.rows // 2
    values = (2 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    target = torch.randint(0, classes, (rows,), generator=generator).to(device)
    teacher = values[:half] + 0.1 * torch.randn(half, classes, generator=generator).to(device, dtype)
    found: dict[str, Any] = {}
    missing: list[str] = []

    def through(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        leaf, memory = values.clone().requires_grad_(), teacher.clone()

        def step() -> None:
            leaf.grad = None
            loss(leaf, memory).backward()
            memory.copy_(leaf.detach()[half:])

        return step

    if "eager" in wanted:
        found["eager"] = through(lambda z, t: eager_loss(z, target, t))
    if "official" in wanted:
        found["official"] = through(lambda z, t: official_loss(z[:half], z[half:], target, t))
    for name, mode in (("compile", "default"), ("compile-ro", "reduce-overhead")):
        if name in wanted:
            compiled = torch.compile(eager_loss, mode=mode)
            found[name] = through(lambda z, t, f=compiled: f(z, target, t))
    if "liger" in wanted:
        try:
            from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
            from liger_kernel.ops.kl_div import LigerKLDivLossFunction
        except Exception:
            missing.append("liger")
        else:

            def liger(z: Tensor, t: Tensor) -> Tensor:
                student = F.log_softmax(z[:half].float() / TAU, 1)
                kl = LigerKLDivLossFunction.apply(student, F.softmax(t.float() / TAU, 1), "batchmean")
                return LigerCrossEntropyFunction.apply(z * 1, target)[0] + kl * TAU**2

            found["liger"] = through(liger)
    for impl in ("cuda", "triton", "cpu"):
        if impl not in wanted:
            continue
        known = _backends.implementations()[impl]
        if not known.available:
            missing.append(f"{impl} ({known.reason})")
            continue
        criterion = LastBatchLoss(classes, capacity=half, dtype=dtype, device=device, temperature=TAU, impl=impl)
        criterion(teacher, target[:half])
        leaf = values.clone().requires_grad_()

        def ours(criterion: LastBatchLoss = criterion, leaf: Tensor = leaf) -> None:
            leaf.grad = None
            criterion(leaf, target).backward()

        found[impl] = ours
        found[f"{impl}-step"] = bare_op(impl, values.clone(), target, criterion)
    return found, missing


def bare_op(impl: str, logits: Tensor, target: Tensor, criterion: LastBatchLoss) -> Callable[[], object]:
    """The op without an autograd node: loss, gradient and roll, for people who call ``logits.backward(grad)``."""
    buffer = criterion.buffer
    assert buffer is not None
    op = ops.op_for(impl, "last_batch_roll")
    options = (target, None, None, None, None, None, None, 1.0, TAU, 1.0, 0.0, 0.0, 0.0, -1.0, -100, 1, 0, True)
    return lambda: op(logits, buffer.logits, buffer.slots, None, -1, *options)


def minimal_bytes(shape: shapes.Shape, dtype: torch.dtype) -> int:
    """Read the logits, read and write half of them as teacher, write the gradient: 3 units per logit."""
    return 3 * shape.rows * shape.classes * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--classes", nargs="+", type=int, help="only these numbers of classes")
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and kind of timing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    ours = ["cuda", "triton", "compile-ro", "liger"] if on_gpu else ["cpu"]
    wanted = args.variants or ["eager", "official", "compile", *ours]
    env = harness.environment(args.device)
    roof = harness.copy_bandwidth(args.device) if on_gpu else None
    sizes = [*shapes.GPU_LAUNCH, *shapes.GPU_BANDWIDTH] if on_gpu else list(shapes.CPU)
    for shape in sizes:
        if args.classes and shape.classes not in args.classes:
            continue
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            torch._dynamo.reset()
            work, missing = variants(shape, dtype, args.device, wanted)
            results = {"wall": harness.interleaved(work, args.device, seconds=args.seconds)}
            if on_gpu:
                results["device_warm"] = harness.device_times(work, seconds=args.seconds, cold=False)
                results["device_cold"] = harness.device_times(work, seconds=args.seconds, cold=True)
                graphs = {name: graph for name, step in work.items() if (graph := harness.captured(step)) is not None}
                results["graph"] = harness.interleaved(graphs, args.device, seconds=args.seconds / 2)
            records = []
            for kind, times in results.items():
                for name, time in times.items():
                    record = {"bench": "last_batch", "kind": kind, "variant": name, "dtype": dtype_name, **time}
                    record |= {"rows": shape.rows, "classes": shape.classes, "missing": missing, **env}
                    if on_gpu:
                        record["launches"] = harness.launches(work[name])
                        record["peak_bytes"] = memory.peak_bytes(work[name], args.device)
                        record["copy_bandwidth"] = roof
                        achieved = minimal_bytes(shape, dtype) / (time["median_us"] * 1e-6)
                        record["of_copy_bandwidth"] = achieved / (roof or 1)
                    records.append(record)
            harness.write(args.out, records)
            report(shape, dtype_name, results, missing)


def report(shape: shapes.Shape, dtype: str, results: dict[str, Any], missing: list[str]) -> None:
    """One line per variant: times, and how many times ours is faster."""
    print(f"\n{shape.rows} x {shape.classes} {dtype}   missing: {', '.join(missing) or 'nothing'}")
    for kind, times in results.items():
        best = min((t["median_us"] for name, t in times.items() if name in ("cuda", "triton", "cpu")), default=None)
        for name, t in sorted(times.items(), key=lambda item: item[1]["median_us"]):
            ratio = f"{t['median_us'] / best:6.2f} x ours" if best else ""
            print(
                f"  {kind:<12}{name:<14}{t['median_us']:>11.1f} us  "
                f"[{t['p20_us']:.1f}, {t['p80_us']:.1f}]  n={t['n']}  {ratio}"
            )


if __name__ == "__main__":
    main()
