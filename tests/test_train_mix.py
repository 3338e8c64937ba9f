"""Mixed images in the trainer: what the criterion is given, which methods take them, and runs from the command line."""

from __future__ import annotations

import pytest
import torch
from builders import exported, train, train_stopped
from torch import nn

from dlb_fast import LastBatchLoss, LsrKDLoss
from dlb_fast.data import ArrayDataset, Batch, Mix, RandomErasing, ResidentLoader
from dlb_fast.methods.ce import CrossEntropy
from dlb_fast.presets import load_preset
from dlb_fast.train.config import RunConfig, from_dict, override, to_dict
from dlb_fast.train.flags import parse_flags
from dlb_fast.train.loop import accepted_inputs, training_loss
from dlb_fast.train.methods import METHODS, resolve

torch.set_num_threads(1)

TINY = {"source": "synthetic:40,4,8", "per_class": None, "label_noise": 0.0}
BASE = override(load_preset("digits"), **TINY, batch_size=8, epochs=2, eval_every=None)
MIXED = override(BASE, mixup_alpha=0.4, cutmix_alpha=1.0)


def batches(mix=None, count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = ArrayDataset(images, torch.arange(24) % 5, [str(i) for i in range(5)], "random")
    return list(ResidentLoader(data, 8, mix=mix or Mix(mixup_alpha=1.0, mode="elem")))[:count]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()


def double(batch):
    batch.images = batch.images.double()
    return batch


@pytest.mark.parametrize("forward", ["joint", "two_pass"])
def test_pairs_and_dense_targets_train_alike(forward):
    """A criterion that knows pairs gets them; the same one with a face that does not gets dense targets."""

    class Hidden(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, logits, target, ids, num_old):
            assert target.dim() == 2 and torch.allclose(target.sum(1), torch.ones(len(target)).double())
            return self.inner(logits, target, ids, num_old=num_old)

    pair, dense = network(), network()
    criteria = LastBatchLoss(5), Hidden(LastBatchLoss(5))
    for batch in batches():
        for model, criterion in zip((pair, dense), criteria, strict=True):
            loss = training_loss(model, criterion, double(batch), forward=forward)
            loss.backward()
    assert pair[1].weight.grad.abs().sum() > 0.1
    torch.testing.assert_close(pair[1].weight.grad, dense[1].weight.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("criterion", [LastBatchLoss(3), CrossEntropy(), LsrKDLoss()], ids=["dlb", "ce", "lsr_kd"])
def test_the_class_with_the_larger_share_is_what_train_top1_counts(criterion):
    class Fixed(nn.Module):
        def forward(self, images):
            return torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]], requires_grad=True) + 0

    first, second, share = torch.tensor([0, 0, 2]), torch.tensor([1, 1, 1]), torch.tensor([0.7, 0.2, 0.6])
    batch = Batch(torch.zeros(3, 1), first, torch.arange(3), 0, 0, 0, second, share)
    training_loss(Fixed(), criterion, batch)
    assert criterion.parts.correct == 1  # row 0; row 1 mostly shows class 1, row 2 class 2
    assert {"ids", "target_b", "lam"} <= accepted_inputs(criterion)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_trains_on_mixed_images_or_says_why_not(method, tmp_path):
    config = override(MIXED, method=method, epochs=1)
    if METHODS[method].mixes:
        result = train(config, tmp_path)
        assert result["step"] >= 5 and result["loss"] > 0
    else:
        with pytest.raises(
            ValueError, match=f"must be 0 with method {method}: .*methods for mixed images: ce, two_view, dlb, "
        ):
            train(config, tmp_path)


def test_options_that_need_one_class_refuse_mixed_images(tmp_path):
    for values, name in (
        ({"method": "lsr_kd", "correct_share": 0.9}, "correct_share"),
        ({"method": "mr_kd", "swap": True}, "swap"),
        ({"method": "mr_kd", "ensemble_lr": 0.1}, "ensemble_lr"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs one class per image"):
            resolve(override(MIXED, **values))
    resolve(override(MIXED, method="mr_kd"))


def test_mixing_changes_the_run_and_a_resume_does_not(tmp_path):
    train(BASE, tmp_path / "plain")
    assert train(MIXED, tmp_path / "whole")["lb"] > 0
    train_stopped(MIXED, tmp_path / "part", 13)
    train(MIXED, tmp_path / "part", resume=True)
    plain, whole, part = (exported(tmp_path / name) for name in ("plain", "whole", "part"))
    assert whole == part and plain != whole


def test_the_command_line_reaches_every_option():
    flags = (
        "--mixup-alpha 0.2 --cutmix-alpha 1.0 --mix-prob 0.9 --mix-switch-prob 0.3 --mix-mode elem "
        "--rand-augment 2,9 --cutout 3 --erase-prob 0.25 --erase-area 0.1 0.2 --erase-mode pixel"
    )
    config = parse_flags(RunConfig, RunConfig(), flags.split(), "dlb-fast train")
    assert config.augment.mix() == Mix(0.2, 1.0, 0.9, 0.3, "elem")
    assert [repr(t) for t in config.augment.transforms()] == ["RandAugment(2, magnitude=9)", "Cutout(3, fill=[0])"]
    assert repr(config.augment.erase()) == repr(RandomErasing(0.25, area=(0.1, 0.2), mode="pixel"))
    assert from_dict(to_dict(config)) == config
    assert RunConfig().augment.erase() is None
    assert RunConfig().augment.mix() is None and RunConfig().augment.transforms() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rand_augment": "2"}, "config: rand_augment must be N,M"),
        ({"rand_augment": "2,31"}, "config: RandAugment: magnitude must be at most 30"),
        ({"erase_prob": 1.5}, "config: RandomErasing: prob must be in"),
        ({"cutout": -3}, "config: Cutout: size must be at least 1"),
        ({"mixup_alpha": -0.1}, "config: Mix: mixup_alpha must be finite and >= 0"),
        ({"cutmix_alpha": 1.0, "mix_prob": 2.0}, "config: Mix: prob must be in"),
    ],
)
def test_wrong_numbers_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        override(RunConfig(), **values)


def test_rand_augment_cutout_and_erasing_reach_the_images(tmp_path):
    results = [
        train(override(BASE, **values), tmp_path / str(k))["loss"]
        for k, values in enumerate([{}, {"rand_augment": "2,9"}, {"cutout": 4}, {"flip": True}, {"erase_prob": 0.5}])
    ]
    assert len(set(results)) == 5
