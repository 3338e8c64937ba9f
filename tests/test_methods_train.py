"""Every method in the trainer: it learns, it stops and resumes bit for bit, and its config says what it ran with."""

from __future__ import annotations

import statistics

import pytest
import torch
from builders import assert_same_run, last_checkpoint, train, train_stopped
from method_cases import CASES, SIBLINGS

from dlb_fast import DistillationLoss, Teacher, cli, report
from dlb_fast.presets import PRESETS, load_preset
from dlb_fast.train import compare
from dlb_fast.train.config import _field_type, override, without_effect
from dlb_fast.train.methods import METHODS, VARIANTS, find, resolve, variant
from dlb_fast.train.run import build_trainer

torch.set_num_threads(1)

SMALL = override(
    load_preset("digits"), per_class=4, batch_size=12, max_steps=9, eval_every=3, checkpoint_every=3, log_every=1,
    seed=7,
)  # fmt: skip


def config_of(name):
    return override(SMALL, method=name, **CASES[name].options)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_equals_uninterrupted(name, tmp_path):
    config = config_of(name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = train(config, whole)
    assert result["step"] == 9
    train_stopped(config, cut, 5)  # between two checkpoints, in the middle of an epoch
    assert train(config, cut, resume=True)["step"] == 9
    assert_same_run(whole, cut)


@pytest.mark.parametrize("name", ["dlb", *SIBLINGS])
def test_the_teacher_changes_the_weights(name, tmp_path):
    """Against the same run with alpha=0: a teacher that was wired to nothing would leave the weights alone."""
    taught, alone = tmp_path / "taught", tmp_path / "alone"
    first, second = {"alpha": 0.5}, {"alpha": 0.0}
    if name == "gce":  # which has one term: against the cross entropy
        first, second = {}, {"method": "ce", "q": None}
    train(override(config_of(name), **first), taught)
    train(override(config_of(name), **second), alone)
    a, b = (last_checkpoint(path)["model"] for path in (taught, alone))
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", METHODS)
def test_learning_goes_somewhere(name):
    """Forty steps on forty digits: the test accuracy leaves chance far behind."""
    config = override(config_of(name), max_steps=40, lr=0.05, label_noise=0.0, eval_every=40, checkpoint_every=40)
    trainer = build_trainer(config)
    trainer.log.quiet = True
    result = trainer.fit()
    assert result["test_top1"] > 0.4, result
    assert result["train_top1"] is not None and 0.2 < result["train_top1"] <= 1.0


def test_every_number_is_written_into_the_run_folder(tmp_path):
    train(override(SMALL, method="bake"), tmp_path)
    saved = report.read_run(tmp_path).config.loss
    assert (saved.alpha, saved.temperature, saved.omega, saved.companions) == (1.0, 4.0, 0.5, 1)
    assert resolve(override(SMALL, method="cs_kd")).train.forward == "partners"


def test_numbers_of_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"loss\.omega is not used by method dlb \(it is by bake\)"):
        resolve(override(SMALL, omega=0.5))
    with pytest.raises(ValueError, match=r"loss\.temperature is not used by method zipf"):
        resolve(override(SMALL, method="zipf", temperature=2.0))
    with pytest.raises(ValueError, match=r"loss\.alpha is 0 with method two_view, got 0\.5"):
        resolve(override(SMALL, method="two_view", alpha=0.5))
    assert resolve(resolve(override(SMALL, method="two_view"))).loss.alpha == 0.0
    with pytest.raises(ValueError, match="did you mean bake"):
        resolve(override(SMALL, method="bakes"))
    with pytest.raises(ValueError, match="forward=partners belongs to cs_kd"):
        resolve(override(SMALL, forward="partners"))
    with pytest.raises(ValueError, match="forward=two_pass belongs to two_view and dlb, whose batches repeat rows"):
        resolve(override(SMALL, forward="two_pass", method="bake"))
    two = override(SMALL, forward="two_pass")
    assert resolve(two).train.forward == variant(two, "two_view").train.forward == "two_pass"
    assert variant(two, "ce").train.forward == "joint" and variant(two, "cs_kd").train.forward == "partners"


class Mixer(DistillationLoss):
    """A share of the label, the rest of the model's own prediction."""

    def __init__(self, share=0.5, **options):
        super().__init__(**options)
        self.share = share

    def teacher(self, inputs):
        own = inputs.logits.detach().softmax(1)
        return Teacher("probabilities", self.share * torch.eye(own.shape[1])[inputs.target] + (1 - self.share) * own)


class Bare(DistillationLoss):
    """Without a label smoothing."""

    batches = "two_views"

    def __init__(self, alpha=1.0):
        super().__init__(alpha=alpha)

    def teacher(self, inputs):
        return Teacher("none")


class Wanting(Bare):
    def __init__(self, size):
        super().__init__()


