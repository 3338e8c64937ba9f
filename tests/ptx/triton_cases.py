"""What runs in the process where Triton compiles: calls of every regime, option and dtype against the reference."""

from __future__ import annotations

import random
from typing import Any

import torch

from . import fuzz, mutants
from .machine import Kernel
from .oracle import Stream, batch, compare
from .triton_device import PRETENDED, TritonDevice, instead

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
ROLL = {"roll": True}
EVERYTHING = {**ROLL, "pair": True, "weight": True, "label_smoothing": 0.1, "mask": True}
# name: (classes, rows, dtype, options). Regimes: several pairs per warp, one pair held, long rows; aligned and not.
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "pairs-10-f32": (10, 140, "f32", ROLL),
    "pairs-10-bf16": (10, 140, "bf16", {"kind": "logits", "reduction": "none"}),
    "pairs-100-f32": (100, 40, "f32", ROLL),
    "pairs-100-f16": (100, 40, "f16", {**EVERYTHING, "alpha": torch.tensor(0.7)}),
    "held-1000-bf16": (1000, 8, "bf16", ROLL),
    "held-1000-f32": (1000, 8, "f32", {**EVERYTHING, "reduction": "sum"}),
    "held-1000-f16": (1000, 8, "f16", EVERYTHING),
    "held-1001-bf16": (1001, 8, "bf16", ROLL),
    "held-1001-f16": (1001, 8, "f16", {"kind": "none", "weight": True}),
    "held-8192-bf16": (8192, 6, "bf16", ROLL),
    "held-8192-f32": (8192, 6, "f32", ROLL),
    "held-8192-f16": (8192, 6, "f16", {"kind": "logits", "need_grad": False}),
    "long-32000-bf16": (32000, 4, "bf16", ROLL),
    "long-32000-f32": (32000, 4, "f32", ROLL),
    "long-32000-f16": (32000, 4, "f16", {"kind": "logits", "mask": True}),
    "long-21841-bf16": (21841, 4, "bf16", ROLL),
    "long-21841-f16": (21841, 4, "f16", ROLL),
    "long-dense-bf16": (33000, 4, "bf16", {"kind": "probabilities", "dense": True}),
    "dense-f32": (300, 6, "f32", {"kind": "probabilities", "dense": True, "weight": True, "label_smoothing": 0.1}),
    "virtual-bf16": (1000, 8, "bf16", {"kind": "virtual", "correct_share": 0.9, "counted": True}),
    "uniform-f32": (100, 8, "f32", {"kind": "virtual", "temperature": 1.0}),
    "counted-bf16": (1000, 24, "bf16", {**ROLL, "counted": True}),
    "counted-f32": (100, 24, "f32", {**EVERYTHING, "counted": True}),
    "double": (1000, 8, "f64", ROLL),
}


