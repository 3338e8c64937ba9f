"""The compiled resize has torch's pixels, bit for bit, on every instruction set, and refuses what does not fit."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlb_fast.data.transforms.crops import SCHEMA, resized_crops

Box = tuple[int, int, int, int, bool]  # top, left, height, width, flip
NONE = (None, 0, 0, 0, 0, 0, False, None)  # no second view and no table

pytestmark = pytest.mark.skipif(resized_crops() is None, reason="the op is not built here")


def by_torch(image: torch.Tensor, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The definition: crop, torch's antialiased resize, flip."""
    top, left, h, w, flip = box
    window = image[:, top : top + h, left : left + w]
    view = F.interpolate(window[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return view.flip(2) if flip else view


def draw_box(rng: random.Random, height: int, width: int) -> Box:
    h, w = (rng.choice([1, side, rng.randint(1, side)]) for side in (height, width))
    return rng.randint(0, height - h), rng.randint(0, width - w), h, w, rng.random() < 0.5


def compare(seed: int, cases: int) -> dict[str, int]:
    """Random sizes, boxes and layouts; how many of which kind were compared. Raises at the first other pixel."""
    op, rng, seen = resized_crops(), random.Random(seed), {"shrunk by more than three": 0, "enlarged": 0, "strided": 0}
    torch.manual_seed(seed)
    for case in range(cases):
        channels = rng.choice([3, 3, 3, 1, 4])
        height, width = (rng.choice([1, 2, rng.randint(1, 40), rng.randint(1, 700)]) for _ in "hw")
        pixels = torch.randint(0, 256, (height + 1, width + 2, channels), dtype=torch.uint8)
        if rng.random() < 0.3:
            pixels = (pixels > 127).to(torch.uint8) * 255  # the ends of the range
        image = pixels[1:, 2:].permute(2, 0, 1)
        layout = rng.choice(["last", "first", "window", "window"])
        if layout != "window":
            image = image.contiguous() if layout == "first" else image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        side = rng.choice([12, 64, 300])
        size = rng.randint(1, side), rng.choice([rng.randint(1, side), 32, 224])
        rows = torch.zeros(3, *size, channels, dtype=torch.uint8)
        if rng.random() < 0.2:
            rows = torch.zeros(3, channels, *size, dtype=torch.uint8).permute(0, 2, 3, 1)
        boxes = draw_box(rng, height, width), draw_box(rng, height, width)
        op(image, rows, 0, *boxes[0], rows, 2, *boxes[1], None)
        table = torch.randn(channels, 256)
        values = torch.empty_strided(rows.shape, rows.stride()).zero_()
        op(image, values, 0, *boxes[0], values, 2, *boxes[1], table)
        for row, box in zip((0, 2), boxes, strict=True):
            wanted = by_torch(image, box, size)
            assert torch.equal(rows[row].permute(2, 0, 1), wanted), (case, tuple(image.shape), size, box, layout)
            assert torch.equal(values[row], table[torch.arange(channels), rows[row].long()]), (case, "by the table")
            seen["shrunk by more than three"] += box[3] > 3 * size[1]
            seen["enlarged"] += box[3] < size[1]
            seen["strided"] += layout == "first"
        assert not rows[1].any() and not values[1].any(), (case, "the row between")
    return seen


@pytest.mark.slow
def test_every_pixel_is_that_of_torch() -> None:
    """tests/test_cpu_isa.py compares fewer, on every instruction set."""
    assert all(count > 40 for count in compare(5, 1000).values())


@pytest.mark.slow
@pytest.mark.parametrize("out", [224, 96, 7])
def test_the_weights_of_every_size(out: int) -> None:
    """One axis at a time, many lines each: one weight off by one unit would show."""
    op = resized_crops()
    torch.manual_seed(out)
    for size in range(1, 800, 1 if out == 224 else 5):
        wide = torch.randint(0, 256, (3, 64, size), dtype=torch.uint8)
        for image, (h, w) in ((wide, (64, out)), (wide.transpose(1, 2), (out, 64))):
            rows = torch.zeros(1, h, w, 3, dtype=torch.uint8)
            op(image, rows, 0, 0, 0, *image.shape[1:], False, *NONE)
            assert torch.equal(rows[0].permute(2, 0, 1), by_torch(image, (0, 0, *image.shape[1:], False), (h, w))), size


def test_the_compiled_schema_is_the_python_one() -> None:
    compiled = torch._C.parse_schema(f"dlb_fast::{SCHEMA}")
    assert str(resized_crops()._schema) == str(compiled)


def test_opcheck() -> None:
    image, a, b = (torch.zeros(s, dtype=torch.uint8) for s in ((3, 9, 8), (2, 4, 4, 3), (2, 5, 4, 3)))
    torch.library.opcheck(resized_crops(), (image, a, 1, 1, 1, 7, 6, True, b, 0, 0, 0, 9, 8, False, None))
    floats = torch.zeros(2, 4, 4, 3)
    torch.library.opcheck(resized_crops(), (image, floats, 1, 1, 1, 7, 6, True, *NONE[:-1], torch.zeros(3, 256)))


GOOD: dict[str, Any] = {"image": (3, 9, 8), "images": (2, 4, 4, 3), "row": 0, "box": (0, 0, 9, 8)}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": (9, 8)}, r"image must be uint8 \(channels, height, width\), got 2 dimensions"),
        ({"image": (0, 9, 8)}, "image must be uint8"),
        ({"images": (4, 4, 3)}, r"images must be \(rows, .* uint8 without, got 3 dimensions"),
        ({"images": (2, 4, 4, 1)}, "image's 3 channels in its last dimension, got 1"),
        ({"images": (2, 0, 4, 3)}, "must have pixels, got 0 x 4"),
        ({"row": 2}, r"row must be in \[0, 2\), got 2"),
        ({"row": -1}, "row must be in"),
        ({"box": (1, 0, 9, 8)}, r"must lie inside the image of 9 x 8, got \(1, 0, 9, 8\)"),
        ({"box": (0, -1, 9, 8)}, "must lie inside"),
        ({"box": (0, 0, 9, 0)}, "must lie inside"),
        ({"box": (0, 2**62, 9, 2**62)}, "must lie inside"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, second: bool) -> None:
    case = {**GOOD, **change}
    image, rows, good = (
        torch.zeros(case[k] if k in case else GOOD["images"], dtype=torch.uint8) for k in ("image", "images", "good")
    )
    view = (rows, case["row"], *case["box"], False)
    first = (good, 1, 0, 0, 1, 1, False) if second else view
    with pytest.raises(RuntimeError, match=message):
        resized_crops()(image, *first, *((*view, None) if second else NONE))


def test_other_dtypes_are_refused() -> None:
    image, rows = torch.zeros(3, 9, 8), torch.zeros(2, 4, 4, 3)
    table = torch.zeros(3, 256)
    for a, b, t, message in (
        (image, rows.byte(), None, "image must be uint8"),
        (image.byte(), rows, None, "float32 with a table and uint8 without"),
        (image.byte(), rows.byte(), table, "float32 with a table and uint8 without"),
        (image.byte(), rows, table[:1], r"table must be contiguous float32 \(channels, 256\)"),
        (image.byte(), rows, table.double(), "table must be contiguous float32"),
        (image.byte(), rows, table.t().contiguous().t(), "table must be contiguous float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            resized_crops()(a, b, 0, 0, 0, 9, 8, False, *NONE[:-1], t)


def test_the_interpreter_runs_meanwhile() -> None:
    image, rows = torch.zeros(3000, 3000, 3, dtype=torch.uint8).permute(2, 0, 1), torch.zeros(1, 1500, 1500, 3).byte()
    span: list[float] = []

    def work() -> None:
        span.append(time.perf_counter())
        for _ in range(4):
            resized_crops()(image, rows, 0, 0, 0, 3000, 3000, False, *NONE)
        span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    marks = []
    while thread.is_alive():
        marks.append(time.perf_counter())
        time.sleep(0)
    assert sum(span[0] < mark < span[1] for mark in marks) > 20  # holding the lock, a call lets nobody in
