"""Pictures over several runs and of one run, as PNG files and as SVG inside a page."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlb_fast.train.checkpoint import write_atomically

from .runs import Run, groups_of
from .tables import COLUMNS

__all__ = ["MOST_BANDS", "PANELS", "curves_figure", "draw_curves", "noise_figure", "panel", "pooled_reliability"]
__all__ += ["reliability_figure", "save_png", "style", "svg"]

INK = "#24262b"  # of text and axes; in a page it becomes the colour of the text around
LINES = 28  # lines that differ in grey too: 7 colours, 4 dashes and 7 markers that change together
COLORS = ("#1f77b4", "#d95f02", "#2a9d6f", "#b0518f", "#7a7a7a", "#b8860b", "#7b68c8")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of all pictures. Names are no formulas, and a character that the font lacks is no reason to warn."""
    import matplotlib
    from cycler import cycler

    lines = {"color": COLORS, "linestyle": ("-", "--", ":", "-."), "marker": "os^DvPX"}
    settings: Any = {
        "axes.prop_cycle": cycler(**{k: [v[i % len(v)] for i in range(LINES)] for k, v in lines.items()}),
        "lines.markersize": 4,
        "lines.linewidth": 1.6,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "text.parse_math": False,
        "svg.fonttype": "none",
    }
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    settings |= dict.fromkeys(inked, INK)
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches with one axis.

    The margins are fixed: a layout engine draws every text twice and doubles the time of a page.
    """
    from matplotlib.figure import Figure  # without pyplot: no backend is chosen and no figure stays in memory

    figure = Figure(figsize=(width, height))
    room = {"left": 0.6 / width, "right": 1 - 0.2 / width, "bottom": 0.5 / height, "top": 1 - 0.35 / height}
    return figure, figure.subplots(gridspec_kw=room)


def _count_axis(axis: Any, name: str) -> None:
    """Whole numbers from 0 on the x axis, 500 000 as 500k, few enough to stand apart."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel(name)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _marks(count: int, number: int) -> tuple[int, int]:
    """Which points of line `number` get a marker: a dozen, and not those of the other lines."""
    every = max(1, count // 12)
    return number * every // 4 % every, every


def save_png(figure: Any, path: Path) -> Path:
    remedy = "then make it with dlb-fast report"
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130), remedy)
    return path


