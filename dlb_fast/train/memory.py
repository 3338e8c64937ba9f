"""How much memory a run took at its peak: what is told beside its accuracy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

__all__ = ["peak_mebibytes", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Start measuring anew: device memory on a GPU, resident memory of this process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def peak_mebibytes(device: torch.device) -> float | None:
    """MiB at the peak since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
