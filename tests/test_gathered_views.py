"""The op that gathers a resident batch makes what numpy and torch make, bit for bit, and refuses what does not fit."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch

from dlb_fast.data import Compose, Cutout, Flip, PadCrop, ResidentLoader, resident_views
from dlb_fast.data.arrays import ArrayDataset
from dlb_fast.data.compiled import GATHER_SCHEMA, gathered_views
from dlb_fast.data.normalise import Normalise
from dlb_fast.data.resident_views import gather_on_host

pytestmark = pytest.mark.skipif(gathered_views() is None, reason="the op is not built here")

DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(rng: random.Random, views: int = 7) -> tuple[torch.Tensor, np.ndarray[Any, Any], tuple[int, int]]:
    """Images (N, H, W, c), places (4, n) and the size of a view."""
    height, width, channels = rng.randint(1, 40), rng.randint(1, 40), rng.choice([3, 3, 1, 2, 4])
    images = torch.randint(0, 256, (rng.randint(1, 5), height, width, channels), dtype=torch.uint8)
    h, w = rng.randint(1, height), rng.randint(1, width)
    limits = (len(images), height - h + 1, width - w + 1, 2)
    return images, np.array([[rng.randrange(high) for _ in range(views)] for high in limits]), (h, w)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_gather_and_the_normalisation_in_two_steps(dtype: torch.dtype, channels_last: bool) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        images, places, size = draw(rng)
        c = images.shape[3]
        mean, std = [rng.random() for _ in range(c)], [rng.random() + 0.1 for _ in range(c)]
        normalise = Normalise(mean, std, dtype, channels_last=channels_last)
        views = gather_on_host(images.numpy(), places, size)
        want, out = (normalise.empty(tuple(views.shape), torch.uint8) for _ in range(2))
        normalise.into(want, views)
        gathered_views()(images, torch.from_numpy(places), normalise.table(c), out)
        assert torch.equal(out, want) and out.stride() == want.stride()


def pictures() -> ArrayDataset:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 9, 8), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    return ArrayDataset(images, np.arange(40) % 5, list("abcde"))


TRANSFORMS = [None, PadCrop(4), Flip(), Compose([PadCrop(3), Flip()]), Compose([Flip(), Cutout(3)])]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_loader_makes_the_same_batches_with_and_without_it(
    transform: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures()
    found = []
    for op in (gathered_views(), None):
        monkeypatch.setattr(resident_views, "gathered_views", lambda op=op: op)
        loader = ResidentLoader(data, 8, transform=transform, mean=(0.4,) * 3, std=(0.2,) * 3, dtype=dtype)
        found.append([batch for _ in range(2) for batch in loader])
    assert len(found[0]) == 20
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.ids, other.ids)
        assert one.images.stride() == other.images.stride()


def test_a_batch_that_is_held_is_not_written_again() -> None:
    loader = ResidentLoader(pictures(), 8, transform=PadCrop(2))
    held = [(batch.images, batch.images.clone()) for _ in range(3) for batch in loader]
    assert all(torch.equal(images, copy) for images, copy in held)


def test_a_dtype_that_the_op_does_not_know_takes_the_way_of_torch() -> None:
    loader = ResidentLoader(pictures(), 8, transform=PadCrop(2), dtype=torch.float8_e4m3fn)
    plain = ResidentLoader(pictures(), 8, transform=PadCrop(2))
    for one, other in zip(loader, plain, strict=True):
        assert torch.equal(one.images.float(), other.images.to(torch.float8_e4m3fn).float())


def test_a_copy_of_a_loader_does_not_carry_its_spare_memory() -> None:
    loader = ResidentLoader(pictures(), 8, transform=PadCrop(2))
    before = len(pickle.dumps(loader))
    for _ in loader:
        pass
    assert len(pickle.dumps(loader)) < before + 1000


def test_more_views_than_one_thread_takes() -> None:
    images = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8)
    places = np.stack([np.arange(300)[::-1], np.zeros(300, int), np.zeros(300, int), np.arange(300) % 2])
    out = torch.empty(300, 32, 32, 3)
    gathered_views()(images, torch.from_numpy(places), torch.arange(256.0).repeat(3, 1), out)
    assert torch.equal(out, gather_on_host(images.numpy(), places, (32, 32)).float())


def test_the_compiled_schema_is_the_python_one() -> None:
    assert str(gathered_views()._schema) == str(torch._C.parse_schema(f"dlb_fast::{GATHER_SCHEMA}"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", torch.zeros(2, 6, 5, 3), "images must be contiguous uint8"),
        ("images", torch.zeros(2, 3, 6, 5, dtype=torch.uint8).permute(0, 2, 3, 1), "images must be contiguous uint8"),
        ("images", torch.zeros(6, 5, 3, dtype=torch.uint8), "got 3 dimensions"),
        ("places", torch.zeros(4, 2, dtype=torch.int32), r"places must be contiguous int64 \(4, n\)"),
        ("places", torch.zeros(3, 2, dtype=torch.int64), "places must be contiguous int64"),
        ("places", torch.tensor([[0, 2], [0, 0], [0, 0], [0, 0]]), r"\[:, 1\] = \(2, 0, 0\) leads out of 2 images"),
        ("places", torch.tensor([[0, -1], [0, 0], [0, 0], [0, 0]]), "leads out of"),
        ("places", torch.tensor([[0, 0], [3, 0], [0, 0], [0, 0]]), r"places\[:, 0\] = \(0, 3, 0\) leads out"),
        ("places", torch.tensor([[0, 0], [0, 0], [0, -1], [0, 0]]), "leads out of"),
        ("places", torch.tensor([[0, 0], [0, 0], [0, 2**62], [0, 0]]), "leads out of"),
        ("table", torch.zeros(3, 255), r"table must be contiguous \(3, 256\)"),
        ("table", torch.zeros(3, 256, dtype=torch.int32), "table must be uint8, float16"),
        ("out", torch.zeros(2, 4, 4, 3, dtype=torch.float64), "in the dtype of the table"),
        ("out", torch.zeros(3, 4, 4, 3), r"out must be \(2, height, width, 3\)"),
        ("out", torch.zeros(2, 7, 4, 3), "leads out of"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    given = {
        "images": torch.zeros(2, 6, 5, 3, dtype=torch.uint8), "places": torch.zeros(4, 2, dtype=torch.int64),
        "table": torch.zeros(3, 256), "out": torch.ones(2, 4, 4, 3),
    }  # fmt: skip
    gathered_views()(*given.values())
    assert not given["out"].any()
    with pytest.raises(RuntimeError, match=message):
        gathered_views()(*{**given, name: value}.values())
