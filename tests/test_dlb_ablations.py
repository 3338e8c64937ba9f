"""The ablations of DLB: their batches, their teachers, and that lag 1 is DLB itself."""

import json

import numpy as np
import pytest
import torch
import yaml

from benchmarks import dlb_ablations as ablations
from dlb_fast import fused_lb_loss
from dlb_fast.data import OverlapBatchSampler
from dlb_fast.train import compare
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.loop import TrainingDiverged

torch.set_num_threads(1)


def stream(lag, view=1, epochs=3):
    sampler = ablations.LagSampler(23, 8, lag, view, seed=4)
    return [
        [column.tolist() for column in sampler.views(e, step)] for e in range(epochs) for step in range(len(sampler))
    ]


def test_lag_one_has_the_rows_of_dlb():
    dlb = OverlapBatchSampler(23, 8, seed=4)
    theirs = [[c.tolist() for c in dlb.views(e, step)] for e in range(3) for step in range(len(dlb))]
    assert stream(1) == theirs and stream(1, view=0) != theirs
    assert [[i, e] for i, e, _ in stream(1, view=0)] == [[i, e] for i, e, _ in theirs]
    assert not any(any(views) for _, _, views in stream(1, view=0))  # the draws of the first visit


def test_the_old_half_is_the_new_one_of_so_many_steps_ago():
    for lag in (0, 1, 2):
        rows = stream(lag)
        for step, (ids, epochs, views) in enumerate(rows):
            if step < lag:
                assert len(ids) == 4
                continue
            old, of = (np.array([ids, epochs])[:, :4], np.array(rows[step - lag][:2])[:, -4:])
            assert (old == of).all() and views == [1] * 4 + [0] * 4


def test_once_has_the_new_halves_alone():
    assert stream(None) == [[column[-4:] for column in rows] for rows in stream(1)]


def test_lag_two_learns_from_the_logits_of_two_steps_ago():
    criterion, torch_seed = ablations.TwoStreams(5, capacity=2, alpha=2.0, temperature=3.0), torch.manual_seed(0)
    halves = [torch.randn(2, 5, generator=torch_seed) for _ in range(6)]
    targets, said = torch.tensor([0, 1, 2, 3]), {}
    for t in range(6):
        old = [halves[t - 2] + 0.5] if t >= 2 else []
        logits = torch.cat((*old, halves[t])).requires_grad_()
        ids = torch.tensor([10 * (t - 2), 10 * (t - 2) + 1] * bool(old) + [10 * t, 10 * t + 1])
        loss = criterion(logits, targets[-len(logits) :], ids)
        wanted = fused_lb_loss(logits, targets[-len(logits) :], said.get(t - 2), alpha=2.0, temperature=3.0)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        said[t] = halves[t]
    state = criterion.state_dict()
    again = ablations.TwoStreams(5, capacity=2, alpha=2.0, temperature=3.0)
    again.load_state_dict(state)
    assert again(logits, targets, ids + 20).item() == criterion(logits, targets, ids + 20).item()


def test_lag_zero_teaches_in_one_direction():
    logits = torch.randn(4, 5, generator=torch.manual_seed(0)).requires_grad_()
    criterion = ablations.OneDirection(alpha=2.0, temperature=3.0)
    loss = criterion(logits, torch.tensor([0, 1, 0, 1]))
    first, second = (torch.log_softmax(half / 3.0, 1) for half in logits.chunk(2))
    kl = (second.detach().exp() * (second.detach() - first)).sum(1).mean()
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1])) + 2.0 * 9.0 * kl
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(one, logits)[0] for one in (loss, wanted))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert criterion.parts.lb.item() == pytest.approx(9.0 * kl.item(), rel=1e-5)


def test_lag_one_has_the_images_of_dlb():
    config = override(RunConfig(), source="digits", per_class=4, batch_size=8, padding=1, flip=False)
    data = open_data(config.data)
    ours = ablations.LagData(**vars(data))
    ours.variant = ablations.Variant("", "dlb", 1, 1)
    options = {"overlap": True, "seed": 3, "device": torch.device("cpu")}
    for mine, theirs in zip(ours.train_loader(**options), data.train_loader(**options), strict=True):
        assert torch.equal(mine.images, theirs.images) and torch.equal(mine.ids, theirs.ids)
    for view, same in ((0, True), (1, False)):  # whether a repeated half has the pixels of its first visit
        ours.variant = ablations.Variant("", "dlb", 1, view)
        before, now = list(ours.train_loader(**options))[:2]
        assert torch.equal(before.images[-4:], now.images[:4]) == same


def test_all_variants_are_run_once(tmp_path, monkeypatch):
    study = {
        "common": {"preset": "digits", "data": {"per_class": 4, "batch_size": 8, "label_noise": 0.4},
                   "train": {"max_steps": 6, "eval_every": 3}},
        "seeds": [0, 1], "networks": {"net": None}, "noises": {"sym": None},
        "methods": {"dlb": {"loss": {"method": "dlb"}, "settings": [{"loss": {"alpha": 2.0}}]}},
        "tuning": {"network": "net", "noise": "sym", "seed": 9},
        "tables": [{"network": "net", "methods": ["dlb"], "noises": ["sym"]}],
    }  # fmt: skip
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(study))
    out, chosen = tmp_path / "o", {"kind": "chosen", "method": "dlb", "setting": {"loss": {"alpha": 2.0}}, "tried": []}
    out.mkdir()
    (out / "results.jsonl").write_text(json.dumps(chosen) + "\n")
    command = ["--protocol", str(tmp_path / "p.yaml"), "--out", str(out)]
    with pytest.raises(ValueError, match="--only lag3 fits none of 8 runs"):
        ablations.main([*command, "--only", "lag3"])
    assert ablations.main([*command, "--only", "*/seed0"]) == 0
    lines = compare.read_results(out / "results.jsonl")[1:]
    assert [line["cell"] for line in lines] == [f"ablation/net/{name}/sym/seed0" for name in ablations.VARIANTS]
    assert {line["steps"] for line in lines} == {6} and {line["config"].get("alpha") for line in lines[:3]} == {2.0}
    assert [line["images"] for line in lines] == [48, 40, 44, 24]  # the first batches of lag 1 and 2 have no old half
    monkeypatch.setattr(ablations, "train_run", lambda *a, **k: pytest.fail("trained again"))
    assert ablations.main([*command, "--only", "*/seed0"]) == 0

    def diverge(*args, **options):
        raise TrainingDiverged("the loss became NaN; lower the learning rate")

    monkeypatch.setattr(ablations, "train_run", diverge)
    before = compare.claimed

    def late(path, asked):  # another command ends between the first look at the results and the lock
        compare.write_results(path / "results.jsonl", [chosen, {**lines[0], "cell": "ablation/net/lag0/sym/seed1"}])
        return before(path, asked)

    monkeypatch.setattr(compare, "claimed", late)
    assert ablations.main([*command, "--only", "*/seed1"]) == 0
    found = compare.read_results(out / "results.jsonl")[1:]
    assert [line["cell"] for line in found] == [f"ablation/net/{name}/sym/seed1" for name in ablations.VARIANTS]
    assert [line.get("diverged") for line in found] == [None] + 3 * ["the loss became NaN"]
