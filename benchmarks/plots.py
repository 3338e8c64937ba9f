"""Curves from results files; every point is a record, nothing is typed.

    python -m benchmarks.plots benchmarks/results/sweep-cpu.jsonl --out benchmarks/results

From records of `bench_last_batch --sweep classes`: time or throughput with the roof that a copy set in the same run,
and the speed-up of ours over eager and torch.compile, against the number of classes. From `--sweep batch`:
microseconds against rows. A curve is the median, its band the 20 to 80 % quantiles.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results_file import OURS, Record, label, machine, read

Curves = dict[tuple[str, str], list[Record]]  # (variant, path) -> records in order of x
KINDS = {
    "wall": "wall clock",
    "device_warm": "device time, warm cache",
    "device_cold": "device time, cold cache",
    "graph": "graph replay",
}


def curves(records: list[Record], x: str) -> Curves:
    """The records of each contender, by growing ``x``. ValueError where two stand at one place."""
    found: Curves = defaultdict(list)
    for record in sorted(records, key=lambda r: r[x]):
        found[record["variant"], record["path"]].append(record)
    for (variant, path), points in found.items():
        if len({p[x] for p in points}) < len(points):
            raise ValueError(f"plots: {variant} ({path}) was measured twice at one {x}; plot one run at a time")
    # Beside the public faces the bare op says nothing new, and the peers' second path is the same work.
    return {
        key: points
        for key, points in found.items()
        if not key[0].endswith("-op") and (key[1] == "autograd" or key[0] in OURS)
    }


def draw(axes: Any, found: Curves, x: str, value: Callable[[Record, str], float]) -> None:
    """A line with its band per contender; ours are drawn on top and thicker."""
    for (variant, path), points in sorted(found.items(), key=lambda item: item[0][0] in OURS):
        at, ours = [p[x] for p in points], variant in OURS
        (line,) = axes.plot(
            at, [value(p, "median_us") for p in points], marker="o", markersize=3, linewidth=2 if ours else 1,
            linestyle="--" if path == "gradient" else "-", label=label(variant, path),
        )  # fmt: skip
        low, high = ([value(p, q) for p in points] for q in ("p20_us", "p80_us"))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log")


def cost_of_classes(axes: Any, records: list[Record], gpu: bool) -> None:
    """GB/s of the least traffic under the roof (GPU), or nanoseconds per logit above the time a copy takes (CPU)."""
    found = curves(records, "classes")

    def rate(r: Record, which: str) -> float:
        logits = r["rows"] * r["classes"]
        return r["least_bytes_per_logit"] * logits / r[which] * 1e-3 if gpu else r[which] * 1e3 / logits

    draw(axes, found, "classes", rate)
    roofs = sorted({(r["classes"], r["copy_bandwidth"], r["least_bytes_per_logit"]) for r in records})
    heights = [band * 1e-9 if gpu else least / band * 1e9 for _, band, least in roofs]
    axes.plot([c for c, _, _ in roofs], heights, color="black", linestyle=":", label="copy of as many bytes")
    axes.set_ylabel("GB/s of the least traffic" if gpu else "ns per logit")
    axes.set_xlabel(f"classes C ({records[0]['rows']} rows)")
    if not gpu:
        axes.set_yscale("log")


def speedup_over_classes(axes: Any, records: list[Record], gpu: bool) -> None:
    """How many times faster our criterion is than each peer, by medians of one run."""
    found = curves([r for r in records if r["path"] == "autograd"], "classes")
    best: dict[int, float] = {}
    for (variant, _), points in found.items():
        for p in points if variant in OURS else ():
            best[p["classes"]] = min(best.get(p["classes"], p["median_us"]), p["median_us"])
    peers = {key: [p for p in points if p["classes"] in best] for key, points in found.items() if key[0] not in OURS}
    draw(axes, peers, "classes", lambda r, which: r[which] / best[r["classes"]])
    axes.axhline(1, color="black", linestyle=":")
    axes.set_ylabel("time over our criterion's")
    axes.set_xlabel(f"classes C ({records[0]['rows']} rows)")


def time_of_rows(axes: Any, records: list[Record], gpu: bool) -> None:
    """Microseconds of one call."""
    draw(axes, curves(records, "rows"), "rows", lambda r, which: r[which])
    axes.set_yscale("log")
    axes.set_ylabel("µs")
    axes.set_xlabel(f"rows (C = {records[0]['classes']})")


PLOTS: dict[str, tuple[str, Callable[[Any, list[Record], bool], None]]] = {
    "cost": ("classes", cost_of_classes),
    "speedup": ("classes", speedup_over_classes),
    "batch": ("batch", time_of_rows),
}


def plot(paths: list[Path], out: Path) -> list[Path]:
    """Write an SVG per plot, kind of timing and dtype found in the files; returns them. ValueError for no sweep."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dlb_fast"  # the same file from the same records
    import matplotlib.pyplot as plt

    written: list[Path] = []
    for path in paths:
        groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
        for record in read([path]):
            if record.get("bench") == "last_batch" and "sweep" in record:
                groups[record["sweep"], record["kind"], record["dtype"]].append(record)
        if not groups:
            raise ValueError(f"plots: {path} holds no sweep; make one with bench_last_batch --sweep classes|batch")
        out.mkdir(parents=True, exist_ok=True)
        for (sweep, kind, dtype), records in groups.items():
            for name, (over, paint) in PLOTS.items():
                if over != sweep:
                    continue
                figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
                paint(axes, records, kind != "wall" or "launches" in records[0])
                axes.set_title(f"{dtype}, {KINDS[kind]}\n{machine(records[0])}", fontsize=8)
                axes.grid(alpha=0.3)
                axes.legend(fontsize=8)
                target = out / f"{path.stem}-{name}-{dtype}-{kind}.svg"
                figure.savefig(target, metadata={"Date": None})
                plt.close(figure)
                written.append(target)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="plots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the SVG files")
    args = parser.parse_args()
    try:
        written = plot(args.results, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
