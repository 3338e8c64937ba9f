"""The loss over classes that are split over ranks: the value and the gradient of one process on the whole logits."""

from __future__ import annotations

import copy
import re
from unittest.mock import patch

import pytest
import torch
from process_group import ProcessGroup
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlb_fast import LossParts, _args, fused_lb_loss, sharded, sharded_lb_loss

ROWS, OLD, CLASSES = 9, 5, 23
SPLITS = {1: [[23]], 2: [[12, 11], [3, 20], [23, 0]], 4: [[6, 6, 6, 5], [1, 15, 0, 7]]}
PARTS = ("teacher", "weight", "dense")  # what has a dimension of classes


def inputs(dtype=torch.float64, seed=0):
    """Whole tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, CLASSES, (2, ROWS), generator=generator)
    labels[0, 1] = -100
    dense = normal(ROWS, CLASSES).softmax(1)
    dense[2] = 0
    dense[2, [3, 20]] = 0.5  # a tie between two ranks, whose second class has the largest logit: not correct
    logits = 3 * normal(ROWS, CLASSES)
    logits[2, 20] = 12
    return {
        "logits": logits.to(dtype),
        "teacher": (3 * normal(OLD, CLASSES)).to(dtype),
        "weight": normal(CLASSES).abs() + 0.1,
        "target": labels[0],
        "target_b": labels[1],
        "dense": dense,
        "lam": torch.linspace(0, 1, ROWS, dtype=torch.float64),
        "kd_mask": torch.tensor([True, False, True, True, True]),
    }


def plain(given):
    return given["target"], given["teacher"], {}


def both_options(given):
    options = {"weight": given["weight"], "label_smoothing": 0.2, "kd_mask": given["kd_mask"], "alpha": 0.7}
    return given["target"], given["teacher"], {**options, "temperature": 2.0}


CASES = {
    "plain": plain,
    "ce": lambda given: (given["target"], None, {}),
    "kl": lambda given: (None, given["teacher"], {"kd_mask": given["kd_mask"]}),
    "options": both_options,
    "sum": lambda given: (*both_options(given)[:2], {**both_options(given)[2], "reduction": "sum"}),
    "none": lambda given: (*both_options(given)[:2], {**both_options(given)[2], "reduction": "none"}),
    "smoothing": lambda given: (given["target"], None, {"label_smoothing": 1.0}),
    "weight": lambda given: (given["target"], None, {"weight": given["weight"]}),
    "weightless": lambda given: (
        given["target"],
        None,
        {"weight": given["weight"].index_fill(0, given["target"].clamp(0), 0), "label_smoothing": 0.1},
    ),
    "ignored": lambda given: (torch.full((ROWS,), -100), given["teacher"], {}),
    "dense": lambda given: (given["dense"], given["teacher"], {}),
    "dense options": lambda given: (given["dense"], None, {"weight": given["weight"], "label_smoothing": 0.1}),
    "pair": lambda given: (
        given["target"],
        given["teacher"],
        {"target_b": given["target_b"], "lam": given["lam"], "weight": given["weight"], "label_smoothing": 0.1},
    ),
    "pair of a number": lambda given: (given["target"], None, {"target_b": given["target_b"], "lam": 0.3}),
    "tensors": lambda given: (
        given["target"].int(),
        given["teacher"],
        {"alpha": torch.tensor(0.4), "temperature": torch.tensor(5.0, dtype=torch.float64)},
    ),
}


def broken(given):
    """Rows whose logits or teacher are not finite, classes at -inf; a row that nothing counts holds NaN."""
    z, t, y = given["logits"], given["teacher"], given["target"]
    z[0, 20] = float("nan")
    z[1, 2] = float("nan")  # ignored by the CE, masked in the KL
    z[2, 3:] = -float("inf")  # a whole part, and of some splits two
    y[2] = 1
    z[4, 22] = float("inf")
    z[6] = -float("inf")
    z[7, 5] = -float("inf")
    y[7] = 5
    given["dense"][7, 5] = 0
    y[8], given["target_b"][8] = 1, 2  # whose share is 0
    z[8, 2] = -float("inf")
    t[2, 2:9] = -float("inf")
    t[3, 21] = float("nan")
    t[4] = -float("inf")
    return given | {"options": {"reduction": "none"}}  # a mean of these rows would be NaN


def upstream_of(loss):
    """A gradient of the loss that is the same on all ranks and differs between rows."""
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape) * 0.3


def one_process(given, case):
    logits = given["logits"].clone().requires_grad_()
    target, teacher, options = case(given)
    options |= given.get("options", {})
    for name in ("alpha", "temperature"):  # plain autograd gives a class at -inf no gradient where tau is a tensor
        options |= {name: float(options[name])} if name in options else {}
    loss, parts = fused_lb_loss(logits, target, teacher, impl="torch", return_parts=True, **options)
    loss.backward(upstream_of(loss))
    return loss.detach(), torch.stack(parts), logits.grad


def part(values, split, place, dim=1):
    return None if values is None else values.split(split, dim)[place]


def one_rank(given, case, split, place, group=None):
    """Loss, parts and the gradient of this rank's part."""
    target, teacher, options = case(given)
    options |= given.get("options", {})
    logits = part(given["logits"], split, place).clone().requires_grad_()
    if target is not None and target.dim() == 2:
        target = part(target, split, place)
    if "weight" in options:
        options["weight"] = part(options["weight"], split, place, 0)
    loss, parts = sharded_lb_loss(
        logits, target, part(teacher, split, place), group=group, return_parts=True, **options
    )
    assert isinstance(parts, LossParts)
    loss.backward(upstream_of(loss))
    return loss.detach(), torch.stack(parts), logits.grad


