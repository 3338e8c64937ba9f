"""Config, schedules, optimiser groups, averaged weights, evaluation, logs: each against a formula written out here."""

import json
import math

import pytest
import torch
from torch import nn

from dlb_fast.train import log as logs
from dlb_fast.train import state
from dlb_fast.train.config import (
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
)
from dlb_fast.train.evaluate import calibration_error, evaluate
from dlb_fast.train.optim import Ema, make_optimizer
from dlb_fast.train.schedule import make_scheduler

torch.set_num_threads(1)


# --- config


def test_config_survives_yaml(tmp_path):
    import yaml

    config = override(RunConfig(), lr=1e-4, betas=(0.8, 0.9), per_class=3, method="two_view", ema=0.99)
    config = override(config, schedule=ScheduleConfig(schedule="multistep", milestones=(1.5, 3.0)))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(tmp_path / "c.yaml") == config


def test_a_file_overrides_only_what_it_names(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 1e-3}\ntrain: {epochs: 2.0}\n")  # YAML reads 1e-3 as text
    config = load_config(tmp_path / "c.yaml", override(RunConfig(), alpha=0.5))
    assert (config.optim.lr, config.train.epochs, config.loss.alpha) == (1e-3, 2, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {}}, "unknown group 'optimizer'"),
        ({"optim": {"learning_rate": 1}}, "unknown field optim.learning_rate"),
        ({"loss": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"loss": {"temperature": -1}}, "temperature must be finite and > 0, got -1.0"),
        ({"loss": {"temperature": "warm"}}, "loss.temperature must be float, got 'warm'"),
        ({"loss": {"method": "kd"}}, "method must be one of dlb, two_view, ce, .*got 'kd'"),
        ({"loss": {"alpha": math.nan}}, "alpha must be finite"),
        ({"data": {"batch_size": 33}}, "batch_size must be even"),
        ({"data": {"flip": 1}}, "data.flip must be bool"),
        ({"data": {"label_noise": 1.2}}, r"label_noise must be in \[0, 1\]"),
        ({"train": {"epochs": 0}}, "epochs must be at least 1"),
        ({"train": {"epochs": 1.5}}, "train.epochs must be int"),
        ({"schedule": {"milestones": [1]}}, "milestones must be given with schedule=multistep"),
        ({"schedule": {"schedule": "multistep", "milestones": [3, 2]}}, "milestones must be increasing"),
        ({"optim": {"momentum": 0}}, "nesterov must be False when momentum is 0"),
    ],
)
def test_wrong_configs_are_refused(values, message, tmp_path):
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)


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
    assert got == pytest.approx(want, abs=1e-6)
    assert {name: pytest.approx(values, abs=1e-6) for name, values in bins.items()} == calibration
    assert got["count"] == 203 and model.training and model[1].training


def test_evaluate_of_few_classes_and_of_nothing():
    assert evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))])["top5"] == 1.0
    with pytest.raises(ValueError, match="no image"):
        evaluate(nn.Identity(), [])
    with pytest.raises(ValueError, match="labels reach 7 but the model has 3 logits"):
        evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 7, 0]))])


def test_calibration_error_of_a_perfect_and_of_a_boasting_model():
    sure = torch.tensor([[100.0, 0.0]] * 4)
    assert calibration_error(sure, torch.zeros(4, dtype=torch.long)) == pytest.approx(0.0)
    assert calibration_error(sure, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.75)


# --- logs


ROW = {"step": 3, "epoch": 1.0, "images_seen": 12, "lr": 0.1, "loss": 0.5, "ce": math.nan, "test_top1": 0.25}


def test_logs_are_strict_json_and_plain_csv(tmp_path, capsys):
    log = logs.RunLog(tmp_path)
    log.progress(ROW)
    log.result(ROW)
    step, result = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert step["kind"] == "step" and result["kind"] == "eval" and result["ce"] is None
    head, line = (tmp_path / "metrics.csv").read_text().splitlines()
    cells = dict(zip(head.split(","), line.split(","), strict=True))
    assert cells["test_top1"] == "0.25" and cells["ce"] == "" and tuple(head.split(",")) == logs.COLUMNS
    assert "test 25.00 %" in capsys.readouterr().err


def test_rewind_cuts_the_files_back(tmp_path):
    log = logs.RunLog(tmp_path, quiet=True)
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
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    log = logs.RunLog(tmp_path, stream=stream)
    log.start(step=0, total=2)
    log.advance()
    log.result(ROW)
    log.close()
    assert "/2" in stream.getvalue() and "test 25.00 %" in stream.getvalue()


def test_defaults_are_valid():
    assert to_dict(RunConfig())["data"]["source"] == "digits"
    for part in (DataConfig, LossConfig, OptimConfig, ScheduleConfig, TrainConfig):
        part()


def test_weights_of_another_shape_or_a_broken_file(tmp_path):
    path = tmp_path / "w.safetensors"
    state.save_weights(path, nn.Linear(3, 2), {"model": "linear"})
    copy = nn.Linear(3, 2)
    state.load_weights(path, copy)
    with pytest.raises(state.CheckpointError, match=r"weight: \(2, 3\) in the file, \(4, 3\) in the model"):
        state.load_weights(path, nn.Linear(3, 4))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(state.CheckpointError, match="not a readable safetensors file"):
        state.load_weights(path, copy)


