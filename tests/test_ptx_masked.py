"""Classes masked by a large negative logit cost a two-pass CUDA kernel no digit, wherever they stand.

Models mask classes (of another task, of padding) by -1e4, the lowest float16 or float32, or -inf. Resident rows are
compared too: all kernels give the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx import harness
from ptx.oracle import batch, reference_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]

MASKS = (-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min, -torch.inf)
PLACES = {
    "first": lambda classes: slice(0, 1),
    "first half": lambda classes: slice(0, classes // 2),
    "middle": lambda classes: slice(classes // 2, classes // 2 + 1),
    "last": lambda classes: slice(classes - 1, classes),
    "all but some": lambda classes: slice(0, classes - 30),
}
TEACHERS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "logits": {"kind": "logits"},
    "logits, cold": {"kind": "logits", "temperature": 0.5},
    "probabilities": {"kind": "probabilities"},
    "right class": {"kind": "virtual", "correct_share": 1.0},
}
TARGETS = ("labels", "pair", "dense", "dense, weight")


def check(
    classes: int, place: str, mask: float, teacher_name: str, target_name: str, dtype: torch.dtype = torch.float32,
    clusters: int = 0, teacher_dtype: torch.dtype | None = None,
) -> str:  # fmt: skip
    """Loss, parts and gradient of a batch with masked classes; the regime that computed it."""
    rows = 4 if classes < 5000 else 2
    logits, _, teacher = batch(rows, classes, torch.float32, taught=rows // 2, seed=classes)
    g = torch.Generator().manual_seed(classes)
    labels, second = (torch.randint(classes - 25, classes - 5, (rows,), generator=g) for _ in range(2))
    masked = PLACES[place](classes)
    logits[:, masked] = teacher[:, masked] = mask
    logits, teacher = logits.to(dtype), teacher.to(teacher_dtype or dtype)
    options = dict(TEACHERS[teacher_name])
    target = labels
    if target_name == "pair":
        options |= {"target_b": second, "lam": torch.tensor(0.7)}
    elif target_name.startswith("dense"):
        target = torch.zeros(rows, classes).scatter_(1, labels[:, None], 0.7)
        target[torch.arange(rows), second] += 0.3
        if "weight" in target_name:
            options["weight"] = torch.rand(classes, generator=g)
    given = None
    if options["kind"] == "probabilities":
        given = torch.softmax(teacher.float(), 1)
    elif options["kind"] == "logits":
        given = teacher
    result = harness.emulator(largest_cluster=clusters, seed=classes).last_batch(
        logits, target, teacher=given, **options
    )
    loss, parts, grad = reference_of(logits, target, given, torch.float64, options)
    torch.testing.assert_close(result.loss.double(), loss, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(result.parts[:4].double(), parts, rtol=2e-6, atol=1e-5)
    assert result.grad is not None
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-8 * 1.02, torch.float16: 2.0**-11 * 1.02}[dtype]
    torch.testing.assert_close(result.grad.double() / result.parts[4].double(), grad, rtol=step, atol=2e-6)
    return str(result.plan["regime"])


def turning(masks: tuple[float, ...], place: str, cases: list[tuple[str, str]]) -> list[tuple[float, str, str]]:
    """Each case with one mask, another one at every place: every pair of mask, place and case, and no product."""
    first = list(PLACES).index(place)
    return [(masks[(first + number) % len(masks)], *case) for number, case in enumerate(cases)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [100, 1500])
def test_masked_classes_under_every_option(classes: int, place: str) -> None:
    cases = [(teacher, target) for teacher in TEACHERS for target in TARGETS if teacher != "right class"]
    cases.append(("right class", "labels"))
    regimes = {check(classes, place, *case) for case in turning(MASKS, place, cases)}
    assert regimes == ({"lanes", "two_pass_warp"} if classes == 100 else {"block", "two_pass_block"})


@pytest.mark.parametrize("place", PLACES)
def test_masked_classes_of_long_rows(place: str) -> None:
    """Without clusters they take two passes, by the plain kernel where the target is a label and the teacher logits."""
    cases = [("logits", "labels"), ("logits, cold", "labels"), ("none", "labels"), ("logits", "dense")]
    for case in turning(MASKS, place, cases):
        assert check(17000, place, *case) == "two_pass_block"
    (case,) = turning(MASKS, place, cases[:1])
    assert check(17000, place, *case, clusters=8) == "cluster"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [100, 1500, 17000])
def test_masked_classes_in_half_precision(classes: int, place: str, dtype: torch.dtype) -> None:
    cases = [("logits", "dense"), ("probabilities", "pair"), ("right class", "labels"), ("logits", "labels")]
    for case in turning((-1e4, -65504.0, -torch.inf), place, cases):
        check(classes, place, *case, dtype)
    # A teacher of another element type takes two passes too.
    assert check(classes, place, *case, dtype, teacher_dtype=torch.float32).startswith("two_pass")


@pytest.mark.parametrize("classes", [100, 1500, 17000])
def test_what_masked_classes_do_to_label_smoothing_is_what_torch_does(classes: int) -> None:
    """Smoothing asks for some of a masked class: a large loss, an infinite one, NaN where its class weight is 0."""
    logits, target, teacher = batch(4, classes)
    target.clamp_(min=classes // 2 + 1)
    for mask in (-1e4, -1e9, -torch.inf):
        logits[:, : classes // 2] = mask
        for weight in (None, torch.ones(classes), (torch.arange(classes) > classes // 4).float()):
            options = {"label_smoothing": 0.1, "weight": weight}
            result = harness.emulator(largest_cluster=0).last_batch(logits, target, teacher=teacher[:0], **options)
            loss, _, grad = reference_of(logits, target, teacher[:0], torch.float64, options)
            torch.testing.assert_close(result.loss.double(), loss, rtol=2e-6, atol=1e-5, equal_nan=True)
            assert result.grad is not None
            torch.testing.assert_close(result.grad.double(), grad, rtol=0, atol=2e-6)
