"""Reading results files: JSON lines, one record a line, as `harness.write` wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LABELS = {
    "eager": "eager", "official": "official code's form", "compile": "torch.compile",
    "compile-ro": "torch.compile, reduce-overhead", "liger": "Liger CE + KL",
    "cpu": "ours (C++)", "cuda": "ours (CUDA)", "triton": "ours (Triton)",
}  # fmt: skip
OURS = ("cuda", "triton", "cpu")
BAR_TIME, BAR_MEMORY = 1.03, 1.01  # a whole step with DLB over one with CE, from the project's requirements


def verdicts(dlb: Record, records: list[Record]) -> str:
    """Whether a step with DLB keeps the bars, beside records of the same run.

    In time, `met` or `missed` where the whole interval lies on one side of the bar and the control, the
    baseline once more, stays within it; otherwise `undecided`.
    """
    control = [r for r in records if r["variant"] == "ce_again" and same_step(r, dlb)]
    quiet = bool(control) and all(1 / BAR_TIME <= r["ratio_low"] <= r["ratio_high"] <= BAR_TIME for r in control)
    time = "met" if dlb["ratio_high"] <= BAR_TIME else "missed" if dlb["ratio_low"] > BAR_TIME else "undecided"
    peak = "met" if dlb["peak_ratio"] <= BAR_MEMORY else "missed"
    return (
        f"at most {BAR_TIME:.2f} x the time of ce: {time if quiet else 'undecided'}; "
        f"at most {BAR_MEMORY:.2f} x its peak memory: {peak}"
    )


def same_step(a: Record, b: Record) -> bool:
    """Whether two records of `bench_step` are of one model, shape, mode and moment."""
    return all(
        a[name] == b[name] for name in ("model", "rows", "size", "mode", "dtype", "command", "date") if name in b
    )


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of all files, in order. ValueError names a file and line that is no record."""
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a JSON record ({error})") from None
            if record.get("bench") == "last_batch":  # files from before there were two paths
                record.setdefault("path", "gradient" if record["variant"].endswith("-step") else "autograd")
            records.append(record)
    return records


def label(variant: str, path: str = "autograd") -> str:
    """How a contender is called in tables and plots."""
    if variant.removesuffix("-op") in OURS and variant.endswith("-op"):
        return f"{LABELS[variant.removesuffix('-op')]}, bare op"
    if variant in OURS and path == "gradient":
        return f"{LABELS[variant]}, dlb_step"
    return LABELS.get(variant, variant)


def machine(record: Record) -> str:
    """`AMD EPYC, 2 threads, torch 2.13.0+cpu, commit abc, 2026-11-21`: where and when a record was measured."""
    torch, date = record["versions"]["torch"], record["date"][:10]
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"{record['hardware']}, {threads}, torch {torch}, commit {record['commit']}, {date}"
