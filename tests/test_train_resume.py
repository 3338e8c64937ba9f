"""Nothing is lost: an interrupted run continues to bit-identical weights and logs; broken files are named."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import (
    assert_same,
    assert_same_run,
    environment,
    exported,
    last_checkpoint,
    metrics_rows,
    train,
    train_stopped,
    wait_for,
)
from torch import nn

from dlb_fast import cli
from dlb_fast.buffer import LogitBuffer, unpack_state
from dlb_fast.data import Batch
from dlb_fast.presets import load_preset
from dlb_fast.train import checkpoint, log, run
from dlb_fast.train.checkpoint import CheckpointError
from dlb_fast.train.config import override, to_dict
from dlb_fast.train.log import RunLog
from dlb_fast.train.loop import Trainer, TrainingDiverged
from dlb_fast.train.run import RunFolder, newest_run

torch.set_num_threads(1)

# 40 images, 10 drawn per step: 4 steps per epoch, 12 in all; an evaluation and a checkpoint every epoch
SMALL = override(load_preset("digits"), per_class=4, batch_size=20, epochs=3, eval_every=None, log_every=1, seed=7)
VARIANTS = {
    "dlb": {},
    "two_pass": {"forward": "two_pass"},
    "ce": {"method": "ce", "batch_size": 10},
    "everything": {"ema": 0.9, "amp": "bf16", "clip_grad": 1.0, "optimizer": "adamw", "decay_norm_and_bias": False},
    "airbench": {"model": "airbench_small", "method": "ce", "batch_size": 10, "amp": "bf16", "channels_last": True},
    "fp16-accumulated": {"amp": "fp16", "accumulate": 2, "epochs": 6},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"whole-{name}")
            train(override(SMALL, **VARIANTS[name]), made[name])
        return made[name]

    return get


# each variant in the middle of an epoch; the other places for two of them
STOPS = [(name, 6) for name in VARIANTS] + [("dlb", 1), ("dlb", 8), ("fp16-accumulated", 8)]


@pytest.mark.parametrize(("name", "step"), STOPS)
def test_stopped_and_resumed_equals_uninterrupted(name, step, whole, tmp_path):
    config = override(SMALL, **VARIANTS[name])
    train_stopped(config, tmp_path, step)
    assert not (tmp_path / "result.json").exists()
    assert train(config, tmp_path, resume=True)["step"] == 12
    assert_same_run(whole(name), tmp_path)
    assert exported(whole(name)) == exported(tmp_path)


def test_signals_are_given_back(tmp_path):
    def mine(*_):
        raise AssertionError("nobody sent a signal")

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        train(override(SMALL, epochs=1), tmp_path)
        assert all(signal.getsignal(number) is mine for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_teacher_is_part_of_the_state(whole):
    """Forgetting the buffer's logits would go unnoticed by every other part of the checkpoint."""
    saved = unpack_state(last_checkpoint(whole("dlb"))["criterion"]["_extra_state"])
    assert saved["logits"].shape == (10, 10) and saved["logits"].abs().sum() > 0 and len(saved["ids"]) == 10


def test_the_buffers_of_two_ranks_as_one():
    """The rows are joined in rank order and their counters summed; batches in a row are counted anew."""
    buffers = [LogitBuffer(3, 2), LogitBuffer(3, 2)]
    for rank, buffer in enumerate(buffers):
        for batch in range(3):
            buffer.update(torch.full((4 if batch else 2, 3), float(rank)), torch.arange(4 if batch else 2) + 10 * batch)
    joined = checkpoint._divide_buffer([buffer.state_dict() for buffer in buffers], 0, 1)
    loaded = LogitBuffer(3, 4)
    assert loaded.load_state_dict(joined) and loaded.logits[:, 0].tolist() == [0, 0, 1, 1]
    assert (loaded.mismatched, loaded.untaught) == (8, 0) and buffers[0].untaught == 2


def test_kill_minus_nine_and_resume(tmp_path, monkeypatch, capsys):
    """A real process, killed without warning, continued by the bare command."""
    config = override(SMALL, checkpoint_every=3, epochs=20)
    expected = tmp_path / "expected"
    train(config, expected)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "dlb_fast", "train", "--config", "c.yaml", "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoints/step-0000000[3-9]*.pt")), "a checkpoint", process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    (run,) = (tmp_path / "runs").iterdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume"]) == 0
    assert "continuing from" in capsys.readouterr().err
    assert_same_run(expected, run)


