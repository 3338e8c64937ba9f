"""Ablations of DLB on a protocol's data: the age of the teacher, a new augmentation, and no second visit at all.

    python -m benchmarks.dlb_ablations --protocol benchmarks/protocol-cifar10.yaml --data DATA --out OUT

A batch is `[half t - lag | half t]` of DLB's own plan of halves, the teacher of a row is what the network said of its
image `lag` steps ago, and alpha and temperature are those chosen for DLB in OUT/results.jsonl. Lag 1 is DLB.

- `lag0`: both views of a half in one batch. The first half of the rows learns from the logits of the second half, of
  the same forward and detached: DDGSD with one of its two directions.
- `lag2`: two streams of DLB, the even and the odd batches, each with a criterion of its own.
- `same_view`: DLB whose repeated half has the pixels of its first visit. Where a view is only mirrored at random (the
  protocol's first network), half of the rows of DLB have these anyway.
- `once`: the new halves alone with cross entropy, the same steps with half the rows. Beside the control, DLB's batches
  without its term, it tells what showing the images a second time does.

OUT is the folder of `dlb-fast compare --protocol`, whose runs of `dlb` are the reference. Every run appends a line to
results.jsonl; what is there is not run again, and what was cut short continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlb_fast import DistillationLoss, Inputs, LastBatchLoss, Teacher
from dlb_fast.data import OverlapPlan, PlanSampler
from dlb_fast.presets import load_preset
from dlb_fast.train import compare
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import RunData, identity, open_data
from dlb_fast.train.loop import TrainingDiverged
from dlb_fast.train.protocol import differences, load_protocol
from dlb_fast.train.run import RunFolder, train_run

OURS, MODULE = "dlb", "benchmarks.dlb_ablations"  # which is __main__ when it runs


class OneDirection(DistillationLoss):
    """`CE(all rows) + alpha tau^2 mean KL(second half || first half)`, the second half of the rows detached."""

    def __init__(self, *, alpha: float = 1.0, temperature: float = 3.0, impl: str = "auto") -> None:
        super().__init__(alpha=alpha, temperature=temperature, impl=impl)

    def teacher(self, inputs: Inputs) -> Teacher:
        return Teacher("logits", inputs.logits[len(inputs.logits) // 2 :].detach())


class OneStream(LastBatchLoss):
    """DLB's criterion, which knows the repeated rows by their ids alone."""

    def forward(self, logits: Tensor, target: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(logits, target, ids)


class TwoStreams(DistillationLoss):
    """Every second batch belongs to the same `LastBatchLoss`, so that a teacher is two steps old."""

    parts: Any = None

    def __init__(
        self,
        num_classes: int,
        *,
        capacity: int | None = None,
        alpha: float = 1.0,
        temperature: float = 3.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(alpha=alpha, temperature=temperature, impl=impl)
        options: dict[str, Any] = {"capacity": capacity, "alpha": alpha, "temperature": temperature, "impl": impl}
        self.streams = nn.ModuleList(LastBatchLoss(num_classes, **options) for _ in range(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Tensor, target: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        stream = self.streams[int(self.calls) % 2]
        self.calls += 1
        loss = stream(logits, target, ids)
        self.parts = stream.parts
        return loss


class Variant(NamedTuple):
    """A variant of DLB: its name in tables, its criterion, the age of the teacher, and the view of the second visit.

    `lag` None: no second visit.
    """

    label: str
    method: str
    lag: int | None
    view: int


VARIANTS = {
    "lag0": Variant("lag 0 (one direction of DDGSD)", f"{MODULE}:OneDirection", 0, 1),
    "lag2": Variant("lag 2", f"{MODULE}:TwoStreams", 2, 1),
    "same_view": Variant("lag 1, the same view twice", f"{MODULE}:OneStream", 1, 0),
    "once": Variant("cross entropy of the new halves alone", "ce", None, 0),
}


class LagSampler(PlanSampler):
    """Batches `[half t - lag | half t]` of the plan of DLB's sampler; the first `lag` of a run have no old half.

    With lag None no batch has one. With lag 0 these are two views of the same half. With lag 2 the first two
    batches of an epoch may have an image in both halves, which the plan rules out for lag 1: about 2 of 128 with 10
    000 images. `view` is that of the old half's images; 0 repeats the pixels of their first visit.
    """

    def __init__(self, length: int, batch_size: int, lag: int | None, view: int, seed: int) -> None:
        super().__init__(OverlapPlan(length, batch_size // 2, seed=seed), 0, batch_size)
        self.lag, self.view = lag, view

    def views(self, epoch: int, step: int) -> tuple[Any, Any, Any]:
        """The old rows, then the new ones."""
        new, at = self.plan.half(epoch, step), (epoch, step)
        alone = new, np.full(len(new), epoch), np.zeros(len(new), np.int64)
        if self.lag is None:
            return alone
        for _ in range(self.lag):
            if (before := self.plan.before(*at)) is None:
                return alone
            at = before
        old = self.plan.half(*at)
        epochs = np.repeat([at[0], epoch], [len(old), len(new)])
        return np.concatenate((old, new)), epochs, np.repeat([self.view, 0], [len(old), len(new)])


class LagData(RunData):
    """The data of a run with the batches of a variant."""

    variant = VARIANTS["lag0"]

    def train_loader(self, *, seed: int, overlap: bool, sampler: Any = None, **options: Any) -> Any:
        """A loader of the variant's batches."""
        rows, lag, view = self.config.batch_size, self.variant.lag, self.variant.view
        sampler = LagSampler(len(self.train), rows, lag, view, seed)
        return super().train_loader(seed=seed, overlap=False, sampler=sampler, **options)


def train(config: RunConfig, name: str, folder: RunFolder) -> dict[str, Any]:
    """Train a variant with a config of DLB, or continue it; returns its summary."""
    data = LagData(**vars(open_data(config.data)))
    data.variant = variant = VARIANTS[name]
    method = override(config, method=variant.method)
    if variant.lag is None:  # cross entropy has no numbers of its own
        method = override(method, alpha=None, temperature=None)
    if not (folder.path / "result.json").exists():
        try:
            result = train_run(method, folder, resume=folder.exists(), quiet=True, data=data)
        except TrainingDiverged as error:
            return {"diverged": str(error).partition(";")[0], "config": differences(method)}
        if result["stopped_by"] is not None:
            raise KeyboardInterrupt
    return {**compare.summary(folder, data), "config": differences(method)}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(prog="dlb_ablations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--protocol", type=Path, required=True, help="the study; network and noises of its first table")
    parser.add_argument("--data", help="as in dlb-fast compare")
    parser.add_argument("--labels", type=Path, help="as in dlb-fast compare")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study, with its results.jsonl")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="runs with such names, as there")
    args = parser.parse_args(argv)
    protocol, results = load_protocol(args.protocol, load_preset), args.out / compare.RESULTS
    opened, protocol = compare.with_data(protocol, args.data, args.labels)
    chosen = compare.states(protocol, compare.read_results(results)).chosen
    settings = [chosen[other] for other in protocol.needs(OURS) if other in chosen]
    if len(settings) < len(protocol.needs(OURS)):
        parser.error(f"{results} has no setting chosen for {OURS}; run dlb-fast compare --only 'tuning/{OURS}/*' first")
    network = protocol.tables[0].network
    cells = {
        f"ablation/{network}/{name}/{noise}/seed{seed}": (name, noise, seed)
        for seed in protocol.seeds
        for noise in protocol.tables[0].noises
        for name in VARIANTS
    }
    labels = {cell: VARIANTS[name].label for cell, (name, _, _) in cells.items()}
    asked = {"config": None, "runs": labels, "command": " ".join(sys.argv[1:]), "data": identity(opened)}
    wanted = compare.fitting(list(cells), args.only)
    with compare.claimed(args.out, asked):
        lines = compare.read_results(results)  # another command may have ended since
        known = {line.get("cell") for line in lines}
        for cell in wanted:
            if cell in known:
                continue
            name, noise, seed = cells[cell]
            config = protocol.config_of(network, noise, OURS, settings, seed)
            line = train(compare.located(config, args.data, args.labels), name, RunFolder(args.out / cell))
            about = {"kind": "ablation", "cell": cell, "network": network, "noise": noise, "method": name}
            lines.append({**about, "label": labels[cell], "seed": seed, **line, "jobs": 1})
            compare.write_results(results, lines)
            top1 = line["diverged"] if "diverged" in line else f"top-1 {100 * line['last']['test_top1']:.2f} %"
            print(f"{cell}: {top1}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
