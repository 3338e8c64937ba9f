"""Comparisons: equal budgets, resumable, and a table that is the runs' own numbers. Small and short."""

import csv
import json
import signal
import statistics

import pytest
import torch

from dlb_fast import cli, report
from dlb_fast.presets import load_preset
from dlb_fast.train import compare
from dlb_fast.train.config import ScheduleConfig, override

torch.set_num_threads(1)

DEMO = ("ce", "ls", "two_view", "dlb")  # what the demo compares
FLAGS = ["--per-class", "4", "--batch-size", "20", "--epochs", "2", "--jobs", "1"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "out"
    assert cli.main(["demo", "--seeds", "2", "--out", str(path), *FLAGS]) == 0
    return path


def last_rows(path):
    rows = {}
    for method in DEMO:
        for seed in range(2):
            with open(path / f"{method}-seed{seed}" / "metrics.csv", newline="") as file:
                rows[method, seed] = list(csv.DictReader(file))
    return rows


def test_all_methods_make_the_same_steps_on_as_many_images(demo):
    rows = last_rows(demo)
    assert {row[-1]["step"] for row in rows.values()} == {"8"}
    assert len({len(row) for row in rows.values()}) == 1  # `best` picks among equally many evaluations
    seen = {method: int(row[-1]["images_seen"]) for (method, _), row in rows.items()}
    # the overlapping methods have no old half in their very first step
    assert seen == {"ce": 160, "ls": 160, "two_view": 150, "dlb": 150}


def test_the_table_is_what_the_runs_measured(demo, capsys):
    rows = last_rows(demo)
    text = (demo / "report.md").read_text()
    for method in DEMO:
        last = [100 * float(rows[method, seed][-1]["test_top1"]) for seed in range(2)]
        best = [100 * max(float(r["test_top1"]) for r in rows[method, seed]) for seed in range(2)]
        line = next(x for x in text.splitlines() if x.startswith(f"| {compare.LABELS[method]} "))
        for values in (last, best):
            assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in line
    assert (demo / "curves.png").stat().st_size > 10_000


def test_methods_differ_only_in_what_they_are_about(demo):
    """The alpha=0 control and DLB see the same batches from the same start; their KL differs."""
    rows = last_rows(demo)
    control, dlb = rows["two_view", 0], rows["dlb", 0]
    assert float(dlb[-1]["lb"]) > 0 and dlb[-1]["test_nll"] != control[-1]["test_nll"]
    configs = {m: dict(vars(report.read_run(demo / f"{m}-seed0").config.loss)) for m in ("ls", "ce")}
    assert configs["ls"].pop("label_smoothing") == 0.1 and configs["ce"].pop("label_smoothing") == 0.0
    assert configs["ls"] == configs["ce"]


def test_the_same_command_again_trains_nothing_but_writes_the_report(demo, monkeypatch, capsys):
    (demo / "report.md").unlink()
    monkeypatch.setattr(compare, "train_run", lambda *a, **k: pytest.fail("trained again"))
    assert cli.main(["demo", "--seeds", "2", "--out", str(demo), *FLAGS]) == 0
    assert "loss implementation that ran: " in capsys.readouterr().out
    assert (demo / "report.md").exists()


def test_an_interrupted_comparison_continues(tmp_path, demo, monkeypatch):
    import os

    from dlb_fast.train.loop import Trainer

    original = Trainer.optimizer_step
    steps = []

    def stopping(self):
        steps.append(1)
        if len(steps) == 13:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    arguments = ["demo", "--seeds", "1", "--methods", "ce,ls", "--out", str(tmp_path / "c"), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", stopping)
        assert cli.main(arguments) == 130
    assert len(compare.read_comparison(tmp_path / "c")) == 1
    assert cli.main(arguments) == 0
    for name in ("ce-seed0", "ls-seed0"):
        ours, theirs = ((p / name / "checkpoints" / "last.safetensors").read_bytes() for p in (tmp_path / "c", demo))
        assert ours == theirs


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(tmp_path, demo):
    path = tmp_path / "pool"
    flags = [*FLAGS[:-1], "2", "--methods", "ce,dlb"]
    assert cli.main(["demo", "--seeds", "1", "--out", str(path), *flags]) == 0
    for name in ("ce-seed0", "dlb-seed0"):
        ours, theirs = (json.loads((p / name / "result.json").read_text())["test_nll"] for p in (path, demo))
        assert ours == theirs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "dlb,kd"], "methods must be distinct names of ce, ls, two_view, dlb"),
        (["--methods", "dlb,dlb"], "methods must be distinct"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--alpha", "2"], "holds a comparison with another config"),
    ],
)
def test_wrong_use(flags, message, demo, capsys):
    assert cli.main(["demo", "--seeds", "2", "--out", str(demo), *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert cli.main(["demo", "--out", str(tmp_path), *FLAGS]) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_schedules_keep_their_place_in_the_run():
    """50 images, 20 rows: DLB has 5 steps an epoch, cross entropy 2; the milestones must stay at the same steps."""
    base = override(load_preset("digits"), per_class=5, batch_size=20, epochs=6)
    schedule = ScheduleConfig(schedule="multistep", milestones=(2.0, 4.0), warmup_epochs=1.0)
    configs = compare.equal_budget(override(base, schedule=schedule), ["dlb", "ce"])
    steps = {"dlb": 5, "ce": 2}
    places = {
        name: [round(m * steps[name]) for m in (*config.schedule.milestones, config.schedule.warmup_epochs)]
        for name, config in configs.items()
    }
    assert places["dlb"] == places["ce"] == [10, 20, 5]
    assert {(c.train.max_steps, c.train.eval_every) for c in configs.values()} == {(30, 20)}
