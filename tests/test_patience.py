"""Early stopping: the right step, the same after a resume and on all ranks, and what is evaluated afterwards."""

import json

import pytest
from builders import exported, last_checkpoint, stop_at, train, train_stopped
from ranks import make

from dlb_fast.presets import load_preset
from dlb_fast.train import run as runs
from dlb_fast.train.checkpoint import step_of_weights
from dlb_fast.train.compare import run as compare
from dlb_fast.train.config import override

CONFIG = override(
    load_preset("digits"), per_class=4, batch_size=20, max_steps=30, eval_every=2, checkpoint_every=4, patience=3
)
SCORES = {2: 0.2, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.6, 12: 0.6, 14: 0.1, 16: 0.3, 18: 0.9}  # of the step; a tie is no gain


@pytest.fixture
def scored(monkeypatch):
    """The evaluation after step k has top-1 SCORES[k]."""
    original = runs.build_trainer

    def build(*args, **options):
        trainer = original(*args, **options)
        trainer.evaluate = lambda network: {"top1": SCORES[trainer.step], "top5": 1.0, "nll": 1.0, "count": 40}
        return trainer

    monkeypatch.setattr(runs, "build_trainer", build)


def test_the_run_ends_after_evaluations_without_a_gain(scored, tmp_path, capsys):
    result = train(CONFIG, tmp_path, quiet=False)
    assert (result["step"], result["stopped_by"], result["best_step"]) == (16, "patience", 10)
    said = capsys.readouterr().err
    assert "stopped early at step 16 of 30: 3 evaluations without a better test top-1 (patience 3)" in said
    assert "best 60.00 % at step 10; `dlb-fast eval` takes the best weights, with --weights last those of the" in said
    weights = [step_of_weights(tmp_path / "checkpoints" / f"{name}.safetensors") for name in ("best", "last")]
    assert weights == [10, 16] and last_checkpoint(tmp_path)["step"] == 16
    assert json.loads((tmp_path / "result.json").read_text())["stopped_by"] == "patience"


def test_a_resume_ends_at_the_same_step_with_the_same_weights(scored, tmp_path):
    train(CONFIG, tmp_path / "whole")
    for step in (5, 12, 15):
        folder = tmp_path / str(step)
        train_stopped(CONFIG, folder, step)
        result = train(CONFIG, folder, resume=True)
        assert (result["step"], result["stopped_by"]) == (16, "patience")
        assert all(exported(folder, name) == exported(tmp_path / "whole", name) for name in ("best", "last"))


def test_an_ended_run_continues_with_more_patience_only(scored, tmp_path, capsys):
    train(CONFIG, tmp_path)
    before = exported(tmp_path)
    assert train(CONFIG, tmp_path, resume=True, quiet=False)["step"] == 16
    assert "the run has ended early at step 16; a larger --patience, or None, continues it" in capsys.readouterr().err
    assert exported(tmp_path) == before and (tmp_path / "result.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 19)
        result = train(override(CONFIG, patience=4), tmp_path, resume=True)
    assert (result["best_step"], result["stopped_by"]) == (18, "SIGTERM")
    assert not (tmp_path / "result.json").exists()


def patient(folder):
    trainer = make("ddp", folder, epochs=400, eval_every=2, checkpoint_every=100, patience=2)
    # a rank's own score would end the ranks at different steps
    trainer.evaluate = lambda network: {"top1": 0.5 if trainer.ranks.is_main else float(trainer.step)}
    result = trainer.fit()
    return trainer.step, result["stopped_by"]


def test_all_ranks_end_at_the_same_step(process_group, tmp_path):
    assert process_group(patient, tmp_path) == [(6, "patience"), (6, "patience")]
    saved = last_checkpoint(tmp_path)
    assert (saved["step"], saved["stale"]) == (6, 2)


def test_where_patience_has_no_meaning():
    with pytest.raises(ValueError, match="patience would end the methods after different numbers of steps"):
        compare(CONFIG, methods=["ce"], seeds=1)
    with pytest.raises(ValueError, match="patience needs an evaluation; give evaluate"):
        from dlb_fast.train.loop import Trainer

        trainer = make()
        Trainer(trainer.model, trainer.criterion, trainer.optimizer, trainer.loader, patience=2)
    with pytest.raises(ValueError, match="patience must be at least 1 or null, got 0"):
        override(CONFIG, patience=0)