def difference(got, want):
    """The largest difference relative to max(1, |want|); NaN and infinities in other places are infinitely far."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(7.0), want[~finite].nan_to_num(7.0)) or not got[finite].isfinite().all():
        return float("inf")
    apart = (got - want)[finite].abs() / want[finite].abs().clamp(min=1)
    return apart.max().item() if apart.numel() else 0.0


def against_one_process(make, groups):
    """(case, split) -> largest difference in loss, parts and gradient, on this rank."""
    apart = {}
    for size, group in groups.items():
        place = torch.distributed.get_rank(group)
        if place < 0:
            continue
        for name, case in CASES.items():
            want = one_process(make(), case)
            for split in SPLITS[size]:
                got = one_rank(make(), case, split, place, group)
                want_here = (*want[:2], part(want[2], split, place))
                assert all(g.dtype == w.dtype and g.shape == w.shape for g, w in zip(got, want_here, strict=True))
                apart[name, tuple(split)] = max(difference(g, w) for g, w in zip(got, want_here, strict=True))
    return apart


def broken_inputs():
    return broken(inputs())


def on_two(make):
    few = 3 * 8 * CLASSES // 2  # pieces of a few rows, whose last is smaller
    with patch.object(sharded, "PIECE_BYTES_ON_CPU", few):
        return against_one_process(make, {2: None})


@pytest.mark.parametrize("make", [inputs, broken_inputs], ids=["finite", "broken"])
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(make, process_group):
    for apart in process_group(on_two, make):
        assert len(apart) == len(CASES) * len(SPLITS[2])
        assert {at: off for at, off in apart.items() if not off <= 1e-12} == {}


class Watched(TorchDispatchMode):
    """Counts collectives and their elements, and the elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.collectives: list[tuple[str, int]] = []
        self.largest = 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or the first use imports the compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            (values,) = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.collectives.append((func.overloadpacket.__name__, values.numel()))
        elif isinstance(made, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, made.numel())
        return made


def watched_call():
    """Collectives of forward and backward, and what the largest tensors are, over 64 rows of 1000 local classes."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(64, 1000, generator=generator, requires_grad=True)
    teacher = torch.randn(32, 1000, generator=generator)
    with patch.object(sharded, "PIECE_BYTES_ON_CPU", 5 * 4 * 1000):
        with Watched() as forward:
            loss = sharded_lb_loss(logits, torch.arange(64), teacher, label_smoothing=0.1)
        with Watched() as backward:
            loss.backward()
        repeated, logits.grad = logits.grad, None
        sharded_lb_loss(logits, torch.arange(64), teacher, label_smoothing=0.1).backward()
    return (
        forward.collectives, backward.collectives, forward.largest, backward.largest,
        loss.item(), torch.equal(repeated, logits.grad),
    )  # fmt: skip


def test_two_collectives_of_the_rows_and_none_in_the_backward(process_group):
    """And nothing of the size of the logits but the gradient."""
    first, second = process_group(watched_call)
    for forward, backward, largest, largest_of_backward, _, same in (first, second):
        # m, mt, the two sizes, two marks; then d1, the sum and the label's x, and d2, dt, gap.
        assert forward == [("allreduce_", 64 + 32 + 2 + 2), ("allreduce_", 3 * 64 + 3 * 32)] and backward == []
        assert largest <= 5 * 1000 and largest_of_backward == 64 * 1000
        assert same
    assert first[4] == second[4]  # to the bit


def wrong_calls():
    """The errors of calls that do not fit this rank's logits, and the collectives that ran meanwhile."""
    z, y, t = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long), torch.zeros(3, 4)
    calls = [
        ((z, y[:5]), {}),
        ((z[None], y), {}),
        ((z, y.float()), {}),
        ((z, torch.zeros(6, 8)), {}),  # the whole dense target
        ((z, y, torch.zeros(3, 8)), {}),
        ((z, y, torch.zeros(7, 4)), {}),
        ((z, y, t), {"kd_mask": torch.ones(6, dtype=torch.bool)}),
        ((z, y), {"kd_mask": torch.ones(3, dtype=torch.bool)}),
        ((z, y), {"weight": torch.ones(8)}),
        ((z, None), {}),
        ((z, y), {"target_b": y}),
        ((z, y, t), {"temperature": 1000.0}),
        ((z, y, t), {"alpha": torch.ones((), requires_grad=True)}),
        ((z, y), {"reduction": "max"}),
        ((z, y), {"group": "world"}),
        ((z, y), {"group": torch.distributed.GroupMember.NON_GROUP_MEMBER}),
    ]
    said = []
    with Watched() as watched:
        for arguments, options in calls:
            try:
                sharded_lb_loss(*arguments, **options)
                said.append("nothing")
            except (TypeError, ValueError, RuntimeError) as error:
                said.append(str(error))
    return said, watched.collectives


