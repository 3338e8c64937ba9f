"""Which implementations of the loss work on this machine, and why the others do not; then torch's own `collect_env`.

Only the standard library is imported at the top, so that a torch that cannot be imported is a line of the report. What
loads a native library runs in a child process, because a crash there must not end the report.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["examine", "implementations", "main", "self_test"]

VARIABLES = ("DLB_FAST_", "TRITON_", "CUDA_VISIBLE", "CUDA_HOME", "OMP_NUM", "MKL_NUM", "LD_PRELOAD", "LD_LIBRARY")
PATIENCE = 240.0  # seconds for one child; the first import of torch from a cold disk takes a minute


def implementations() -> dict[str, Any]:
    """Every implementation with its availability, the reason and its state; what `impl="auto"` takes, and the verdicts
    on each GPU as far as they are known."""
    import torch

    from dlb_fast import _backends

    known = {name: found._asdict() for name, found in _backends.implementations().items()}
    auto, verdicts = {"cpu": _backends.pick("auto", torch.device("cpu"))}, {}
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        wished = os.environ.get("DLB_FAST_BACKEND", "auto")
        auto[device] = _backends.proven(torch.device(device), check=False)[0] if wished == "auto" else wished
        verdicts[device] = {name: str(found) for name, found in _verdicts(index, check=False).items()}
    numbers = {"kernels": _backends.cuda_build()[1]} if _backends.KERNELS.exists() else {}
    numbers |= {"driver": _backends.card(0).driver} if verdicts else {}
    versions = {name: _backends.as_text(number) for name, number in numbers.items()}
    versions |= {"torch": torch.version.cuda} if torch.version.cuda else {}
    return {"known": known, "auto": auto, "verdicts": verdicts, "cuda": versions}


def _verdicts(index: int, check: bool) -> dict[str, Any]:
    """The verdict on each implementation that can run on a GPU; with ``check`` each is checked anew."""
    from dlb_fast import _backends

    missing = {"cuda": _backends.cuda_missing(index), "triton": _backends.triton_missing("cuda")}
    usable = [name for name, reason in missing.items() if not reason]
    return {name: _backends.verdict(name, index, check, again=check) for name in usable}


def prove() -> dict[str, bool]:
    """Check the kernels on every GPU, also where a verdict is known; whether none is wrong or undecided, by GPU."""
    import torch

    every = range(torch.cuda.device_count())
    return {f"cuda:{index}": all(found.passed for found in _verdicts(index, check=True).values()) for index in every}


def prove_triton(uuid: str, device: str = "cuda", sizes: tuple[int, ...] = (10, 100, 1000, 1001, 32000)) -> None:
    """Hold Triton's kernels against the float64 definition on the GPU with this UUID; the last line is the verdict.

    Losses, gradients and stored rows of four batches: the first, the next, the same once more, and the one after.
    """
    import torch

    from dlb_fast import LastBatchLoss

    found = [torch.cuda.get_device_properties(index).uuid for index in range(torch.cuda.device_count())] if uuid else []
    if uuid and uuid not in map(str, found):
        print(json.dumps({"undecided": "no such GPU is visible"}), flush=True)
        return
    where = torch.device(device, [*map(str, found)].index(uuid)) if uuid else torch.device(device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    generator, worst, cases, place = torch.Generator().manual_seed(1), 0.0, 0, "the start"
    print("launch Triton's kernels", flush=True)
    try:
        for number, classes in enumerate(sizes):
            for dtype in (dtypes[number % 3], *dtypes[3:] * (number == 0)):
                place = f"{str(dtype).removeprefix('torch.')}, C={classes}"
                ours = LastBatchLoss(classes, capacity=3, dtype=dtype, device=where, impl="triton")
                truth = LastBatchLoss(classes, capacity=3, dtype=torch.float64, impl="torch")
                for first, rows in ((0, 3), (0, 6), (0, 6), (3, 6)):
                    ids = torch.arange(first, first + rows)
                    target = torch.randint(classes, (rows,), generator=generator).index_fill_(0, ids[1:2] - first, -100)
                    z = (3 * torch.randn(rows, classes, generator=generator)).to(dtype)
                    if rows == 6 and truth.buffer is not None:  # as one optimiser step changes them
                        teacher = truth.buffer.teacher(truth.buffer.match(rows, ids, None, -1))
                        z[: len(teacher)] = (teacher + 0.1 * z[: len(teacher)]).to(dtype)
                    exact = z.to("cpu", torch.float64, copy=True).requires_grad_()
                    leaf = z.to(where, copy=True).requires_grad_()
                    loss, true_loss = ours(leaf, target.to(where), ids.to(where)), truth(exact, target, ids)
                    loss.backward()
                    true_loss.backward()
                    worst = max(worst, _share_of_allowed(leaf, exact, loss.item() - true_loss.item()))
                    assert ours.buffer is not None and truth.buffer is not None
                    same = torch.equal(ours.buffer.logits.cpu().double(), truth.buffer.logits)
                    if not same or not torch.equal(ours.buffer.slots.cpu(), truth.buffer.slots):
                        raise ArithmeticError("stored rows or their counts are wrong")
                    if not worst <= 1:
                        raise ArithmeticError(f"off by {worst:.3g} times what is allowed")
                cases += 1
        report: dict[str, Any] = {"cases": cases, "of": len(sizes) + 1, "worst": worst}
    except torch.OutOfMemoryError as error:
        report = {"undecided": str(error)}
    except Exception as error:
        report = {"failed": f"{place}: {type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(report), flush=True)
    os._exit(0) if uuid else None


def _share_of_allowed(leaf: Any, exact: Any, loss_error: float) -> float:
    """The largest error of a loss and its gradient, as a share of what float32 and one rounding explain."""
    import torch

    z, true = exact.detach(), exact.grad
    probabilities = torch.softmax(z, 1) * 4 / len(z) + torch.softmax(z / 3, 1) * 3
    narrow = leaf.dtype in (torch.bfloat16, torch.float16)
    rounding = 0.51 * torch.finfo(leaf.dtype).eps if narrow else 0.0
    allowed = 2e-6 * (probabilities + true.abs()) + rounding * true.abs() + (3e-8 if narrow else 0.0)
    gradient = ((leaf.grad.cpu().double() - true).abs() / allowed).max().item()
    loss = abs(loss_error) / (1e-5 * (1 + z.abs().max().item()))
    return max(gradient, loss) if gradient == gradient and loss == loss else float("inf")


def self_test(impl: str) -> dict[str, Any]:
    """Run an implementation in float32 on three small batches; the largest errors against the float64 reference."""
    import torch

    from dlb_fast import fused_lb_loss

    device = "cuda" if impl == "cuda" or (impl == "triton" and torch.cuda.is_available()) else "cpu"
    generator = torch.Generator().manual_seed(0)
    loss_error = gradient_error = 0.0
    for rows, repeated, classes in ((6, 3, 5), (16, 8, 100), (5, 2, 1000)):
        logits = torch.randn(rows, classes, generator=generator)
        last = torch.randn(repeated, classes, generator=generator)
        target = torch.randint(0, classes, (rows,), generator=generator)
        results = []
        for name, dtype, where in (("torch", torch.float64, "cpu"), (impl, torch.float32, device)):
            z = logits.to(where, dtype).requires_grad_()
            loss = fused_lb_loss(z, target.to(where), last.to(where, dtype), impl=name)
            (gradient,) = torch.autograd.grad(loss, z)
            results.append((loss.item(), gradient.double().cpu()))
        (want, want_gradient), (got, got_gradient) = results
        loss_error = max(loss_error, abs(want - got))
        gradient_error = max(gradient_error, (want_gradient - got_gradient).abs().max().item())
    passed = loss_error < 1e-4 and gradient_error < 1e-6
    return {"passed": passed, "device": device, "loss_error": loss_error, "gradient_error": gradient_error}


def _in_child(call: str) -> dict[str, Any]:
    """The value of `doctor.<call>`, computed in a child process; `{"error": ...}` when it raises or the child dies."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import json; from dlb_fast import doctor\n"
        f"try: value = doctor.{call}\n"
        "except Exception as error: value = {'error': f'{type(error).__name__}: {error}'}\n"
        "print('\\n' + json.dumps(value), flush=True); import os; os._exit(0)"  # a crash at exit says nothing here
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"error": f"did not return within {PATIENCE:g} seconds"}
    if done.returncode < 0:
        return {"error": f"the process was ended by {signal.Signals(-done.returncode).name}"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"the process ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"}


