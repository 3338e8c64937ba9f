"""The captured step: by an emulation of capture and replay on the CPU, and by CUDA where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dlb_fast import BakeLoss, LastBatchLoss
from dlb_fast.data import Batch
from dlb_fast.train.config import TrainConfig
from dlb_fast.train.engine import Trainer
from dlb_fast.train.graphed import WARM_UP, GraphedStep, check_graph
from dlb_fast.train.log import RunLog

torch.set_num_threads(1)

CLASSES, HALF = 5, 4
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def batches(count=14, short=None, device="cpu", dtype=torch.float64):
    """`[old | new]` batches: the first without an old half, and one short one in the middle if asked for."""
    generator = torch.Generator().manual_seed(5)
    made, before = [], None
    for step in range(count):
        rows = HALF - 1 if step == short else HALF
        new = torch.randn(rows, 1, 8, 8, dtype=dtype, generator=generator)
        labels, ids = torch.randint(0, CLASSES, (rows,), generator=generator), torch.arange(rows) + HALF * step
        parts = (
            (new, labels, ids)
            if before is None
            else tuple(torch.cat(p) for p in zip(before, (new, labels, ids), strict=True))
        )
        made.append(Batch(*parts, 0 if before is None else len(before[1]), 0, step).to(device))
        before = (new + 0.1, labels, ids)
    return made


class Replayed:
    """Capture as CUDA does it: the work is noted, not done; a replay does it on whatever lies at the same addresses,
    and writes gradients where the capture put them."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.warm, self.records, self.replays = 0, 0, 0

    def warm_up(self, work):
        self.warm += 1
        return work()

    def record(self, work):
        self.records += 1
        assert all(p.grad is None for p in self.parameters)  # else the graph would add to the gradients
        result = torch.zeros((), dtype=torch.float64)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.parameters]

        def replay():
            self.replays += 1
            before = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            result.copy_(work().detach())
            for p, grad, found in zip(self.parameters, grads, before, strict=True):
                grad.copy_(p.grad)
                p.grad = found

        return result, replay


def trained(data, graph, device="cpu", **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(216, CLASSES))
    model = model.to(device, data[0].images.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(
        model, LastBatchLoss(CLASSES, capacity=HALF, device=device), optimizer, data, log=RunLog(quiet=True), epochs=1,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), graph=graph and device == "cuda", **settings,
    )  # fmt: skip
    recorder = None
    if graph and device == "cpu":
        recorder = Replayed(model.parameters())
        trainer.graphed = GraphedStep(trainer._backward, model.parameters(), recorder)
    result = trainer.fit()
    return trainer, result, recorder


def compare(eager, graphed, data):
    for name, value in eager[0].model.state_dict().items():
        assert torch.equal(value, graphed[0].model.state_dict()[name]), name
    assert torch.equal(eager[0].criterion.buffer.logits, graphed[0].criterion.buffer.logits)
    assert torch.equal(eager[0].criterion.buffer.ids, graphed[0].criterion.buffer.ids)
    for name in ("loss", "ce", "lb", "train_top1", "images_seen"):
        assert eager[1][name] == graphed[1][name]


@pytest.mark.parametrize("short", [None, 9])
@pytest.mark.parametrize("settings", [{}, {"clip_grad": 0.05, "ema": 0.5}, {"amp": "fp16"}, {"forward": "two_pass"}])
def test_replayed_steps_are_the_eager_ones(short, settings):
    data = batches(short=short)
    eager = trained(data, False, **settings)
    graphed = trained(data, True, **settings)
    compare(eager, graphed, data)
    recorder = graphed[2]
    others = 1 if short is None else 3  # the first batch; a short one, and the one after it, whose old half is short
    assert (recorder.records, recorder.warm) == (1, WARM_UP + others)
    assert recorder.replays == len(data) - recorder.warm


def test_what_cannot_be_captured_is_refused():
    cuda, dlb = torch.device("cuda"), LastBatchLoss(CLASSES)
    check_graph(TrainConfig(), BakeLoss(), torch.device("cpu"), "ddp")  # not asked for
    check_graph(TrainConfig(graph=True), dlb, cuda, "none")
    for criterion, device, kind, said in (
        (dlb, torch.device("cpu"), "none", "graph=True expects a CUDA device, got cpu"),
        (dlb, cuda, "ddp", "graph=True expects one process, got distributed=ddp"),
        (BakeLoss(), cuda, "none", "methods dlb, two_view, ce.*got BakeLoss"),
    ):
        with pytest.raises(ValueError, match=said):
            check_graph(TrainConfig(graph=True), criterion, device, kind)
    for settings, said in (
        ({"accumulate": 2}, "accumulate must be 1 with graph"),
        ({"compile": True}, "compile must be False with graph"),
        ({"distributed": "fsdp"}, "distributed must be auto or none with graph"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainConfig(graph=True, **settings)
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="graph=True expects a CUDA device"):
        Trainer(model, nn.CrossEntropyLoss(), sgd, [], max_steps=1, graph=True)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("settings", [{}, {"amp": "bf16"}, {"amp": "fp16", "clip_grad": 0.5}, {"forward": "two_pass"}])
def test_captured_training_equals_eager_training(settings):
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    try:
        data = batches(40, short=21, device="cuda", dtype=torch.float32)
        eager = trained(data, False, device="cuda", **settings)
        graphed = trained(data, True, device="cuda", **settings)
    finally:
        torch.backends.cudnn.deterministic = before
    assert graphed[0].graphed.form is not None  # it was captured
    compare(eager, graphed, data)
