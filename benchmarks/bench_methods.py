"""What each method costs per step beside plain cross entropy on the same batch, measured in one run.

    python -m benchmarks.bench_methods --out benchmarks/results/methods-cpu.jsonl
    python -m benchmarks.bench_methods --model resnet32 --classes 100 --rows 128 --size 32

A step is forward, loss, backward, optimiser and whatever the method keeps. Every method gets a batch of the same rows;
what its sampler or loader costs is not in these times (batches are made before), and that BAKE's epochs are
`companions + 1` times longer is not either: its card says so. `loss` is the criterion alone (forward and backward on
given logits), without the model and so without methods that evaluate copies of it.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlb_fast import DistillationLoss
from dlb_fast.data import Batch
from dlb_fast.train.config import LossConfig
from dlb_fast.train.loop import accepted_inputs, training_loss
from dlb_fast.train.methods import METHODS, find, make_criterion
from dlb_fast.train.models import create_model

from . import harness


def criterion_of(name: str, args: argparse.Namespace) -> DistillationLoss:
    """The criterion with the defaults of its method; copies of the model, if any, are taken early."""
    options = {"copy_every": 5} if "copy_every" in find(name).options else {}
    sizes = {"num_classes": args.classes, "num_samples": 4 * args.rows, "rows": args.rows, "epochs": 100}
    criterion: Any = make_criterion(LossConfig(method=name, **options), **sizes)
    return criterion.to(args.device)


def whole_step(name: str, args: argparse.Namespace) -> tuple[Callable[[], None], str]:
    """One training step of a method, warmed up until its teacher has something to say; and its line on costs."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = create_model(args.model, args.classes, 3).to(args.device).train()
    criterion = criterion_of(name, args)
    criterion.setup(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    half = args.rows // 2
    images = torch.randn(args.rows, 3, args.size, args.size, generator=generator).to(args.device)
    targets = torch.randint(0, args.classes, (half,), generator=generator).repeat(2).to(args.device)
    ids = torch.arange(half).repeat(2).to(args.device)
    num_old = half if find(name).batches == "overlap" else 0
    batch = Batch(images, targets, ids, num_old, epoch=0, step=0)
    accepts, forward = accepted_inputs(criterion), find(name).forward or "joint"
    if num_old:  # the very first batch of DLB has no old half
        training_loss(model, criterion, Batch(images[half:], targets[half:], ids[half:], 0, 0, 0))

    def step() -> None:
        loss = training_loss(model, criterion, batch, forward=forward, inputs=accepts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        criterion.step()

    for _ in range(12):
        step()
    return step, criterion.cost()


def loss_only(name: str, args: argparse.Namespace) -> Callable[[], None] | None:
    """The criterion on given logits, forward and backward; None where it needs the model."""
    if find(name).criterion.copies_model:
        return None
    generator = torch.Generator().manual_seed(0)
    half = args.rows // 2
    criterion = criterion_of(name, args)
    logits = torch.randn(args.rows, args.classes, generator=generator).to(args.device).requires_grad_()
    targets = torch.randint(0, args.classes, (half,), generator=generator).repeat(2).to(args.device)
    given: dict[str, Any] = {"ids": torch.arange(half).repeat(2).to(args.device), "epoch": 0}
    if "features" in inspect.signature(criterion.forward).parameters:
        given["features"] = torch.randn(args.rows, args.features, generator=generator).to(args.device)
    if find(name).batches == "overlap":
        criterion(logits.detach()[half:], targets[half:], given["ids"][half:])

    def step() -> None:
        logits.grad = None
        criterion(logits, targets, **given).backward()

    return step


def report(kind: str, times: dict[str, Any], costs: dict[str, str]) -> None:
    """A line per method: its time, and what it takes beside cross entropy."""
    base = times["ce"]["median_us"]
    print(f"\n{kind}: extra time beside plain cross entropy ({base:.0f} us, n={times['ce']['n']})")
    for name, time in times.items():
        extra = time["median_us"] - base
        print(
            f"  {name:<10}{time['median_us']:>11.1f} us [{time['p20_us']:.1f}, {time['p80_us']:.1f}]  "
            f"{extra:>+10.1f} us {100 * extra / base:>+8.1f} %   {costs.get(name, '')}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--features", type=int, default=512, help="columns of BAKE's features in the loss alone")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="per kind of timing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    names = ["ce", *(name for name in args.methods if name != "ce")]
    steps = {name: whole_step(name, args) for name in names}
    costs = {name: cost for name, (_, cost) in steps.items()}
    results = {"step": harness.interleaved({n: s for n, (s, _) in steps.items()}, args.device, seconds=args.seconds)}
    losses = {name: work for name in names if (work := loss_only(name, args)) is not None}
    results["loss"] = harness.interleaved(losses, args.device, seconds=args.seconds / 3)
    env = harness.environment(args.device)
    records = []
    for kind, times in results.items():
        report(kind, times, costs if kind == "step" else {})
        shape = {"model": args.model, "rows": args.rows, "classes": args.classes, "size": args.size}
        records += [
            {
                "bench": "methods", "kind": kind, "variant": name, **time,
                "of_ce": time["median_us"] / times["ce"]["median_us"], "cost": costs[name], **shape, **env,
            }
            for name, time in times.items()
        ]  # fmt: skip
    harness.write(args.out, records)


if __name__ == "__main__":
    main()
