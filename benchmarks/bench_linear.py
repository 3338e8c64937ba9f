"""The loss from hidden states: loss and gradients of hidden states and weight, ours against what people run today.

    python -m benchmarks.bench_linear --device cpu --out benchmarks/results/linear-cpu.jsonl
    python -m benchmarks.bench_linear --device cuda --dtypes bfloat16 --out linear.jsonl
    python -m benchmarks.bench_linear --shape 2048 512 32000 --variants fused eager --losses ce half

Losses: `ce`, cross entropy alone; `half` and `full`, with the logits of a teacher for half of the rows and for all;
`hidden`, the teacher's hidden states and weight (half of the rows); `top_k`, its 64 largest logits (half of the rows).
Contenders: `fused`, `fused_linear_lb_loss`; `eager`, `F.linear`, `F.cross_entropy` and `F.kl_div`; `compile`, the same
under `torch.compile`; `torch`, `F.linear_cross_entropy` in chunks; `liger`, its fused linear cross entropy.
`products` are the three products that each of them needs, hidden states x weight and the two of the backward, over all
rows at once, into memory that is there: a contender's time beyond them is a figure of the same run.

Every contender is held against float64 before it is timed; what computes something else is listed as missing, and is an
error where it is ours. Memory on a CPU is that of a process apart during its first step of this size, as the operating
system counts it, without inputs, teacher and the weight's gradient in float32. Last comes a table of bars.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dlb_fast import TopK, fused_linear_lb_loss
from dlb_fast.linear import LOGIT_BYTES

from . import harness, memory, shapes
from .harness import Bar, judged
from .loss_variants import TAU, eager_loss

K = 64  # logits kept of a row of a top_k teacher
TAUGHT = {"ce": 0.0, "half": 0.5, "full": 1.0, "hidden": 0.5, "top_k": 0.5}  # share of the rows with a teacher
DENSE = ("half", "full")
LOSSES = {
    "fused": tuple(TAUGHT),
    "eager": ("ce", *DENSE, "hidden"),
    "compile": ("ce", *DENSE),
    "torch": ("ce",),
    "liger": ("ce",),
}
PRODUCTS = ("forward", "hidden", "weight")  # of the logits, and of the gradients of hidden states and weight
# Relative errors, of the loss and in the norm of a gradient, up to which a contender computes the same.
ALLOWED = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 3e-2), "float16": (5e-4, 1e-2), "float64": (1e-12, 1e-11)}
PIECE = 64 << 20  # bytes of float64 logits at once
# What the fused loss must reach: bytes, and ratios of time.
BAR_BYTES, BAR_TOP_K = 64e6, 1.10
BAR_TIME = {"cpu": {"eager": 0.75, "compile": 0.90}, "cuda": {"eager": 0.75, "compile": 0.90, "liger": 1.0}}
BAR_PRODUCTS = {"float32": 1.20, "bfloat16": 1.30}

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]  # the loss, the gradients of hidden states and weight
Key = tuple[str, str]  # contender, loss


class Problem(NamedTuple):
    """One step's inputs, the same for every contender."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    teacher: Tensor  # (rows, C)
    teacher_hidden: Tensor
    kept: int

    @classmethod
    def of(cls, shape: shapes.LinearShape, dtype: torch.dtype, device: str, losses: Iterable[str] = ()) -> Problem:
        """Logits of deviation 4; no product of this size is computed, which would be memory of a library's own."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        rows, features, classes = shape.rows, shape.features, shape.classes
        hidden = draw(rows, features)
        dense = any(loss in losses for loss in (*DENSE, "top_k"))
        return cls(
            hidden.to(dtype),
            (draw(classes, features) * (4 / features**0.5)).to(dtype),
            torch.randint(0, classes, (rows,), generator=generator, device=device),
            (4 * draw(rows if dense else 0, classes)).to(dtype),
            (hidden + draw(rows, features)).to(dtype),
            min(K, classes - 1),
        )

    def of_loss(self, loss: str) -> Any:
        """The teacher of a loss, as `fused_linear_lb_loss` takes it."""
        rows = int(TAUGHT[loss] * len(self.hidden))
        if loss == "hidden":
            return self.teacher_hidden[:rows], self.weight
        if loss == "top_k":
            return TopK.of(self.teacher[:rows], self.kept, TAU)
        return self.teacher[:rows] if rows else None


class Exact(NamedTuple):
    """A loss and its gradients in float64."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def distillation(loss: str, z: Tensor, teacher: Any) -> Tensor:
    """Sum over rows of ``tau^2 KL`` in float64, by its formula."""
    log_q = F.log_softmax(z / TAU, 1)
    if loss == "top_k":
        log_p = teacher.values.double() / TAU - teacher.logsumexp.double()[:, None]
        log_q = log_q.gather(1, teacher.indices)
        rest_p, rest_q = (1 - log.exp().sum(1, keepdim=True) for log in (log_p, log_q))
        log_p, log_q = torch.cat([log_p, rest_p.log()], 1), torch.cat([log_q, rest_q.log()], 1)
    else:
        log_p = F.log_softmax(teacher.double() / TAU, 1)
    return TAU**2 * (log_p.exp() * (log_p - log_q)).sum()


