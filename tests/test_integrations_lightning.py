"""LastBatchCallback with a real Lightning Trainer: every checkpoint continues bit for bit."""

from __future__ import annotations

import logging
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F
from builders import ROOT, environment, python
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dlb_fast import DistillationLoss, LastBatchLoss, Teacher
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
        pl.callbacks.ModelCheckpoint(tmp_path, filename="last-{step}", every_n_train_steps=STEPS, save_top_k=-1),
        pl.callbacks.ModelCheckpoint(tmp_path, filename="end-{epoch}", every_n_epochs=1, save_top_k=-1),
    ]
    module, callback = parts()
    whole = fit(tmp_path, module, LOADERS[kind](), callback=callback, saves=saves)
    assert whole.seen == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    assert whole.criterion.buffer.mismatched == 0 and min(whole.terms[1:]) > 0
    assert len(list(tmp_path.glob("*.ckpt"))) == EPOCHS * STEPS // 5 + 2 * EPOCHS
    for name in ("step=10", "last-step=14", "end-epoch=0"):  # in an epoch, at its last step, and after it
        checkpoint = tmp_path / f"{name}.ckpt"
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


class Twice(Net):
    """float64, with or without ids; keeps what it was trained on."""

    optimizer, manual, ids = "sgd", False, True

    def __init__(self):
        super().__init__()
        self.automatic_optimization = not self.manual
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
        self.kept = []

    def loss(self, batch):
        self.terms.append(None)
        ids = batch.ids if self.ids else None
        loss = self.criterion(self.net(batch.images.double()), batch.targets, ids)
        self.terms[-1] = [term.item() for term in self.criterion.parts]
        return loss

    def training_step(self, batch, batch_idx):
        if not self.kept or self.kept[-1] is not batch:
            self.kept.append(batch)
        if not self.manual:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        with torch.no_grad():
            self.criterion(self.net(batch.images.double()), batch.targets)

    def configure_optimizers(self):
        return make_optimizer(self.optimizer, self.net.parameters())


class Sam(torch.optim.SGD):
    """Two passes per step (Foret et al., 2021): a step up by 0.05 of the gradient, and the gradient there."""

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        weights = [p for group in self.param_groups for p in group["params"]]
        moved = [0.05 * p.grad for p in weights]
        for p, by in zip(weights, moved, strict=True):
            p.add_(by)
        torch.enable_grad()(closure)()
        for p, by in zip(weights, moved, strict=True):
            p.sub_(by)
        super().step()
        return loss


def make_optimizer(name, parameters):
    if name == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
    return (Sam if name == "sam" else torch.optim.SGD)(parameters, lr=0.1)


