"""The PTX of the CUDA kernels at the edges of their options, against the reference: what no ordinary batch meets."""

from __future__ import annotations

import pytest
import torch
from ptx import harness
from ptx.oracle import batch, compare, reference_of, run
from test_last_batch_edges import not_finite

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("classes", [10, 300, 2000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_float16_gradient_that_would_not_fit_is_stored_smaller(
    classes: int, reduction: str, scale: float
) -> None:
    """The factor is undone in the backward, where a small upstream gradient may bring it back into range."""
    logits, target, teacher = batch(4, classes, torch.float16, scale=scale)
    result = harness.emulator().last_batch(logits, target, teacher=teacher, reduction=reduction, alpha=1e5)
    wanted = reference_of(logits, target, teacher, torch.float64, {"reduction": reduction, "alpha": 1e5})[2]
    assert result.grad is not None and float(result.parts[4]) < (1.0 if reduction != "mean" else 65536.0)
    # Two shares of alpha tau that cancel, each off by a reciprocal's unit in the last place and two roundings.
    shares = 1e5 * 3.0 / (len(teacher) if reduction == "mean" else 1)
    torch.testing.assert_close(
        result.grad.double() / result.parts[4].double(), wanted, rtol=1e-3, atol=2.0**-22 * shares
    )


@pytest.mark.parametrize("correct_share", [0.0, 0.3, 0.9, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_teacher_by_rule_of_a_single_class_has_only_its_share(
    correct_share: float | None, dtype: torch.dtype
) -> None:
    logits, target, _ = batch(3, 1, dtype)
    options = {} if correct_share is None else {"correct_share": correct_share}
    result = run(harness.emulator(), logits, target, kind="virtual", temperature=1.0, alpha=0.7, **options)
    assert result.grad is not None and not result.grad.any()


@pytest.mark.parametrize("classes", [10, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pair_without_its_second_label_is_counted_where_it_is_right(
    classes: int, dtype: torch.dtype
) -> None:
    """It has no loss and no gradient, NaN or not, unless it is taught; and a label that is no class is never right."""
    logits, target, teacher = batch(10, classes, dtype)
    target[:9] = logits[:9].argmax(1)
    second = target.roll(1)
    target[8], target[9] = classes, -7
    second[[0, 2, 5, 6, 7, 8, 9]] = -100
    target[2] = -100
    logits[6, 1] = torch.nan
    logits[7, 0] = -torch.inf
    options = {"target_b": second, "lam": torch.tensor(0.3)}
    for given in (None, teacher):
        for reduction in ("mean", "none"):
            result = harness.emulator().last_batch(
                logits.clone(), target, teacher=given, reduction=reduction, **options
            )
            compare(result, logits, target, given, reduction=reduction, **options)
            assert float(result.parts[3]) == 6.0  # rows 0, 1, 3, 4, 5 and 7


@pytest.mark.parametrize("classes", [10, 300, 2000])
def test_a_teacher_by_rule_asks_the_first_label_of_a_pair_only(classes: int) -> None:
    logits, target, _ = batch(8, classes)
    second = target.roll(1)
    second[[0, 3, 4]] = -100
    target[[3, 5]] = -100
    options = {"kind": "virtual", "correct_share": 0.9, "target_b": second, "lam": torch.tensor(0.3)}
    for reduction in ("mean", "sum", "none"):
        result = run(harness.emulator(), logits, target, reduction=reduction, **options)
        assert float(result.parts[5]) == 6.0
    target[4] = classes
    result = harness.emulator().last_batch(logits, target, reduction="none", **options)
    assert result.grad is not None
    assert result.loss.isnan().tolist() == result.grad.isnan().all(1).tolist() == [i == 4 for i in range(8)]


def test_a_row_without_a_finite_loss_is_not_right() -> None:
    for classes in (5, 300):
        logits, target, right = not_finite(classes)
        for teacher in (None, torch.zeros(8, classes)):
            found = harness.emulator().last_batch(logits, target, teacher=teacher)
            assert int(found.parts[3]) == right
