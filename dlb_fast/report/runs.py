"""Runs as their folders tell them, and which of them are seeds of one method."""

from __future__ import annotations

import csv
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlb_fast.train.compare import read_comparison
from dlb_fast.train.config import RunConfig, load_config, override, to_dict

__all__ = ["Confusion", "Run", "find_runs", "flat", "groups_of", "plain", "read_run"]


@dataclass(frozen=True)
class Run:
    """One run as its folder tells it.

    Args:
        path: run folder.
        label: name of its method in tables and legends.
        config: its config.
        versions: what it ran on.
        rows: a row of numbers per evaluation.
        steps: the progress rows between evaluations; None stands for NaN and infinities.
        calibration: the reliability bins of the last evaluation, or None.
        confusion: the counts per pair of classes of the last evaluation, or None.
        result: what a finished run has written, empty before.
    """

    path: Path
    label: str
    config: RunConfig
    versions: dict[str, Any]
    rows: list[dict[str, float]]
    steps: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, list[float]] | None = None
    confusion: Confusion | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.train.seed

    @property
    def peak_mib(self) -> float:
        """The largest memory of a finished run in MiB; nan where it was not measured."""
        peak = self.result.get("peak_mib")
        return math.nan if peak is None else peak

    def last(self, column: str) -> float:
        """A column at the last evaluation; nan where it is missing."""
        return self.rows[-1].get(column, math.nan) if self.rows else math.nan

    def best(self, column: str = "test_top1") -> float:
        """The largest value of a column over all evaluations; nan where it is missing."""
        return max((row[column] for row in self.rows if column in row), default=math.nan)


@dataclass(frozen=True)
class Confusion:
    """What the classes of the test images were taken for.

    Args:
        classes: names by index.
        pairs: images by (class, predicted class), both as index.
    """

    classes: list[str]
    pairs: dict[tuple[int, int], int]

    @functools.cached_property
    def images(self) -> Counter[int]:
        """Test images per class."""
        return _sums((target, count) for (target, _), count in self.pairs.items())

    @functools.cached_property
    def predicted(self) -> Counter[int]:
        """Test images per predicted class."""
        return _sums((predicted, count) for (_, predicted), count in self.pairs.items())

    def accuracy(self, index: int) -> float:
        """Share of the class's images that were classified right; nan without an image."""
        images = self.images[index]
        return self.pairs.get((index, index), 0) / images if images else math.nan

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(class, predicted class, images) of the wrong answers, the most frequent first."""
        wrong = [(*pair, count) for pair, count in self.pairs.items() if pair[0] != pair[1]]
        return sorted(wrong, key=lambda row: (-row[2], row[:2]))


def _sums(found: Iterable[tuple[int, int]]) -> Counter[int]:
    sums: Counter[int] = Counter()
    for index, count in found:
        sums[index] += count
    return sums


def read_run(path: Path | str, label: str | None = None) -> Run:
    """Read a run folder, finished or not; `label` is the name of the method by default.

    Raises:
        ValueError: no config is there, or a file is damaged; names the file.
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
    lines = _json_lines(path / "metrics.jsonl")
    bins = [line["test_calibration"] for line in lines if line.get("test_calibration")]
    bins = [c for c in bins if all(value is not None for part in c.values() for value in part)]  # null was nan
    return Run(
        path,
        label or config.loss.method,
        config,
        _json(path / "versions.json"),
        rows,
        [line for line in lines if line.get("kind") == "step"],
        bins[-1] if bins else None,
        _confusion(path / "confusion.json", rows),
        _json(path / "result.json"),
    )


def _confusion(path: Path, rows: Sequence[Mapping[str, float]]) -> Confusion | None:
    """The counts if they are those of the last evaluation; a resumed run may have gone back behind them."""
    found = _json(path)
    if not found or not rows or found.get("step") != rows[-1].get("step"):
        return None
    try:
        names = json.loads(found.get("classes") or "[]")
    except ValueError:  # a loop of one's own has put something else into the weights' metadata
        names = []
    try:
        pairs = {(int(target), int(predicted)): int(count) for target, predicted, count in found["pairs"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"report: {path} is damaged: {error}") from error
    count = max([len(names), 1, *(1 + index for pair in pairs for index in pair)])
    return Confusion([_name(names, index) for index in range(count)], pairs)


def _name(names: Sequence[Any], index: int) -> str:
    return (str(names[index]) if index < len(names) else "") or f"class {index}"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"report: {path} is damaged: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a killed process may have left half a line at its end."""
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


def find_runs(path: Path) -> list[tuple[Path, str | None]]:
    """(run folder, label) of a run, of a comparison's finished runs, or of all of these directly inside a folder.

    Raises:
        ValueError: there is no run.
    """
    if (path / "config.yaml").exists():
        return [(path, None)]
    if found := read_comparison(path):
        return list(found)
    runs: list[tuple[Path, str | None]] = []
    for inside in sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []:
        runs += read_comparison(inside) or [(inside, None)] * (inside / "config.yaml").exists()
    if not runs:
        raise ValueError(f"report: there is no run in {path}; a run folder has a config.yaml")
    return runs


def groups_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method. Only runs whose configs differ in nothing but the seed are averaged.

    Where a label has several configs, the fields that differ are added to it; where a seed occurs twice, the folder.
    """
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.label, json.dumps(to_dict(override(run.config, seed=0)))), []).append(run)
    groups: dict[str, list[Run]] = {}
    for (label, _), group in alike.items():
        values = [flat(other[0].config) for (name, _), other in alike.items() if name == label]
        mine = flat(group[0].config)
        varies = [n for n in mine if n != "seed" and any(other[n] != mine[n] for other in values)]
        named = ", ".join([label, *(f"{n} {plain(mine[n])}" for n in varies)])
        if varies and (len(named) > 60 or _text(named) in groups):
            name = group[0].path.resolve().name
            named = f"{label} ({name if len(name) < 48 else name[:45] + '...'})"
        named = _text(named)
        if len({run.seed for run in group}) == len(group) and named not in groups:
            groups[named] = group
            continue
        for run in group:
            groups.setdefault(_text(f"{named} ({run.path})"), []).append(run)
    return groups


def _text(name: str) -> str:
    """A name that can be printed: that of a file may hold bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()


def flat(config: RunConfig) -> dict[str, Any]:
    return {name: value for part in to_dict(config).values() for name, value in part.items()}


def plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "-"
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