def by_hand(batches, start, name, accumulate, cut=0):
    """The same in plain torch; `cut`: batches of an epoch, after which no row is repeated."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    net.load_state_dict(start)
    optimizer = make_optimizer(name, net.parameters())
    stored = None
    for number, batch in enumerate(batches):
        if cut and number % cut == 0:
            stored = None
        evaluations = []

        def closure():
            z = net(batch.images.double())  # noqa: B023
            loss = F.cross_entropy(z, batch.targets)  # noqa: B023
            if stored is not None:  # noqa: B023
                t, s = F.softmax(stored / 3, 1), F.log_softmax(z[: len(stored)] / 3, 1)  # noqa: B023
                loss = loss + 9 * F.kl_div(s, t, reduction="batchmean")
            if name == "sgd":
                loss = loss / accumulate
            else:
                optimizer.zero_grad()
            loss.backward()
            evaluations.append(z.detach())  # noqa: B023
            return loss

        if name == "sgd":
            closure()
            step = number % STEPS
            if (step + 1) % accumulate == 0 or step == STEPS - 1:
                optimizer.step()
                optimizer.zero_grad()
        else:
            optimizer.step(closure)
        stored = evaluations[-1][batch.num_old :]
    return weights(types.SimpleNamespace(net=net))


LOOPS = {
    "plain": ({}, {}),
    "without ids": ({"ids": False}, {}),
    "manual optimisation": ({"manual": True}, {}),
    "LBFGS": ({"optimizer": "lbfgs"}, {}),
    "LBFGS without ids": ({"optimizer": "lbfgs", "ids": False}, {}),
    "SAM": ({"optimizer": "sam"}, {}),
    "SAM without ids": ({"optimizer": "sam", "ids": False}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 3}),
    "validation before and within the epoch": ({}, {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    "cut": ({}, {"limit_train_batches": 4}),
    "cut, without ids": ({"ids": False}, {"limit_train_batches": 4}),
    "loaders made anew": ({}, {"reload_dataloaders_every_n_epochs": 1}),
}


WITH_WORKERS = ("plain", "cut, without ids", "loaders made anew", "LBFGS")


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "resident") for case in LOOPS), *((c, "DataLoader with workers") for c in WITH_WORKERS)]
)
def test_weights_are_those_of_a_plain_loop(tmp_path, case, kind):
    attributes, options = LOOPS[case]
    module = type("Case", (Twice,), attributes)()
    loader = LOADERS[kind]()
    if "reload_dataloaders_every_n_epochs" in options:
        module.train_dataloader, loader = LOADERS[kind], None
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in module.net.state_dict().items()}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=EPOCHS,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[LastBatchCallback()], **options,
    )  # fmt: skip
    trainer.fit(module, loader, EvalLoader(TEST, 32))
    cut = options.get("limit_train_batches", 0)
    assert len(module.kept) == EPOCHS * (cut or STEPS)
    want = by_hand(module.kept, start, module.optimizer, options.get("accumulate_grad_batches", 1), cut)
    assert (weights(module) - want).abs().max() < 1e-6  # weights() are float32
    assert module.criterion._same is None


class Evaluations(DistillationLoss):
    """Records which calls evaluate the last batch again."""

    def teacher(self, inputs):
        return Teacher("none")

    def record(self, inputs):
        self.found.append(inputs.again)


def test_any_criterion_is_told_that_a_closure_is_the_same_batch(tmp_path):
    criterion = Evaluations()
    criterion.found = []
    module = type("Case", (Twice,), {"optimizer": "sam", "ids": False})()
    module.criterion = criterion
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[LastBatchCallback()], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, LOADERS["resident"]())
    assert criterion.found == [False, True] * STEPS


def test_the_terms_are_logged(tmp_path):
    class Logger(pl.loggers.logger.DummyLogger):
        def __init__(self):
            super().__init__()
            self.kept = []

        def log_metrics(self, metrics, step=None):
            self.kept.append(metrics)

    logger, module = Logger(), Twice()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=logger, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[LastBatchCallback()], log_every_n_steps=3,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, LOADERS["resident"]())
    kept = [entry for entry in logger.kept if "last_batch" in entry]
    assert len(kept) == 2 * STEPS // 3
    for entry, terms in zip(kept, module.terms[2::3], strict=True):
        assert [entry["cross_entropy"], entry["last_batch"]] == pytest.approx(terms[1:3], rel=1e-6)
    assert min(entry["last_batch"] for entry in kept) > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_criterion_outside_the_module_keeps_its_mode(tmp_path, training):
    """Every loop of Lightning that trains nothing evaluates it as torch's cross entropy."""
    criterion = LastBatchLoss(4).train(training)
    modes = []

    class Outside(Net):
        def test_step(self, batch, batch_idx):
            modes.append(self.criterion.training)

        validation_step = predict_step = test_step

    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[LastBatchCallback(criterion)],
    )  # fmt: skip
    for loop in (trainer.test, trainer.validate, trainer.predict):
        loop(Outside(criterion), EvalLoader(TEST, 32))
        assert criterion.training is training
    assert modes and not any(modes)


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
    for many in (3, 0.5):
        with pytest.raises(ValueError, match=f"overfit_batches={many} trains on the same batches in every epoch"):
            fit(tmp_path, Net(), LOADERS["resident"](), overfit_batches=many)
    with pytest.raises(ValueError, match="made as rank 0 of 2, but this process is rank 0 of 1"):
        fit(tmp_path, Net(), ResidentLoader(TRAIN, 16, rank=0, world_size=2))


def test_lightning_does_not_replace_the_sampler_in_silence():
    """On several ranks it would, if the sampler were one of torch's."""
    from lightning.pytorch.utilities.data import _dataloader_init_kwargs_resolve_sampler
    from torch.utils.data import DistributedSampler

    loader = torch_loader()
    with pytest.raises(TypeError, match=r"use_distributed_sampler=False"):
        _dataloader_init_kwargs_resolve_sampler(loader, DistributedSampler(loader.dataset, 2, 0))


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
        settings = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore,error:LogitBuffer"}  # no rank meets another's rows
        python(script, tmp_path, "resident", *checkpoint, cwd=tmp_path, **settings)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed"))
    assert torch.equal(whole, resumed)
