"""A continuation with other numbers: it takes them, or is refused and leaves the run as it was."""

import shutil
from pathlib import Path

import pytest
import torch
from builders import exported, last_checkpoint, metrics_rows, train

from dlb_fast import cli
from dlb_fast.presets import load_preset
from dlb_fast.train import checkpoint
from dlb_fast.train.checkpoint import CheckpointError
from dlb_fast.train.config import override
from dlb_fast.train.loop import Trainer
from dlb_fast.train.optim import lr_factor, make_optimizer
from dlb_fast.train.run import RunFolder, train_run

torch.set_num_threads(1)

# 4 steps per epoch
SMALL = override(load_preset("digits"), per_class=4, batch_size=20, epochs=2, eval_every=None, log_every=1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("begun")
    train(SMALL, path)
    return path


@pytest.fixture
def run(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.mark.parametrize(
    ("first", "changed"),
    [
        ({}, {"momentum": 0.1, "nesterov": False, "weight_decay": 0.1}),
        ({"optimizer": "adamw"}, {"betas": (0.5, 0.6)}),
    ],
)
def test_a_continuation_uses_the_numbers_it_says(first, changed, tmp_path):
    config = override(SMALL, **first)
    train(config, tmp_path)
    longer = override(config, epochs=4, lr=0.2, **changed)
    train(longer, tmp_path, resume=True)
    (group,) = last_checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert {name: type(value)(group[name]) for name, value in changed.items()} == changed
    assert group["initial_lr"] == 0.2 and last_checkpoint(tmp_path)["scheduler"]["base_lrs"] == [0.2]


def test_the_rate_of_the_first_step_after_a_resume_is_that_of_the_new_length(run, monkeypatch):
    used, original = [], Trainer.optimizer_step

    def noting(self):
        used.append(self.optimizer.param_groups[0]["lr"])
        original(self)

    monkeypatch.setattr(Trainer, "optimizer_step", noting)
    config = override(SMALL, epochs=4, lr=0.2)
    train(config, run, resume=True)
    numbers = {"config": config.schedule, "total_steps": 16, "steps_per_epoch": 4, "peak": 0.2}
    assert used == [0.2 * lr_factor(step, **numbers) for step in range(8, 16)]


def test_an_optimiser_keeps_its_decay_groups(tmp_path):
    model = torch.nn.Linear(2, 2)
    config = override(SMALL, decay_norm_and_bias=False, weight_decay=0.5).optim
    other = make_optimizer(model, override(SMALL, decay_norm_and_bias=False, weight_decay=0.1).optim)
    optimizer = make_optimizer(model, config)
    optimizer.load_state_dict(other.state_dict())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 10}, "half . world_size was"),
        ({"seed": 3}, "seed was 0"),
        ({"method": "ce"}, "does not fit CrossEntropy .*another method"),
        ({"method": "mr_kd"}, "does not fit MrKDLoss .*another method"),
        ({"optimizer": "adamw"}, "another optimiser .*SGD with 1 groups., here is torch.optim.adamw.AdamW with 1"),
        ({"decay_norm_and_bias": False}, "another optimiser .*SGD with 1 groups., here is .*SGD with 2 groups"),
        ({"ema": 0.9}, "without EMA"),
    ],
)
@pytest.mark.filterwarnings("ignore:LogitBuffer", "ignore:Using a non-tuple sequence")
def test_a_refused_continuation_leaves_the_run_as_it_was(changed, said, run):
    def files():
        return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = files()
    with pytest.raises((ValueError, CheckpointError), match=said):
        train(override(SMALL, epochs=4, lr=0.2, **changed), run, resume=True)
    assert files() == before
    assert train(override(SMALL, epochs=4), run, resume=True)["step"] == 16


@pytest.mark.parametrize("keep", [1, 2])
def test_later_checkpoints_count_as_the_oldest(keep, tmp_path):
    """A resume has skipped them. By name they are the newest, and would be kept in place of every good one."""
    (tmp_path / "step-000000009.pt").write_bytes(b"damaged")
    for step in (5, 6, 7):
        path = checkpoint.save_checkpoint(tmp_path, {"step": step}, keep=keep)
        assert path.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:09d}.pt" for step in range(8 - keep, 8)]


def test_files_that_are_not_checkpoints_are_never_deleted(tmp_path):
    strangers = {"step-best.pt", "step-1.pt", "step-000000001.pt.bak", "copy-of-step-000000001.pt", ".notes.tmp"}
    strangers |= {".step-best.pt.12.tmp", ".step-000000001.pt.swp", "best.safetensors", ".last.safetensors.12.tmp"}
    for name in strangers:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".step-000000001.pt.123.tmp").write_bytes(b"left by a killed process")
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, {"step": step}, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == strangers | {"step-000000003.pt"}
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000000003.pt"]


