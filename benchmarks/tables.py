"""Markdown tables from results files; no figure in them is typed.

    python -m benchmarks.tables                                  # print the tables of the committed results
    python -m benchmarks.tables --write benchmarks/README.md     # put them between the markers of a file
    python -m benchmarks.tables RESULTS.jsonl ...                # of other files

`generated()` gives the same text to whoever else wants to publish it; a test holds benchmarks/README.md to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .results_file import OURS, Record, label, machine, read, verdicts

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- begin: python -m benchmarks.tables -->", "<!-- end: python -m benchmarks.tables -->"


def committed() -> list[Path]:
    """The results files of the checkout."""
    return sorted(RESULTS.glob("*.jsonl"))


def generated(paths: Iterable[Path] | None = None) -> str:
    """All tables of these results files (None: the committed ones), as markdown."""
    sections = []
    for path in committed() if paths is None else paths:
        records = read([path])
        for bench, table in TABLES.items():
            wanted = latest([r for r in records if r.get("bench") == bench and "sweep" not in r])
            if wanted:
                sections.append(f"{table(wanted)}\n\n{origin(path, wanted)}")
    return "\n\n".join(sections) + "\n"


def latest(records: list[Record]) -> list[Record]:
    """Without what the same file measured again later."""
    names = ("kind", "variant", "path", "rows", "classes", "dtype", "model", "size", "mode")
    return list({tuple(r.get(name) for name in names): r for r in records}.values())


def origin(path: Path, records: list[Record]) -> str:
    """Where the figures above stand and how they were made."""
    made = sorted({r["command"] for r in records})
    counts = sorted(r["n"] for r in records)
    places = "; ".join(sorted({machine(r) for r in records}))
    n = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    missing = sorted({name for r in records for name in r.get("missing", ())})
    text = f"`{path.name}`: {places}; n = {n}. " + ", ".join(f"`{command}`" for command in made) + "."
    return text + (f" Not there: {'; '.join(missing)}." if missing else "")


def rows_of(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table without the columns in which no row has anything."""
    full = [i for i in range(len(heads)) if any(row[i] != "-" for row in rows)]
    lines = [[row[i] for i in full] for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(record: Record, unit: float = 1.0, form: str = ".0f") -> str:
    """`median [20 %, 80 %]`."""
    return "{} [{}, {}]".format(*(format(record[f"{name}_us"] / unit, form) for name in ("median", "p20", "p80")))


def loss_table(records: list[Record]) -> str:
    """The loss alone. Each ratio divides by our criterion's time of the same run and kind of timing."""
    ours = {}
    for r in records:
        key = (r["rows"], r["classes"], r["dtype"], r["kind"])
        if r["variant"] in OURS and r["path"] == "autograd":
            ours[key] = min(ours.get(key, r["median_us"]), r["median_us"])
    rows = []
    for r in records:
        bare = r["path"] == "gradient"
        if bare and not r["variant"].startswith(OURS):
            continue  # the same work by another call; the file has it
        base = ours.get((r["rows"], r["classes"], r["dtype"], r["kind"]))
        share, peak = r.get("of_copy_bandwidth"), r.get("peak_bytes")
        rows.append([
            f"{r['rows']} x {r['classes']}", r["dtype"], r["kind"], label(r["variant"], r["path"]), spread(r),
            f"{r['median_us'] / base:.2f}" if base else "-",
            "-" if share is None else f"{share:.0%}",
            "-" if peak is None else f"{peak / 1e6:.2f}",
            f"{r['launches']}" if "launches" in r else "-",
        ])  # fmt: skip
    heads = [
        "shape",
        "dtype",
        "timing",
        "variant",
        "us [20 %, 80 %]",
        "x ours",
        "of copy bandwidth",
        "peak MB",
        "launches",
    ]
    return "**The loss alone**\n\n" + rows_of(heads, rows)


def step_table(records: list[Record]) -> str:
    """Whole steps; ratios are medians over rounds, with 95 % intervals."""
    rows, judged = [], []
    for r in records:
        ratio = f"{r['ratio']:.4f} [{r['ratio_low']:.4f}, {r['ratio_high']:.4f}]"
        what = f"{r['model']}, {r['rows']} rows of {r['size']} px, {r['dtype']}, {r['mode']}"
        peak = f"{r['peak_bytes'] / 1e6:.1f}"
        rows.append([what, r["variant"], spread(r, 1e3, ".1f"), ratio, peak, f"{r['peak_ratio']:.4f}"])
        if r["variant"] == "dlb" and r["base"] == "ce":
            judged.append(f"{what}: {verdicts(r, records)}.")
    heads = [
        "step",
        "variant",
        "ms [20 %, 80 %]",
        f"{records[0]['clock']} time over ce [95 %]",
        "peak MB",
        "peak over ce",
    ]
    return "\n\n".join(["**A whole training step**", rows_of(heads, rows), *judged])


def methods_table(records: list[Record]) -> str:
    """What each method costs beside plain cross entropy."""
    rows = [
        [
            f"{r['model']}, {r['rows']} rows of {r['size']} px", r["kind"], r["variant"],
            spread(r), f"{r['of_ce']:.2f}", r["cost"],
        ]
        for r in records
    ]  # fmt: skip
    heads = ["step", "timing", "method", "us [20 %, 80 %]", "x ce", "keeps"]
    return "**The methods**\n\n" + rows_of(heads, rows)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "last_batch": loss_table,
    "step": step_table,
    "methods": methods_table,
}


def between_markers(text: str, tables: str) -> str:
    """``text`` with what stands between its markers replaced. ValueError where it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"tables: expected the lines {BEGIN!r} and {END!r} once each, in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{tables}\n{text[text.index(END) :]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: the committed files")
    parser.add_argument("--write", type=Path, help="markdown file with the two markers")
    args = parser.parse_args()
    try:
        tables = generated(args.results or None)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.write is None:
        print(tables, end="")
    else:
        args.write.write_text(between_markers(args.write.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
