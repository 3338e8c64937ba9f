"""What works on this machine and why the rest does not. Never crashes: a check that fails is itself a finding.

Only the standard library is imported here. Everything else is imported by checks that catch whatever is raised, and
first of all in a process apart, because a broken library may also end its process, print, or never come back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["examine", "main", "self_test"]

OPTIONAL = (
    "numpy", "triton", "tyro", "yaml", "safetensors", "tqdm", "matplotlib", "sklearn", "PIL", "simplejpeg", "onnx",
    "onnxscript", "onnxruntime", "tensorboard", "trackio", "wandb",
)  # fmt: skip
FRAMEWORKS = ("torchvision", "timm", "lightning", "accelerate", "transformers")
DISTRIBUTIONS = {"yaml": "PyYAML", "sklearn": "scikit-learn", "PIL": "pillow"}  # where the names differ
VARIABLES = ("DLB_FAST_", "TRITON_", "CUDA_VISIBLE", "CUDA_HOME", "OMP_NUM", "MKL_NUM", "LD_PRELOAD", "LD_LIBRARY")
TOOLS = ("c++", "g++", "clang++", "ninja", "nvcc")
PATIENCE = 240.0  # seconds for one process of checks; importing large frameworks from a cold disk takes a minute


def _guarded(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except BaseException as error:  # a broken library may raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def _torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **_versions(torch),
        "threads": torch.get_num_threads(),
        "built_for_cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _built() -> dict[str, Any]:
    from dlb_fast._build import build_info  # type: ignore[import-not-found, unused-ignore]

    return dict(build_info())


def _package() -> dict[str, Any]:
    import dlb_fast

    where = {"folder": str(Path(dlb_fast.__file__).parent)}
    return {**_versions(dlb_fast), **where}


def _versions(module: Any) -> dict[str, Any]:
    """`version` of what was loaded; `installed_version` as well, where the package manager thinks of another one."""
    import importlib.metadata

    try:
        installed = importlib.metadata.version(DISTRIBUTIONS.get(module.__name__, module.__name__))
    except importlib.metadata.PackageNotFoundError:
        installed = None
    loaded = str(getattr(module, "__version__", None) or installed or "unknown")
    return {"version": loaded, **({"installed_version": installed} if installed not in (None, loaded) else {})}


def _library(name: str) -> dict[str, Any]:
    import importlib
    import importlib.util

    if importlib.util.find_spec(name) is None:
        return {"installed": False}
    return {"installed": True, **_versions(importlib.import_module(name))}


def _environment() -> dict[str, Any]:
    """Variables that change what runs, and the compilers that an installation would find."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return {"variables": variables, "tools": {name: shutil.which(name) for name in TOOLS}}


def _implementations() -> dict[str, Any]:
    from dlb_fast import _backends

    return {
        name: {"available": found.available, "reason": found.reason, "state": found.state}
        for name, found in _backends.implementations().items()
    }


def _picks() -> dict[str, str]:
    import torch

    from dlb_fast import _backends

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {device: _backends.pick("auto", device) for device in devices}


def self_test() -> dict[str, Any]:
    """Run every available implementation against the float64 reference; per name: errors, or why not run."""
    import torch

    from dlb_fast import _backends, fused_lb_loss

    def error_of(impl: str) -> dict[str, Any]:
        device = "cuda" if impl == "cuda" or (impl == "triton" and torch.cuda.is_available()) else "cpu"
        generator = torch.Generator().manual_seed(0)
        worst = {"loss": 0.0, "gradient": 0.0}
        for rows, half, classes in ((6, 3, 5), (16, 8, 100), (5, 2, 1000)):
            logits = torch.randn(rows, classes, generator=generator)
            teacher = torch.randn(half, classes, generator=generator)
            target = torch.randint(0, classes, (rows,), generator=generator)
            results = []
            for name, dtype, where in (("torch", torch.float64, "cpu"), (impl, torch.float32, device)):
                z = logits.to(where, dtype).requires_grad_()
                loss = fused_lb_loss(z, target.to(where), teacher.to(where, dtype), impl=name)
                loss.backward()
                assert z.grad is not None
                results.append((loss.item(), z.grad.double().cpu()))
            (want, want_grad), (got, got_grad) = results
            worst["loss"] = max(worst["loss"], abs(want - got))
            worst["gradient"] = max(worst["gradient"], (want_grad - got_grad).abs().max().item())
        passed = worst["loss"] < 1e-4 and worst["gradient"] < 1e-6
        return {"ran": True, "passed": passed, "device": device, "worst_error": worst}

    report: dict[str, Any] = {}
    for name, found in _backends.implementations().items():
        report[name] = _guarded(partial(error_of, name)) if found.available else {"ran": False, "why": found.reason}
        if "error" in report[name]:
            report[name] = {"ran": True, "passed": False, **report[name]}
    return report


def _checks() -> dict[str, Callable[[], Any]]:
    libraries = {f"library {name}": partial(_library, name) for name in (*OPTIONAL, *FRAMEWORKS)}
    own = {"torch": _torch, "dlb_fast": _package, "built": _built, "implementations": _implementations, "auto": _picks}
    return {**own, "self_test": self_test, **libraries}


