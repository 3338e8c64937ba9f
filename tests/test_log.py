"""Logs of a run: metric files, console, and trackers, none of which can end a run."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
from builders import train, wait_for

from dlb_fast import cli
from dlb_fast.presets import load_preset
from dlb_fast.train import log as logs
from dlb_fast.train.config import TrainConfig, from_dict, override
from dlb_fast.train.flags import parse_flags
from dlb_fast.train.log import COLUMNS, RunLog

ROW = {"step": 3, "epoch": 1.0, "images_seen": 12, "lr": 0.1, "loss": 0.5, "ce": math.nan, "test_top1": 0.25}
SCORES = {"test_top1": 0.75, "test_count": 40, "test_calibration": {"share": [1.0]}}
SPEED = {"loss": 0.5, "lr": 0.1, "images_per_second": 1234.0, "data_wait": 0.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_logs_are_strict_json_and_plain_csv(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.progress(ROW)
    log.result(ROW)
    step, result = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert step["kind"] == "step" and result["kind"] == "eval" and result["ce"] is None
    head, line = (tmp_path / "metrics.csv").read_text().splitlines()
    cells = dict(zip(head.split(","), line.split(","), strict=True))
    assert cells["test_top1"] == "0.25" and cells["ce"] == "" and tuple(head.split(",")) == COLUMNS
    assert "test 25.00 %" in capsys.readouterr().err


def test_rewind_cuts_the_files_back(tmp_path):
    log = RunLog(tmp_path, quiet=True)
    log.result(ROW)
    positions = log.positions()
    log.result(ROW)
    log.progress(ROW)
    log.rewind(positions)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    log.rewind({})
    assert (tmp_path / "metrics.csv").read_text() == ""


def test_a_terminal_gets_a_bar(tmp_path):
    log = RunLog(tmp_path, stream=Terminal())
    log.start(step=0, total=4)
    log.tick(1)
    log.progress({"step": 1, **SPEED})
    log.result(ROW)
    log.close()
    said = log.stream.getvalue()
    assert "1/4" in said and "images/s 1234  waiting for data 25 %" in said and "test 25.00 %" in said


def test_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock[0])
    log = RunLog(tmp_path, stream=io.StringIO())
    log.start(step=0, total=90, per_epoch=7.5)
    for step in range(1, 10):
        clock[0] += 1000 if step == 1 else 4  # the first step compiles
        if step % 5 == 0:
            log.progress({"step": step, **SPEED})
        log.tick(step)
    lines = log.stream.getvalue().splitlines()
    assert lines == [
        "step 1/90  epoch 1/12",
        "step 4/90  epoch 1/12 (0:14 left)  run 5:44 left",
        "step 7/90  epoch 1/12 (0:02 left)  run 5:32 left  loss 0.5000  lr 0.1  images/s 1234  waiting for data 25 %",
    ]
    assert "\r" not in log.stream.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")])
def test_a_time_left_is_read_at_a_glance(seconds, shown):
    assert logs._clock(seconds) == shown


# --- trackers


def started(folder, name, step=0):
    log = RunLog(folder, stream=io.StringIO(), trackers=[name], config={"optim": {"lr": 0.1}})
    log.start(step=step, total=8)
    return log


def killed_and_resumed(folder, name):
    """Points at steps 2, 4 and 6 with loss 1; killed, and resumed from step 4 with loss 2."""
    log = started(folder, name)
    for step in (2, 4, 6):
        log.progress({"step": step, "loss": 1.0})
    if name != "tensorboard":  # the services' own processes would live on
        log.close()
    log = started(folder, name, step=4)
    for step in (6, 8):
        log.progress({"step": step, "loss": 2.0})
    log.close()
    assert "failed" not in log.stream.getvalue()


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
    log = started(tmp_path, "tensorboard")
    row = {"step": 2, "epoch": 0.5, "lr": 0.1, "ce": None, "lb": math.nan, "train_top1": 0.25}
    log.progress(row)
    log.result({**row, **SCORES})  # an evaluation at a log point: the same step, more names
    log.close()
    found = points(tmp_path)
    assert found[("test/top1", 2)] == 0.75 and found[("train/top1", 2)] == 0.25 and found[("train/lr", 2)] > 0.09
    assert math.isnan(found[("train/lb", 2)]) and ("train/ce", 2) not in found
    assert not any("calibration" in tag for tag, _ in found)


def test_tensorboard_purges_the_steps_that_a_resume_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    killed_and_resumed(tmp_path, "tensorboard")
    losses = {step: value for (tag, step), value in points(tmp_path).items() if tag == "train/loss"}
    assert losses == {2: 1.0, 4: 1.0, 6: 2.0, 8: 2.0}


def test_trackio_continues_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    trackio = pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    killed_and_resumed(tmp_path / "run", "trackio")
    (run,) = list(trackio.Api().runs("dlb_fast"))
    from trackio.sqlite_storage import SQLiteStorage

    stored = SQLiteStorage.get_logs("dlb_fast", run.name)
    assert {row["step"]: row["train/loss"] for row in stored} == {2: 1.0, 4: 1.0, 6: 2.0, 8: 2.0}


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


def test_wandb_continues_a_run_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    killed_and_resumed(tmp_path / "run", "wandb")
    assert wandb.run is None
    want = [(2, 1.0), (4, 1.0), (6, 1.0), (6, 2.0), (8, 2.0)]  # two files of one run; the server drops the second 6
    wait_for(lambda: offline_history(tmp_path / "run/wandb") == want, "W&B's own process to write its file")
    files = list((tmp_path / "run/wandb").glob("offline-run-*"))
    run_id = (tmp_path / "run/tracker_id").read_text()
    assert len(files) == 2 and all(file.name.endswith(run_id) for file in files)


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(method, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def fail(*arguments):
        raise ConnectionError(f"no network in {method}")

    monkeypatch.setattr(logs.TensorBoard, method, fail)
    config = override(load_preset("digits"), per_class=4, batch_size=20, epochs=2, log_every=1)
    train(override(config, trackers=("tensorboard",)), tmp_path / "r")
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard failed") == 1 and f"ConnectionError: no network in {method}" in said
    assert json.loads((tmp_path / "r/result.json").read_text())["step"] == 8


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_or_broken_library_is_refused_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    flags = ["train", "--preset", "digits", "--trackers", name, "--out", str(tmp_path / "r")]
    assert cli.main(flags) == 2
    said = capsys.readouterr().err
    assert f"tracker {name} cannot be used" in said and f"pip install {name}" in said
    assert not (tmp_path / "r").exists()


def test_names_of_trackers():
    assert from_dict({"train": {"trackers": ["trackio"]}}).train.trackers == ("trackio",)
    flags = parse_flags(TrainConfig, TrainConfig(), ["--trackers", "trackio", "wandb"], "test")
    assert flags.trackers == ("trackio", "wandb")
    for wrong in (("mlflow",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match="trackers must be distinct names of tensorboard, trackio, wandb"):
            TrainConfig(trackers=wrong)
    with pytest.raises(ValueError, match="need a run folder"):
        RunLog(None, trackers=("tensorboard",))
    assert set(logs.TRACKERS) == {"tensorboard", "trackio", "wandb"}