WRONG = [
    r"target must have shape \(6,\) for labels or \(6, 4\)",
    r"logits must have shape \(B, C\)",
    r"target.long\(\)",
    r"target must have shape \(6,\) for labels or \(6, 4\) for probabilities, got \(6, 8\)",
    r"last_logits must have shape \(H, C\) with H <= 6 and C = 4, got \(3, 8\)",
    r"last_logits must have shape .* got \(7, 4\)",
    r"pass kd_mask\[:3\]",
    "kd_mask was given without last_logits",
    r"weight must be floating with shape \(4,\)",
    "nothing is left to compute",
    "needs labels target .* and lam together",
    "temperature must be between",
    r"has no gradient of alpha, which requires one; pass alpha.detach\(\)",
    "reduction must be one of",
    "group must be a torch.distributed.ProcessGroup or None, got str",
    "group must be a torch.distributed.ProcessGroup or None|not in group",
]


def test_what_does_not_fit_is_said_before_the_first_collective(process_group):
    for said, collectives in process_group(wrong_calls):
        assert collectives == []
        for pattern, message in zip(WRONG, said, strict=True):
            assert message.startswith("sharded_lb_loss: ") and re.search(pattern, message), message


def different_calls():
    """What calls say that the ranks make with other values, and the loss where the values cannot be read."""
    rank = torch.distributed.get_rank()
    z, y, t = torch.zeros(6, 4), torch.arange(6), torch.zeros(3, 4)
    mask = torch.tensor([True, rank == 0, True])
    swapped = y.flip(0) if rank else y
    calls = [
        ((z, y + 2 * rank), {}),
        ((z, swapped), {}),
        ((z, y, t), {"kd_mask": mask}),
        ((z, y), {"target_b": y, "lam": torch.full((), 0.5 + 0.1 * rank)}),
        ((z, y), {"target_b": y, "lam": 0.5 + 0.1 * rank}),
        ((z, y), {"label_smoothing": 0.1 * rank}),
        ((z, y), {"weight": torch.ones(4)} if rank else {}),
        ((z, y, t), {"alpha": 1.0 + rank}),
        ((z, y + 3), {}),
        ((z, y - 1), {}),
    ]
    said, losses = [], []
    for arguments, options in calls:
        try:
            sharded_lb_loss(*arguments, **options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    with patch.object(_args, "readable", lambda value: False):  # as on a GPU
        for arguments, options in [calls[0], calls[2], calls[8], ((z, y), {})]:
            logits = arguments[0].clone().requires_grad_()
            loss = sharded_lb_loss(logits, *arguments[1:], **options)
            loss.backward()
            losses.append((loss.item(), logits.grad.isnan().any(1).tolist()))
    return said, losses


def test_ranks_that_differ_are_told_together(process_group):
    first, second = process_group(different_calls)
    assert first[0] == second[0]
    *differ, beyond, below = first[0]
    assert all(re.search("labels, lam, kd_mask and options must be the same on all 2 ranks", one) for one in differ)
    assert "target[5] = 8 is not a class: expected 0 <= label < 8" in beyond and "target[0] = -1" in below
    for _, ((labels, grad), (masks, _), (label, rows), (right, none)) in (first, second):
        assert labels != labels and all(grad) and masks != masks
        assert label != label and rows == [False] * 5 + [True]
        assert right == pytest.approx(torch.tensor(8.0).log().item()) and not any(none)


def precision(dtype):
    """Errors of one process and of two ranks against float64, as shares of the largest value."""
    rank, split = torch.distributed.get_rank(), [700, 1300]
    generator = torch.Generator().manual_seed(5)
    z, t = (4 * torch.randn(32, 2000, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    y = torch.randint(0, 2000, (32,), generator=generator)
    given = {"logits": z, "teacher": t, "target": y}
    right = one_process({**given, "logits": z.double(), "teacher": t.double()}, plain)
    one, ours = one_process(given, plain), one_rank(given, plain, split, rank)

    def errors(of):
        grad = part(right[2], split, rank)
        return (of[0] - right[0]).abs() / right[0], (of[2].double() - grad).abs().max() / grad.abs().max()

    return [float(e) for e in (*errors((one[0], None, part(one[2], split, rank))), *errors(ours))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_one_process(dtype, process_group):
    for loss, grad, our_loss, our_grad in process_group(precision, dtype):
        assert our_loss <= 2 * loss + 1e-7 and our_grad <= 2 * grad + 1e-7


def test_half_precision_with_a_loss_scale_keeps_the_gradient_of_a_large_batch():
    """Divided by the rows, the gradient is below float16; the scale is applied before it is rounded."""
    logits = torch.zeros(1024, 40, dtype=torch.float16, requires_grad=True)
    (sharded_lb_loss(logits, torch.zeros(1024, dtype=torch.long)) * 65536.0).backward()
    want = 65536.0 / 1024 / 40
    torch.testing.assert_close(logits.grad[:, 1:].float(), torch.full((1024, 39), want), rtol=1e-3, atol=0)


def test_one_process_is_a_group_of_one():
    for name, case in CASES.items():
        for make in (inputs, broken_inputs):
            for got, want in zip(one_rank(make(), case, [23], 0), one_process(make(), case), strict=True):
                assert difference(got, want) <= 1e-12, name


def test_it_is_differentiable_once_and_reads_the_teacher_in_the_backward():
    z, y, t = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2]), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sharded_lb_loss(z, y, t), z, create_graph=True)
    loss = sharded_lb_loss(z, y, t)
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * first)
    loss = sharded_lb_loss(z, y, t)
    t.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.fixture(scope="module")
