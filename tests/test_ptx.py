"""nvcc's PTX of the CUDA kernels, executed on the CPU, against the reference: regimes, dtypes, options, values.

No GPU: this proves indices, barriers, bounds and arithmetic, not speed.
"""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
from ptx import harness
from ptx.oracle import Stream, batch, compare, run

from dlb_fast.reference import last_batch_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# classes, rows, multiprocessors, the regime expected of contiguous plain arguments
REGIMES = [
    (1, 6, 4, "lanes"),
    (10, 40, 1, "lanes"),
    (32, 6, 4, "lanes"),
    (33, 7, 4, "lanes"),
    (100, 20, 1, "lanes"),
    (128, 6, 4, "lanes"),
    (129, 6, 4, "warp"),
    (1000, 10, 1, "warp"),
    (1001, 5, 4, "warp"),
    (1024, 4, 4, "warp"),
    (1025, 6, 1, "block"),
    (2500, 4, 4, "block"),
    (16384, 2, 4, "block"),
    (16385, 4, 4, "cluster"),
    (40001, 2, 4, "cluster"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("classes", "rows", "multiprocessors", "regime"), REGIMES)
def test_regimes(classes: int, rows: int, multiprocessors: int, regime: str, dtype: torch.dtype) -> None:
    emulator = harness.emulator(multiprocessors=multiprocessors, seed=classes)
    logits, target, teacher = batch(rows, classes, dtype)
    taught = run(emulator, logits, target, teacher)
    assert taught.plan["regime"] == regime and not taught.plan["general"]
    assert float(taught.parts[5]) == len(teacher)
    run(emulator, logits, target)
    run(emulator, logits, target, kind="virtual", label_smoothing=0.1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("classes", "rows"), [(96, 261), (1000, 41), (8192, 7), (32000, 3)])
def test_rows_of_whole_packets_have_a_kernel_without_edges(classes: int, rows: int, dtype: torch.dtype) -> None:
    """One row, one pair, and more pairs than the device takes at a time; a teacher, a buffer, and neither."""
    emulator = harness.emulator(multiprocessors=1, seed=classes)
    for count in (1, 2, rows):
        logits, target, teacher = batch(count, classes, dtype)
        assert run(emulator, logits, target, teacher).plan["whole"]
    assert run(emulator, logits, target, label_smoothing=0.1).plan["whole"]
    held = dtype if dtype != torch.float32 or classes == 96 else torch.bfloat16  # a 16-bit buffer, half a packet a time
    stream = Stream(emulator, classes, rows // 2, held)
    for index in range(3):
        ids = torch.arange(rows // 2 * 2) + rows // 2 * index
        logits, target, _ = batch(len(ids), classes, dtype, seed=index)
        target[index::4] = -100
        assert stream.step(logits, target, ids).plan["whole"]
    # One element further all of this has edges.
    logits, target, teacher = batch(2, classes, dtype)
    storage = torch.zeros(2 * classes + 1, dtype=dtype)[1:].view(2, classes).copy_(logits)
    moved = torch.zeros(classes + 1, dtype=dtype)[1:].view(1, classes).copy_(teacher)
    plan = run(emulator, storage, target, moved, grad_offset=1).plan
    assert plan["regime"] not in ("two_pass_warp", "two_pass_block") and not plan["whole"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [8, 1000, 1100])
def test_logits_beyond_what_a_product_with_log2_e_holds(classes: int, dtype: torch.dtype) -> None:
    """The largest and the smallest finite numbers are logits like others, and those whose product is off by much."""
    if dtype == torch.float16:
        return  # 65504 is far from it
    for size, sign in itertools.product((3e38, 1.2345678e10, 2e7), (1, -1)):
        large = sign * size
        logits, target, teacher = batch(4, classes, dtype)
        logits[0] = logits[2] = large  # a row of equals
        logits[1, 3], target[1] = size, 3
        teacher[:] = logits[:2]
        result = harness.emulator().last_batch(logits, target, teacher=teacher, reduction="none")
        equal = torch.log(torch.tensor(float(classes)))
        assert result.grad is not None and result.grad.isfinite().all()
        torch.testing.assert_close(result.loss[[0, 2]], equal.expand(2), rtol=3e-6, atol=1e-5)
        assert abs(float(result.loss[1])) < 1e-5 and float(result.grad[1].abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [17000, 20001])
def test_long_rows_without_clusters_are_streamed(classes: int, dtype: torch.dtype) -> None:
    emulator = harness.emulator(largest_cluster=0)
    logits, target, teacher = batch(4, classes, dtype)
    plan = run(emulator, logits, target, teacher).plan
    assert plan["regime"] == "two_pass_block" and not plan["general"]
    assert run(emulator, logits, target).plan["general"]


def test_sixteen_blocks_in_a_cluster() -> None:
    emulator = harness.emulator(largest_cluster=16)
    logits, target, teacher = batch(2, 140000, torch.bfloat16)
    assert run(emulator, logits, target, teacher).plan["cluster"] == 16


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "weight": {"weight": True},
    "weight and smoothing": {"weight": True, "label_smoothing": 0.1},
    "ignored": {"ignored": True},
    "ignored, weight": {"ignored": True, "weight": True},
    "another ignore_index": {"ignored": 3, "ignore_index": 3},
    "all ignored": {"ignored": "all"},
    "pair": {"pair": 0.3},
    "pair per row": {"pair": "rows"},
    "pair, weight, smoothing": {"pair": 0.3, "weight": True, "label_smoothing": 0.2, "ignored": True},
    "dense": {"dense": True},
    "dense, weight, smoothing": {"dense": True, "weight": True, "label_smoothing": 0.1},
    "ignored, smoothing": {"ignored": True, "label_smoothing": 0.1},
    "mask": {"mask": True},
    "mask of nothing": {"mask": "none"},
    "probabilities": {"kind": "probabilities"},
    "probabilities, masked": {"kind": "probabilities", "mask": True, "temperature": 4.0},
    "uniform": {"kind": "virtual", "temperature": 1.0},
    "right class": {"kind": "virtual", "correct_share": 0.9, "ignored": True},
    "right class, certain": {"kind": "virtual", "correct_share": 1.0, "alpha": 0.3},
    "lsr weights": {"kind": "virtual", "ce_alpha": -1.0, "alpha": 0.1},
    "temperature 1": {"temperature": 1.0, "alpha": 2.5},
    "on the device": {"alpha": torch.tensor(0.7), "temperature": torch.tensor(2.5), "ce_alpha": -0.5},
    "no labels": {"no labels": True},
    "taught everywhere": {"taught": 12},
    "taught once": {"taught": 1},
    "teacher of other dtype": {"teacher_dtype": torch.float16},
    "teacher of other dtype too": {"teacher_dtype": torch.bfloat16},
    "teacher in float32": {"teacher_dtype": torch.float32},
}


SHAPES = [
    (10, "sum", torch.float32),
    (100, "none", torch.bfloat16),
    (301, "mean", torch.float16),
    (1500, "mean", torch.float32),
]


@pytest.mark.parametrize(("classes", "reduction", "dtype"), SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, classes: int, reduction: str, dtype: torch.dtype) -> None:
    options = dict(OPTIONS[name])
    rows = 12
    logits, target, teacher = batch(rows, classes, dtype, taught=options.pop("taught", None), seed=classes)
    g = torch.Generator().manual_seed(classes)
    labels: torch.Tensor | None = target
    if (ignored := options.pop("ignored", None)) is not None:
        value = -100 if not isinstance(ignored, int) or ignored is True else ignored
        target[: rows if ignored == "all" else 5 : 2] = value
    if (pair := options.pop("pair", None)) is not None:
        options["target_b"] = torch.randint(0, classes, (rows,), generator=g)
        options["lam"] = torch.rand(rows, generator=g) if pair == "rows" else torch.tensor(pair)
    if options.pop("dense", False):
        labels = torch.rand(rows, classes, generator=g)
        labels[2, : classes // 2] = 0.0
        labels = labels / labels.sum(1, keepdim=True)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes, generator=g) + 0.5
    if (mask := options.pop("mask", None)) is not None:
        options["kd_mask"] = torch.tensor([mask != "none", False] * 3)
    if options.pop("no labels", False):
        labels = None
    teacher = teacher.to(options.pop("teacher_dtype", dtype))
    if options.get("kind") == "probabilities":
        teacher = torch.softmax(teacher.float(), 1)
        teacher[0, 0] = 0.0
    given = None if options.get("kind") == "virtual" else teacher
    run(harness.emulator(seed=7), logits, labels, given, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [10, 100, 1000, 1100, 17000])
def test_near_equal_teacher(classes: int, dtype: torch.dtype) -> None:
    """The normal case of the method: p_s - p_t cancels, and only float32 until the store keeps its digits."""
    logits, target, teacher = batch(4, classes, torch.float32, drift=1e-3)
    logits, teacher = logits.to(dtype), teacher.to(dtype)
    for clusters in (0, 8):
        run(harness.emulator(largest_cluster=clusters), logits, None, teacher, alpha=1.0)


@pytest.mark.parametrize("classes", [10, 100, 1001, 2000, 17001])
@pytest.mark.parametrize("clusters", [0, 8])
def test_infinite_logits(classes: int, clusters: int) -> None:
    emulator = harness.emulator(largest_cluster=clusters)
    logits, target, teacher = batch(6, classes)
    teacher[:, 1:4] = -torch.inf
    logits[:, 1:3] = -torch.inf  # no teacher mass, or no share: costs nothing
    target = target.clamp(min=4)
    run(emulator, logits, target, teacher)
    logits[5] += 1e4  # a common offset changes nothing
    run(emulator, logits, target, teacher)
    logits[0, 5] = -torch.inf  # teacher mass on an impossible class: an infinite loss, a finite gradient
    result = emulator.last_batch(logits, target, teacher=teacher)
    assert result.loss.item() == torch.inf and result.grad is not None and result.grad.isfinite().all()
    # Nothing is possible: no NaN may reach other rows.
    logits[4] = -torch.inf
    rows = emulator.last_batch(logits, target, teacher=teacher, reduction="none")
    assert rows.loss[1:4].isfinite().all() and rows.loss[5].isfinite()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [96, 100, 1000, 1001, 8192, 8193, 17000, 17001])
def test_a_common_offset_costs_no_digits(classes: int, dtype: torch.dtype) -> None:
    """Rows of all regimes far from 0, where the rounding of what is subtracted from an exponent is 3e-4 of a loss."""
    logits, target, teacher = batch(6, classes, dtype)
    logits, teacher = logits + 1e4, teacher + 1e4
    result = harness.emulator().last_batch(logits, target, teacher=teacher, reduction="none")
    wanted, _ = last_batch_loss(logits.double(), target, teacher.double(), reduction="none")
    torch.testing.assert_close(result.loss.double(), wanted, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("classes", [10, 100, 1000, 1100, 17000])
@pytest.mark.parametrize("clusters", [0, 8])
def test_nan(classes: int, clusters: int) -> None:
    emulator = harness.emulator(largest_cluster=clusters)
    logits, target, teacher = batch(8, classes)
    logits[1, classes - 1] = logits[6, 3] = teacher[2, 2] = torch.nan
    result = emulator.last_batch(logits, target, teacher=teacher, reduction="none")
    assert result.loss.isnan().tolist() == [i in (1, 2, 6) for i in range(8)]
    assert result.grad is not None and result.grad.isnan().all(1).tolist() == [i in (1, 2, 6) for i in range(8)]
    # Rows that do not count hide their NaN: zero loss, zero gradient.
    target[[1, 6]] = -100
    mask = torch.tensor([True, False, False, True])
    compare(
        emulator.last_batch(logits, target, teacher=teacher, kd_mask=mask),
        logits, target, teacher, kd_mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [-1, 10, -(2**40), 2**40])
@pytest.mark.parametrize("classes", [10, 100, 1000, 1100])
def test_labels_that_are_no_class_poison_their_row(classes: int, bad: int) -> None:
    bad = classes if bad == 10 else bad
    for kind in ("none", "virtual", "probabilities"):
        logits, target, teacher = batch(6, classes)
        target[3] = bad
        given = teacher.softmax(1) if kind == "probabilities" else None
        result = harness.emulator().last_batch(logits, target, teacher=given, kind=kind, reduction="none")
        assert result.loss.isnan().tolist() == [i == 3 for i in range(6)]
        assert result.grad is not None and result.grad.isnan().all(1).tolist() == [i == 3 for i in range(6)]


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [*itertools.product([10, 100, 1000, 1001, 2000], FLOATS), (17001, torch.bfloat16)],
    ids=str,
)
def test_strides_and_offsets(classes: int, dtype: torch.dtype) -> None:
    rows = 6
    plain, target, teacher = batch(rows, classes, dtype)
    for padding, start in ((1, 0), (0, 1), (8, 8), (3, 5)):
        storage = torch.full((rows * (classes + padding) + start,), 99.0, dtype=dtype)
        logits = storage[start:].view(rows, classes + padding)[:, :classes]
        logits.copy_(plain)
        run(harness.emulator(), logits, target, teacher)
        run(harness.emulator(), logits, target, teacher, grad_offset=3)
    wide = torch.full((3, classes + 5), 55.0, dtype=dtype)[:, 3 : classes + 3]
    wide.copy_(teacher)
    run(harness.emulator(), plain, target, wide)
    every_second = torch.stack([target, target + 1], 1)[:, 0]
    run(harness.emulator(), plain, every_second, teacher)
    run(harness.emulator(), plain[:1].expand(rows, -1), target[:1].expand(rows), teacher)


@pytest.mark.parametrize("classes", [10, 1000, 1100, 17001])
def test_rows_beyond_two_to_the_31_elements(classes: int) -> None:
    """Offsets are 64 bits wide: five rows, 2^30 elements apart, in memory that is never touched in between."""
    rows, apart, no_reserve = 5, 2**30, 0x4000  # mmap.MAP_NORESERVE has a name from Python 3.13 on
    memory = mmap.mmap(-1, ((rows - 1) * apart + classes) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, classes), (apart, 1))
    plain, target, teacher = batch(rows, classes, torch.bfloat16)
    logits.copy_(plain)
    run(harness.emulator(), logits, target, teacher)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize("classes", [10, 100, 1000, 1100, 17000])
