"""The loss over classes that are split over ranks: the value and the gradient of one process on the whole logits."""

from __future__ import annotations

import copy
import warnings

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
    dense[2, [3, 20]] = 0.5  # a tie between two ranks
    return {
        "logits": (3 * normal(ROWS, CLASSES)).to(dtype),
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
    t[2, 2:9] = -float("inf")
    t[3, 21] = float("nan")
    t[4] = -float("inf")
    return given


def upstream_of(loss):
    """A gradient of the loss that is the same on all ranks and differs between rows."""
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape) * 0.3


def one_process(given, case):
    logits = given["logits"].clone().requires_grad_()
    target, teacher, options = case(given)
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
    sharded.PIECE_BYTES["cpu"] = 3 * 8 * CLASSES // 2  # pieces of a few rows, whose last is smaller
    return against_one_process(make, {2: None})


@pytest.mark.parametrize("make", [inputs, broken_inputs], ids=["finite", "broken"])
def test_two_ranks_have_the_loss_and_the_gradient_of_one_process(make, process_group):
    for apart in process_group(on_two, make):
        assert len(apart) == len(CASES) * len(SPLITS[2])
        assert {at: off for at, off in apart.items() if not off <= 1e-12} == {}
