"""Config, schedules, optimiser groups, averaged weights, evaluation: each against a formula written out here."""

import ctypes
import json
import math
import platform
import resource
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dlb_fast.presets import load_preset
from dlb_fast.train import run
from dlb_fast.train.checkpoint import CheckpointError, load_matching, read_weights, save_weights
from dlb_fast.train.config import (
    EFFECTS,
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    from_dict,
    load_config,
    override,
    to_dict,
    without_effect,
)
from dlb_fast.train.evaluate import calibration_error, evaluate
from dlb_fast.train.flags import TrainArgs, parse_flags
from dlb_fast.train.methods import resolve
from dlb_fast.train.optim import Ema, make_optimizer, make_scheduler

torch.set_num_threads(1)


# --- config


def test_config_survives_yaml(tmp_path):
    config = override(RunConfig(), lr=1e-5, betas=(0.8, 0.9), per_class=3, method="two_view", ema=0.99, flip=False)
    config = override(config, source="imagefolder:a b", rand_augment="2,9", trackers=("wandb", "tensorboard"))
    config = override(config, schedule=ScheduleConfig(schedule="multistep", milestones=(1.5, 3.0)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "c.yaml") == config


def test_numbers_of_numpy_in_a_config_are_saved_as_numbers(tmp_path):
    given = {"alpha": np.float32(0.5), "lr": np.float64(1), "batch_size": np.int64(64), "betas": (np.float64(0.8), 0.9)}
    config = override(RunConfig(), **given)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "c.yaml") == config
    json.dumps(to_dict(config))


def test_a_file_overrides_only_what_it_names(tmp_path):
    # YAML reads 1e-3 as text
    (tmp_path / "c.yaml").write_text("optim: {lr: 1e-3}\ntrain: {epochs: 2, max_steps: null}\n")
    config = load_config(tmp_path / "c.yaml", override(RunConfig(), alpha=0.5))
    assert (config.optim.lr, config.train.epochs, config.loss.alpha) == (1e-3, 2, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {}}, "unknown group 'optimizer'; did you mean optim.optimizer"),
        ({"optim": {"learning_rate": 1}}, "unknown field optim.learning_rate; known: optim.optimizer, optim.lr, "),
        ({"loss": {"temprature": 1}}, "unknown field loss.temprature; did you mean loss.temperature"),
        ({"train": {"lr": 1}}, "unknown field train.lr; did you mean optim.lr"),
        ({"loss": {"temperature": -1}}, "temperature must be finite and > 0, got -1.0"),
        ({"loss": {"temperature": "warm"}}, "loss.temperature must be None or FLOAT, got 'warm'"),
        ({"loss": {"method": "kd"}}, "method must be one of .*, got 'kd'"),
        ({"loss": {"alpha": math.nan}}, "alpha must be finite"),
        ({"data": {"batch_size": 33}}, "batch_size must be even"),
        ({"data": {"flip": 1}}, "data.flip must be one of 'True', 'False', got '1'"),
        ({"data": {"label_noise": 1.2}}, r"label_noise must be in \[0, 1\]"),
        ({"train": {"epochs": 0}}, "epochs must be at least 1"),
        ({"train": {"epochs": 1.5}}, "train.epochs must be INT, got '1.5'"),
        ({"train": {"eval_every": "often"}}, "train.eval_every must be None or INT, got 'often'"),
        ({"train": {"amp": "fp8"}}, "train.amp must be one of 'none', 'bf16', 'fp16', got 'fp8'"),
        ({"train": {"trackers": ["mlflow"]}}, "train.trackers must be one of 'tensorboard', .*, got 'mlflow'"),
        ({"optim": {"betas": [0.1, "x"]}}, "optim.betas must be None or FLOAT FLOAT ..., got '0.1', 'x'"),
        ({"schedule": {"milestones": ["x"]}}, r"schedule.milestones must be FLOAT FLOAT \.\.\., got 'x'"),
        ({"optim": {"lr": {"peak": 1}}}, "optim.lr must be one value or a list, got {'peak': 1}"),
        ({"schedule": {"milestones": [1]}}, "milestones must be given with schedule=multistep"),
        ({"schedule": {"schedule": "multistep", "milestones": [3, 2]}}, "milestones must be increasing"),
        ({"optim": {"momentum": 0, "nesterov": True}}, "nesterov must be False when momentum is 0"),
    ],
)
def test_wrong_configs_are_refused(values, message, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "fast"], "--lr must be None or FLOAT, got 'fast'"),
        (["--lr", "-1"], "config: lr must be finite and > 0, got -1.0"),
        (["--epoch", "1"], "unknown option --epoch; did you mean --epochs?"),
        (["--amp", "fp8"], "--amp must be one of 'none', 'bf16', 'fp16', got 'fp8'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(TrainArgs, TrainArgs(), flags, "dlb-fast train")
    assert end.value.code == 2 and capsys.readouterr().err == f"dlb-fast train: {message} (--help lists all flags)\n"


def test_unreadable_config_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.yaml"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.yaml"):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(TypeError, match="expected groups"):
        from_dict([1])  # type: ignore[arg-type]


