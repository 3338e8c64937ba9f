"""The CPU works through a batch in pieces small enough for one thread: more than one piece gives what one would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlb_fast.data.normalise import CPU_CHUNK, Normalise
from dlb_fast.data.resident_views import gather_on_host

SHAPE = (37, 32, 32, 3)  # several pieces and a short last one


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalisation(channels_last):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, SHAPE, generator=generator).byte()
    assert pixels.numel() > 3 * CPU_CHUNK and pixels.numel() % CPU_CHUNK
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    got = Normalise(mean, std, channels_last=channels_last)(pixels)
    want = (pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(got.double(), want.permute(0, 3, 1, 2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flipped", ["none", "some", "all"])
def test_windows(channels, flipped):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 40, 41, channels), dtype=np.uint8)
    count, size = 90, (32, 33)
    assert count * size[0] * size[1] > 2 * CPU_CHUNK
    flips = {"none": np.zeros(count), "some": rng.integers(0, 2, count), "all": np.ones(count)}[flipped]
    rows, tops, lefts = (rng.integers(0, high, count) for high in (9, 9, 9))
    got = gather_on_host(images, np.stack([rows, tops, lefts, flips.astype(np.int64)]), size)
    for view, row, top, left, flip in zip(got.numpy(), rows, tops, lefts, flips, strict=True):
        window = images[row, top : top + size[0], left : left + size[1]]
        assert np.array_equal(view, window[:, ::-1] if flip else window)