def test_few_rows(rows: int, classes: int) -> None:
    logits, target, teacher = batch(rows, classes)
    for kind in ("none", "logits", "virtual"):
        run(harness.emulator(), logits, target, teacher if kind == "logits" else None, kind=kind)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_rows_are_counted_first(weighted: bool) -> None:
    rows, classes = 4099, 5
    logits, target, teacher = batch(rows, classes)
    target[::7] = -100
    options = {"weight": torch.rand(classes) + 0.5} if weighted else {}
    mask = torch.rand(len(teacher)) < 0.7
    result = run(harness.emulator(multiprocessors=1), logits, target, teacher, kd_mask=mask, **options)
    assert result.plan["count_blocks"] > 1 and float(result.parts[5]) == int(mask.sum())


def test_repeated_runs_are_bit_identical_whatever_the_thread_order() -> None:
    logits, target, teacher = batch(64, 100, torch.bfloat16)
    results = []
    for seed in range(4):
        emulator = harness.emulator(multiprocessors=64, seed=seed, card=0)
        results.append(emulator.last_batch(logits, target, teacher=teacher))
        assert results[-1].plan["blocks"] > 4
    for other in results[1:]:
        assert torch.equal(other.parts, results[0].parts) and torch.equal(other.loss, results[0].loss)
        assert torch.equal(other.grad, results[0].grad)


