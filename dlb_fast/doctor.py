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
    """Every implementation with its availability, the reason and its state, and what `impl="auto"` takes."""
    import torch

    from dlb_fast import _backends

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    known = {name: found._asdict() for name, found in _backends.implementations().items()}
    return {"known": known, "auto": {device: _backends.pick("auto", torch.device(device)) for device in devices}}


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
    for name, test in report.get("self_test", {}).items():
        errors = "loss off by {loss_error:.1e}, gradient by {gradient_error:.1e}, on {device}"
        verdict = "passed" if test.get("passed") else "FAILED"
        lines.append(f"self-test {name}: {verdict} ({test.get('error') or errors.format(**test)})")
    for title in ("libraries", "variables"):
        lines.append(f"{title}: " + (", ".join(f"{name} {value}" for name, value in report[title].items()) or "none"))
    return [*lines, "", report["environment"]]


def main(argv: list[str]) -> int:
    """`dlb-fast doctor [--json] [--self-test]`; 1 when the losses cannot run here or a self-test fails, else 0."""
    parser = argparse.ArgumentParser(prog="dlb-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--self-test", action="store_true", help="run every implementation against the reference")
    args = parser.parse_args(argv)
    report = examine(with_self_test=args.self_test)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(["Copy everything below into an issue.", "", *_lines(report)]))
    failed = [name for name, test in report.get("self_test", {}).items() if not test.get("passed")]
    return int("error" in report["implementations"] or bool(failed))
