"""Experiment trackers: what they are told, that no step comes twice after a resume, and that none can end a run."""

import io
import json
import math
import sys
import time
import types

import pytest

from dlb_fast import cli
from dlb_fast.train import log as logs
from dlb_fast.train import sinks
from dlb_fast.train.config import TrainConfig, from_dict, parse_flags

ROW = {"epoch": 0.5, "lr": 0.1, "loss": 0.5, "ce": None, "lb": math.nan, "train_top1": 0.25}
SCORES = {"test_top1": 0.75, "test_count": 40, "test_calibration": {"share": [1.0]}}


class Fake:
    """A stand-in with the face of wandb and trackio: remembers, and fails when told to."""

    def __init__(self, monkeypatch, name):
        self.inits, self.rows, self.finished, self.broken = [], [], 0, set()
        module = types.ModuleType(name)
        module.init = self.init
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options):
        self.fail("init")
        self.inits.append(options)
        print("hello from a tracker")
        return self

    def log(self, values, step):
        self.fail("log")
        self.rows.append((step, dict(values)))

    def finish(self):
        self.fail("finish")
        self.finished += 1

    def fail(self, what):
        if what in self.broken:
            raise ConnectionError(f"no network in {what}")


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    fake = Fake(monkeypatch, request.param)
    fake.name = request.param
    return fake


def started(folder, names, step=0, stream=None):
    log = logs.RunLog(folder, stream=stream or io.StringIO(), trackers=names, config={"optim": {"lr": 0.1}})
    log.start(step=step, total=8)
    return log


