"""Random shapes, strides, options and values through the CUDA kernels' PTX, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import harness
from .machine import Kernel
from .oracle import Stream, compare

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choices:
    """What a case is drawn from. ``rows``: at most four of long ones, where nothing else is said."""

    dtypes: Sequence[torch.dtype] = FLOATS
    classes: Sequence[int] = (
        1, 2, 7, 10, 16, 31, 33, 100, 127, 129, 250, 500, 999, 1000, 1024, 1025, 1500, 4097, 16390,
    )  # fmt: skip
    rows: Sequence[int] = ()
    kinds: Sequence[str] = ("none", "logits", "roll", "virtual", "probabilities")
    forms: Sequence[str] = ("labels", "labels", "pair", "dense")
    clusters: Sequence[int] = (0, 8)  # the largest
    # Elements between the rows of an array, and before the first one.
    strides: Sequence[tuple[int, int]] = ((0, 0), (0, 0), (1, 0), (0, 3), (8, 0), (5, 2))
    stored: Sequence[torch.dtype] = FLOATS  # of a teacher, beside the logits' own


def strided(
    shape: tuple[int, int], dtype: torch.dtype, pick: random.Random, g: torch.Generator, scale: float,
    strides: Sequence[tuple[int, int]],
) -> torch.Tensor:  # fmt: skip
    (rows, classes), (padding, start) = shape, pick.choice(strides)
    storage = torch.full((rows * (classes + padding) + start,), 1e4, dtype=torch.float32).to(dtype)
    view = storage[start:].view(rows, classes + padding)[:, :classes]
    # 3e7 log2 e is off by more than 1 in float32, and float16 has no such number.
    offset = pick.choice([0.0, 0.0, 0.0, 50.0, 50.0, 50.0 if dtype == torch.float16 else 3e7])
    return view.copy_((torch.randn(rows, classes, generator=g) * scale + offset).to(dtype))


def steps(
    stream: Stream, logits: torch.Tensor, target: torch.Tensor, pick: random.Random, g: torch.Generator,
    options: dict[str, Any], with_ids: Sequence[bool] = (True, True, False), with_mask: Sequence[bool] | None = None,
    strides: Sequence[tuple[int, int]] = Choices.strides,
) -> list[str]:  # fmt: skip
    """A few batches through a buffer: the same, the next, some of it; rows that are not finite."""
    (rows, classes), dtype = logits.shape, logits.dtype
    words, ids, counted = [], torch.arange(rows), target
    for _ in range(pick.randint(2, 4)):
        again = pick.choice([-1, -1, 0, 1])
        moved = pick.choice(["same", "next", "next", "some"])
        if moved != "same":  # what was stored last becomes the first rows, or all but one in three of them
            count, *kept = stream.slots[6:].chunk(2)[int(stream.slots[0])].tolist()
            fresh = ids.max() + 1 + torch.arange(rows)
            fresh[: min(count, rows)] = torch.tensor(kept[: min(count, rows)], dtype=torch.int64)
            ids = torch.where(torch.arange(rows) % 3 == 1, -fresh, fresh) if moved == "some" else fresh
        spoil = pick.choice([None, None, torch.nan, torch.inf, -torch.inf, 7e4])
        if spoil is not None:
            # Rows that count for nothing: what a loss makes of them is compared elsewhere.
            counted = target if target.dim() == 2 else target.clone()
            logits[rows // 2 :: 2, pick.randrange(classes)] = spoil
            if target.dim() == 1:
                counted[rows // 2 :: 2] = -100
        masked = pick.random() < 0.3 if with_mask is None else pick.choice(with_mask)
        stream.step(
            logits, counted, ids if pick.choice(with_ids) else None, pick.choice([None, pick.randint(0, rows)]), again,
            torch.rand(rows, generator=g) < 0.7 if masked else None,
            losses=spoil is None or target.dim() == 1, **options,
        )  # fmt: skip
        words += [moved, f"again {again}"]
        logits, counted = strided((rows, classes), dtype, pick, g, 2.0, strides), target
    return words


ANYTHING = Choices()


def one_case(seed: int, among: Choices = ANYTHING, kernel: Callable[[str, str], Kernel] = harness.kernel) -> str:
    """Runs one case; returns the words that describe it."""
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    classes, dtype = pick.choice(among.classes), pick.choice(among.dtypes)
    rows = pick.choice(among.rows or ((1, 2, 3, 4, 5, 8, 13) if classes < 4000 else (1, 2, 4)))
    clusters = pick.choice(among.clusters)
    emulator = harness.Emulator(
        multiprocessors=pick.choice([1, 4, 100]), largest_cluster=clusters, seed=seed, kernel=kernel
    )
    logits = strided((rows, classes), dtype, pick, g, pick.choice([0.1, 2.0, 10.0]), among.strides)
    target = torch.randint(0, classes, (rows,), generator=g)
    right = torch.rand(rows, generator=g) < 0.3  # of many classes a label at random never is
    target = torch.where(right, logits.argmax(1), target)
    options: dict[str, Any] = {
        "alpha": pick.choice([0.0, 0.5, 1.0]), "temperature": pick.choice([1.0, 2.5, 4.0]),
        "reduction": pick.choice(["mean", "sum", "none"]), "label_smoothing": pick.choice([0.0, 0.0, 0.1]),
    }  # fmt: skip
    kind = pick.choice(among.kinds)
    if pick.random() < 0.3:
        target[torch.rand(rows, generator=g) < 0.5] = -100
    if pick.random() < 0.25:
        options["weight"] = torch.rand(classes, generator=g) + 0.1
    form = pick.choice(among.forms)
    if form == "pair":
        options["target_b"] = torch.randint(0, classes, (rows,), generator=g)
        options["lam"] = torch.rand(rows, generator=g)
    elif form == "dense":
        target = torch.softmax(torch.randn(rows, classes, generator=g), 1)
    if kind == "virtual" and form == "labels" and pick.random() < 0.5:
        options["correct_share"] = 0.9
    if kind == "roll":
        capacity = pick.choice([(rows + 1) // 2, pick.randint(max(1, rows - 2), rows + 1)])
        stream = Stream(emulator, classes, capacity, pick.choice([dtype, dtype, *among.stored]))
        return " ".join([kind, form, *steps(stream, logits, target, pick, g, options, strides=among.strides), *options])
    teacher, original = None, logits.clone()
    if kind in ("logits", "probabilities"):
        taught = pick.randint(0, rows)
        teacher = strided((max(taught, 1), classes), pick.choice([dtype, *among.stored]), pick, g, 2.0, among.strides)
        teacher = teacher[:taught]
        if kind == "probabilities":
            teacher = torch.softmax(teacher.float(), 1)
        if pick.random() < 0.3:
            options["kd_mask"] = torch.rand(taught, generator=g) < 0.6
    call = {"kind": kind, **options}
    result = emulator.last_batch(logits, target, teacher=teacher, **call)
    compare(result, original, target, teacher, **call)
    return " ".join([kind, form, *options])
