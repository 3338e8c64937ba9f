"""Curves of a sweep from its results file; every point is a record.

    python -m benchmarks.plots benchmarks/results/sweep-cpu.jsonl --out benchmarks/results

Makes one SVG per dtype and kind of timing from the records of `bench_last_batch --sweep classes` and `--sweep batch`:
the cost of a logit and the speed-up over eager and torch.compile against the classes, the time of a call against the
rows. A curve is the median, its band reaches from the 20 to the 80 % quantile.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tables import OURS, Record, label, machine, read

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
        style = {"linewidth": 2 if variant in OURS else 1, "linestyle": "--" if path == "gradient" else "-"}
        (line,) = axes.plot(at, [value(p, "median_us") for p in points], "o", ms=3, label=label(variant, path), **style)
        low, high = ([value(p, quantile) for p in points] for quantile in ("p20_us", "p80_us"))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")


def cost_of_classes(axes: Any, records: list[Record]) -> None:
    """Nanoseconds per logit, above the time of a copy of as many bytes."""
    draw(axes, records, "classes", lambda r, which: r[which] * 1e3 / (r["rows"] * r["classes"]))
    copies = sorted({(r["classes"], r["least_bytes_per_logit"] / r["copy_bandwidth"] * 1e9) for r in records})
    axes.plot(*zip(*copies, strict=True), color="black", linestyle=":", label="copy of as many bytes")
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


PANELS = {"classes": (cost_of_classes, speedup_over_classes), "batch": (time_of_rows,)}


def plot(results: Path, out: Path) -> list[Path]:
    """Write the figures of a results file and return their paths. ValueError for a file without a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dlb_fast"  # the same file from the same records
    import matplotlib.pyplot as plt

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
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
        for ax, (paint, records) in zip(axes[0], panels, strict=True):
            paint(ax, records)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        figure.suptitle(f"{dtype}, {kind}: {machine(panels[0][1][0])}", fontsize=9)
        written.append(out / f"{results.stem}-{dtype}-{kind}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        plt.close(figure)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the SVG files")
    args = parser.parse_args()
    try:
        written = [path for results in args.results for path in plot(results, args.out)]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