def test_a_new_method_trains_by_its_import_path(tmp_path, monkeypatch):
    name = f"{Mixer.__module__}:Mixer"
    config = override(SMALL, method=name, alpha=0.5, temperature=2.0)
    result = train(config, tmp_path / "a")
    assert result["step"] == 9 and result["lb"] > 0
    assert report.read_run(tmp_path / "a").config.loss.method == name
    assert find("dlb_fast:BakeLoss") is METHODS["bake"] and find("dlb_fast:LastBatchLoss") is METHODS["dlb"]
    for wrong, message in (
        (f"{Mixer.__module__}:Nobody", "has no Nobody"),
        ("no_such_module:Method", "cannot import no_such_module"),
        ("dlb_fast:LogitBank", "is not a dlb_fast.DistillationLoss"),
    ):
        with pytest.raises(ValueError, match=message):
            override(SMALL, method=wrong)
    bare = override(SMALL, method=f"{Bare.__module__}:Bare")
    trainer = build_trainer(bare)
    assert type(trainer.loader.sampler).__name__ == "ViewPairSampler"
    with pytest.raises(ValueError, match="loss.label_smoothing is not an argument of Bare"):
        build_trainer(override(bare, label_smoothing=0.1))
    with pytest.raises(ValueError, match="the trainer cannot give size of Wanting; give them a default"):
        build_trainer(override(bare, method=f"{Bare.__module__}:Wanting"))


def test_an_option_that_no_flag_can_hold_is_refused():
    for option in (tuple[int, ...], int | float, torch.Tensor):
        with pytest.raises(TypeError, match="Method 'x': option sizes must be annotated as one of bool, int, float"):
            _field_type("x", "sizes", option)


def test_variants_keep_their_own_numbers():
    base = override(SMALL, alpha=0.7, omega=0.9)
    assert variant(base, "dlb").loss.alpha == 0.7 and variant(base, "dlb").loss.omega is None
    assert (variant(base, "bake").loss.alpha, variant(base, "bake").loss.omega) == (1.0, 0.9)
    assert variant(base, "bake0").loss.alpha == 0.0
    base = override(SMALL, method="elr", beta=0.9)  # a momentum; SCE's is a weight
    assert (variant(base, "elr").loss.beta, variant(base, "sce").loss.beta) == (0.9, 1.0)
    assert {VARIANTS[name]["method"] for name in VARIANTS} == set(METHODS)


def test_noise_levels_make_one_table(tmp_path, capsys):
    flags = [
        "compare", "--methods", "ce,dlb", "--seeds", "2", "--noises", "0,0.4", "--out", str(tmp_path / "c"),
        "--jobs", "1", "--per-class", "4", "--batch-size", "12", "--max-steps", "4", "--eval-every", "2",
    ]  # fmt: skip
    assert cli.main(flags) == 0
    out = capsys.readouterr().out
    page = (tmp_path / "c" / "report.md").read_text()
    for noise, column in (("0", 3), ("0.4", 4)):
        runs = [report.read_run(p, n) for p, n in compare.read_comparison(tmp_path / "c" / f"noise-{noise}")]
        assert {run.config.data.label_noise for run in runs} == {float(noise)} and len(runs) == 4
        mean = statistics.fmean(100 * run.last("test_top1") for run in runs if run.label == "DLB")
        row = next(line for line in out.splitlines() if line.startswith("| DLB "))
        assert row.split("|")[column].strip().startswith(f"{mean:.2f} ±")
        assert row in page
    assert (tmp_path / "c" / "noise.png").stat().st_size > 5_000


def test_cs_kd_partners_may_be_the_sample_itself():
    trainer = build_trainer(config_of("cs_kd"))
    assert trainer.loader.sampler.include_anchor and trainer.loader.sampler.companions == 1


def test_a_comparison_of_all_methods(tmp_path, capsys):
    """One seed, equal steps and images, one table; the same command again trains nothing."""
    flags = [
        "compare", "--methods", "all", "--seeds", "1", "--out", str(tmp_path / "c"), "--jobs", "1", "--per-class", "4",
        "--batch-size", "12", "--max-steps", "4", "--eval-every", "2", "--label-noise", "0.4",
    ]  # fmt: skip
    assert cli.main(flags) == 0
    table = capsys.readouterr().out
    runs = [report.read_run(path, label) for path, label in compare.read_comparison(tmp_path / "c")]
    assert len(runs) == len(VARIANTS) and {run.last("step") for run in runs} == {4.0}
    # DLB and its control start with half a batch
    assert {run.label: run.last("images_seen") for run in runs} == {
        label: 42.0 if name in ("dlb", "two_view") else 48.0 for name, label in compare.LABELS.items()
    }
    for label in compare.LABELS.values():
        assert f"| {label} " in table
    assert "seconds" in table and "peak MiB" in table
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("metrics.csv")}
    assert cli.main(flags) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("metrics.csv")}


PRESETS_OF_METHODS = [name for name in PRESETS if load_preset(name).loss.method not in ("dlb", "two_view", "ce")]


@pytest.mark.parametrize("name", PRESETS_OF_METHODS)
def test_presets_of_methods_train_a_step(name):
    tiny = override(
        load_preset(name), source="synthetic:64,4,16", batch_size=16, max_steps=1, model="small_cnn", padding=2,
        per_class=None, label_noise=0.0,
    )  # fmt: skip
    trainer = build_trainer(override(tiny, **without_effect(tiny)))  # without the sizes of image files
    trainer.log.quiet = True
    assert trainer.fit()["step"] == 1