def points(folder):
    """(tag, step) -> value of all scalars, and whether any came twice, read with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    found = [((tag, e.step), e.value) for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)]
    assert len(dict(found)) == len(found), "a step came twice"
    return dict(found)


def test_tensorboard_holds_every_number_once(tmp_path):
    pytest.importorskip("tensorboard")
    log = started(tmp_path, ["tensorboard"])
    log.progress({"step": 2, **ROW})
    log.result({"step": 2, **ROW, **SCORES})  # an evaluation at a log point: the same step, more names
    log.close()
    found = points(tmp_path)
    assert found[("test/top1", 2)] == 0.75 and found[("train/top1", 2)] == 0.25 and found[("train/lr", 2)] > 0.09
    assert math.isnan(found[("train/lb", 2)]) and ("train/ce", 2) not in found
    assert not any("calibration" in tag for tag, _ in found)


def test_tensorboard_repeats_no_step_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    log = started(tmp_path, ["tensorboard"])
    for step in (2, 4, 6):
        log.progress({"step": step, "loss": 1.0})
    del log  # killed: nothing is closed; the last checkpoint was at step 4
    log = started(tmp_path, ["tensorboard"], step=4)
    for step in (6, 8):
        log.progress({"step": step, "loss": 2.0})
    log.close()
    losses = {step: value for (tag, step), value in points(tmp_path).items() if tag == "train/loss"}
    assert losses == {2: 1.0, 4: 1.0, 6: 2.0, 8: 2.0}


def test_a_run_folder_tells_its_tracker_everything_once_over_a_resume(tmp_path, service, monkeypatch, capsys):
    """The real command, stopped in the middle by the step limit of its first half."""
    monkeypatch.setenv({"wandb": "WANDB_PROJECT", "trackio": "TRACKIO_PROJECT"}[service.name], "mine")
    flags = ["--data", "synthetic:40,2,8", "--batch-size", "20", "--log-every", "1", "--eval-every", "2"]
    flags += ["--per-class", "None", "--label-noise", "0", "--trackers", service.name, "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags, "--max-steps", "4"]) == 0
    assert "hello" not in capsys.readouterr().out  # stdout is the command's own
    # A kill between step 4 and the next checkpoint: the run goes on from step 2.
    (tmp_path / "run/checkpoints/step-000000004.pt").unlink()
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "run"), "--max-steps", "6"]) == 0
    sent = [(step, name) for step, values in service.rows for name in values]
    assert len(set(sent)) == len(sent)
    assert [step for step, name in sent if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for step, name in sent if name == "test/top1"] == [2, 4, 6]
    first, second = service.inits
    assert service.finished == 2 and first["project"] == "mine"
    assert first["config"]["train"]["trackers"] == [service.name] and first["resume"] == "allow"
    identity = ("name", "id", "dir") if service.name == "wandb" else ("name",)
    assert all(first[key] == second[key] for key in identity) and first["name"].startswith("run")


def test_a_point_that_was_cut_in_half_is_completed(tmp_path, service):
    log = started(tmp_path, [service.name])
    log.progress({"step": 4, "loss": 1.0})  # killed before the evaluation of the same step
    log = started(tmp_path, [service.name], step=2)
    log.progress({"step": 4, "loss": 1.0})
    log.result({"step": 4, "epoch": 1.0, "loss": 1.0, **SCORES})
    new = {"test/top1", "test/count", "train/epoch"}
    assert [(s, set(v)) for s, v in service.rows] == [(4, {"train/loss"}), (4, new)]


def test_two_runs_of_one_name_are_two_runs_to_the_tracker(tmp_path, service):
    for parent in "ab":
        (tmp_path / parent / "run").mkdir(parents=True)
        started(tmp_path / parent / "run", [service.name])
    first, second = service.inits
    key = "id" if service.name == "wandb" else "name"
    assert first[key] != second[key]


@pytest.mark.parametrize("what", ["log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(tmp_path, service, what, capsys):
    service.broken = {what}
    flags = ["--preset", "digits", "--per-class", "4", "--batch-size", "20", "--epochs", "2", "--log-every", "1"]
    assert cli.main(["train", *flags, "--trackers", f"tensorboard,{service.name}", "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().err
    assert said.count(f"tracker {service.name} failed") == 1 and f"ConnectionError: no network in {what}" in said
    assert json.loads((tmp_path / "r/result.json").read_text())["step"] == 8
    assert ("train/loss", 8) in points(tmp_path / "r")  # the other one was not dropped with it


def test_a_full_disk_under_a_tracker_does_not_end_the_run(tmp_path, service, monkeypatch):
    log = started(tmp_path, [service.name])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks.os, "replace", full)
    log.progress({"step": 2, "loss": 1.0})
    assert "failed and is left out" in log.stream.getvalue() and "No space left" in log.stream.getvalue()


def test_a_tracker_that_cannot_start_stops_a_new_run_but_not_a_continued_one(tmp_path, service):
    service.broken = {"init"}
    with pytest.raises(sinks.TrackerError, match=rf"{service.name} cannot start: ConnectionError.*leave it out"):
        started(tmp_path, [service.name])
    log = started(tmp_path, [service.name], step=4)
    log.progress({"step": 6, "loss": 1.0})
    assert log.stream.getvalue().count("failed and is left out") == 1


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_or_broken_library_is_told_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    target = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, target, None)
    flags = ["train", "--preset", "digits", "--trackers", name, "--out", str(tmp_path / "r")]
    assert cli.main(flags) == 1
    said = capsys.readouterr().err
    assert f"tracker {name} cannot be used" in said and f"pip install {name}" in said
    assert not (tmp_path / "r").exists()
    monkeypatch.delitem(sys.modules, target)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb.py").write_text("raise RuntimeError('protobuf is too new')\n")
    if name == "wandb":
        assert cli.main(flags) == 1
        assert "RuntimeError: protobuf is too new" in capsys.readouterr().err


def test_an_unreadable_memory_of_the_trackers_begins_a_new_run(tmp_path, service):
    started(tmp_path, [service.name])
    (tmp_path / "trackers.json").write_text("{")
    log = started(tmp_path, [service.name], step=2)
    log.progress({"step": 4, "loss": 1.0})
    assert "cannot be read" in log.stream.getvalue() and service.rows == [(4, {"train/loss": 1.0})]


def test_names_of_trackers():
    assert TrainConfig(trackers=("tensorboard,wandb",)).trackers == ("tensorboard", "wandb")
    assert from_dict({"train": {"trackers": "trackio,wandb"}}).train.trackers == ("trackio", "wandb")
    assert from_dict({"train": {"trackers": ["trackio"]}}).train.trackers == ("trackio",)
    flags = parse_flags(TrainConfig, TrainConfig(), ["--trackers", "trackio", "wandb"], "test")
    assert flags.trackers == ("trackio", "wandb")
    for wrong in (("mlflow",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match="trackers must be distinct names of tensorboard, trackio, wandb"):
            TrainConfig(trackers=wrong)
    with pytest.raises(ValueError, match="need a run folder"):
        logs.RunLog(None, trackers=("tensorboard",))


def test_plain_lines_when_there_is_no_terminal(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    log = logs.RunLog(tmp_path, stream=stream)
    log.start(step=0, total=90)
    for step in range(1, 10):
        clock[0] += 4
        log.advance()
        log.progress({"step": step, "loss": 0.5, "lr": 0.1, "images_per_second": 1234.0, "data_wait": 0.25})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 3/90  loss 0.5000  lr 0.1  images/s 1234  waiting for data 25 %"
    assert len(lines) == 3 and "\r" not in stream.getvalue()


def test_a_bar_tells_throughput_and_the_wait_for_data(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log = logs.RunLog(tmp_path, stream=Terminal())
    log.start(step=0, total=4)
    log.advance()
    log.progress({"step": 1, "loss": 0.5, "lr": 0.1, "images_per_second": 1234.0, "data_wait": 0.25})
    log.close()
    assert "images/s 1234  waiting for data 25 %" in log.stream.getvalue() and "1/4" in log.stream.getvalue()


def test_the_real_trackio_continues_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    trackio = pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    for step, rows in ((0, (2, 4, 6)), (4, (6, 8))):
        log = started(tmp_path / "run", ["trackio"], step=step)
        for number in rows:
            log.progress({"step": number, "loss": float(number)})
        log.close()
    assert "failed" not in log.stream.getvalue()
    (run,) = list(trackio.Api().runs("dlb_fast"))
    from trackio.sqlite_storage import SQLiteStorage

    stored = SQLiteStorage.get_logs("dlb_fast", run.name)
    assert [(row["step"], row["train/loss"]) for row in stored] == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]


def offline_history(folder):
    """(step, loss) of every row in W&B's logs: a header, then checksum (4), length (2), kind (1), record."""
    from wandb.proto import wandb_internal_pb2

    told = []
    for path in folder.glob("offline-run-*/*.wandb"):
        data, place = path.read_bytes(), 7
        while place + 7 <= len(data):
            length = int.from_bytes(data[place + 4 : place + 6], "little")
            record = wandb_internal_pb2.Record.FromString(data[place + 7 : place + 7 + length])
            row = {item.nested_key[0]: item.value_json for item in record.history.item}
            told += [(int(row["_step"]), float(row["train/loss"]))] if row else []
            place += 7 + length
    return sorted(told)


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    keys: list[str] = []
    for step, rows in ((0, (2, 4, 6)), (4, (6, 8))):
        log = started(tmp_path / "run", ["wandb"], step=step)
        keys.append(wandb.run.id)
        for number in rows:
            log.progress({"step": number, "loss": float(number)})
        log.close()
        assert wandb.run is None and "failed" not in log.stream.getvalue()
    deadline, want = time.time() + 20, [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]
    while (told := offline_history(tmp_path / "run/wandb")) != want and time.time() < deadline:
        time.sleep(0.1)  # W&B's own process writes the file
    assert told == want
    assert keys[0] == keys[1] == json.loads((tmp_path / "run/trackers.json").read_text())["id"]
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2