def test_two_processes_do_not_train_in_one_folder(run, capsys):
    """The lock belongs to the opened file, so a second one of this process is refused like that of another."""
    folder = RunFolder(run)
    folder.lock()
    try:
        assert cli.main(["train", "--resume", "--epochs", "3", "--quiet", "--out", str(run)]) == 2
    finally:
        folder.unlock()
    assert "another process is training in" in capsys.readouterr().err
    assert last_checkpoint(run)["step"] == 8
    assert train(override(SMALL, epochs=3), run, resume=True)["step"] == 12  # unlocked, and again after this one
    folder.lock()
    folder.unlock()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder: cannot make .*file/run .*--out"):
        train(SMALL, tmp_path / "file" / "run")


@pytest.fixture
def same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20000101-000000")


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(same_second):
    names = [RunFolder.named("a b/c").path.as_posix() for _ in range(3)]
    assert names == [f"runs/20000101-000000-a-b-c{end}" for end in ("", "-2", "-3")]
    assert all(Path(name).is_dir() for name in names)


def test_a_folder_that_appears_after_the_look_is_not_taken(same_second, monkeypatch):
    """Another process is faster between the look for a free name and the making of the folder."""
    Path("runs/20000101-000000-a").mkdir(parents=True)
    original = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **_: path.parent.name != "runs" and original(path))
    assert RunFolder.named("a").path.name == "20000101-000000-a-2"


def test_a_run_that_is_refused_leaves_no_folder_of_its_own(same_second):
    config = override(SMALL, device="cuda:99")
    folder, mine = RunFolder.named("a"), Path("mine")
    mine.mkdir()
    for one in (folder, RunFolder(mine)):
        with pytest.raises(ValueError, match="'cuda:99' cannot be used"):
            train_run(config, one, quiet=True)
    assert not folder.path.exists()
    assert mine.is_dir()


def test_runs_that_is_a_file_is_named(same_second):
    Path("runs").write_text("")
    with pytest.raises(ValueError, match=r"runs is not a folder.*--out"):
        RunFolder.named("a")


def test_a_run_that_another_process_made_in_the_meantime_is_not_overwritten(run, monkeypatch):
    """Both looked before the other one began; it has ended when this one has its data."""
    mine = RunFolder(run)
    original, begun = mine.lock, run / "config.yaml"
    text = begun.read_bytes()
    begun.unlink()

    def lock():
        original()
        begun.write_bytes(text)

    monkeypatch.setattr(mine, "lock", lock)
    with pytest.raises(ValueError, match="already holds a run; resume it"):
        train_run(override(SMALL, epochs=1, seed=5), mine, quiet=True)
    assert last_checkpoint(run)["step"] == 8 and begun.read_bytes() == text


def failing_first_step(config, path, monkeypatch):
    """A run whose first step fails, after a row of metrics and the best weights of an evaluation."""

    def fail(self, batch):
        self.log.result({"step": 0, "epoch": 0.0, "test_top1": 0.9})
        self._export("best")
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forward_backward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config, path)
    assert RunFolder(path).exists() and not RunFolder(path).has_work()


@pytest.mark.slow  # writes the page of the run
@pytest.mark.parametrize("how", ["anew", "resume"])
def test_after_a_failed_first_step_the_same_command_and_a_resume_both_start(how, begun, tmp_path, monkeypatch, capsys):
    failing_first_step(override(SMALL, lr=9.0), tmp_path, monkeypatch)
    (tmp_path / "config.yaml").write_bytes((begun / "config.yaml").read_bytes())  # as if begun with the right numbers
    flags = ["--resume"] if how == "resume" else ["--config", str(begun / "config.yaml")]
    assert cli.main(["train", *flags, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "already" not in said
    assert ("a new one takes its place" if how == "anew" else "starting from scratch") in said
    assert_same_run_files(begun, tmp_path)


def assert_same_run_files(first, second):
    assert metrics_rows(first) == metrics_rows(second)
    for name in ("best", "last"):
        assert exported(first, name) == exported(second, name)


def test_a_new_run_in_the_folder_of_a_failed_one_has_its_own_config(tmp_path, monkeypatch):
    failing_first_step(override(SMALL, lr=9.0), tmp_path, monkeypatch)
    (tmp_path / "tracker_id").write_text("of the failed run")
    train(override(SMALL, epochs=1), tmp_path)
    assert RunFolder(tmp_path).read_config().optim.lr == SMALL.optim.lr
    assert [row["step"] for row in metrics_rows(tmp_path)] == ["4"] and not (tmp_path / "tracker_id").exists()


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(run):
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        path.unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="has no checkpoint, but the run has been trained.*another --out"):
        train(SMALL, run, resume=True)
    assert cli.main(["train", "--out", str(run)]) == 2
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