def interrupted(path):
    """A run stopped at step 11, with an older checkpoint beside the newest."""
    train_stopped(SMALL, path, 11)
    found = sorted((path / "checkpoints").glob("step-*.pt"))
    assert [p.name for p in found] == ["step-000000008.pt", "step-000000011.pt"]
    return found


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_bit(path):
    """One bit of a tensor's numbers: the file's structure stays whole."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda r: r.file_size)
        payload = archive.read(record)
    data = path.read_bytes()
    place = data.index(payload) + len(payload) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    torch.save({"state_dict": {}}, path)


class Evil:
    def __reduce__(self):
        return (os.putenv, ("EVIL", "1"))


def with_code(path):
    torch.save({"format": checkpoint.FORMAT, "version": 1, "x": Evil()}, path)


def newer(path):
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)


def other_model(path):
    saved = checkpoint.read_checkpoint(path)
    saved["model"] = {name: value[:1] if value.dim() else value for name, value in saved["model"].items()}
    checkpoint.save_checkpoint(path.parent, without_marks(saved))


def without_marks(saved):
    return {name: value for name, value in saved.items() if name not in ("format", "version")}


def changed(name, change):
    """A checkpoint with the right mark, one part of which `change(state)` has changed behind the writer's back."""

    def damage(path):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    damage.__name__ = name
    return damage


def written(name, change):
    """The same, as if it had been written like this."""

    def damage(path):
        saved = without_marks(checkpoint.read_checkpoint(path))
        change(saved)
        checkpoint.save_checkpoint(path.parent, {"step": 11, **saved})

    damage.__name__ = name
    return damage


def with_nan(state):
    next(iter(state["model"].values())).view(-1)[0] = float("nan")


def with_infinity(state):
    list(state["model"].values())[-1].fill_(float("inf"))


