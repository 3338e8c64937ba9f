"""What works on this machine and why the rest does not. Never crashes: a check that fails is itself a finding.

Only the standard library is imported here; everything else inside checks that catch whatever comes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["examine", "main", "self_test"]

OPTIONAL = ("numpy", "triton", "tyro", "yaml", "safetensors", "tqdm", "matplotlib", "sklearn", "PIL", "simplejpeg")
FRAMEWORKS = ("torchvision", "timm", "lightning", "accelerate", "transformers")


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
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "built_for_cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _built() -> dict[str, Any]:
    from dlb_fast._build import build_info  # type: ignore[import-not-found, unused-ignore]

    return dict(build_info())


def _library(name: str) -> dict[str, Any]:
    import importlib
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec(name) is None:
        return {"installed": False}
    module = importlib.import_module(name)
    return {"installed": True, "version": str(getattr(module, "__version__", "unknown"))}


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


def examine(*, with_self_test: bool = False) -> dict[str, Any]:
    """The whole report as plain values.

    Example:
        >>> sorted(examine())[:3]
        ['auto', 'dlb_fast', 'frameworks']
    """
    report = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": _guarded(_torch),
        "dlb_fast": _guarded(lambda: __import__("dlb_fast").__version__),
        "built": _guarded(_built),
        "implementations": _guarded(_implementations),
        "auto": _guarded(_picks),
        "libraries": {name: _guarded(partial(_library, name)) for name in OPTIONAL},
        "frameworks": {name: _guarded(partial(_library, name)) for name in FRAMEWORKS},
    }
    if with_self_test:
        report["self_test"] = _guarded(self_test)
    return report


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"dlb_fast {_short(report['dlb_fast'])}, Python {report['python']}, {report['platform']}"]
    torch = report["torch"]
    if "error" in torch:
        lines.append(f"torch: {torch['error']}")
    else:
        gpus = ", ".join(torch["gpus"]) or "no GPU visible"
        lines.append(f"torch {torch['version']} (CUDA {torch['built_for_cuda']}), {torch['threads']} threads, {gpus}")
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
    if not isinstance(state, dict):
        return str(state)
    if "error" in state:
        return f"broken ({state['error']})"
    return state["version"] if state["installed"] else "not installed"


def main(argv: list[str]) -> int:
    """`dlb-fast doctor [--json] [--self-test]`; 0, or 1 when a self-test fails."""
    parser = argparse.ArgumentParser(prog="dlb-fast doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--self-test", action="store_true", help="run every implementation against the reference")
    args = parser.parse_args(argv)
    report = examine(with_self_test=args.self_test)
    print(json.dumps(report, indent=1) if args.json else "\n".join(_lines(report)))
    tests = report.get("self_test", {})
    failed = "error" in tests or any(isinstance(t, dict) and t.get("ran") and not t["passed"] for t in tests.values())
    return int(failed)