def _serve(names: Sequence[str]) -> None:
    """The process apart: run checks in order, a line of JSON for each; what libraries print goes nowhere."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    checks = _checks()
    for name in names:
        os.write(answers, json.dumps([name, _guarded(checks[name])]).encode() + b"\n")


def _apart(names: Sequence[str]) -> dict[str, Any]:
    """Results of checks that were run in a process apart; one that ends that process is blamed and the rest go on."""
    results: dict[str, Any] = {}
    while left := [name for name in names if name not in results]:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from dlb_fast import doctor; doctor._serve({left!r}); "
            "import os; os._exit(0)"  # how libraries behave at exit is not the question
        )
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE,
            )  # fmt: skip
            output, end = done.stdout, _how_it_ended(done.returncode)
        except subprocess.TimeoutExpired as error:
            output, end = error.stdout or b"", f"did not come back within {PATIENCE:g} seconds"
        except OSError:  # no process can be started here: all that is left is to try it in this one
            return {**results, **{name: _guarded(_checks()[name]) for name in left}}
        for line in output.splitlines():
            results.update([json.loads(line)])
        lost = [name for name in left if name not in results]
        if lost:
            results[lost[0]] = {"error": end}
    return results


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    try:
        return f"ended its process by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended its process by signal {-code}"


def examine(*, with_self_test: bool = False) -> dict[str, Any]:
    """The whole report as plain values.

    Example:
        >>> sorted(examine())[:3]
        ['auto', 'built', 'dlb_fast']
    """
    own = {name: check for name, check in _checks().items() if name != "self_test"}
    apart = _apart([*own, *(["self_test"] if with_self_test else [])])

    def here(name: str) -> Any:
        """In this process, where its twin came through: a torch that is imported by halves crashes the exit."""
        if isinstance(apart[name], dict) and "error" in apart[name]:
            return apart[name]
        return _guarded(own[name])

    report = {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "environment": _guarded(_environment),
        **{name: here(name) for name in ("torch", "dlb_fast", "built", "implementations", "auto")},
        "libraries": {name: apart[f"library {name}"] for name in OPTIONAL},
        "frameworks": {name: apart[f"library {name}"] for name in FRAMEWORKS},
    }
    if with_self_test:
        report["self_test"] = apart["self_test"]
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    package = report["dlb_fast"]
    where = f" in {package['folder']}" if "folder" in package else ""
    lines = [f"dlb_fast {_short(package)}{where}", f"Python {report['python']} ({report['executable']})"]
    lines.append(report["platform"])
    torch = report["torch"]
    if "error" in torch:
        lines.append(f"torch: {torch['error']}")
    else:
        gpus = ", ".join(torch["gpus"]) or "no GPU visible"
        lines.append(f"torch {_short(torch)} (CUDA {torch['built_for_cuda']}), {torch['threads']} threads, {gpus}")
    if "error" not in report["built"]:  # absent beside another Python than the builder's, and in pure Python installs
        built = report["built"]
        cuda = f"CUDA {built['cuda_archs']}" if built["cuda_archs"] else "no CUDA"
        lines.append(
            f"compiled by {built['compiler']} against torch {built['torch']}, {cuda}; "
            f"on this CPU: {built['cpu_instruction_set']}"
        )
    lines.append("implementations of the loss:")
    found = report["implementations"]
    for name, state in found.items() if "error" not in found else ():
        verdict = "available" if state["available"] else f"missing: {state['reason']}"
        lines.append(f"  {name:<7} {verdict}  [{state['state']}]")
    if "error" in found:
        lines.append(f"  {found['error']}")
    if "error" in report["auto"]:
        lines.append(f"  auto: {report['auto']['error']}")
    else:
        lines += [f'  impl="auto" on {device}: {name}' for device, name in report["auto"].items()]
    environment = report["environment"]
    if "error" in environment:
        lines.append(f"environment: {environment['error']}")
    else:
        found = [name for name, path in environment["tools"].items() if path]
        lines.append(f"compilers: {', '.join(found) or 'none on the PATH'}")
        lines.append("set: " + (", ".join(f"{k}={v}" for k, v in environment["variables"].items()) or "nothing"))
    for title in ("libraries", "frameworks"):
        lines.append(f"{title}: " + ", ".join(f"{name} {_short(state)}" for name, state in report[title].items()))
    for name, result in report.get("self_test", {}).items():
        if name == "error":
            lines.append(f"self-test: {result}")
        elif not result["ran"]:
            lines.append(f"self-test {name}: not run ({result['why']})")
        else:
            verdict = "passed" if result["passed"] else "FAILED"
            lines.append(f"self-test {name}: {verdict} {result.get('worst_error') or result.get('error')}")
    return lines


def _short(state: Any) -> str:
    if "error" in state:
        return f"broken ({state['error']})"
    if not state.get("installed", True):
        return "not installed"
    if "installed_version" in state:
        return f"{state['version']} LOADED, {state['installed_version']} INSTALLED"
    return state["version"]


def _failed(report: dict[str, Any]) -> bool:
    if any("error" in report[name] for name in ("torch", "dlb_fast", "implementations", "auto")):
        return True
    tests = report.get("self_test", {})
    return "error" in tests or any(test["ran"] and not test["passed"] for test in tests.values())


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
    return int(_failed(report))