BROKEN = [
    (changed("marks alone", lambda s: [s.pop(k) for k in list(s) if k not in ("format", "version")]), "incomplete"),
    (changed("no model", lambda s: s.pop("model")), "incomplete or changed: state"),
    (changed("empty optimiser", lambda s: s["optimizer"]["state"].clear()), r"state.optimizer.state is not what"),
    (changed("half an optimiser", lambda s: s["optimizer"]["state"].pop(1)), r"state.optimizer.state is not what"),
    (changed("cut momentum", lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1))), "state.0"),
    (changed("text for a number", lambda s: s.update(epoch="2")), "state.epoch is not what"),
    (changed("no rows", lambda s: s["criterion"].clear()), "state.criterion is not what"),
    (changed("no list of contents", lambda s: s.pop("contents")), "its list of contents"),
    (written("no scaler", lambda s: s.pop("scaler")), "cannot be loaded .KeyError"),
    (written("a list for a model", lambda s: s.update(model=[1])), "cannot be loaded .AttributeError"),
    (written("cut generator", lambda s: s["rng"].update(torch=torch.zeros(3, dtype=torch.uint8))), "cannot be loaded"),
    (written("NaN", with_nan), "NaN or infinite values in "),
    (written("infinity", with_infinity), "NaN or infinite values in "),
    (
        written("NaN moments", lambda s: s["optimizer"]["state"][0]["momentum_buffer"].fill_(float("nan"))),
        "NaN or infinite values in momentum_buffer of parameter 0 in the optimiser",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_broken_content_is_skipped_for_the_older_checkpoint(damage, reason, begun, tmp_path, capsys):
    folder = shutil.copytree(begun, tmp_path / "run")
    damage(folder / "checkpoints/step-000000011.pt")
    trainer = run.build_trainer(SMALL, folder=folder, log=RunLog(folder, quiet=True))
    try:
        assert trainer.resume().name == "step-000000008.pt" and trainer.step == 8
    finally:
        trainer.loader.close()
    said = capsys.readouterr().err
    assert re.search(f"skipped a checkpoint: .*step-000000011.*{reason}", said), said
    saved = last_checkpoint_of(folder, 8)
    assert_same(trainer.model.state_dict(), saved["model"])
    assert_same(trainer.optimizer.state_dict()["state"], saved["optimizer"]["state"])


def last_checkpoint_of(folder, step):
    return checkpoint.read_checkpoint(folder / f"checkpoints/step-{step:09d}.pt")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("begun")
    interrupted(path)
    return path


def test_weights_that_turn_nan_are_not_saved(tmp_path, monkeypatch):
    """The loss of the last step before a checkpoint is finite, its gradient is not."""
    original = Trainer.optimizer_step

    def poisoned(self):
        if self.step == 7:
            next(self.model.parameters()).grad.fill_(float("nan"))
        original(self)

    monkeypatch.setattr(Trainer, "optimizer_step", poisoned)
    config = override(SMALL, eval_every=100)
    with pytest.raises(TrainingDiverged, match=r"became NaN or infinite by step 8 .*step-000000004"):
        train(override(config, checkpoint_every=4), tmp_path)
    assert last_checkpoint(tmp_path)["step"] == 4 and exported_step(tmp_path, "last") == 4
    with pytest.raises(TrainingDiverged, match="became NaN or infinite by step 8"):  # evaluated before it is saved
        train(override(config, eval_every=8), tmp_path / "evaluated")
    assert not list((tmp_path / "evaluated/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "not a readable checkpoint"),
        (flip_bit, "is damaged .checksum"),
        (empty, "not a readable checkpoint"),
        (foreign, "not written by dlb_fast"),
        (with_code, "not a readable checkpoint"),
        (newer, "format version 99"),
        (other_model, "does not fit this model"),
    ],
)
def test_a_bad_checkpoint_is_named_and_skipped(damage, reason, whole, tmp_path, capsys):
    _, newest = interrupted(tmp_path)
    damage(newest)
    quiet = damage is truncate  # what is lost is said in any case
    train(SMALL, tmp_path, resume=True, quiet=quiet)
    said = capsys.readouterr().err
    assert re.search(f"skipped a checkpoint: .*{newest.name}.*({reason})", said), said
    assert quiet or ("continuing from" in said and "step-000000008.pt" in said)
    assert_same_run(whole("dlb"), tmp_path)


def test_if_no_checkpoint_is_usable_the_run_is_not_started_over(tmp_path):
    for path in interrupted(tmp_path):
        truncate(path)
    before = metrics_rows(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used.*step-000000008"):
        train(SMALL, tmp_path, resume=True)
    assert metrics_rows(tmp_path) == before


def test_a_run_killed_before_its_first_checkpoint_starts_from_scratch(whole, tmp_path):
    RunFolder(tmp_path).create(SMALL, "torch")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    train(SMALL, tmp_path, resume=True)
    assert_same_run(whole("dlb"), tmp_path)


def test_another_number_of_classes_is_refused(tmp_path):
    train(override(SMALL, source="synthetic:40,3,8", per_class=None, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"class 3 was none and is 'class_3' here; 3 classes were, 5 are"):
        train(override(SMALL, source="synthetic:40,5,8", per_class=None), tmp_path, resume=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(whole, tmp_path):
    """The kernel refuses to let the file grow, exactly as on a full disk."""
    interrupted(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").glob("step-*.pt")}
    limit = min(map(len, before.values())) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*step-000000012.*last good.*step-000000011"):
            train(SMALL, tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints").iterdir() if p.suffix != ".safetensors"}
    assert after == before  # nothing lost, nothing half-written
    train(SMALL, tmp_path, resume=True)
    assert_same_run(whole("dlb"), tmp_path)


def test_metrics_on_a_full_disk_say_so(tmp_path, monkeypatch):
    log = RunLog(tmp_path, quiet=True)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*No space left"):
        log.progress({"step": 1})


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted_write(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, interrupted_write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 5):
        checkpoint.save_checkpoint(tmp_path, {"step": step}, keep=3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step-00000000{k}.pt" for k in (2, 3, 4)]


def poison(monkeypatch, step):
    """Give the batch of step `step` (from 1) images that are NaN."""
    original = Trainer.forward_backward

    def poisoned(self, batch):
        if self.step + 1 == step:
            batch.images = batch.images * float("nan")
        original(self, batch)

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)


def test_a_loss_that_turns_nan_stops_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, 10)
    with pytest.raises(TrainingDiverged, match=r"by step 10 \(epoch 2\).*last good checkpoint is .*step-000000008"):
        train(SMALL, tmp_path)
    assert all(torch.isfinite(v).all() for v in last_checkpoint(tmp_path)["model"].values())
    assert train(override(SMALL, nan_check=False), tmp_path / "unchecked")["step"] == 12


@pytest.mark.parametrize("stop", [None, 7], ids=["due", "signal"])
def test_no_checkpoint_is_written_after_a_nan(stop, tmp_path, monkeypatch):
    """Between two log points, where nothing else looks at the loss: at a due checkpoint, and at one after a signal."""
    poison(monkeypatch, 6)
    config = override(SMALL, log_every=100, eval_every=100, checkpoint_every=4)
    with pytest.raises(TrainingDiverged, match=r"last good checkpoint is .*step-000000004"):
        train(config, tmp_path) if stop is None else train_stopped(config, tmp_path, stop)
    assert last_checkpoint(tmp_path)["step"] == 4
    assert all(torch.isfinite(v).all() for v in last_checkpoint(tmp_path)["model"].values())


def test_the_newest_run_is_the_one_worked_on_last(tmp_path):
    with pytest.raises(ValueError, match="there is no run under"):
        newest_run(tmp_path)
    for number, name in enumerate(("b", "a", "c")):
        RunFolder(tmp_path / name).create(SMALL, "torch")
        for path in (tmp_path / name / "config.yaml", tmp_path / name / "checkpoints"):
            os.utime(path, (number, number))
    (tmp_path / "z").mkdir()  # not a run
    assert newest_run(tmp_path).path.name == "c"
    os.utime(tmp_path / "b" / "checkpoints", (9, 9))
    assert newest_run(tmp_path).path.name == "b"


def test_every_generator_is_restored():
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    np.random.standard_normal()  # leaves a cached second value
    random.gauss(0, 1)
    saved = checkpoint.get_rng_state()

    def draw():
        return torch.rand(1).item(), np.random.standard_normal(), random.gauss(0, 1), random.random()

    first = draw()
    assert draw() != first
    checkpoint.set_rng_state(saved)
    assert draw() == first


def test_a_loader_without_state_is_wound_forward(tmp_path):
    """Plain lists of batches resume too."""
    torch.manual_seed(0)
    batches = [Batch(torch.randn(4, 3), torch.randint(0, 2, (4,)), torch.arange(4), 0, 0, s) for s in range(5)]

    def trainer(folder, **settings):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))  # the dropout needs the generator's state
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(
            model, nn.CrossEntropyLoss(), sgd, batches, folder=folder, log=RunLog(folder, quiet=True), **settings
        )

    whole = trainer(tmp_path / "whole", epochs=2)
    whole.fit()
    part = trainer(tmp_path / "part", epochs=2, max_steps=7)
    part.fit()
    rest = trainer(tmp_path / "part", epochs=2)
    assert rest.resume().name == "step-000000007.pt" and (rest.epoch, rest.in_epoch) == (1, 2)
    rest.fit()
    assert torch.equal(whole.model[0].weight, rest.model[0].weight)


def test_a_used_up_loader_is_an_error_not_an_endless_loop():
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), sgd, iter([]), max_steps=2, log=RunLog(quiet=True))
    with pytest.raises(ValueError, match="no more batches at step 0 of 2"):
        trainer.fit()
    with pytest.raises(ValueError, match="give max_steps"):
        Trainer(model, nn.CrossEntropyLoss(), sgd, iter([]))


class Killed(BaseException):
    """The end of the process in the middle of a write."""


def killed_in_a_write(config, path, name, number, *, after=False, resume=False):
    """Train until write `number` (from 1) of the file `name`; it happens only `after`."""
    original, seen = checkpoint.write_atomically, []

    def write(target, writer):
        seen.append(target.name)
        ends = target.name == name and seen.count(name) == number
        if not ends or after:
            original(target, writer)
        if ends:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", write)
        patch.setattr(run, "write_atomically", write)
        patch.setattr(log, "write_atomically", write)
        with pytest.raises(Killed):
            train(config, path, resume=resume)


def exported_step(path, name):
    return checkpoint.step_of_weights(path / "checkpoints" / f"{name}.safetensors")


# 3 checkpoints, each followed by the export of `last`
WRITES = [("last.safetensors", 1), ("best.safetensors", 1), ("result.json", 1)]
WRITES += [("step-000000012.pt", 1), ("confusion.json", 3)]
WRITES = [pytest.param(*write, after, marks=pytest.mark.slow) for write in WRITES for after in (False, True)]


@pytest.mark.parametrize(("name", "number", "after"), [("last.safetensors", 3, False), *WRITES])
def test_a_run_killed_in_a_write_is_whole_after_a_resume(name, number, after, whole, tmp_path):
    killed_in_a_write(SMALL, tmp_path, name, number, after=after)
    train(SMALL, tmp_path, resume=True)
    assert_same_run(whole("dlb"), tmp_path)
    assert (whole("dlb") / "confusion.json").read_bytes() == (tmp_path / "confusion.json").read_bytes()
    for weights in ("last", "best"):
        assert exported(whole("dlb"), weights) == exported(tmp_path, weights)
    results = [json.loads((path / "result.json").read_text()) for path in (whole("dlb"), tmp_path)]
    assert results[0].keys() == results[1].keys() and all(
        results[0][key] == results[1][key] for key in ("step", "loss", "test_top1", "best_top1", "best_step")
    )


def test_the_weights_of_the_ema_are_exported_again(whole, tmp_path):
    config = override(SMALL, **VARIANTS["everything"])
    killed_in_a_write(config, tmp_path, "last.safetensors", 3)
    assert exported_step(tmp_path, "last") == 8
    train(config, tmp_path, resume=True)
    assert exported(whole("everything")) == exported(tmp_path)


def test_a_full_disk_at_the_repeated_export_is_an_error(tmp_path, monkeypatch):
    killed_in_a_write(SMALL, tmp_path, "last.safetensors", 3)

    def refuse(*args):
        raise CheckpointError("cannot write last.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", refuse)
        with pytest.raises(CheckpointError, match="cannot write last"):
            train(SMALL, tmp_path, resume=True)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("first", "writes", "rest", "said", "best"),
    [
        ({4: 0.5, 8: 0.4, 12: 0.9}, 2, {12: 0.2}, "has the weights of step 12, not those of step 4", (12, 0.2)),
        ({4: 0.5, 8: 0.9}, 2, {8: 0.3, 12: 0.2}, "", (4, 0.5)),
    ],
    ids=["lost", "made again"],
)
def test_best_weights_of_steps_that_are_undone_do_not_stay(first, writes, rest, said, best, tmp_path, capsys):
    """Killed after the export of a better network, before its checkpoint; the continuation is a worse one."""
    scores, at, original = {}, [], Trainer._evaluate

    def noting(self):
        at.append(self.step)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", noting)
        patch.setattr(run, "evaluate", lambda *_, **__: {"top1": scores[at[-1]]})
        scores.update(first)
        killed_in_a_write(SMALL, tmp_path, "best.safetensors", writes, after=True)
        scores.update(rest)
        result = train(override(SMALL, lr=0.01), tmp_path, resume=True)
    assert said in capsys.readouterr().err
    assert (result["best_step"], result["best_top1"]) == best and exported_step(tmp_path, "best") == best[0]


