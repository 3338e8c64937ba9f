"""View randomness: one pure function, scalar and batched, the same numbers for ever."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from dlb_fast.data import SampleIndex, ViewRng, ViewRngs


def test_view_randomness_is_one_function_scalar_and_batched():
    epochs, ids, uses = np.array([0, 3, 3, 2**40]), np.array([5, 5, 9, 0]), np.array([0, 1, 0, 1])
    many = ViewRngs(11, epochs, ids, uses)
    ones = [ViewRng(11, int(e), int(i), int(u)) for e, i, u in zip(epochs, ids, uses, strict=True)]
    assert many.bits().tolist() == [one.bits() for one in ones]
    assert many.uniform(-1, 2).tolist() == [one.uniform(-1, 2) for one in ones]
    many.skip(3)
    for one in ones:
        one.skip(3)
    assert many.integer(7).tolist() == [one.integer(7) for one in ones]
    bounds = np.array([1, 2, 3, 2**32])
    assert many.integer(bounds).tolist() == [one.integer(int(b)) for one, b in zip(ones, bounds, strict=True)]
    assert ViewRng(0, 0, 0, 0).bits() == 0xE0C59F572EACB49A  # the same for ever, on any platform


def test_views_differ_in_each_key_and_look_uniform():
    base = (1, 2, 3, 0)
    assert ViewRng(*np.array(base)).bits() == ViewRng(*base).bits()  # NumPy integers too
    neighbours = [(2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]
    firsts = {ViewRng(*key).bits() for key in [base, *neighbours]}
    assert len(firsts) == 5
    rngs = ViewRngs(0, 0, np.arange(20_000), 0)
    values = rngs.uniform()
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(values, rngs.uniform())[0, 1]) < 0.03
    other = ViewRngs(0, 0, np.arange(20_000), 1).uniform()
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.03
    counts = np.bincount(rngs.integer(9), minlength=9) / 20_000
    assert np.abs(counts - 1 / 9).max() < 0.01
    generator = ViewRng(*base).torch_generator()
    assert torch.equal(
        torch.rand(3, generator=generator),
        torch.rand(3, generator=ViewRng(*base).torch_generator()),
    )
    assert ViewRng(*base).numpy_generator().random() == ViewRng(*base).numpy_generator().random()


def test_sample_index_is_an_int_that_survives_pickling():
    index = SampleIndex(7, seed=1, epoch=2, view=1, step=4)
    again = pickle.loads(pickle.dumps(index))
    assert again == 7 and (again.seed, again.epoch, again.view, again.step) == (1, 2, 1, 4)
    assert np.arange(10)[again] == 7 and torch.arange(10)[again] == 7 and list(range(10))[again] == 7
    assert again.rng().bits() == ViewRng(1, 2, 7, 1).bits()
