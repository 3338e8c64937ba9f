"""The rolling form of the Triton kernel against ``LogitBuffer``'s own definition, step by step."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import op_options, row_loss

from dlb_fast import LogitBuffer, ops

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1 (conftest sets it)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAN, INF = float("nan"), float("inf")


class Definition(LogitBuffer):
    """The buffer's definition in plain torch, told what the op is told: the host decides and refuses nothing."""

    def recognise(self, batch, ids, num_old, again=-1, op=""):
        return again

    def stored_rows(self, batch, num_old, again=0, op=""):
        return 0


class Pair:
    """The kernel and the definition, each with its buffer: every batch goes through both, and all is compared."""

    def __init__(self, capacity, classes, dtype=F32, seed=3):
        self.mine = LogitBuffer(classes, capacity, dtype, DEVICE)
        self.right = Definition(classes, capacity, dtype, DEVICE)
        self.g = torch.Generator().manual_seed(seed)
        self.classes = classes

    def logits(self, batch, dtype=F32):
        return (2 * torch.randn(batch, self.classes, generator=self.g, dtype=F64)).to(dtype).to(DEVICE)

    def labels(self, batch):
        return torch.randint(0, self.classes, (batch,), generator=self.g).to(DEVICE)

    def __call__(self, z, y, ids=None, num_old=None, again=0, kd_mask=None, **options):
        """Parts, and the rows with a valid teacher."""
        ids = ids if ids is None or isinstance(ids, torch.Tensor) else torch.tensor(ids, device=DEVICE)
        match = self.right.match(len(z), ids, num_old, again)
        valid = match.repeats if kd_mask is None else match.repeats & kd_mask[: len(match.repeats)]
        teacher = torch.where(valid[:, None], self.right.teacher(match), 0.0)
        x = z.clone().requires_grad_()
        loss, parts = row_loss("test", "torch", x, y, teacher=teacher, kd_mask=valid, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        self.right.update(z, ids, num_old, again, kd_mask)

        op = ops.op_for("triton", "last_batch_update")
        given = op_options(y, **options) if kd_mask is None else op_options(y, kd_mask=kd_mask, **options)
        old = -1 if num_old is None else num_old
        results = op(z, self.mine.rows, self.mine.slots, ids, old, again, *given)
        close = {"rtol": 1e-5, "atol": 2e-6} if z.dtype in (F32, F64) else {"rtol": 1e-2, "atol": 1e-4}
        scaled = results[2] / results[1][4].to(z.dtype)
        for got, wanted in zip((results[0], results[1][:4], scaled), (loss.detach(), parts[:4], grad), strict=True):
            torch.testing.assert_close(got, wanted.to(got), equal_nan=True, **close)
        assert self.mine.slots.tolist() == self.right.slots.tolist()
        torch.testing.assert_close(self.mine.rows, self.right.rows, rtol=0, atol=0, equal_nan=True)
        assert results[1][5] == valid.sum()
        return results[1], valid.tolist()

    def counters(self):
        """taught, mismatched, unknown, not_finite, untaught."""
        return self.mine.slots[1:6].tolist()


@pytest.fixture(params=["counted in every program", "counted before"])
def counting(request, monkeypatch):
    """Both ways to know what the means divide by, and whether the ids are those of the batch before."""
    from dlb_fast.kernels import launch

    if request.param == "counted before":
        monkeypatch.setattr(launch, "COUNT_HERE_ROWS", 2)
        monkeypatch.setattr(launch, "COUNT_CHUNK", 3)


def stream(pair, layout, ids=True, dtype=F32, **options):
    """Overlapping batches of (old, new, num_old) rows; how many rows each taught."""
    taught, place = [], layout[0][0]
    for old, new, num_old in layout:
        own = torch.arange(place - old, place + new, device=DEVICE) if ids else None
        place += new
        z, y = pair.logits(old + new, dtype), pair.labels(old + new)
        taught.append(sum(pair(z, y, own, num_old, -1, **options)[1]))
    return taught


def test_first_full_and_short_steps():
    pair = Pair(4, 50)
    layout = [(4, 4, None), (4, 4, None), (4, 2, None), (2, 4, None), (4, 4, None)]
    assert stream(pair, layout) == [0, 4, 4, 2, 4]
    assert pair.counters() == [14, 0, 0, 0, 0]


def test_without_ids_and_half_precision_storage():
    layout = [(0, 3, 0), (3, 3, None), (3, 3, None)]
    for dtype in (BF16, F16):
        assert stream(Pair(3, 40, dtype), layout, ids=False) == [0, 3, 3]
    assert stream(Pair(3, 40, BF16), layout, dtype=BF16) == [0, 3, 3]


def test_num_old_given_and_room_to_spare():
    layout = [(0, 5, 0), (5, 3, 5), (3, 5, 3), (5, 0, 5), (0, 4, 0), (4, 4, None)]
    assert stream(Pair(7, 20), layout) == [0, 5, 3, 5, 0, 4]


@pytest.mark.parametrize("classes", [5, 600])
@pytest.mark.parametrize("ids", [True, False])
def test_the_same_batch_again_meets_the_same_teacher(classes, ids, counting, times=(1, 3, 2)):
    """Batches that are evaluated several times: each has one teacher, and its latest evaluation is what is stored."""
    pair = Pair(2, classes)
    for step, evaluations in enumerate(times):
        own = [2 * step + i for i in range(4)] if ids else None
        y = pair.labels(4)
        for evaluation in range(evaluations):
            z = pair.logits(4)
            _, valid = pair(z, y, own, None, -1 if ids else int(evaluation > 0))
            assert valid == [step > 0] * 2
            if step and not evaluation:
                teacher = pair.mine.rows[1 - pair.mine.slots[0], :2].clone()
            if step:
                assert torch.equal(pair.mine.rows[1 - pair.mine.slots[0], :2], teacher)
            assert torch.equal(pair.mine.rows[pair.mine.slots[0], :2], z[2:])
    assert pair.counters() == [2 * sum(times[1:]), 0, 0, 0, 0]


@pytest.mark.slow
def test_the_same_batch_again_with_rows_of_two_passes(counting):
    """Two batches only, and by their ids: long rows are slow in the interpreter, and know nothing of ids."""
    test_the_same_batch_again_meets_the_same_teacher(9001, True, counting, (1, 2))


def test_what_the_caller_says_goes_before_the_ids():
    pair = Pair(2, 5)
    z, y = pair.logits(4), pair.labels(4)
    pair(z, y, [0, 1, 2, 3], None, 0)
    pair(z, y, [2, 3, 4, 5], None, 0)
    assert pair(z, y, [2, 3, 4, 5], None, 0)[1] == [False, False]  # a new batch, whose first rows are others
    assert pair(z, y, [4, 5, 6, 7], None, 0)[1] == [True, True]
    assert pair(z, y, [4, 5, 8, 9], None, 1)[1] == [True, True]  # the same one, whose ids say otherwise
    assert pair.mine.slots[6:].view(2, -1)[pair.mine.slots[0], 1:3].tolist() == [8, 9]
    assert pair.counters() == [6, 2, 0, 0, 0]


def test_one_id_in_several_blocks_makes_a_new_batch(counting, monkeypatch):
    """260 ids are compared in blocks of 128: a batch that differs in the last one only is new."""
    from dlb_fast.kernels import launch

    monkeypatch.setattr(launch, "COUNT_CHUNK", 200)
    pair = Pair(130, 2)
    z, y, ids = pair.logits(260), pair.labels(260), torch.arange(260, device=DEVICE)
    pair(z, y, ids, None, -1)
    pair(z, y, ids + 130, None, -1)
    assert sum(pair(z, y, ids + 130, None, -1)[1]) == 130
    other = ids + 130
    other[-1] = 5000
    assert sum(pair(z, y, other, None, -1)[1]) == 0
    assert pair.counters() == [260, 130, 0, 0, 1]


def test_a_batch_that_is_its_own_repetition_is_new():
    """The last rows have the stored ids, and so have the first: no row is new, so this is a repetition."""
    pair = Pair(2, 5)
    z, y = pair.logits(4), pair.labels(4)
    pair(z, y, [0, 1, 2, 3], None, -1)
    assert pair(z, y, [2, 3, 2, 3], None, -1)[1] == [True, True]
    assert pair.counters() == [2, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_any_batch_meets_any_buffer(seed, counting):
    """Whatever counts, ids and flags the slots hold: the kernel does what the definition does."""
    g = torch.Generator().manual_seed(seed)

    def draw(high, low=0):
        return int(torch.randint(low, high, (), generator=g))

    capacity = draw(6, 1)
    pair = Pair(capacity, 3, (F32, F16)[seed % 2], seed)
    for _ in range(5):
        batch = draw(9, 1)
        slots = pair.mine.slots
        if draw(3) == 0:
            slots[0] = draw(2)
            generations = slots[6:].view(2, -1)
            generations[:, 0] = torch.randint(-1, capacity + 3, (2,), generator=g)
            generations[:, 1 : 1 + capacity] = torch.randint(0, 3, (2, capacity), generator=g)
            generations[:, 1 + capacity :] = torch.randint(0, 2, (2, capacity), generator=g)
            pair.right.slots.copy_(slots)
        kept = slots[6:].view(2, -1)[slots[0] & 1, 1 : 1 + capacity]
        ids = None if draw(4) == 0 else torch.randint(0, 3, (batch,), generator=g).to(DEVICE)
        if ids is not None and draw(2):  # the batch stored last
            count = int(slots[6:].view(2, -1)[slots[0] & 1, 0].clamp(0, min(capacity, batch)))
            ids[batch - count :] = kept[:count]
        num_old = draw(batch + 3) if draw(2) else None
        mask = (torch.rand(batch, generator=g) < 0.7).to(DEVICE) if draw(2) else None
        reduction = ("mean", "none", "sum")[draw(3)]
        pair(pair.logits(batch), pair.labels(batch), ids, num_old, draw(2, -1), mask, reduction=reduction)


def test_resumed_without_a_buffer():
    assert stream(Pair(4, 20), [(4, 4, 4), (4, 4, None)]) == [0, 4]


def test_what_became_of_the_rows_is_counted(counting):
    """Of four rows one has another id, one is masked; unknown ids teach no batch with ids; then nothing repeats."""
    pair = Pair(4, 20)
    ids = torch.arange(12, device=DEVICE)
    mask = torch.tensor([True, True, False, True, True, True, True, True], device=DEVICE)
    pair(pair.logits(8), pair.labels(8), ids[:8], None, -1)
    wrong = ids[4:].clone()
    wrong[1] = 999
    assert pair(pair.logits(8), pair.labels(8), wrong, None, -1, mask)[1] == [True, False, False, True]
    assert pair.counters() == [2, 1, 0, 0, 0]
    for step in range(3):  # a shuffled loop
        pair(pair.logits(8), pair.labels(8), ids[:8] + 100 * (step + 1), None, -1)
        assert pair.counters() == [2, 5 + 4 * step, 0, 0, 1 + step]
    pair(pair.logits(8), pair.labels(8), None, None, -1)
    assert pair.counters() == [6, 13, 0, 0, 0]  # without ids every row repeats
    assert pair(pair.logits(8), pair.labels(8), ids[:8], None, -1)[1] == [False] * 4
    assert pair.counters() == [6, 13, 4, 0, 1]
    pair(pair.logits(8), pair.labels(8), ids[4:], None, -1, torch.zeros_like(mask))
    assert pair.counters() == [6, 13, 4, 0, 0]  # rows repeat, although none may be taught


BAD = {
    "NaN": (F32, F32, lambda row: row.index_fill_(0, torch.tensor(2), NAN), False),
    "only NaN": (F32, F32, lambda row: row.fill_(NAN), False),
    "inf": (F32, F32, lambda row: row.index_fill_(0, torch.tensor(2), INF), False),
    "NaN and inf": (
        F32,
        F32,
        lambda row: row.index_fill_(0, torch.tensor(2), INF).index_fill_(0, torch.tensor(0), NAN),
        False,
    ),
    "only -inf": (F32, F32, lambda row: row.fill_(-INF), False),
    "one -inf": (F32, F32, lambda row: row.index_fill_(0, torch.tensor(2), -INF), True),
    "one finite": (F32, F32, lambda row: row.fill_(-INF).index_fill_(0, torch.tensor(2), -3.0), True),
    "too large for float16": (F32, F16, lambda row: row.index_fill_(0, torch.tensor(2), 65520.0), False),
    "just fits float16": (F32, F16, lambda row: row.index_fill_(0, torch.tensor(2), 65519.0), True),
    "only too small for float16": (F32, F16, lambda row: row.fill_(-65520.0), False),
    "too large for bfloat16": (F32, BF16, lambda row: row.index_fill_(0, torch.tensor(2), 3.4e38), False),
    "too large for float32": (F64, F32, lambda row: row.index_fill_(0, torch.tensor(2), 1e39), False),
    "large": (F64, F64, lambda row: row.index_fill_(0, torch.tensor(2), 1e39), True),
}


def not_finite_case(name, classes, counted=True, target=True):
    """Row 1 of the stored ones is as ``name`` says; it teaches the next batch, or not. The rest is as ever."""
    dtype, buffer_dtype, spoil, finite = BAD[name]
    pair = Pair(3, classes, buffer_dtype)
    z, y = pair.logits(6, dtype), pair.labels(6)
    spoil(z[4].cpu() if DEVICE == "cpu" else z[4])
    y[4] = 2 if counted else -100
    y = y if target else None
    pair(z, y, None, 3, 0)
    capacity = pair.mine.capacity
    flags = pair.mine.slots[6:].view(2, -1)[pair.mine.slots[0], 1 + capacity :]
    assert flags.tolist() == [1, int(finite), 1]
    z = pair.logits(6, dtype)
    parts, valid = pair(z, y, None, None, 0)
    assert valid == [True, finite, True]
    assert pair.counters() == [2 + finite, 0, 0, 1 - finite, 0]
    if not finite:
        assert parts[:3].isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_a_stored_row_that_is_not_finite_does_not_teach(name):
    not_finite_case(name, 5)


@pytest.mark.parametrize("name", ["NaN", "inf", "only -inf", "one finite", "too large for float16"])
def test_also_where_its_label_is_ignored_or_there_is_no_target(name):
    not_finite_case(name, 600, counted=False)
    not_finite_case(name, 5, target=False)


SLOWER = [("inf", False), ("only -inf", False), ("one finite", False), ("NaN", True)]


@pytest.mark.parametrize(
    ("name", "counted"), [("NaN", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOWER)]
)
def test_also_where_a_row_takes_two_passes(name, counted):
    not_finite_case(name, 9001, counted=counted)


def test_per_row_losses_and_long_rows():
    layout = [(2, 2, None)] * 2
    assert stream(Pair(2, 5000), layout, reduction="none", label_smoothing=0.1) == [0, 2]
    assert stream(Pair(1, 9001), [(1, 1, None)] * 3) == [0, 1, 1]


def test_a_corrupt_count_stays_inside():
    pair = Pair(4, 8)
    guard = pair.mine.rows.clone()
    for count in (10**6, -5):
        pair.mine.slots[6] = pair.mine.slots[6 + 9] = count
        pair.right.slots.copy_(pair.mine.slots)
        z = pair.logits(6)
        pair(z, pair.labels(6), None, None, 0)
        assert torch.equal(pair.mine.rows[:, 4:], guard[:, 4:])


@pytest.mark.parametrize("again", [0, 1])
def test_an_empty_batch_stores_nothing(again):
    pair = Pair(2, 5)
    for _ in range(2):
        pair(pair.logits(4), pair.labels(4), [0, 1, 2, 3], None, 0)
    before = pair.mine.slots[0].item()
    op = ops.op_for("triton", "last_batch_update")
    z, y = pair.logits(0), pair.labels(0)
    loss, parts, _ = op(z, pair.mine.rows, pair.mine.slots, None, -1, again, *op_options(y))
    assert loss == 0 and parts.tolist() == [0, 0, 0, 0, 1, 0]
    pair.right.update(z, None, None, again)
    assert pair.mine.slots.tolist() == pair.right.slots.tolist()
    assert pair.mine.slots[0] == (before if again else 1 - before)


def test_ignored_nan_rows_are_stored_as_they_are():
    pair = Pair(3, 8)
    z, y = pair.logits(3), pair.labels(3)
    z[1, 2] = NAN
    y[1] = -100
    parts, _ = pair(z, y, None, 0, 0)
    assert parts[:4].isfinite().all() and torch.equal(pair.mine.rows[1, :3].isnan(), z.isnan())


def test_more_pairs_than_programs(monkeypatch):
    import triton.language as tl

    from dlb_fast.kernels import last_batch_triton

    monkeypatch.setattr(last_batch_triton, "MAX_PROGRAMS", tl.constexpr(2))
    pair = Pair(5, 600)
    assert stream(pair, [(5, 5, None), (5, 5, None), (5, 5, None)]) == [0, 5, 5]
    # The same batch after a short one: more pairs than the host expects.
    assert stream(Pair(4, 600), [(4, 4, None), (4, 1, None)]) == [0, 4]