def test_field_names_are_unique_over_groups():
    names = [name for part in to_dict(RunConfig()).values() for name in part]
    assert len(names) == len(set(names))  # `override` and the flags rely on it


def test_defaults_are_valid():
    assert to_dict(RunConfig())["data"]["source"] == "digits"
    for part in (DataConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig):
        part()


# --- schedule


def rates(config: ScheduleConfig, steps: int, per_epoch: float, lr: float = 0.4) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make_scheduler(optimizer, config, total_steps=steps, steps_per_epoch=per_epoch)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0.01)
    want = []
    for _ in range(30):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(ScheduleConfig(min_lr=0.01), 30, 10) == pytest.approx(want, rel=1e-9)


def test_multistep_falls_at_the_epochs():
    got = rates(ScheduleConfig(schedule="multistep", milestones=(1, 2.5), gamma=0.1), 12, 4)
    assert got == pytest.approx([0.4] * 4 + [0.04] * 6 + [0.004] * 2)


def test_warmup_is_linear_then_the_schedule_starts_at_the_peak():
    got = rates(ScheduleConfig(warmup_epochs=0.5), 20, 8)
    assert got[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert got[4:] == pytest.approx([0.2 * (1 + math.cos(math.pi * i / 16)) for i in range(16)])
    assert rates(ScheduleConfig(schedule="constant"), 3, 1) == [0.4] * 3


# --- optimiser, averaged weights


def test_norms_and_biases_can_be_kept_from_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    one = make_optimizer(model, OptimConfig(weight_decay=0.1))
    assert [g["weight_decay"] for g in one.param_groups] == [0.1] and len(one.param_groups[0]["params"]) == 4
    two = make_optimizer(model, OptimConfig(optimizer="adamw", weight_decay=0.1, decay_norm_and_bias=False))
    assert [(len(g["params"]), g["weight_decay"]) for g in two.param_groups] == [(1, 0.1), (3, 0.0)]
    assert isinstance(two, torch.optim.AdamW)


def test_ema_follows_its_formula():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    average = Ema(model, decay=0.3)
    want = model[0].weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model[0].weight += step
        model(torch.randn(4, 2))  # moves the running statistics
        average.update(model)
        decay = min(0.3, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * model[0].weight.detach()
    assert torch.allclose(average.model[0].weight, want)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in average.model.parameters())


# --- evaluation


def brute(logits, targets):
    """The metrics image by image."""
    top1 = top5 = nll = 0.0
    bins = [[0, 0.0, 0.0] for _ in range(15)]
    for row, label in zip(logits.tolist(), targets.tolist(), strict=True):
        exps = [math.exp(v) for v in row]
        probabilities = [e / sum(exps) for e in exps]
        order = sorted(range(len(row)), key=lambda k: -row[k])
        top1 += order[0] == label
        top5 += label in order[:5]
        nll -= math.log(probabilities[label])
        confidence = max(probabilities)
        index = min(14, max(0, math.ceil(confidence * 15) - 1))
        bins[index][0] += 1
        bins[index][1] += order[0] == label
        bins[index][2] += confidence
    n = len(targets)
    ece = sum(count / n * abs(right / count - sure / count) for count, right, sure in bins if count)
    means = [(count / n, right / max(1, count), sure / max(1, count)) for count, right, sure in bins]
    calibration = dict(zip(("share", "accuracy", "confidence"), zip(*means, strict=True), strict=True))
    return {"top1": top1 / n, "top5": top5 / n, "nll": nll / n, "ece": ece, "count": n}, calibration


def test_evaluate_equals_the_count_by_hand():
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(203, 8), torch.randint(0, 8, (203,))
    pieces = list(zip(logits.split(50), targets.split(50), strict=True))  # the last one is short
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    got = evaluate(model, pieces)
    want, bins = brute(logits, targets)
    calibration = got.pop("calibration")
    counts = Counter(zip(targets.tolist(), logits.argmax(dim=1).tolist(), strict=True))
    assert {(target, predicted): n for target, predicted, n in got.pop("confusion")} == counts
    assert got == pytest.approx(want, abs=1e-6)
    assert {name: pytest.approx(values, abs=1e-6) for name, values in bins.items()} == calibration
    assert got["count"] == 203 and model.training and model[1].training


def test_confusion_by_hand():
    """Five images of classes 0 0 1 1 3, taken for 0 2 1 1 0; class 2 has no image and 3 is never predicted."""
    one, other = (torch.eye(4)[[0, 2, 1]], torch.tensor([0, 0, 1])), (torch.eye(4)[[1, 0]], torch.tensor([1, 3]))
    scores = evaluate(nn.Identity(), [one, other])
    assert scores["confusion"] == [[0, 0, 1], [0, 2, 1], [1, 1, 2], [3, 0, 1]]
    nan = torch.full((2, 3), math.nan)
    assert sum(n for *_, n in evaluate(nn.Identity(), [(nan, torch.tensor([0, 2]))])["confusion"]) == 2


def test_evaluate_of_few_classes_and_of_nothing():
    assert evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))])["top5"] == 1.0
    with pytest.raises(ValueError, match="no image"):
        evaluate(nn.Identity(), [])
    with pytest.raises(ValueError, match="labels reach 7 but the model has 3 logits"):
        evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 7, 0]))])
    with pytest.raises(ValueError, match="none of 2 images could be read"):
        evaluate(nn.Identity(), [(torch.eye(2), torch.tensor([-1, -1]))])


