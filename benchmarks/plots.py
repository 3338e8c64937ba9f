"""Pictures from results files; every bar and every point is a record.

    python -m benchmarks.plots                                                      docs/loss-time.svg
    python -m benchmarks.plots benchmarks/results/sweep-cpu.jsonl --out benchmarks/results

The first draws the time of the loss beside eager PyTorch from the newest `cpu-*.jsonl`. The second makes one SVG per
dtype and kind of timing from the records of `bench_last_batch --sweep classes` and `--sweep batch`: the cost of a logit
and the speed-up over eager and torch.compile against the classes, the time of a call against the rows. A curve is the
median, its band reaches from the 20 to the 80 % quantile.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlb_fast.report.pictures import style

from .tables import OURS, ROOT, Record, label, latest, machine, newest, read

LOSS_TIME = ROOT / "docs" / "loss-time.svg"
FILE = {"svg.fonttype": "path", "svg.hashsalt": "dlb_fast"}  # looks the same everywhere, and has the same bytes
CONTENDERS = ("eager", "official", "compile", *OURS)
Value = Callable[[Record, str], float]  # (record, "median_us" or another quantile) -> y


def draw(axes: Any, records: list[Record], x: str, value: Value) -> None:
    """A line with its band per contender; ours are thicker and on top. ValueError for two records at one place."""
    curves: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r[x]):
        if record["path"] == "autograd" or record["variant"] in OURS:  # the others' second path is the same work
            curves[record["variant"], record["path"]].append(record)
    for (variant, path), points in sorted(curves.items(), key=lambda item: item[0][0] in OURS):
        at = [p[x] for p in points]
        if len(set(at)) < len(at):
            raise ValueError(f"plots: {variant} ({path}) was measured twice at one {x}; plot one run at a time")
        width = 2 if variant in OURS else 1
        (line,) = axes.plot(at, [value(p, "median_us") for p in points], label=label(variant, path), linewidth=width)
        low, high = ([value(p, quantile) for p in points] for quantile in ("p20_us", "p80_us"))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")


def cost_of_classes(axes: Any, records: list[Record]) -> None:
    """Nanoseconds per logit, above the time of a copy of as many bytes."""
    draw(axes, records, "classes", lambda r, which: r[which] * 1e3 / (r["rows"] * r["classes"]))
    copies = sorted({(r["classes"], r["least_bytes_per_logit"] / r["copy_bandwidth"] * 1e9) for r in records})
    axes.plot(*zip(*copies, strict=True), color="black", linestyle=":", marker="", label="copy of as many bytes")
    axes.set(xlabel=f"classes ({records[0]['rows']} rows)", ylabel="ns per logit", yscale="log")


def speedup_over_classes(axes: Any, records: list[Record]) -> None:
    """The time of each contender over that of our criterion, by medians of one run."""
    records = [r for r in records if r["path"] == "autograd"]
    ours = {r["classes"]: r["median_us"] for r in records if r["variant"] in OURS}
    others = [r for r in records if r["variant"] not in OURS and r["classes"] in ours]
    draw(axes, others, "classes", lambda r, which: r[which] / ours[r["classes"]])
    axes.axhline(1, color="black", linestyle=":")
    axes.set(xlabel=f"classes ({records[0]['rows']} rows)", ylabel="time over our criterion's")


def time_of_rows(axes: Any, records: list[Record]) -> None:
    """Microseconds of one call."""
    draw(axes, records, "rows", lambda r, which: r[which])
    axes.set(xlabel=f"rows (C = {records[0]['classes']})", ylabel="µs", yscale="log")


def loss_records(path: Path, dtype: str = "float32") -> dict[int, list[Record]]:
    """Classes -> the records with autograd of one dtype, in the order of `CONTENDERS`."""
    found = [r for r in latest(read(path)) if r.get("bench") == "last_batch" and "sweep" not in r]
    found = [r for r in found if (r["dtype"], r["path"], r["kind"]) == (dtype, "autograd", "wall")]
    found = sorted((r for r in found if r["variant"] in CONTENDERS), key=lambda r: CONTENDERS.index(r["variant"]))
    return {c: [r for r in found if r["classes"] == c] for c in sorted({r["classes"] for r in found})}


def loss_caption(path: Path, records: dict[int, list[Record]]) -> str:
    """What was measured, where, how often; the figures themselves, so that a test can see that a picture is stale."""
    of = [r for group in records.values() for r in group]
    n = ", ".join(str(max(r["n"] for r in group)) for group in records.values())
    times = "; ".join(
        f"C={c} " + ", ".join(f"{r['variant']} {r['median_us']:.0f}" for r in g) for c, g in records.items()
    )
    return (
        f"{machine(of[0])}. Median of n = {n} calls in turn; the line on a bar is the 20 to 80 % range. "
        f"{path.name}. us: {times}."
    )


def loss_time(path: Path, out: Path) -> Path:
    """Bars of the time of forward and backward, a panel per number of classes, with the factor over ours."""
    records = loss_records(path)
    if not records:
        raise ValueError(f"plots: {path} holds no loss with autograd; make one with bench_last_batch")
    caption = loss_caption(path, records)
    import matplotlib
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(9, 2.9), layout="constrained", facecolor="white")
        rows = next(iter(records.values()))[0]["rows"]
        figure.suptitle(f"Forward and backward of the loss, {rows} rows, float32: shorter is faster", x=0.01, ha="left")
        for axes, (classes, group) in zip(
            figure.subplots(1, len(records), squeeze=False)[0], records.items(), strict=True
        ):
            ours = next(r["median_us"] for r in group if r["variant"] in OURS)
            unit, name = (1e3, "ms") if ours >= 1e3 else (1, "µs")
            for place, record in enumerate(group):
                low, middle, high = (record[f"{q}_us"] / unit for q in ("p20", "median", "p80"))
                mine = record["variant"] in OURS
                axes.barh(place, middle, 0.66, color="#1f77b4" if mine else "#c3c7cd", zorder=2)
                axes.plot([low, high], [place, place], "-", color="black", linewidth=1, marker="", zorder=3)
                factor = "" if mine else f", {record['median_us'] / ours:.1f} x ours"
                axes.text(high, place, f"  {middle:,.{0 if unit == 1 else 1}f} {name}{factor}", va="center", fontsize=8)
            axes.set(title=f"{classes:,} classes", xlabel=name)
            axes.set_xlim(0, 1.9 * max(r["p80_us"] for r in group) / unit)
            shown = [label(r["variant"]) for r in group] if classes == min(records) else [""] * len(group)
            axes.set_yticks(range(len(group)), shown)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
        figure.supxlabel(caption.partition(" us: ")[0].replace("; the", ";\nthe"), fontsize=6.5, x=0.01, ha="left")
        matplotlib.rcParams.update(FILE)
        figure.savefig(out, metadata={"Date": None, "Description": caption})
    return out


PANELS = {"classes": (cost_of_classes, speedup_over_classes), "batch": (time_of_rows,)}


def plot(results: Path, out: Path) -> list[Path]:
    """Write the figures of a results file and return their paths. ValueError for a file without a sweep."""
    import matplotlib
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in read(results):
        if record.get("bench") == "last_batch" and "sweep" in record and not record["variant"].endswith("-op"):
            groups[record["dtype"], record["kind"]][record["sweep"]].append(record)
    if not groups:
        raise ValueError(f"plots: {results} holds no sweep; make one with bench_last_batch --sweep classes|batch")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for (dtype, kind), sweeps in groups.items():
        panels = [(paint, records) for sweep, records in sweeps.items() for paint in PANELS[sweep]]
        rows = (len(panels) + 1) // 2
        with style():
            figure = Figure(figsize=(9, 3.4 * rows), layout="constrained", facecolor="white")
            axes = figure.subplots(rows, 2).flat
            for ax, (paint, records) in zip(axes, panels, strict=False):
                paint(ax, records)
                ax.legend(fontsize=8, handlelength=4)
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_major_formatter("{x:,.6g}")
                    axis.set_minor_formatter("")
            for ax in axes[len(panels) :]:
                ax.set_axis_off()
            figure.suptitle(f"{dtype}, {kind}: {machine(panels[0][1][0])}", fontsize=9, x=0.01, ha="left")
            written.append(out / f"{results.stem}-{dtype}-{kind}.svg")
            matplotlib.rcParams.update(FILE)
            figure.savefig(written[-1], metadata={"Date": None})
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="results of a sweep; none: draw docs/loss-time.svg")
    parser.add_argument("--out", type=Path, help="folder for the SVG files of a sweep")
    args = parser.parse_args()
    if bool(args.results) != (args.out is not None):
        parser.error("a sweep needs results and --out")
    try:
        written = [path for results in args.results for path in plot(results, args.out)]
        written = written or [loss_time(newest("cpu-*.jsonl"), LOSS_TIME)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
