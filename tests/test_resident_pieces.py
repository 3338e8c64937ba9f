"""The CPU works through a batch in pieces small enough for one thread: more than one piece gives what one would."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlb_fast.data.transforms.crops import windows
from dlb_fast.data.transforms.normalise import CPU_CHUNK, Normalise

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
def test_windows(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 40, 41, channels), dtype=np.uint8)
    rows, tops, lefts = (torch.from_numpy(rng.integers(0, 9, 90)) for _ in range(3))
    got = windows(torch.from_numpy(images), (32, 33))[rows, tops, lefts].view(-1, 32, 33, channels).numpy()
    for view, row, top, left in zip(got, rows, tops, lefts, strict=True):
        assert np.array_equal(view, images[row, top : top + 32, left : left + 33])
