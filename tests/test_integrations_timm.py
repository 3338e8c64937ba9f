"""LastBatchTask with timm's own tasks, checkpoints and EMA; timm's own train script with overlapping batches."""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import logging
import os
import re
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import ROOT, python
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

from timm.data import Mixup  # noqa: E402
from timm.models import create_model  # noqa: E402
from timm.task import LogitDistillationTask, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

from dlb_fast.integrations.timm import LastBatchTask, _Script  # noqa: E402
from dlb_fast.integrations.timm import main as run_script  # noqa: E402

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


ARGS = {
    "jsd_loss": False, "bce_loss": False, "kd_model_name": None, "aug_splits": 0, "aug_repeats": 0,
    "cutmix_minmax": None, "naflex_loader": False, "train_img_sizes": None, "train_batches_per_epoch": None,
    "epoch_repeats": 0.0, "num_classes": 4, "smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0, "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0, "prefetcher": True, "batch_size": 16,
    "grad_accum_steps": 1, "log_interval": 50,
}  # fmt: skip
EPOCHS, STEPS = 3, 7


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()


def train(args, amp=False, **criterion):
    """As timm's train script; returns the task, its batches and the weights that a plain loop gives."""
    torch.manual_seed(0)
    args = argparse.Namespace(**{**ARGS, **args})
    net = flat()
    plain = copy.deepcopy(net)
    task = LastBatchTask(net, LastBatchLoss(4, alpha=2.0, **criterion), verbose=True, args=args)
    loader = task.batches(ResidentLoader(DATA, 16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    kept, results = [], []
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and loader.mixup_enabled:
            raise AssertionError("timm's own mixup is on")
        for step, (images, targets) in enumerate(loader):
            kept.append(loader._batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                result = task(images.double(), targets)
            results.append({name: result[name].detach().clone() for name in ("loss", "task_loss", "kd_loss")})
            rest = STEPS % args.grad_accum_steps
            last = rest and step >= STEPS - rest
            (result["loss"] / (rest if last else args.grad_accum_steps)).backward()
            if (step + 1) % args.grad_accum_steps == 0 or step == STEPS - 1:
                optimizer.step()
                optimizer.zero_grad()
    return task, kept, results, by_hand(kept, plain, args, amp)


def by_hand(batches, net, args, amp):
    """In plain torch and float64, the mixed labels as probabilities."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stored = None
    for number, batch in enumerate(batches):
        step, accumulated = number % STEPS, args.grad_accum_steps
        if step >= STEPS - STEPS % accumulated:
            accumulated = STEPS % accumulated
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            z = net(batch.images.double()).float() if amp else net(batch.images.double())
        target = F.one_hot(batch.targets, 4).to(z)
        if batch.lam is not None:
            share = batch.lam.to(z)[:, None]
            target = share * target + (1 - share) * F.one_hot(batch.target_b, 4)
        loss = F.cross_entropy(z, target, label_smoothing=args.smoothing)
        if stored is not None:
            teacher, student = F.softmax(stored / 3, 1), F.log_softmax(z[: len(stored)] / 3, 1)
            loss = loss + 2 * 9 * F.kl_div(student, teacher, reduction="batchmean")
        stored = z[batch.num_old :].detach()
        (loss / accumulated).backward()
        if (step + 1) % args.grad_accum_steps == 0 or step == STEPS - 1:
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([value.flatten() for value in net.state_dict().values()])


HONOURED = {
    "as the script has it": {},
    "no smoothing": {"smoothing": 0.0},
    "accumulation": {"grad_accum_steps": 3},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both, per row": {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "elem"},
    "some batches": {"mixup": 0.8, "mixup_prob": 0.5},
    "until an epoch": {"mixup": 0.8, "mixup_off_epoch": 1},
    "autocast": {"amp": True},
}


@pytest.mark.parametrize("case", HONOURED)
def test_weights_are_those_of_a_plain_loop_and_the_teacher_saw_the_same_mixture(case):
    args = dict(HONOURED[case])
    task, kept, results, want = train(args, amp=args.pop("amp", False))
    got = torch.cat([value.flatten() for value in task.get_trainable_module().state_dict().values()])
    assert (got - want).abs().max() < 1e-6  # lam is float32
    assert task.criterion.label_smoothing == args.get("smoothing", 0.1) and task.criterion.buffer.mismatched == 0
    assert max(result["kd_loss"] for result in results) > 0
    if not args.get("mixup") and not args.get("cutmix"):
        return
    # ResidentLoader shows the pixels as they are, so both mixtures of a sample are the same image
    for before, now in itertools.pairwise(kept):
        assert torch.equal(before.new, now.old)
        if before.lam is not None and now.lam is not None:
            assert torch.equal(before.lam[before.num_old :], now.lam[: now.num_old])
            assert torch.equal(before.target_b[before.num_old :], now.target_b[: now.num_old])
    raw = DATA.images.float() / 255
    mixed = [not torch.allclose(batch.new, raw[batch.ids[batch.num_old :]]) for batch in kept]
    off = args.get("mixup_off_epoch") or EPOCHS
    assert any(mixed[: off * STEPS]) and not any(mixed[off * STEPS :])
    assert all(mixed[: off * STEPS]) or "mixup_prob" in args or "cutmix" in args


def test_a_batch_that_was_mixed_behind_the_task_is_refused():
    task = LastBatchTask(flat(), LastBatchLoss(4), verbose=False)
    mixup = Mixup(mixup_alpha=0.8, num_classes=4)
    for images, targets in task.batches(ResidentLoader(DATA, 16)):
        mixed, soft = mixup(images.clone(), targets)
        with pytest.raises(
            ValueError, match=r"got a target \(\d+, 4\) of torch.float32, .*teacher of a row saw another"
        ):
            task(mixed.double(), soft)
        task(images.double(), targets)


def test_the_terms_are_logged_where_timm_logs(caplog):
    with caplog.at_level(logging.INFO, logger="dlb_fast.integrations.timm"):
        _, _, results, _ = train({"grad_accum_steps": 2, "log_interval": 2})
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("integrations.timm")]
    # updates 0 and 2 of an epoch of 4, and its last batch
    assert [line.split("]")[0] for line in lines[:3]] == ["Train: 0 [   2/7", "Train: 0 [   6/7", "Train: 0 [   7/7"]
    assert len(lines) == 3 * EPOCHS
    for epoch in range(EPOCHS):
        part = results[epoch * STEPS :][:STEPS]
        ce, kd = (sum(result[name].item() for result in part) / STEPS for name in ("task_loss", "kd_loss"))
        assert lines[3 * epoch + 2].endswith(f"Cross entropy: {ce:#.3g}  Last batch: {kd:#.3g}")


REFUSED = {
    "--jsd-loss True has no effect here": {"jsd_loss": True},
    "--bce-loss True has no effect here": {"bce_loss": True},
    "--kd-model-name resnet50 has no effect": {"kd_model_name": "resnet50"},
    "--aug-splits 3 has no effect": {"aug_splits": 3},
    "--aug-repeats 3.0 has no effect": {"aug_repeats": 3.0},
    r"--cutmix-minmax \[0.2, 0.8\] has no effect": {"cutmix_minmax": [0.2, 0.8]},
    "--naflex-loader True has no effect": {"naflex_loader": True},
    r"--train-img-sizes \[128, 224\] has no effect": {"train_img_sizes": [128, 224]},
    "--train-batches-per-epoch 10 has no effect": {"train_batches_per_epoch": 10},
    "--epoch-repeats 2.0 has no effect": {"epoch_repeats": 2.0},
    "--num-classes is 10, the criterion has 4": {"num_classes": 10},
    "mode must be one of batch, elem, got 'pair'": {"mixup": 0.2, "mixup_mode": "pair"},
    "without the prefetcher timm mixes every batch once more": {"cutmix": 1.0, "prefetcher": False},
    "have 16 rows and --batch-size is 128": {"batch_size": 128},
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_of_the_script_that_cannot_be_honoured_are_refused(message):
    with pytest.raises(ValueError, match=message):
        train(REFUSED[message])


def test_refusals():
    with pytest.raises(ValueError, match=r"--smoothing is 0.1 and criterion.label_smoothing 0.2"):
        train({}, label_smoothing=0.2)
    task = LastBatchTask(flat(), LastBatchLoss(4), verbose=False, args=argparse.Namespace(**ARGS))
    with pytest.raises(ValueError, match=r"train on loader_train = task.batches\(loader\)"):
        task(torch.zeros(4, 3, 8, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="made as rank 1 of 2, but this process is rank 0 of 1"):
        task.batches(ResidentLoader(DATA, 16, rank=1, world_size=2))
    with pytest.raises(TypeError, match="criterion must be a LastBatchLoss, got CrossEntropyLoss"):
        LastBatchTask(model(), nn.CrossEntropyLoss())
    task = LastBatchTask(model(), LastBatchLoss(4), verbose=False)
    sampler = OverlapBatchSampler(DATA, 16)
    with pytest.raises(TypeError, match="expected a loader of Batch, got list"):
        next(iter(task.batches(DataLoader(DATA, batch_sampler=sampler))))
    next(iter(task.batches(ResidentLoader(DATA, 16))))
    with pytest.raises(ValueError, match="got a target of 3 rows, expected 8"):
        task(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long))


# timm's own script is in its repository only: that of DLB_FAST_TIMM_TRAIN, or this one, downloaded.
STAND_IN = ROOT / "tests" / "timm_script.py"
OWN = "https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.28/train.py"
SHA256 = "1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6"
TINY = """
    --model test_resnet --num-classes 10 --input-size 3 32 32 --device cpu --workers 1 -b 32 --opt adamw --lr 5e-3
    --warmup-epochs 0 --hflip 0 --log-interval 100 --experiment run
"""
TIMMS = """
    --aa rand-m3-mstd0.5-inc1 --reprob 0.1 --mixup 0.1 --model-ema --model-ema-decay 0.9
"""


def words(options, digits, output):
    return [*options.split(), "--data-dir", str(digits), "--output", str(output)]


@pytest.fixture(scope="module", params=["stand-in", "timm's own"])
def script(request, tmp_path_factory):
    if request.param == "stand-in":
        return STAND_IN
    if given := os.environ.get("DLB_FAST_TIMM_TRAIN"):
        return Path(given)
    try:
        with urllib.request.urlopen(OWN, timeout=10) as answer:
            text = answer.read()
    except OSError as error:
        pytest.skip(f"timm's train.py cannot be had ({error}); DLB_FAST_TIMM_TRAIN=PATH names a copy")
    assert hashlib.sha256(text).hexdigest() == SHA256
    path = tmp_path_factory.mktemp("timm") / "train.py"
    path.write_bytes(text)
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    if reason := reason_against("sklearn"):
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("digits")
    python("examples/digits_folder.py", made, 300)
    return made


@pytest.fixture
def started(monkeypatch):
    """Run a script in this process; returns what took its names over."""

    def start(path, *arguments):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", [*sys.argv])
        taken = _Script(str(path))
        taken.run([str(argument) for argument in arguments])
        return taken

    return start


def test_timms_script_learns_with_its_own_augmentation_and_resumes(script, digits, tmp_path, started):
    steps, options = 15, words(TINY + TIMMS, digits, tmp_path)
    first = started(script, *options, "--epochs", 3)
    buffer = first.criterion.buffer
    assert (buffer.taught, buffer.mismatched) == ((3 * steps - 1) * 16, 0)  # the first batch has no teacher
    newest = tmp_path / "run" / "last.pth.tar"
    assert torch.load(newest, weights_only=False)["metric"] > 20  # per cent; chance: 10
    then = started(script, *options, "--epochs", 4, "--resume", newest)
    assert then.criterion.buffer.taught - buffer.taught in (0, steps * 16) and then.criterion.buffer.mismatched == 0
    # Both views of a sample are there, normalised, and timm's augmentation made them different.
    (before, _), (after, _) = itertools.islice(then.batches, 2)
    ids = then.batches._batch.ids
    assert len(after) == 32 and before.shape[1:] == (3, 32, 32) and before.min() < -0.5 < 0.5 < after.max()
    assert not torch.equal(before[16:], after[:16]) and len(set(ids.tolist())) == 32


def test_timms_script_on_two_ranks(script, digits, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dlb_fast.integrations.timm")
    options = words(TINY + "--epochs 1 --grad-accum-steps 2 --amp --amp-dtype bfloat16", digits, tmp_path)
    said = python(*launch, script, *options, PYTHONWARNINGS="ignore")
    # nan passes: in bfloat16 on the CPU logits become NaN now and then, with torch's cross entropy too.
    shown = re.search(r"Train: 0 \[   7/7\]  Cross entropy: \S+  Last batch: (\S+)", said.stdout + said.stderr)
    assert shown is not None and shown[1] != "0.00", said.stderr
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["task_state"]
    assert state["loader"]["world_size"] == 2 and state["criterion"]["_extra_state"].numel() > 16 * 10 * 2  # bfloat16


def test_the_script_has_the_options_of_the_loss(digits, tmp_path, started):
    own = "--epochs 0 --dlb-alpha 0.5 --dlb-temperature 4 --smoothing 0.2 --no-prefetcher"
    taken = started(STAND_IN, *words(TINY + own, digits, tmp_path))
    criterion = taken.criterion
    assert (criterion.alpha, criterion.temperature, criterion.label_smoothing) == (0.5, 4.0, 0.2)
    images, labels = next(iter(taken.batches))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and len(images) == 16


SCRIPT_REFUSED = {
    "--aug-repeats 3 has no effect here": "--aug-repeats 3",
    "--jsd-loss True has no effect here": "--jsd-loss",
    "batch_size must be even": "-b 31",
    "need 256 .* samples, got 240": "-b 512",
    "mode must be one of batch, elem, got 'pair'": "--mixup 0.2 --mixup-mode pair",
    "leave out --no-prefetcher": "--mixup 0.2 --no-prefetcher",
}


@pytest.mark.parametrize("message", SCRIPT_REFUSED)
def test_the_script_says_in_a_sentence_what_it_refuses(digits, tmp_path, monkeypatch, message):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run_script([str(STAND_IN), *words(TINY + SCRIPT_REFUSED[message], digits, tmp_path)])


def test_what_is_no_script_of_timm_and_losses_and_data_that_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="usage: python -m dlb_fast.integrations.timm TRAIN.PY ARGS"):
        run_script([])
    with pytest.raises(SystemExit, match="error: .* is not a file; timm's train.py is in its repository"):
        run_script([str(tmp_path / "train.py")])
    (tmp_path / "other.py").write_text("def main(): pass")
    with pytest.raises(SystemExit, match="has no parser, create_loader, ClassificationTask, which this takes over"):
        run_script([str(tmp_path / "other.py")])
    taken = _Script(str(STAND_IN))
    taken.args, taken.criterion = argparse.Namespace(**ARGS, dataset="wds/x"), LastBatchLoss(4)
    for loss in (nn.BCEWithLogitsLoss(), nn.CrossEntropyLoss(weight=torch.ones(4))):
        with pytest.raises(ValueError, match="LastBatchLoss replaces the unweighted cross entropy only"):
            taken.create_task(flat(), loss)
    with pytest.raises(TypeError, match=r"--dataset wds/x \(Stream\) is read in its own order"):
        taken.create_loader(type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": None})(), is_training=True)
    with pytest.raises(TypeError, match="cannot use collate_fn"):
        taken.create_loader(DATA, is_training=True, collate_fn=list)