def test_a_longer_run_has_no_result_of_the_shorter_one(tmp_path):
    train(override(SMALL, epochs=1), tmp_path)
    killed_in_a_write(SMALL, tmp_path, "step-000000012.pt", 1, resume=True)
    assert not (tmp_path / "result.json").exists()


def test_a_killed_run_leaves_no_temporary_file_behind_for_ever(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    left = [".versions.json.7.tmp", ".config.yaml.71.tmp", "checkpoints/.best.safetensors.7.tmp", ".tracker_id.7.tmp"]
    left += [".confusion.json.7.tmp", ".report.html.7.tmp", ".report.md.7.tmp", ".curves.png.7.tmp"]
    foreign = ["checkpoints/.mine.7.tmp", ".config.yaml.tmp", "notes.7.tmp"]
    for name in left + foreign:
        (tmp_path / name).write_text("half")
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.unlock()
    assert [name for name in left + foreign if (tmp_path / name).exists()] == foreign


def test_an_emptied_config_is_not_one_of_defaults(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(load_preset("digits"), "torch")
    assert folder.read_config() == load_preset("digits")
    folder.config.write_text("\n")
    with pytest.raises(ValueError, match="config.yaml is empty; expected the fields of a run"):
        folder.read_config()


def test_clearing_that_is_cut_short_is_done_again(tmp_path, monkeypatch):
    """Otherwise a new run would add its rows to those of the old one."""
    folder = RunFolder(tmp_path)
    folder.create(load_preset("digits"), "torch")
    for name in ("metrics.csv", "metrics.jsonl", "tracker_id"):
        (tmp_path / name).write_text("old")
    original, deleted = Path.unlink, []

    def killed(self, **options):
        if len(deleted) == 2:
            raise KeyboardInterrupt
        deleted.append(self)
        original(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert folder.exists() and not folder.has_work()
    folder.clear()
    assert not any((tmp_path / name).exists() for name in ("config.yaml", "metrics.csv", "metrics.jsonl", "tracker_id"))