def four_ranks():
    made = ProcessGroup(4)
    yield made
    made.close()


def on_four():
    groups = {1: torch.distributed.new_group([1]), 2: torch.distributed.new_group([1, 3]), 4: None}
    return {name: against_one_process(make, groups) for name, make in (("finite", inputs), ("broken", broken_inputs))}


@pytest.mark.slow  # processes of its own
def test_one_two_and_four_ranks_have_the_loss_and_the_gradient_of_one_process(four_ranks):
    results = four_ranks(on_four)
    for apart in (result[name] for result in results for name in ("finite", "broken")):
        assert {at: off for at, off in apart.items() if not off <= 1e-12} == {}
    sizes = [{len(split) for _, split in result["finite"]} for result in results]
    assert sizes == [{4}, {1, 2, 4}, {4}, {2, 4}]


def distributed(given, mesh, placements):
    """The tensors of a call as DTensors."""
    from torch.distributed.tensor import Shard, distribute_tensor

    by_class = [Shard(0) if placement == Shard(1) else placement for placement in placements]
    made = dict(given)
    for name in ("logits", "teacher", "dense"):
        made[name] = distribute_tensor(given[name], mesh, placements)
    return made | {"weight": distribute_tensor(given["weight"], mesh, by_class)}


def on_a_mesh():
    """Largest differences of DTensor calls, by mesh and case."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard

    apart = {}
    line, square = DeviceMesh("cpu", [0, 1, 2, 3]), DeviceMesh("cpu", [[0, 1], [2, 3]])
    for mesh, placements in ((line, [Shard(1)]), (square, [Replicate(), Shard(1)])):
        for name in ("options", "dense options", "none"):
            case = CASES[name]
            want = one_process(inputs(), case)
            given = distributed(inputs(), mesh, placements)
            logits = given["logits"].requires_grad_()
            target, teacher, options = case(given)
            loss, parts = sharded_lb_loss(logits, target, teacher, return_parts=True, **options)
            loss.backward(upstream_of(loss))
            assert type(loss) is torch.Tensor and tuple(logits.grad.placements) == tuple(placements)
            got = (loss.detach(), torch.stack(parts), logits.grad.full_tensor())
            apart[mesh.ndim, name] = max(difference(g, w) for g, w in zip(got, want, strict=True))
    return apart


@pytest.mark.slow  # torch takes seconds to import DTensor
def test_dtensors_bring_their_group(four_ranks):
    for apart in four_ranks(on_a_mesh):
        assert len(apart) == 6 and {at: off for at, off in apart.items() if not off <= 1e-12} == {}


def wrong_meshes():
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    mesh, square = DeviceMesh("cpu", [0, 1, 2, 3]), DeviceMesh("cpu", [[0, 1], [2, 3]])
    z, y, t, w = torch.zeros(8, 12), torch.zeros(8, dtype=torch.long), torch.zeros(8, 12), torch.ones(12)
    split, of_t = distribute_tensor(z, mesh, [Shard(1)]), distribute_tensor(t, mesh, [Replicate()])
    calls = [
        lambda: sharded_lb_loss(distribute_tensor(z, square, [Shard(0), Shard(1)]), y),
        lambda: sharded_lb_loss(distribute_tensor(z, mesh, [Replicate()]), y),
        lambda: sharded_lb_loss(split, y, of_t),
        lambda: sharded_lb_loss(split, y, t),
        lambda: sharded_lb_loss(split, y, weight=w),
        lambda: sharded_lb_loss(split, torch.full((8, 12), 1 / 12)),
        lambda: sharded_lb_loss(split, y, group=torch.distributed.group.WORLD),
        lambda: sharded_lb_loss(split.to_local(), y, distribute_tensor(t, mesh, [Shard(1)])),
        lambda: fused_lb_loss(split, y),
    ]
    said = []
    for call in calls:
        with Watched() as watched, pytest.raises((TypeError, ValueError)) as error:
            call()
        said.append((str(error.value), watched.collectives))
    return said


WRONG_MESHES = [
    r"must be \(B, C\) with Shard\(1\) on one mesh dimension .*rows are split .*pass to_local\(\)",
    r"must be \(B, C\) with Shard\(1\) .*; use logits.redistribute",
    r"last_logits as a DTensor must lie on the mesh of the logits with .*Shard\(dim=1\).*Replicate",
    r"last_logits must be a DTensor like the logits, with .*Shard\(dim=1\).*distribute_tensor",
    r"weight must be a DTensor like the logits, with .*Shard\(dim=0\)",
    "target must be a DTensor like the logits",
    "group must be None with a DTensor",
    "last_logits must be a plain tensor, got a DTensor",
    "logits must be a plain tensor, got a DTensor .sharded_lb_loss takes split classes",
]


@pytest.mark.slow  # torch takes seconds to import DTensor
def test_dtensors_that_do_not_fit_are_refused(four_ranks):
    for said in four_ranks(wrong_meshes):
        for pattern, (message, _) in zip(WRONG_MESHES, said, strict=True):
            assert re.search(pattern, message), message


def head_of_columns():
    """Largest differences of one step's gradients of a body and of a head whose columns are split."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    mesh, given = init_device_mesh("cpu", (4,)), inputs()
    split = parallelize_module(copy.deepcopy(whole), mesh, {"2": ColwiseParallel(use_local_output=False)})
    x = torch.randn(ROWS, 6, dtype=torch.float64)
    fused_lb_loss(whole(x), given["target"], given["teacher"], impl="torch").backward()
    teacher = distribute_tensor(given["teacher"], mesh, [Shard(1)])
    sharded_lb_loss(split(x), given["target"], teacher).backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in split.parameters()]
    return [difference(got, p.grad) for got, p in zip(grads, whole.parameters(), strict=True)]


@pytest.mark.slow  # torch takes seconds to import DTensor
def test_a_head_of_split_columns_has_the_gradient_of_one_process(four_ranks):
    for apart in four_ranks(head_of_columns):
        assert len(apart) == 4 and max(apart) <= 1e-12


def compiled_calls():
    apart = []
    place = torch.distributed.get_rank()
    compiled = torch.compile(sharded_lb_loss, fullgraph=True, backend="aot_eager")
    for case in (plain, both_options):
        want = one_rank(inputs(), case, SPLITS[4][0], place)
        with patch(f"{__name__}.sharded_lb_loss", compiled):
            got = one_rank(inputs(), case, SPLITS[4][0], place)
        apart += [difference(g, w) for g, w in zip(got, want, strict=True)]
    return apart


@pytest.mark.slow  # compiles
def test_it_compiles_in_one_graph(four_ranks):
    for apart in four_ranks(compiled_calls):
        assert max(apart) <= 1e-12