def test_calibration_error_of_a_perfect_and_of_a_boasting_model():
    sure = torch.tensor([[100.0, 0.0]] * 4)
    assert calibration_error(sure, torch.zeros(4, dtype=torch.long)) == pytest.approx(0.0)
    assert calibration_error(sure, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.75)


# --- weights


def test_weights_of_another_shape_or_a_broken_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(3, 2), {"model": "linear"})
    copy = nn.Linear(3, 2)
    load_matching(copy, read_weights(path)[0], str(path))
    with pytest.raises(CheckpointError, match=r"weight: \(2, 3\) in the file, \(4, 3\) in the model"):
        load_matching(nn.Linear(3, 4), read_weights(path)[0], str(path))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_weights(path)


FILES = {"source": "imagefolder:data"}
MULTISTEP = {"schedule": ScheduleConfig(schedule="multistep", milestones=(1.0,))}
BOTH = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
# option -> (a value, fields with which it has no effect, fields with which it has one)
OPTIONS = {
    "image_size": (64, {}, FILES),
    "eval_size": (64, {"source": "cifar10:data"}, {"source": "tar:data"}),
    "eval_resize": (64, {"source": "synthetic:40,2,8"}, {"source": "list:data"}),
    "num_threads": (4, {}, {"source": "tinyimagenet:data"}),
    "max_pixels": (1000, {}, FILES),
    "on_error": ("replace", {}, FILES),
    "label_noise": (0.1, {"noise_kind": "file:labels.npy"}, {"noise_kind": "pair"}),
    "noise_kind": ("pair", {}, {"label_noise": 0.1}),
    "data_seed": (3, {"source": "cifar100:data"}, {"source": "cifar100:data", "per_class": 5}),
    "erase_area": ((0.1, 0.2), {}, {"erase_prob": 0.5}),
    "erase_mode": ("rand", {}, {"erase_prob": 0.5}),
    "mix_prob": (0.5, {}, {"mixup_alpha": 0.2}),
    "mix_mode": ("elem", {}, {"cutmix_alpha": 1.0}),
    "mix_switch_prob": (0.3, {"mixup_alpha": 0.2}, BOTH),
    "mixup_alpha": (0.2, {**BOTH, "mix_switch_prob": 1.0}, {**BOTH, "mix_switch_prob": 0.9}),
    "cutmix_alpha": (1.0, {**BOTH, "mix_switch_prob": 0.0}, {}),
    "momentum": (0.5, {"optimizer": "adamw"}, {}),
    "nesterov": (False, {"optimizer": "adamw"}, {}),
    "betas": ((0.8, 0.9), {}, {"optimizer": "adamw"}),
    "weight_decay": (0.1, {"optimizer": "rprop"}, {"optimizer": "rmsprop"}),
    "decay_norm_and_bias": (False, {"weight_decay": 0.0}, {}),
    "gamma": (0.5, {}, MULTISTEP),
    "min_lr": (0.001, MULTISTEP, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_without_effect_is_refused(name):
    value, without, having = OPTIONS[name]
    config = override(RunConfig(), **{**without, name: value})
    assert list(without_effect(config)) == [name]
    with pytest.raises(ValueError, match=rf"config: {name}=.* has no effect with .*, only with .*; leave it out"):
        resolve(config)
    assert resolve(override(RunConfig(), **{**having, name: value}))
    assert name not in without_effect(override(config, **without_effect(config)))  # the default is accepted


def test_options_without_effect_for_one_reason_are_named_together():
    config = override(load_preset("imagenet-resnet50-dlb"), source="digits")
    with pytest.raises(ValueError, match="image_size=176, eval_size=224, eval_resize=232, num_threads=16 have no"):
        resolve(config)
    assert resolve(override(config, **without_effect(config))).data.image_size == 32


def test_every_option_of_the_table_is_tried():
    assert OPTIONS.keys() == EFFECTS.keys()


# --- memory


@pytest.mark.parametrize(
    ("largest", "asked"),
    [
        (2**30, [(-3, 2**30), (-1, 2**30)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)]),  # an older glibc
        (0, [(-3, 2**30), (-3, 2**25)]),  # nothing else is changed where the threshold cannot be
    ],
)
def test_memory_is_kept_as_far_as_the_c_library_allows(monkeypatch, largest, asked):
    calls = []

    def mallopt(what, value):
        calls.append((what, value))
        return int(what != -3 or value <= largest)

    monkeypatch.setattr(run.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    run._keep_freed_memory(torch.device("cpu"))
    assert calls == asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    run._keep_freed_memory(torch.device("cpu"))
    if not ctypes.CDLL(None).mallopt(-3, 2**30):
        pytest.skip("this glibc keeps blocks of 32 MiB at most")

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, which are 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(8)) < 1000  # not every time: a block that was aligned may not fit again
