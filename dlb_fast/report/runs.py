"""A run as its folder tells it: every figure of a report is read here, from the run's own files."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlb_fast.train.config import RunConfig, load_config

__all__ = ["Run", "read_run"]

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run: label of its method, seed, config, and a row per evaluation.

    `steps` are the rows between evaluations, `calibration` the reliability bins of the last evaluation (None where it
    has none) and `result` what a finished run left, empty before.
    """

    path: Path
    label: str
    config: RunConfig
    versions: dict[str, Any]
    rows: list[Row]
    steps: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, list[float]] | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    @property
    def peak_mib(self) -> float:
        """Largest memory of a finished run, nan where it was not measured."""
        peak = self.result.get("peak_mib")
        return math.nan if peak is None else peak

    def last(self, column: str) -> float:
        """A column at the end of the run."""
        return self.rows[-1].get(column, math.nan)

    def best(self, column: str = "test_top1") -> float:
        """The largest value of a column over all evaluations, nan where there is none."""
        return max((row[column] for row in self.rows if column in row), default=math.nan)


def read_run(path: Path | str, label: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        ValueError: no config or no finished evaluation is there, or a file is damaged; names the file.
    """
    path = Path(path)
    if not (path / "config.yaml").exists():
        raise ValueError(f"report: {path} is not a run folder (it has no config.yaml)")
    config = load_config(path / "config.yaml")
    metrics = path / "metrics.csv"
    try:
        with open(metrics, newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except FileNotFoundError:
        rows = []
    except (ValueError, TypeError) as error:
        raise ValueError(f"report: {metrics} is damaged: {error}") from error
    if not rows:
        raise ValueError(f"report: {path} has no finished evaluation yet")
    lines = _json_lines(path / "metrics.jsonl")
    found = [line["test_calibration"] for line in lines if line.get("test_calibration")]
    bins = [c for c in found if all(value is not None for part in c.values() for value in part)]  # null: it was nan
    return Run(
        path,
        label or config.loss.method,
        config,
        _json(path / "versions.json"),
        rows,
        [line for line in lines if line.get("kind") == "step"],
        bins[-1] if bins else None,
        _json(path / "result.json"),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"report: {path} is damaged: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that a killed process may have left with half a line at its end."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"report: {path} is damaged in line {number}: {error}") from error
    return read
