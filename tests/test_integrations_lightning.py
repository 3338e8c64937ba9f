"""LastBatchCallback with a real Lightning Trainer: every checkpoint continues bit for bit."""

from __future__ import annotations

import logging
import textwrap

import pytest
import torch
from builders import ROOT, environment, python
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dlb_fast import LastBatchLoss
from dlb_fast.data import (
    EvalLoader,
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    collate_overlap,
    synthetic,
)

if REASON := reason_against("lightning.pytorch"):
    pytest.skip(REASON, allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # a framework's own warnings are its business

import lightning.pytorch as pl  # noqa: E402

from dlb_fast.integrations.lightning import LastBatchCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
TRAIN, TEST = (synthetic(split, length=56, num_classes=4, size=8) for split in ("train", "test"))
EPOCHS, STEPS = 3, 7  # of 16 rows, 8 of them new


def as_float(image, rng):
    return image.float() / 255


def torch_loader(workers=0, kind=DataLoader):
    data = IndexedDataset(TRAIN, as_float)
    sampler = OverlapBatchSampler(data, 16)
    return kind(data, batch_sampler=sampler, collate_fn=collate_overlap, num_workers=workers)


LOADERS = {
    "resident": lambda: ResidentLoader(TRAIN, 16),
    "overlap": lambda: OverlapLoader(TRAIN, 16, num_threads=1),
    "DataLoader": torch_loader,
    "DataLoader with workers": lambda: torch_loader(2),
    "StatefulDataLoader": lambda: torch_loader(2, StatefulDataLoader),
}


class Net(pl.LightningModule):
    def __init__(self, criterion=None):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        if criterion is None:
            self.criterion = LastBatchLoss(4)
        else:
            object.__setattr__(self, "criterion", criterion)
        self.seen, self.terms = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.epoch, batch.step))
        loss = self.criterion(self.net(batch.images), batch.targets, batch.ids)
        self.terms.append(self.criterion.parts.lb.item())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        before = self.criterion.state_dict()["_extra_state"]
        logits = self.net(batch.images)
        loss = self.criterion(logits, batch.targets)
        assert torch.allclose(loss, nn.functional.cross_entropy(logits, batch.targets), atol=1e-6)
        assert torch.equal(before, self.criterion.state_dict()["_extra_state"])
        self.log("val", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(folder, module, loader, *, ckpt_path=None, callback=None, saves=(), **options):
    torch.manual_seed(0)
    nn.init.normal_(module.net[1].weight, std=0.1)
    nn.init.normal_(module.net[4].weight, std=0.1)
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=EPOCHS,
        enable_model_summary=False, enable_checkpointing=bool(saves),
        callbacks=[callback or LastBatchCallback(), *saves], **options,
    )  # fmt: skip
    weights_only = {"weights_only": True} if ckpt_path else {}
    trainer.fit(module, loader, EvalLoader(TEST, 32), ckpt_path=ckpt_path, **weights_only)
    return module


def weights(module):
    return torch.cat([value.flatten().float() for value in module.net.state_dict().values()])


@pytest.mark.parametrize(("kind", "external"), [*((kind, False) for kind in LOADERS), ("resident", True)])
def test_every_checkpoint_continues_bit_for_bit(tmp_path, kind, external):
    """`external`: the criterion is no part of the module."""

    def parts():
        criterion = LastBatchLoss(4) if external else None
        return Net(criterion), LastBatchCallback(criterion)

    saves = [
        pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1),
        pl.callbacks.ModelCheckpoint(tmp_path, filename="end-{epoch}", every_n_epochs=1, save_top_k=-1),
    ]
    module, callback = parts()
    whole = fit(tmp_path, module, LOADERS[kind](), callback=callback, saves=saves)
    assert whole.seen == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    assert whole.criterion.buffer.mismatched == 0 and min(whole.terms[1:]) > 0
    made = sorted(tmp_path.glob("*.ckpt"))
    assert len(made) == EPOCHS * STEPS // 5 + EPOCHS
    for checkpoint in made:
        module, callback = parts()
        resumed = fit(tmp_path, module, LOADERS[kind](), callback=callback, ckpt_path=checkpoint)
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], checkpoint.name
        assert not resumed.seen or resumed.criterion.buffer.mismatched == 0
        assert torch.equal(weights(resumed), weights(whole)), checkpoint.name


@pytest.mark.parametrize("kind", ["resident", "DataLoader with workers"])
def test_epochs_cut_short_and_accumulation(tmp_path, kind):
    module = fit(tmp_path, Net(), LOADERS[kind](), limit_train_batches=4, accumulate_grad_batches=2)
    assert module.seen == [(epoch, step) for epoch in range(EPOCHS) for step in range(4)]
    # the first batch of a later epoch repeats rows that were never new: no term for these, but no shift either
    assert module.criterion.buffer.mismatched == 8 * (EPOCHS - 1)
    assert module.criterion.buffer.capacity == 8 and module.terms[-1] > 0


def test_a_second_fit_starts_with_an_empty_criterion(tmp_path):
    module, loader = Net(), LOADERS["resident"]()
    first = weights(fit(tmp_path, module, loader))
    loader.set_epoch(0)
    assert not torch.equal(first, weights(fit(tmp_path, module, loader)))
    assert module.criterion.buffer.mismatched == 0


def test_refusals(tmp_path):
    module = Net()
    with pytest.raises(TypeError, match="expected a loader of dlb_fast.data.* got DataLoader with batch_sampler"):
        fit(tmp_path, module, DataLoader(IndexedDataset(TRAIN, None), batch_size=4))
    module.other = LastBatchLoss(4)
    with pytest.raises(ValueError, match="expected one last-batch criterion in Net, found 2"):
        fit(tmp_path, module, LOADERS["resident"]())
    with pytest.raises(ValueError, match="made as rank 0 of 2, but this process is rank 0 of 1"):
        fit(tmp_path, Net(), ResidentLoader(TRAIN, 16, rank=0, world_size=2))


SCRIPT = """
    import sys, torch
    import lightning.pytorch as pl
    import test_integrations_lightning as case
    from dlb_fast.integrations.lightning import LastBatchCallback

    folder, kind, path = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None

    class Ranked(case.Net):
        def train_dataloader(self):
            return case.ResidentLoader(case.TRAIN, 8) if kind == "resident" else case.torch_loader()

    module = Ranked()
    every = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    saves = [every] if path is None else []
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    case.fit(folder, module, None, saves=saves, ckpt_path=path, **options)
    assert module.criterion.buffer.mismatched == 0
    if module.global_rank == 0:
        torch.save(case.weights(module), f"{folder}/{'resumed' if path else 'whole'}.pt")
"""


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit(tmp_path):
    script = tmp_path / "ranked.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = f"{environment()['PYTHONPATH']}:{ROOT / 'tests'}"
    for checkpoint in ([], [tmp_path / "step=10.ckpt"]):
        python("-W", "ignore", script, tmp_path, "resident", *checkpoint, cwd=tmp_path, PYTHONPATH=path)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert torch.equal(whole, resumed)
