"""What `Mix` draws: shares, boxes, partners; and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_mix import MIXES, numbered

from dlb_fast.data import Mix, OverlapLoader, ResidentLoader
from dlb_fast.data.rng import Draws
from dlb_fast.data.transforms.mixing import partners, symmetric_beta


def test_shares_follow_beta_and_the_probabilities_hold():
    for alpha in (0.1, 0.2, 1.0, 3.0, 1e-3, 500.0):
        draws = Draws(np.arange(20000, dtype=np.uint64) * np.uint64(7919))
        values = symmetric_beta(alpha, draws)
        assert draws.counter == 2 and ((values >= 0) & (values <= 1)).all()
        assert values.mean() == pytest.approx(0.5, abs=0.012)
        assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
        # the fourth moment tells the shape; Beta's is known in closed form
        central = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
        assert ((values - 0.5) ** 4).mean() == pytest.approx(central, rel=0.08)
    mix = Mix(mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.6, switch_prob=0.25, mode="elem")
    table = mix._draw(0, 0, 0, 20000, 0, (32, 48))
    mixed, boxed = table[0] != np.arange(20000), table[5] > 0
    assert mixed.mean() == pytest.approx(0.6, abs=0.02)
    assert boxed.sum() / mixed.sum() == pytest.approx(0.25, abs=0.03)  # boxes of no area count as boxes, but rarely
    assert (table[2][~mixed] == 1).all() and table[3:].min() >= 0
    assert ((table[3:5] + table[5:]).max(1) <= (32, 48)).all()


def test_draws_differ_between_halves_epochs_seeds_and_rows():
    mix = Mix(mixup_alpha=1.0, mode="elem")
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    shares = [mix._draw(*place, 4, rank, (8, 8))[2] for place in places for rank in range(2)]
    flat = np.concatenate(shares)
    assert len(np.unique(flat)) == len(flat)
    batch = Mix(mixup_alpha=1.0)._draw(0, 0, 0, 4, 1, (8, 8))[2]
    assert len(np.unique(batch)) == 1  # one share for the half
    assert (batch == Mix(mixup_alpha=1.0)._draw(0, 0, 0, 4, 0, (8, 8))[2]).all()  # of all ranks


@pytest.mark.parametrize("rows", range(1, 12))
def test_partners(rows):
    order = partners(rows)
    assert sorted(order.tolist()) == list(range(rows))
    assert rows == 1 or (order != np.arange(rows)).all()
    assert rows % 2 or (order[order] == np.arange(rows)).all()


def test_bad_arguments_are_named():
    for values, message in [
        ({}, "both 0"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be finite and >= 0, got -1.0"),
        ({"cutmix_alpha": math.inf}, "cutmix_alpha must be finite"),
        ({"mixup_alpha": math.nan}, "mixup_alpha must be finite"),
        ({"mixup_alpha": 1.0, "prob": 1.5}, r"prob must be in \[0, 1\], got 1.5"),
        ({"mixup_alpha": 1.0, "mode": "pair"}, "mode must be one of batch, elem, got 'pair'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mix(**values)
    mix = MIXES[0]
    with pytest.raises(TypeError, match=r"mix must be a dlb_fast\.data\.Mix or None, got float"):
        ResidentLoader(numbered(), 8, mix=0.2)
    for kind in (ResidentLoader, OverlapLoader):
        with pytest.raises(ValueError, match=r"mix needs a floating dtype, got torch\.uint8"):
            kind(numbered(), 8, mix=mix, dtype=torch.uint8)
    batch = next(iter(ResidentLoader(numbered(), 8, mix=mix)))
    with pytest.raises(ValueError, match="mixed already"):
        mix(batch, steps_per_epoch=5)
    bare = dataclasses.replace(batch, target_b=None, lam=None)
    with pytest.raises(TypeError, match=r"must be floating point to be mixed, got torch\.uint8"):
        mix(dataclasses.replace(bare, images=bare.images.byte()), steps_per_epoch=5)
    with pytest.raises(ValueError, match="steps_per_epoch is 5, but the batch is step 7"):
        mix(dataclasses.replace(bare, step=7), steps_per_epoch=5)
    with pytest.raises(ValueError, match="no half before it"):
        mix(dataclasses.replace(bare, num_old=2), steps_per_epoch=5)
