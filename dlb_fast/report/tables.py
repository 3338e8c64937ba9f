"""Tables over several runs and of one run's evaluations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .runs import Run, groups_of

__all__ = ["COLUMNS", "Table", "compare_table", "evaluations_table", "noise_table", "number", "paired_table", "spread"]

# column -> (heading, format, factor)
COLUMNS = {
    "step": ("step", ",.0f", 1),
    "epoch": ("epoch", "", 1),
    "lr": ("learning rate", "", 1),
    "loss": ("loss", ".4f", 1),
    "ce": ("cross entropy", ".4f", 1),
    "lb": ("teacher's term", ".4f", 1),
    "train_top1": ("train top-1 %", ".2f", 100),
    "test_top1": ("test top-1 %", ".2f", 100),
    "test_top5": ("test top-5 %", ".2f", 100),
    "test_nll": ("test NLL", ".4f", 1),
    "test_ece": ("test ECE %", ".2f", 100),
    "images_per_second": ("images/s", ",.0f", 1),
    "data_wait": ("data wait %", ".1f", 100),
}


@dataclass(frozen=True)
class Table:
    """A table of texts; as a string it is Markdown that lines up in a terminal too.

    Args:
        head: headings.
        rows: cells.
        text: the columns that hold words and are aligned left; all others hold numbers and are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = (0,)

    def __str__(self) -> str:
        head, *rows = [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
        left = [i in self.text for i in range(len(head))]

        def line(cells: Sequence[str]) -> str:
            padded = (c.ljust(w) if words else c.rjust(w) for c, w, words in zip(cells, widths, left, strict=True))
            return f"| {' | '.join(padded)} |"

        rule = ("-" * (w + 2) if words else "-" * (w + 1) + ":" for w, words in zip(widths, left, strict=True))
        return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])


def number(value: float, form: str = ".2f", factor: float = 1) -> str:
    return "-" if math.isnan(value) else format(factor * value, form)


def spread(values: Sequence[float], scale: float = 1.0, form: str = ".2f") -> str:
    """Mean ± sample standard deviation; a single value has none, and nan is left out."""
    values = [scale * v for v in values if not math.isnan(v)]
    if not values:
        return "-"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def compare_table(runs: Sequence[Run]) -> Table:
    """A row per method: test accuracy at the end and at its best, likelihood, calibration, images, seconds, memory."""

    def row(label: str, group: list[Run]) -> dict[str, str]:
        return {
            "method": label,
            "seeds": str(len(group)),
            "last top-1 %": spread([r.last("test_top1") for r in group], 100),
            "best top-1 %": spread([r.best() for r in group], 100),
            "last NLL": spread([r.last("test_nll") for r in group], form=".3f"),
            "last ECE %": spread([r.last("test_ece") for r in group], 100, ".1f"),
            "images seen": "/".join(sorted({number(r.last("images_seen"), ",.0f") for r in group})),
            "steps": "/".join(sorted({number(r.last("step"), ",.0f") for r in group})),
            "seconds": spread([r.last("seconds") for r in group], form=".1f"),
            "peak MiB": spread([r.peak_mib for r in group], form=".0f"),
        }

    rows = [row(label, group) for label, group in groups_of(runs).items()]
    return Table(list(rows[0]), [list(r.values()) for r in rows])


def paired_table(runs: Sequence[Run], against: str) -> Table | None:
    """Differences of last test accuracy to one method, seed by seed; None when no seed is shared."""
    groups = groups_of(runs)
    base = {r.seed: r for r in groups.get(against, [])}
    body = []
    for label, group in groups.items():
        gains = [base[r.seed].last("test_top1") - r.last("test_top1") for r in group if r.seed in base]
        if label != against and gains:
            wins = f"{sum(g > 0 for g in gains)} of {len(gains)}"
            body.append((f"{against} - {label}", spread(gains, 100), wins))
    return Table(("difference of last top-1", "points", f"seeds where {against} is ahead"), body) if body else None


def noise_table(found: Mapping[float, Sequence[Run]]) -> Table:
    """A row per method, a column per share of wrong training labels: test accuracy at the end of training."""
    groups = {share: groups_of(runs) for share, runs in found.items()}
    head = ["last top-1 %, mean ± standard deviation", "seeds", *(f"{100 * share:g} % wrong" for share in found)]
    body = []
    for label in next(iter(groups.values())):
        tried = [groups[share].get(label, []) for share in found]
        seeds = "/".join(sorted({str(len(runs)) for runs in tried}))
        body.append([label, seeds, *(spread([r.last("test_top1") for r in runs], 100) for runs in tried)])
    return Table(head, body)


def evaluations_table(rows: Sequence[Mapping[str, float]]) -> Table:
    shown = {name: column for name, column in COLUMNS.items() if any(name in row for row in rows)}
    columns = []
    for name, (_, form, factor) in shown.items():
        values = [row.get(name, math.nan) for row in rows]
        columns.append([number(value, form or _decimals(values), factor) for value in values])
    return Table([heading for heading, _, _ in shown.values()], list(zip(*columns, strict=True)), text=())


def _decimals(values: Sequence[float]) -> str:
    """A format with one number of decimals: none for whole numbers, else four digits of the largest."""
    finite = [abs(v) for v in values if math.isfinite(v) and v]
    if all(v == int(v) for v in finite):
        return ".0f"
    return f".{min(12, max(0, 3 - math.floor(math.log10(max(finite)))))}f"