def svg(figure: Any, label: str) -> Any:
    """The figure as an inline SVG element; the same numbers give the same text."""
    import matplotlib
    from markupsafe import Markup, escape

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata=nothing, facecolor="none")
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # the same in every figure of a page
    text = text.replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def curves_figure(runs: Sequence[Run]) -> Any:
    """Four panels and a legend below; see `draw_curves`."""
    import numpy as np
    from matplotlib.figure import Figure

    groups = {label: [r for r in group if r.rows] for label, group in groups_of(runs).items()}
    groups = {label: group for label, group in groups.items() if group}
    panels = [("test_top1", "test top-1, %", 100), ("test_nll", "test NLL", 1), ("loss", "training loss", 1)]
    calibrated = any(run.calibration for run in runs)
    figure = Figure(figsize=(10, 7.5 if calibrated else 4), layout="constrained")
    axes = figure.subplots(2, 2).flat if calibrated else figure.subplots(1, 3)
    handles: dict[str, Any] = {}
    for axis, (column, title, factor) in zip(axes, panels, strict=False):
        for number, (label, group) in enumerate(groups.items()):
            length = min(len(r.rows) for r in group)
            x = [group[0].rows[i].get("images_seen", math.nan) for i in range(length)]
            values = factor * np.array([[r.rows[i].get(column, math.nan) for i in range(length)] for r in group])
            mean = values.mean(axis=0)
            (line,) = axis.plot(x, mean, markevery=_marks(length, number))
            handles[label] = line
            if len(group) > 1 and len(groups) <= MOST_BANDS:
                band = values.std(axis=0, ddof=1)
                axis.fill_between(x, mean - band, mean + band, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(title)
        _count_axis(axis, "images seen")
    if calibrated:
        axis = axes[-1]
        axis.plot([0, 100], [0, 100], linestyle="-", marker="", color="grey", linewidth=1)
        for label, group in groups.items():
            points = pooled_reliability([run.calibration for run in group if run.calibration])
            x, y = ([100 * p[i] for p in points] for i in (1, 2))
            line = handles[label]
            axis.plot(x, y, color=line.get_color(), linestyle=line.get_linestyle(), marker="")
            sizes = [4 + 120 * share for share, _, _ in points]
            axis.scatter(x, y, s=sizes, color=line.get_color(), marker=line.get_marker())
        axis.set(title="reliability, last evaluation", xlabel="mean confidence, %", ylabel="accuracy, %")
        axis.set(xlim=(0, 101), ylim=(0, 101))
    if handles:
        names = [textwrap.fill(f" {label} (n={len(groups[label])})", 60) for label in handles]
        longest = max(len(line) for name in names for line in name.split("\n"))
        lines = math.ceil(len(names) / max(1, min(4, 130 // (longest + 10))))
        columns = math.ceil(len(names) / lines)
        figure.legend(handles.values(), names, loc="outside lower center", ncols=columns, handlelength=3.5)
    return figure


MOST_BANDS = 6  # more bands than these hide the lines


@style()
def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Test accuracy, test NLL and training loss over images seen, and the reliability of the last evaluation.

    Curves are means over seeds with a band of one standard deviation. The reliability is that of all images of all
    seeds: accuracy over mean confidence, a point per bin, whose area is the share of the images in it.
    """
    return save_png(curves_figure(runs), path)


def pooled_reliability(found: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[float, float, float]]:
    """(share, mean confidence, accuracy) of every bin that is not empty, over test sets of one size."""
    points = []
    for bins in zip(*(zip(c["share"], c["confidence"], c["accuracy"], strict=True) for c in found), strict=True):
        full = sum(share for share, _, _ in bins)
        if full:
            confidence = sum(share * confidence for share, confidence, _ in bins) / full
            accuracy = sum(share * accuracy for share, _, accuracy in bins) / full
            points.append((full / len(bins), confidence, accuracy))
    return points


def noise_figure(found: Mapping[float, Sequence[Run]]) -> Any:
    """Accuracy over the share of wrong labels. Bars of one share stand side by side; the legend is in their order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axis = figure.subplots()
    shares = list(found)
    labels = list(groups_of(found[shares[0]]))
    step = 0.3 * min([b - a for a, b in itertools.pairwise(sorted(shares))], default=0.1) * 100 / max(8, len(labels))
    ends: dict[str, Any] = {}
    for number, label in enumerate(labels):
        scores = [[100 * r.last("test_top1") for r in groups_of(found[s]).get(label, [])] or [math.nan] for s in shares]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in scores]
        means = [statistics.fmean(v) for v in scores]
        x = [100 * s + step * (number - (len(labels) - 1) / 2) for s in shares]
        ends[label] = (means[-1], axis.errorbar(x, means, spread, elinewidth=1, capsize=2))
    axis.set(xlabel="wrong training labels, %", ylabel="test top-1 at the end, %", xticks=[100 * s for s in shares])
    order = sorted(ends, key=lambda label: -ends[label][0])
    figure.legend([ends[o][1] for o in order], [f" {o}" for o in order], loc="outside right center", handlelength=3.5)
    return figure


# title -> columns of one panel
PANELS = {
    "Top-1 accuracy, %": ("test_top1", "train_top1"),
    "Training loss": ("loss", "ce", "lb"),
    "Test NLL": ("test_nll",),
    "Calibration error, %": ("test_ece",),
    "Learning rate": ("lr",),
    "Images per second": ("images_per_second",),
    "Waiting for data, % of the time": ("data_wait",),
}


def panel(run: Run, title: str) -> Any | None:
    """A figure of the columns of one panel over the steps; None when the run has measured none of them."""
    by_step = {row["step"]: row for row in run.steps} | {row["step"]: row for row in run.rows}
    curves = []
    for name in PANELS[title]:
        heading, _, factor = COLUMNS[name]
        points = {s: by_step[s][name] for s in sorted(by_step) if name in by_step[s]}
        y = [math.nan if v is None or not math.isfinite(v) else factor * v for v in points.values()]
        if not all(map(math.isnan, y)):
            curves.append((heading.removesuffix(" %"), list(points), y))
    if not curves:
        return None
    figure, axis = _figure(5.4, 2.7)
    for number, (heading, x, y) in enumerate(curves):
        axis.plot(x, y, label=heading, markevery=_marks(len(x), number), linewidth=1.6 if len(x) < 300 else 1)
    if len(PANELS[title]) > 1:
        axis.legend(loc="lower right", bbox_to_anchor=(1.02, 0.97), ncols=len(curves), fontsize=8, handlelength=3)
    axis.set_title(title)
    _count_axis(axis, "step")
    axis.set_xlim(0, 1.03 * max(by_step))  # the same in all panels
    return figure


def reliability_figure(bins: Mapping[str, Sequence[float]]) -> Any:
    figure, axis = _figure(5.4, 3.4)
    width, most = 100 / len(bins["share"]), max(bins["share"])
    axis.plot([0, 100], [0, 100], linestyle="--", marker="", color="grey", linewidth=1)
    for index, (share, accuracy, confidence) in enumerate(
        zip(bins["share"], bins["accuracy"], bins["confidence"], strict=True)
    ):
        if share:
            alpha = 0.2 + 0.6 * share / most
            axis.bar(index * width, 100 * accuracy, 0.94 * width, align="edge", color=COLORS[0], alpha=alpha)
            axis.plot([100 * confidence], [100 * accuracy], linestyle="", marker="x", color=INK)
    axis.set(title="Reliability, last evaluation", xlabel="confidence, %", ylabel="accuracy, %")
    axis.set(xlim=(0, 100), ylim=(0, 102))
    return figure
