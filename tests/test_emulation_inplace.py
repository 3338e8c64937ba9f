"""The emulated CUDA kernels writing the gradient over the logits: the bits of the other way, in every regime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import harness
from emulation.oracle import batch, compare

pytestmark = pytest.mark.skipif(bool(harness.missing()), reason=f"emulator: {harness.missing()}")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# classes, rows, largest cluster, the regime of plain arguments. Odd classes: every row lies differently on packets.
REGIMES = [
    (1, 6, 8, "lanes"),
    (33, 14, 8, "lanes"),
    (100, 20, 8, "lanes"),
    (129, 6, 8, "warp"),
    (1001, 6, 8, "warp"),
    (1501, 6, 8, "block"),
    (17001, 4, 8, "cluster"),
    (17001, 4, 0, "streamed_block"),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def misaligned(values: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` elements past an allocation."""
    storage = torch.full((values.numel() + offset,), 55.0, dtype=values.dtype)
    return storage[offset:].view(values.shape).copy_(values)


def both(
    seed: int, clusters: int, logits: torch.Tensor, target: torch.Tensor | None, offset: int = 0, **options: Any
) -> tuple[harness.Result, harness.Result]:
    """The two ways, each with a buffer of its own; everything that comes out has the same bits."""
    results = []
    for in_place in (False, True):
        mine = {k: v.clone() if k in ("buffer", "slots") else v for k, v in options.items()}
        given = misaligned(logits, offset)
        where = {"in_place": True} if in_place else {"grad_offset": offset}
        emulator = harness.emulator(largest_cluster=clusters, seed=seed)
        result = emulator.last_batch(given, target, **mine, **where)
        results.append((result, mine))
    (out, out_memory), (into, in_memory) = results
    assert into.plan["regime"] == out.plan["regime"]
    assert torch.equal(bits(into.grad), bits(out.grad))
    assert torch.equal(bits(into.loss), bits(out.loss)) and torch.equal(bits(into.parts), bits(out.parts))
    for name in ("buffer", "slots"):
        if name in options:
            one, two = out_memory[name], in_memory[name]
            assert torch.equal(one if name == "slots" else bits(one), two if name == "slots" else bits(two)), name
    return out, into


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("classes", "rows", "clusters", "regime"), REGIMES)
def test_every_regime(classes: int, rows: int, clusters: int, regime: str, dtype: torch.dtype) -> None:
    logits, target, teacher = batch(rows, classes, dtype)
    target[1] = -100
    half = len(teacher)
    slots = torch.full((2 + half,), -(2**63))
    slots[0], slots[1] = half, 0
    for offset in (0, 3):
        _, into = both(classes, clusters, logits, target, offset, buffer=teacher, slots=slots, reduction="none")
        assert offset or into.plan["regime"] == regime
        compare(into, logits, target, teacher, reduction="none")
    both(1, clusters, logits, target, label_smoothing=0.1)
    # Rows that count for nothing, NaN and all, are stored as they are and get zeros.
    target[rows // 2 :] = -100
    logits[-1] = torch.nan
    _, into = both(2, clusters, logits, target, 1, buffer=teacher, slots=slots)
    assert into.grad is not None and into.grad[rows // 2 :].abs().max() == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "pair": {"target_b": True, "lam": torch.tensor(0.3)},
    "dense, weight, smoothing": {"dense": True, "weight": True, "label_smoothing": 0.1},
    "probabilities": {"kind": "probabilities"},
    "right class": {"kind": "virtual", "correct_share": 0.9},
    "float16 teacher": {"teacher_dtype": torch.float16},
    "bad label": {"bad": True},
}


@pytest.mark.parametrize("classes", [37, 301, 1500])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, classes: int) -> None:
    """Mostly the streamed kernels, which read every row twice."""
    options = dict(OPTIONS[name])
    logits, target, teacher = batch(8, classes, torch.bfloat16, seed=classes)
    labels: torch.Tensor = target
    if options.pop("target_b", False):
        options["target_b"] = target.flip(0)
    if options.pop("dense", False):
        labels = torch.softmax(torch.randn(8, classes), 1)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes) + 0.5
    if options.pop("bad", False):
        target[2] = classes
    teacher = teacher.to(options.pop("teacher_dtype", teacher.dtype))
    if options.get("kind") == "probabilities":
        teacher = torch.softmax(teacher.float(), 1)
    given = None if options.get("kind") == "virtual" else teacher
    for seed, offset in ((0, 0), (1, 5)):
        both(seed, 8, logits, labels, offset, teacher=given, **options)


def test_many_rows_counted_first() -> None:
    logits, target, teacher = batch(4099, 5)
    ids = torch.arange(4099)
    slots = torch.full((2 + len(teacher),), -(2**63))
    slots[0], slots[1] = len(teacher), 0
    both(0, 8, logits, target, buffer=teacher, slots=slots, ids=ids)


@pytest.mark.parametrize("classes", [96, 1000, 8000, 32000])
def test_traffic_is_that_of_the_other_way(classes: int) -> None:
    logits, target, teacher = batch(4, classes, torch.bfloat16)
    out, into = both(0, 8, logits, target, teacher=teacher)
    for name in ("loads16", "stores16", "bytes_loaded", "bytes_stored"):
        assert out.plan[name] == into.plan[name], name