def options_of(options: dict[str, Any], rows: int, classes: int, step: int) -> dict[str, Any]:
    """The options with tensors in them, of one batch."""
    options = {k: v for k, v in options.items() if k not in ("roll", "dense", "counted")}
    g = torch.Generator().manual_seed(rows + step)
    if options.pop("pair", False):
        options["target_b"] = torch.randint(0, classes, (rows,), generator=g)
        options["lam"] = torch.tensor(0.3)
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes, generator=g) + 0.5
    if options.pop("mask", False):
        options["kd_mask"] = torch.rand(rows // 2, generator=g) < 0.7
    return options


def run(name: str, seed: int = 0) -> None:
    """The calls of one case; with a ``seed``, calls at random of the same kernels."""
    from dlb_fast.kernels import launch

    classes, rows, dtype, options = CASES[name]
    device = TritonDevice(seed=classes + seed)
    here = launch.COUNT_HERE_ROWS, launch.COUNT_CHUNK
    if options.get("counted"):  # a batch of these few rows by the kernel that counts
        launch.COUNT_HERE_ROWS, launch.COUNT_CHUNK = 4, 16
    try:
        if options.get("roll") and seed:
            pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
            made = options_of(options, rows, classes, seed)
            masked = (made.pop("kd_mask", None) is not None,)
            stream = Stream(device, classes, pick.choice([rows // 2, rows // 2 + 1, rows]), DTYPES[dtype])
            logits, target, _ = batch(rows, classes, DTYPES[dtype], seed=seed, scale=pick.choice([0.1, 2.0, 10.0]))
            target[torch.rand(rows, generator=g) < 0.2] = -100
            given = {"alpha": 0.7, **made}
            fuzz.steps(stream, logits, target, pick, g, given, (True,), masked, ((0, 0),))
        elif options.get("roll"):
            stream = Stream(device, classes, rows // 2, DTYPES[dtype])
            for step, moved in enumerate((0, 1, 1, 2, 3)):  # the first, the next, that one again, the next, a last one
                logits, target, _ = batch(rows, classes, DTYPES[dtype], seed=classes + moved)
                target[1] = -100
                ids = torch.arange(rows) + moved * (rows // 2)
                if step == 3:
                    ids[2] = -1
                elif step == 4:  # what was stored last, twice
                    ids[rows // 2 :] = ids[: rows // 2]
                given = {"alpha": 0.7, **options_of(options, rows, classes, step)}
                stream.step(logits, target, ids, **given)
        else:
            logits, target, teacher = batch(rows, classes, DTYPES[dtype], seed=classes + seed)
            target[1] = -100
            if options.get("dense"):
                target = torch.softmax(torch.randn(rows, classes, generator=torch.Generator().manual_seed(1)), 1)
            kind = options["kind"]
            shares = torch.softmax(teacher.float(), 1).to(DTYPES[dtype])
            given = {"logits": teacher, "probabilities": shares}.get(kind)
            made = options_of(options, rows, classes, seed)
            compare(device.last_batch(logits, target, teacher=given, **made), logits, target, given, **made)
    finally:
        launch.COUNT_HERE_ROWS, launch.COUNT_CHUNK = here


def studies(name: str, calls: int) -> list[mutants.Study]:
    """The kernels that a case launches, each with the call of the case and others at random."""
    PRETENDED.launched.clear()
    run(name)

    def case(kernel: Kernel, seed: int) -> mutants.Case:
        def call(changed: Kernel) -> None:
            with instead(kernel, changed):
                run(name, seed)

        return call

    kernels = list(dict.fromkeys(PRETENDED.launched))
    return [
        mutants.Study(
            kernel, [case(kernel, seed) for seed in range(calls)], [case(kernel, seed) for seed in range(calls, 40)]
        )
        for kernel in kernels
    ]


def broken(name: str, barriers: bool, count: int) -> dict[str, list[mutants.Verdict]]:
    """Verdicts by rule: of every barrier, fence and release, or of ``count`` wrong indices and lost predicates."""
    verdicts: dict[str, list[mutants.Verdict]] = {}
    for study in studies(name, 6 if barriers else 12):
        if barriers:
            chosen = study.reached(mutants.without_barriers(study.kernel.program))
        else:
            chosen = study.sampled(count)
        for mutant in chosen:
            verdict = study.judge(mutant)
            mutant.program = None  # a process away, nobody runs it
            verdicts.setdefault(verdict.why, []).append(verdict)
    return verdicts


def scaled() -> None:
    """The kernel of the backward, in every dtype: a factor of 1, one for all rows, one per row."""
    device = TritonDevice()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grad = torch.randn(7, 13).to(dtype)
        same = grad.clone()
        assert device.scale_grad(same, torch.tensor(4.0), 4.0) == 0 and torch.equal(same, grad)
        for upstream in (torch.tensor(3.0), torch.rand(7)):
            scaled = grad.clone()
            device.scale_grad(scaled, upstream, 2.0)
            factor = (upstream if upstream.dim() == 0 else upstream[:, None]) / 2.0
            # The division may err by 2 ulp; the product and its reference each round once.
            close = {"rtol": 3 * torch.finfo(dtype).eps, "atol": 0}
            torch.testing.assert_close(scaled, (grad.float() * factor).to(dtype), **close)


BROKEN = ("pairs-100-f32", "held-1000-bf16", "held-1001-bf16", "long-32000-bf16", "counted-bf16")
