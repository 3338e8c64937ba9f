"""Random shapes, strides, options and values through the CUDA kernels' PTX, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import harness
from .machine import Kernel
from .oracle import Stream, compare

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("none", "logits", "roll", "virtual", "probabilities")
FORMS = ("labels", "labels", "pair", "dense")
CLASSES = (1, 2, 7, 10, 16, 31, 33, 100, 127, 129, 250, 500, 999, 1000, 1024, 1025, 1500, 4097, 16390)


def strided(
    rows: int, classes: int, dtype: torch.dtype, pick: random.Random, g: torch.Generator, scale: float
) -> torch.Tensor:
    padding, start = pick.choice([(0, 0), (0, 0), (1, 0), (0, 3), (8, 0), (5, 2)])
    storage = torch.full((rows * (classes + padding) + start,), 1e4, dtype=torch.float32).to(dtype)
    view = storage[start:].view(rows, classes + padding)[:, :classes]
    return view.copy_((torch.randn(rows, classes, generator=g) * scale + pick.choice([0.0, 0.0, 50.0])).to(dtype))


def steps(
    stream: Stream, logits: torch.Tensor, target: torch.Tensor, pick: random.Random, g: torch.Generator,
    options: dict[str, Any], with_ids: Sequence[bool] = (True, True, False), with_mask: Sequence[bool] | None = None,
    padded: bool = True,
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
        logits, counted = strided(rows, classes, dtype, pick, g, 2.0), target
        if not padded:
            logits = logits.contiguous().clone()
    return words


def one_case(
    seed: int, dtypes: Sequence[torch.dtype] = FLOATS, all_classes: Sequence[int] = CLASSES,
    all_rows: Sequence[int] = (1, 2, 3, 4, 5, 8, 13), kinds: Sequence[str] = KINDS, forms: Sequence[str] = FORMS,
    kernel: Callable[[str, str], Kernel] = harness.kernel,
) -> str:  # fmt: skip
    """Runs one case; returns the words that describe it."""
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    classes, dtype = pick.choice(all_classes), pick.choice(dtypes)
    rows = pick.choice(all_rows) if classes < 4000 else pick.choice([1, 2, 4])
    clusters = pick.choice([0, 8])
    emulator = harness.Emulator(
        multiprocessors=pick.choice([1, 4, 100]), largest_cluster=clusters, seed=seed, kernel=kernel
    )
    logits = strided(rows, classes, dtype, pick, g, pick.choice([0.1, 2.0, 10.0]))
    target: torch.Tensor | None = torch.randint(0, classes, (rows,), generator=g)
    options: dict[str, Any] = {
        "alpha": pick.choice([0.0, 0.5, 1.0]), "temperature": pick.choice([1.0, 2.5, 4.0]),
        "reduction": pick.choice(["mean", "sum", "none"]), "label_smoothing": pick.choice([0.0, 0.0, 0.1]),
    }  # fmt: skip
    kind = pick.choice(kinds)
    if pick.random() < 0.3:
        target[torch.rand(rows, generator=g) < 0.5] = -100
    if pick.random() < 0.25:
        options["weight"] = torch.rand(classes, generator=g) + 0.1
    form = pick.choice(forms)
    if form == "pair":
        options["target_b"] = torch.randint(0, classes, (rows,), generator=g)
        options["lam"] = torch.rand(rows, generator=g)
    elif form == "dense":
        target = torch.softmax(torch.randn(rows, classes, generator=g), 1)
    if kind == "virtual" and form == "labels" and pick.random() < 0.5:
        options["correct_share"] = 0.9
    if kind == "roll":
        capacity = pick.randint(max(1, rows - 2), rows + 1)
        stream = Stream(emulator, classes, capacity, pick.choice([dtype, dtype, *FLOATS]))
        return " ".join([kind, form, *steps(stream, logits, target, pick, g, options), *options])
    teacher, original = None, logits.clone()
    if kind in ("logits", "probabilities"):
        taught = pick.randint(0, rows)
        teacher = strided(max(taught, 1), classes, pick.choice([dtype, *FLOATS]), pick, g, 2.0)[:taught]
        if kind == "probabilities":
            teacher = torch.softmax(teacher.float(), 1)
        if pick.random() < 0.3:
            options["kd_mask"] = torch.rand(taught, generator=g) < 0.6
    call = {"kind": kind, **options}
    result = emulator.last_batch(logits, target, teacher=teacher, **call)
    compare(result, original, target, teacher, **call)
    return " ".join([kind, form, *options])