def examine(*, with_self_test: bool = False) -> dict[str, Any]:
    """The whole report as plain values.

    Example:
        >>> list(examine())
        ['version', 'folder', 'implementations', 'build', 'libraries', 'variables', 'environment']
    """
    from dlb_fast import __version__

    found = _in_child("implementations()")
    report = {"version": __version__, "folder": str(Path(__file__).parent), "implementations": found}
    if with_self_test:
        usable = [name for name, state in found.get("known", {}).items() if state["available"]]
        report["self_test"] = {
            name: self_test(name) if name == "torch" else _in_child(f"self_test({name!r})") for name in usable
        }
    try:
        from dlb_fast._build import build_info  # type: ignore[import-not-found, unused-ignore]

        report["build"] = dict(build_info())
    except Exception as error:  # made for another Python, or not built
        report["build"] = {"error": str(error)}
    report["libraries"] = _libraries()
    report["variables"] = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    try:
        from torch.utils.collect_env import get_pretty_env_info

        report["environment"] = get_pretty_env_info()
    except Exception as error:
        report["environment"] = f"torch: {type(error).__name__}: {error}"
    return report


def _libraries() -> dict[str, str]:
    """The installed versions of everything that the package and its extras require; nothing in a bare checkout."""
    versions = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("dlb_fast") or ():
            name = re.split(r"[^\w.-]", requirement)[0]
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
    return versions


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"dlb_fast {report['version']} in {report['folder']}"]
    build, found = report["build"], report["implementations"]
    if "error" not in build:
        cuda = f"CUDA {build['cuda_archs']}" if build["cuda_archs"] else "no CUDA"
        lines.append(
            f"compiled by {build['compiler']} against torch {build['torch']}, {cuda}; "
            f"on this CPU: {build['cpu_instruction_set']}"
        )
    lines.append("implementations of the loss:" + (f" {found['error']}" if "error" in found else ""))
    for name, state in found.get("known", {}).items():
        verdict = "available" if state["available"] else f"missing: {state['reason']}"
        lines.append(f"  {name:<7} {verdict}  [{state['state']}]")
    lines += [f'  impl="auto" on {device}: {name}' for device, name in found.get("auto", {}).items()]
    for device, verdicts in found.get("verdicts", {}).items():
        lines += [f"  {name} on {device}: {said}" for name, said in verdicts.items()]
    if found.get("cuda"):
        lines.append("CUDA of " + ", of ".join(f"{name} {number}" for name, number in found["cuda"].items()))
    for name, test in report.get("self_test", {}).items():
        errors = "loss off by {loss_error:.1e}, gradient by {gradient_error:.1e}, on {device}"
        verdict = "passed" if test.get("passed") else "FAILED"
        lines.append(f"self-test {name}: {verdict} ({test.get('error') or errors.format(**test)})")
    for title in ("libraries", "variables"):
        lines.append(f"{title}: " + (", ".join(f"{name} {value}" for name, value in report[title].items()) or "none"))
    return [*lines, "", report["environment"]]


def main(argv: list[str]) -> int:
    """`dlb-fast doctor [--json] [--self-test] [--prove]`; 1 when the losses cannot run or a check fails, else 0."""
    parser = argparse.ArgumentParser(prog="dlb-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--self-test", action="store_true", help="run every implementation against the reference")
    parser.add_argument("--prove", action="store_true", help="check the kernels on every GPU and keep the verdicts")
    args = parser.parse_args(argv)
    proven = _in_child("prove()") if args.prove else {}
    report = examine(with_self_test=args.self_test)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(["Copy everything below into an issue.", "", *_lines(report)]))
    failed = [name for name, test in report.get("self_test", {}).items() if not test.get("passed")]
    return int("error" in report["implementations"] or bool(failed) or not all(proven.values()) or "error" in proven)