def test_float16_gradient_of_a_large_batch_does_not_underflow() -> None:
    logits, target, teacher = batch(512, 100, torch.float16)
    result = run(harness.emulator(), logits, target, teacher)
    assert result.grad is not None
    assert float(result.parts[4]) == 65536.0 and (result.grad == 0).float().mean() < 0.01


@pytest.mark.parametrize("classes", [300, 2000])
def test_float16_with_several_right_classes_stays_finite(classes: int) -> None:
    logits, _, _ = batch(4, classes, torch.float16)
    target = (torch.arange(classes) < 200).float().repeat(4, 1)  # its rows sum to 200, not to 1
    result = harness.emulator().last_batch(logits, target, reduction="sum")
    assert result.grad is not None
    wanted = 200 * torch.softmax(logits.double(), 1) - target
    torch.testing.assert_close(result.grad.double() / result.parts[4].double(), wanted, rtol=1e-3, atol=1e-5)


def test_without_a_gradient_nothing_but_the_losses_is_written() -> None:
    logits, target, teacher = batch(8, 1000)
    result = run(harness.emulator(), logits, target, teacher, need_grad=False)
    assert result.plan["bytes_stored"] < 8 * 1000


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [96, 1000, 8000, 32000])
def test_traffic_is_the_floor(classes: int, dtype: torch.dtype) -> None:
    """Every logit read once, every gradient written once, in accesses of 16 bytes."""
    rows = 4
    logits, target, teacher = batch(rows, classes, dtype)
    plan = run(harness.emulator(), logits, target, teacher).plan
    size = logits.element_size()
    assert plan["stores16"] == rows * classes * size // 16
    assert plan["loads16"] == (rows + len(teacher)) * classes * size // 16


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [96, 1000, 8000, 32000])
def test_every_row_is_asked_for_once_before_it_is_read(classes: int, dtype: torch.dtype) -> None:
    """By groups that take several pairs too. Rows of less than a cache line are not worth asking for."""
    rows = {96: 600, 1000: 160, 8000: 36, 32000: 12}[classes]
    logits, target, teacher = batch(rows, classes, dtype)
    plan = run(harness.emulator(multiprocessors=1), logits, target, teacher).plan
    size = classes * logits.element_size()
    if classes == 96:  # by lines of the cache, the one with the row's end besides
        size = ((size + 126) // 128 + 1) * 128
    assert plan["prefetched"] == (rows + len(teacher)) * size
    plan = run(harness.emulator(), logits[:4, :7].contiguous(), target[:4] % 7).plan
    assert plan["prefetched"] == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_grad(dtype: torch.dtype) -> None:
    emulator = harness.emulator()
    grad = torch.randn(7, 13).to(dtype)
    same = grad.clone()
    assert emulator.scale_grad(same, torch.tensor(4.0), 4.0) == 0 and torch.equal(same, grad)
    for upstream in (torch.tensor(3.0), torch.rand(7), torch.rand(14)[::2], torch.rand(1).expand(7)):
        for shift in (0, 3):
            storage = torch.zeros(7 * 13 + shift, dtype=dtype)
            scaled = storage[shift:].view(7, 13).copy_(grad)
            emulator.scale_grad(scaled, upstream, 2.0)
            factor = (upstream if upstream.dim() == 0 else upstream[:, None]) / 2.0
            torch.testing.assert_close(scaled, (grad.float() * factor).to(dtype), rtol=0, atol=0)


def test_refusals() -> None:
    logits, target, _ = batch(4, 10)
    with pytest.raises(ValueError, match="integer labels"):
        harness.emulator().last_batch(logits, None, kind="virtual", correct_share=0.5)