def exact(problem: Problem, losses: Iterable[str]) -> dict[str, Exact]:
    """Each loss and its gradients in float64, some rows at a time."""
    hidden, weight, target = problem.hidden.double(), problem.weight.double(), problem.target
    count = len(hidden)
    found = {
        loss: Exact(hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)) for loss in losses
    }
    teachers = {loss: problem.of_loss(loss) for loss in found}
    for rows in torch.arange(count, device=hidden.device).split(max(1, PIECE // (8 * len(weight)))):
        z = hidden[rows] @ weight.t()
        for loss, result in found.items():
            z.requires_grad_()
            value = F.cross_entropy(z, target[rows], reduction="sum") / count
            taught = int(TAUGHT[loss] * count)
            old = rows[rows < taught]
            if len(old):
                if loss == "hidden":
                    teacher: Any = problem.teacher_hidden[old].double() @ weight.t()
                elif loss == "top_k":
                    teacher = TopK(*(part[old] for part in teachers[loss]))
                else:
                    teacher = teachers[loss][old]
                value = value + distillation(loss, z[: len(old)], teacher) / taught
            (g,) = torch.autograd.grad(value, z)
            result.loss.add_(value.detach())
            result.hidden[rows] = g @ weight
            result.weight.addmm_(g.t(), hidden[rows])
    return found


def errors(found: tuple[Tensor, ...], right: Exact) -> dict[str, float]:
    """Against float64: of the loss relative, of a gradient in the norm, and of its largest element by the largest."""
    result = {"loss": float((found[0].double() - right.loss).abs() / right.loss.abs())}
    for name, got, want in zip(("hidden", "weight"), found[1:], right[1:], strict=True):
        off = got.double() - want
        result[name] = float(off.norm() / want.norm())
        result[f"{name}_largest"] = float(off.abs().max() / want.abs().max())
    return result


def loss_of(name: str, loss: str, problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """A contender's loss of hidden states and weight; an exception where it cannot run here."""
    target, teacher = problem.target, problem.of_loss(loss)
    if name == "fused":
        kind = "logits" if loss in ("ce", *DENSE) else loss
        return lambda h, w: fused_linear_lb_loss(h, w, target, teacher, kind=kind, temperature=TAU)
    if name == "torch":
        options = torch.nn.LinearCrossEntropyOptions()  # its own choice of chunks
        return lambda h, w: F.linear_cross_entropy(h, w, target, options=options)
    if name == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda h, w: liger_fused_linear_cross_entropy(h, w, target)

    def eager(h: Tensor, w: Tensor) -> Tensor:
        z = F.linear(h, w)
        if loss == "ce":
            return F.cross_entropy(z.float(), target)
        if loss == "hidden":
            with torch.no_grad():
                taught = F.linear(*teacher)
            return eager_loss(z, target, taught)
        return eager_loss(z, target, teacher)

    return torch.compile(eager) if name == "compile" else eager


def contenders(
    problem: Problem, device: str, names: Iterable[str], losses: Sequence[str]
) -> tuple[dict[Key, Step], list[str]]:
    """(contender, loss) -> a step; and what was wanted but cannot run here, with the reason."""
    leaves = [part.clone().requires_grad_() for part in (problem.hidden, problem.weight)]
    found: dict[Key, Step] = {}
    missing = []

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            value = loss(*leaves)
            value.backward()
            grads = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            return value.detach(), *grads  # type: ignore[return-value]

        return run

    for name in names:
        if name == "liger" and device != "cuda":
            missing.append("liger (needs a CUDA GPU)")
            continue
        try:
            found |= {(name, loss): step(loss_of(name, loss, problem)) for loss in LOSSES[name] if loss in losses}
        except Exception as error:  # not installed; a torch without it
            missing.append(f"{name} ({type(error).__name__}: {error})")
    return found, missing


def checked(
    work: dict[Key, Step], right: dict[str, Exact], dtype: str
) -> tuple[dict[Key, dict[str, float]], list[str]]:
    """The errors of the contenders that compute this loss; and the others, each with the reason."""
    found: dict[Key, dict[str, float]] = {}
    wrong = []
    for_loss, for_gradient = ALLOWED[dtype]
    for (name, loss), step in work.items():
        try:
            off = errors(step(), right[loss])
            # The value of F.linear_cross_entropy is a sum over its chunks in the dtype of the hidden states.
            held = {"hidden": for_gradient, "weight": for_gradient} | ({} if name == "torch" else {"loss": for_loss})
            bad = [what for what, most in held.items() if not off[what] <= most]
            reason = f"computes something else: {bad[0]} is off by {off[bad[0]]:.3g}" if bad else ""
        except Exception as error:  # the others are worth having
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason:
            wrong.append(f"{name} ({loss}: {reason})")
        else:
            found[name, loss] = off
    return found, wrong


def products(problem: Problem) -> dict[Key, harness.Work]:
    """The three products of any last layer, in its dtype, over all rows, into memory that is there."""
    hidden, weight = problem.hidden, problem.weight
    logits = hidden.new_empty(len(hidden), len(weight))
    grad = hidden.new_full(logits.shape, 1e-3)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    works = (
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(grad, weight, out=of_hidden),
        lambda: torch.mm(grad.t(), hidden, out=of_weight),
    )
    return {("products", name): work for name, work in zip(PRODUCTS, works, strict=True)}


def beyond(peak: int, shape: shapes.LinearShape) -> int:
    """A peak without the weight's gradient in float32."""
    return peak - 4 * shape.classes * shape.features


def alone(name: str, loss: str, shape: shapes.LinearShape, dtype: torch.dtype) -> int:
    """Resident memory of the first step of this size in this process. What is loaded at first use is loaded before."""
    small = Problem.of(shapes.LinearShape(8, 8, 64, ""), dtype, "cpu", [loss])
    for steps, problem in ((2, small), (2 if name == "compile" else 0, Problem.of(shape, dtype, "cpu", [loss]))):
        (step,) = contenders(problem, "cpu", [name], [loss])[0].values()
        for _ in range(steps):  # at this size only the compiler, whose memory is not the step's
            step()
    return memory.resident_peak(step)


def peak_alone(key: Key, shape: shapes.LinearShape, dtype: str) -> int | str:
    """The peak of a contender in a process of its own, or why there is none."""
    sizes = map(str, (shape.rows, shape.features, shape.classes))
    command = [sys.executable, "-m", "benchmarks.bench_linear", "--device", "cpu", "--alone", *key, "--shape", *sizes]
    command += ["--dtypes", dtype, "--threads", str(torch.get_num_threads())]
    process = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if process.returncode:
        return (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return int(json.loads(process.stdout.splitlines()[-1])["peak_bytes"])


def ratios(key: Key, times: dict[Key, harness.Times]) -> dict[str, dict[str, float]]:
    """Time over that of others in the same round: the products, the other contenders of ours, and ours of `ce`."""
    name, loss = key
    bases = {"products": [("products", part) for part in PRODUCTS]}
    if name == "fused":
        bases |= {other: [(other, loss)] for other in LOSSES if other != "fused" and (other, loss) in times}
        if loss != "ce" and ("fused", "ce") in times:
            bases["ce"] = [("fused", "ce")]

    def together(keys: Sequence[Key]) -> list[float]:
        return [sum(parts) for parts in zip(*(times[one].wall for one in keys), strict=True)]

    return {base: harness.paired(times[key].wall, together(keys)) for base, keys in bases.items()}


def measure(shape: shapes.LinearShape, dtype_name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per contender and loss, and one per product."""
    dtype = getattr(torch, dtype_name)
    torch._dynamo.reset()
    problem = Problem.of(shape, dtype, args.device, args.losses)
    work, missing = contenders(problem, args.device, args.variants, args.losses)
    off, wrong = checked(work, exact(problem, args.losses), dtype_name)
    work = {key: work[key] for key in off}
    gc.collect()
    times = harness.in_rounds({**work, **products(problem)}, args.device, seconds=args.seconds, least=args.rounds)
    inside: dict[Key, dict[str, Any]] = {key: {"part": True} for key in times}
    for key, step in work.items():
        inside[key] = {"errors": off[key], "ratios": ratios(key, times)}
        if args.device == "cuda":
            inside[key]["peak_bytes"] = beyond(memory.peak_bytes(step, "cuda"), shape)
    del problem, work  # the processes apart need their memory
    gc.collect()
    if args.device == "cpu" and not args.no_memory:
        for key in off:
            peak = peak_alone(key, shape, dtype_name)
            inside[key] |= {"no_peak": peak} if isinstance(peak, str) else {"peak_bytes": beyond(peak, shape)}
    sizes = {"rows": shape.rows, "features": shape.features, "classes": shape.classes, "dtype": dtype_name}
    return [
        {
            "bench": "linear", "kind": "wall", "variant": variant, "loss": loss, **harness.spread(time.wall), **sizes,
            "device": args.device, **inside[variant, loss], "missing": [*missing, *wrong], "wrong": wrong,
        }
        for (variant, loss), time in times.items()
    ]  # fmt: skip


def bars(
    records: Iterable[dict[str, Any]], device: str, sizes: Iterable[shapes.LinearShape], dtypes: Iterable[str],
    why: str = "",
) -> list[Bar]:  # fmt: skip
    """What the fused loss must reach.

    An error is the largest of all losses, each over eager's in the same dtype. Eager's counts as one rounding of a
    float32 number where it is smaller, which is chance.
    """
    mine = [r for r in records if r.get("bench") == "linear"]
    lines = []
    for shape, dtype in itertools.product(sizes, dtypes):
        same = [r for r in mine if (r["rows"], r["features"], r["classes"], r["dtype"]) == (*shape[:3], dtype)]
        found = {(r["variant"], r["loss"]): r for r in same}
        gone = {text.partition(" (")[0]: text for r in same for text in r["missing"]}
        where = f"C={shape.classes} rows={shape.rows} {dtype}"

        def line(what: str, form: str, value: Any, bar: Any, other: str = "", said: str = "") -> None:
            """One bar; ``value`` is None where it was not measured."""
            told = "-" if value is None else format(value, form)
            met = None if value is None else value <= bar
            reason = said or gone.get("fused") or gone.get(other) or why  # noqa: B023
            lines.append(judged(f"{what}, {where}", told, f"<= {format(bar, form)}", met, reason))  # noqa: B023

        def ratio(loss: str, base: str) -> Any:
            return found.get(("fused", loss), {}).get("ratios", {}).get(base, {}).get("ratio")  # noqa: B023

        for loss in DENSE:
            ours = found.get(("fused", loss), {})
            peak = ours.get("peak_bytes")
            most = BAR_BYTES
            if device == "cuda":  # a chunk's logits and gradient, and the gradients in their own dtype
                width = getattr(torch, dtype).itemsize
                most = 2 * LOGIT_BYTES + width * shape.features * (shape.rows + shape.classes)
            line(
                f"memory MB, {loss}",
                ".1f",
                None if peak is None else peak / 1e6,
                most / 1e6,
                said=ours.get("no_peak", ""),
            )
            for other, bar in BAR_TIME[device].items():
                if loss in LOSSES[other]:
                    line(f"time over {other}, {loss}", ".2f", ratio(loss, other), bar, other)
            if device == "cpu" and dtype in BAR_PRODUCTS:
                line(f"time over the products, {loss}", ".2f", ratio(loss, "products"), BAR_PRODUCTS[dtype])
        if "liger" in BAR_TIME[device]:
            line("time over liger, ce", ".2f", ratio("ce", "liger"), BAR_TIME[device]["liger"], "liger")
        for what in ("loss", "hidden", "weight"):
            least = torch.finfo(torch.float32).eps / 2
            shares = []
            for loss in LOSSES["eager"]:
                ours, eager = (found.get((name, loss), {}).get("errors", {}) for name in ("fused", "eager"))
                if ours and eager:
                    shares.append(ours[what] / max(eager[what], least))
            line(f"error of {what} over eager's", ".2f", max(shares, default=None), 1.0, "eager")
        line("time of top_k over ce", ".2f", ratio("top_k", "ce"), BAR_TOP_K)
    return lines


def lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """One line per contender: time, ratio to the products, memory, errors."""
    told = []
    for r in records:
        if r.get("bench") != "linear":
            continue
        name = f"{r['rows']} x {r['features']} x {r['classes']} {r['dtype']:<9}{r['loss']:<8}{r['variant']:<9}"
        text = f"{name}{r['median_us'] / 1e3:9.1f} ms [{r['p20_us'] / 1e3:.1f}, {r['p80_us'] / 1e3:.1f}] n={r['n']}"
        if "ratios" in r:
            peak = f"{r['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in r else "not measured"
            off = ", ".join(f"{what} {r['errors'][what]:.1e}" for what in ("loss", "hidden", "weight"))
            text += f"  {r['ratios']['products']['ratio']:.2f} x products  peak {peak}  errors: {off}"
        told.append(text)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_linear", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(ALLOWED), default=["bfloat16", "float32"])
    parser.add_argument("--variants", nargs="+", choices=tuple(LOSSES), default=list(LOSSES))
    parser.add_argument("--losses", nargs="+", choices=tuple(TAUGHT), default=list(TAUGHT))
    parser.add_argument("--shape", nargs=3, type=int, metavar=("ROWS", "FEATURES", "CLASSES"), help="instead of ours")
    parser.add_argument("--seconds", type=float, default=60.0, help="per shape and dtype (default: 60)")
    parser.add_argument("--rounds", type=int, default=10, help="at least so many (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default: 2)")
    parser.add_argument("--no-memory", action="store_true", help="on a CPU: no processes apart for the peak memory")
    parser.add_argument("--quick", action="store_true", help="a few rounds of a tiny shape: does it run?")
    parser.add_argument("--alone", nargs=2, metavar=("VARIANT", "LOSS"), help="only its memory; for this process apart")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.seconds, args.rounds = args.shape or [32, 16, 500], 0.0, 2
    sizes = [*shapes.LINEAR[args.device]]
    if args.shape:
        rows, features, classes = args.shape
        sizes = [shapes.LinearShape(rows, features, classes, "")]
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    if args.alone:
        name, loss = args.alone
        print(json.dumps({"peak_bytes": alone(name, loss, sizes[0], getattr(torch, args.dtypes[0]))}))
        return
    env = harness.environment(args.device)
    print(f"{env['hardware']}, {env['threads']} threads, torch {env['versions']['torch']}, load {env['load']}")
    everything = []
    for dtype, shape in itertools.product(args.dtypes, sizes):
        records = measure(shape, dtype, args)
        everything += records
        harness.write(args.out, [{**record, **env} for record in records])
        print("", *lines(records), *(f"not measured: {text}" for text in records[0]["missing"]), sep="\n")
    judgement = bars(everything, args.device, sizes, args.dtypes, "left out")
    print("", harness.as_markdown("What the fused loss must reach", judgement), sep="\n")
    if wrong := [text for r in everything for text in r["wrong"] if text.startswith("fused")]:
        raise SystemExit(f"bench_linear: {wrong[0]}")


if __name__ == "__main__":
    main()
