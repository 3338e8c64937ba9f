"""LastBatchTask with timm's own tasks, checkpoints and EMA."""

from __future__ import annotations

import argparse

import pytest
import torch
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader

from dlb_fast import LastBatchLoss
from dlb_fast.data import (
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    collate_overlap,
    synthetic,
)

if REASON := reason_against("timm.task"):
    pytest.skip(REASON, allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from timm.models import create_model  # noqa: E402
from timm.task import LogitDistillationTask, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

from dlb_fast.integrations.timm import LastBatchTask  # noqa: E402

DATA = synthetic("train", length=56, num_classes=4, size=8)


def model():
    return create_model("test_resnet", num_classes=4, in_chans=3)


def run(folder, epochs, *, loader=ResidentLoader, resume="", accumulate=1, **options):
    torch.manual_seed(0)
    task = LastBatchTask(model(), LastBatchLoss(4), verbose=False)
    batches = task.batches(loader(DATA, 16, **options))
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    start = resume_task_checkpoint(task, resume, optimizer, log_info=False) if resume else 0
    task.setup_ema(decay=0.9)
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, args=argparse.Namespace(model="test_resnet"), task=task,
        checkpoint_dir=folder, recovery_dir=folder,
    )  # fmt: skip
    for epoch in range(start, epochs):
        batches.batch_sampler.set_epoch(epoch)  # as train.py announces it
        task.get_trainable_module().train()
        for step, (images, targets) in enumerate(batches):
            result = task(images, targets)
            loss = result["loss"]
            if accumulate > 1:
                loss /= accumulate  # in place, as train.py does
            loss.backward()
            if (step + 1) % accumulate == 0 or step + 1 == len(batches):
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()
        saver.save_checkpoint(epoch, metric=float(epoch))
    assert task.criterion.buffer.mismatched == 0
    return task


def weights(task):
    return torch.cat([value.flatten().float() for value in task.get_trainable_module().state_dict().values()])


def torch_loader(data, rows):
    data = IndexedDataset(data, lambda image, rng: image.float() / 255)
    return DataLoader(data, batch_sampler=OverlapBatchSampler(data, rows), collate_fn=collate_overlap, num_workers=2)


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (ResidentLoader, {}),
        (OverlapLoader, {"num_threads": 1}),
        (torch_loader, {}),
        (ResidentLoader, {"accumulate": 2}),
    ],
    ids=["resident", "overlap", "DataLoader with workers", "accumulation"],
)
def test_timms_checkpoint_continues_bit_for_bit(tmp_path, loader, options):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole", 3, loader=loader, **options)
    run(tmp_path / "stopped", 2, loader=loader, **options)
    newest = str(tmp_path / "stopped" / "last.pth.tar")
    resumed = run(tmp_path / "stopped", 3, loader=loader, resume=newest, **options)
    assert torch.equal(weights(whole), weights(resumed))


def test_the_result_has_the_keys_of_timms_distillation():
    images, targets = torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,))
    theirs = LogitDistillationTask(model(), model(), nn.CrossEntropyLoss(), temperature=3.0, verbose=False)
    ours = LastBatchTask(model(), LastBatchLoss(4, alpha=0.5), verbose=False)
    first = ours(images[:2], targets[:2])
    result = ours(images, targets)
    assert set(result) == set(theirs(images, targets))
    assert first["kd_loss"] == 0 and result["kd_loss"] > 0
    assert torch.allclose(result["loss"], result["task_loss"] + 0.5 * result["kd_loss"])
    assert not result["kd_loss"].requires_grad


def test_a_model_in_eval_mode_gets_plain_cross_entropy():
    task = LastBatchTask(model(), LastBatchLoss(4), verbose=False)
    images, targets = torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,))
    task(images, targets)
    before = task.get_task_state()["criterion"]["_extra_state"]
    task.trainable_module.eval()
    result = task(images, targets)
    assert torch.allclose(result["loss"], nn.functional.cross_entropy(result["output"], targets))
    assert torch.equal(before, task.get_task_state()["criterion"]["_extra_state"])
    assert task.get_task_state(ema=True) == {}


def test_refusals():
    with pytest.raises(TypeError, match="criterion must be a LastBatchLoss, got CrossEntropyLoss"):
        LastBatchTask(model(), nn.CrossEntropyLoss())
    task = LastBatchTask(model(), LastBatchLoss(4), verbose=False)
    sampler = OverlapBatchSampler(DATA, 16)
    with pytest.raises(TypeError, match="expected a loader of Batch, got list"):
        next(iter(task.batches(DataLoader(DATA, batch_sampler=sampler))))
    next(iter(task.batches(ResidentLoader(DATA, 16))))
    with pytest.raises(ValueError, match="got a target of 3 rows, expected 8"):
        task(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long))
