"""The OpenCV crop: imported late, told to use no threads, same boxes as the antialiased one."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest
import torch

from dlb_fast.data import aliased
from dlb_fast.data.aliased import AliasedRandomResizedCrop
from dlb_fast.data.augment import RandomResizedCrop
from dlb_fast.data.view_rng import ViewRng


def fake_cv2(calls: list[object]) -> types.ModuleType:
    """OpenCV's face, with a nearest-neighbour resize."""
    module = types.ModuleType("cv2")
    module.INTER_LINEAR = 1  # type: ignore[attr-defined]
    module.setNumThreads = calls.append  # type: ignore[attr-defined]

    def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
        assert interpolation == 1 and pixels.flags.c_contiguous and pixels.dtype == np.uint8
        calls.append(pixels.shape)
        rows, columns = (np.arange(n) * m // n for n, m in zip(size[::-1], pixels.shape[:2], strict=True))
        return pixels[rows][:, columns]

    module.resize = resize  # type: ignore[attr-defined]
    return module


def test_same_box_as_the_antialiased_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setitem(sys.modules, "cv2", fake_cv2(calls))
    image = torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8).permute(2, 0, 1)
    crop = AliasedRandomResizedCrop(16)
    assert calls == [0]
    for sample in range(20):
        view = crop(image, ViewRng(0, 0, sample, 0))
        _, _, h, w = RandomResizedCrop(16).box(60, 90, ViewRng(0, 0, sample, 0))
        assert view.shape == (3, 16, 16) and calls[-1] == (h, w, 3)


def test_missing_opencv_is_named_and_nothing_else_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="opencv-python-headless"):
        AliasedRandomResizedCrop(16)
    importlib.reload(aliased)  # importing the module does not import OpenCV


def test_real_opencv_is_near_the_antialiased_crop() -> None:
    pytest.importorskip("cv2")
    y, x = np.mgrid[0:200, 0:300]
    smooth = np.stack([128 + 100 * np.sin(x / 40 + c) * np.cos(y / 50) for c in range(3)], -1).astype(np.uint8)
    image = torch.from_numpy(smooth).permute(2, 0, 1)
    for sample in range(10):
        mine = AliasedRandomResizedCrop(64)(image, ViewRng(0, 0, sample, 0)).float()
        other = RandomResizedCrop(64)(image, ViewRng(0, 0, sample, 0)).float()
        assert (mine - other).abs().mean() < 3
