"""The tables of the documentation, made from `benchmarks/results/` and the presets; nobody types a figure.

    python -m benchmarks.tables                     write them into README and docs/ between their marks
    python -m benchmarks.tables --check             only say which pages are stale
    python -m benchmarks.tables RESULTS.jsonl ...   print the tables of these files

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test fails when one is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.S)
Record = dict[str, Any]

OURS = ("cuda", "triton", "cpu")
LABELS = {
    "eager": "eager",
    "official": "official code's form",
    "compile": "torch.compile",
    "compile-ro": "torch.compile, reduce-overhead",
    "liger": "Liger CE + KL",
    "cpu": "ours (C++)",
    "cuda": "ours (CUDA)",
    "triton": "ours (Triton)",
}
BAR_TIME, BAR_MEMORY = 1.03, 1.01  # a whole step with DLB over one with CE may cost so much


# Records


def read(path: Path) -> list[Record]:
    """The records of a results file. ValueError names the line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON record ({error})") from None
        records.append(record)
    return records


def newest(pattern: str) -> Path:
    """The newest results file of that name. FileNotFoundError when there is none."""
    files = sorted(RESULTS.glob(pattern))
    if not files:
        raise FileNotFoundError(f"no {RESULTS / pattern}; run the benchmark first")
    return files[-1]


def latest(records: list[Record]) -> list[Record]:
    """Only the last of the records that measured the same thing."""
    names = ("kind", "variant", "path", "loss", "rows", "features", "classes", "dtype", "model", "size", "mode")
    return list({tuple(r.get(name) for name in names): r for r in records}.values())


def label(variant: str, path: str = "autograd") -> str:
    """The name of a contender in tables and plots."""
    if variant.removesuffix("-op") in OURS and variant.endswith("-op"):
        return f"{LABELS[variant.removesuffix('-op')]}, bare op"
    if variant in OURS and path == "gradient":
        return f"{LABELS[variant]}, dlb_step"
    return LABELS.get(variant, variant)


def machine(record: Record) -> str:
    """`AMD EPYC, 2 threads, torch 2.13.0+cpu, commit abc, 2026-11-21`: where and when it was measured."""
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    where = f"{record['hardware']}, {threads}, torch {record['versions']['torch']}"
    return f"{where}, commit {record['commit']}, {record['date'][:10]}"


def origin(path: Path, records: list[Record]) -> str:
    """The file, machine, n and commands of the figures above."""
    commands = ", ".join(f"`{command}`" for command in sorted({r["command"] for r in records}))
    places = "; ".join(sorted({machine(r) for r in records}))
    fewest, most = min(r["n"] for r in records), max(r["n"] for r in records)
    n = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    missing = sorted({name for r in records for name in r.get("missing", ())})
    text = f"`{path.name}`: {places}; n = {n}. {commands}."
    return wrapped(text + (f" Not there: {'; '.join(missing)}." if missing else ""))


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


# Tables


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], right: bool = False) -> str:
    """A Markdown table without its empty columns; `right` aligns all but the first to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    full = [i for i in range(len(heads)) if any(row[i] != "-" for row in rows)]
    rule = ["---" if i == 0 or not right else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(row[i] for i in full)} |" for row in (heads, rule, *rows))


def spread(record: Record, unit: float = 1.0, form: str = ".0f") -> str:
    """`median [20 %, 80 %]`."""
    return "{} [{}, {}]".format(*(format(record[f"{name}_us"] / unit, form) for name in ("median", "p20", "p80")))


def loss_table(records: list[Record]) -> str:
    """The loss alone. Each ratio is to the criterion with autograd of the same run and kind of timing."""

    def shape(r: Record) -> tuple[Any, ...]:
        return r["rows"], r["classes"], r["dtype"], r["kind"]

    ours: dict[tuple[Any, ...], float] = {}
    for r in records:
        if r["variant"] in OURS and r["path"] == "autograd":
            ours[shape(r)] = min(ours.get(shape(r), r["median_us"]), r["median_us"])
    heads = ["shape", "dtype", "timing", "variant", "us [20 %, 80 %]", "x ours", "of copy bandwidth", "peak MB"]
    rows = []
    for r in records:
        if r["path"] == "gradient" and not r["variant"].startswith(OURS):
            continue  # the others do the same work by another call
        base, share, peak = ours.get(shape(r)), r.get("of_copy_bandwidth"), r.get("peak_bytes")
        rows.append(
            [
                f"{r['rows']} x {r['classes']}",
                r["dtype"],
                r["kind"],
                label(r["variant"], r["path"]),
                spread(r),
                f"{r['median_us'] / base:.2f}" if base else "-",
                "-" if share is None else f"{share:.0%}",
                "-" if peak is None else f"{peak / 1e6:.2f}",
                r.get("launches", "-"),
            ]
        )
    return table([*heads, "launches"], rows)


def step_table(records: list[Record]) -> str:
    """Whole steps: medians over rounds of the ratio to CE, with 95 % intervals, and the verdicts."""
    rows, judged = [], []
    for r in records:
        what = f"{r['model']}, {r['rows']} x {r['size']} px, {r['dtype']}, {r['mode']}"
        ratio = f"{r['ratio']:.3f} [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
        peak = f"{r['peak_bytes'] / 1e6:.1f}"
        rows.append([what, r["variant"], spread(r, 1e3, ".1f"), ratio, peak, f"{r['peak_ratio']:.4f}"])
        if r["variant"] == "dlb" and r["base"] == "ce":
            judged.append(wrapped(f"{what}: {verdicts(r, records)}."))
    clock = f"{records[0]['clock']} time over ce [95 %]"
    return "\n\n".join(
        [
            table(["step", "variant", "ms [20 %, 80 %]", clock, "peak MB", "peak over ce"], rows),
            *judged,
        ]
    )


def verdicts(dlb: Record, records: list[Record]) -> str:
    """Whether a step with DLB keeps the bars, beside records of the same run.

    `met` or `missed` in time where the whole interval lies on one side of the bar and the control, CE measured once
    more, stays within it; otherwise `undecided`.
    """
    same = ("model", "rows", "size", "mode", "dtype", "command", "date")
    control = [r for r in records if r["variant"] == "ce_again" and all(r[n] == dlb[n] for n in same if n in dlb)]
    quiet = bool(control) and all(1 / BAR_TIME <= r["ratio_low"] <= r["ratio_high"] <= BAR_TIME for r in control)
    time = "met" if dlb["ratio_high"] <= BAR_TIME else "missed" if dlb["ratio_low"] > BAR_TIME else "undecided"
    peak = "met" if dlb["peak_ratio"] <= BAR_MEMORY else "missed"
    return (
        f"at most {BAR_TIME:.2f} x the time of ce: {time if quiet else 'undecided'}; "
        f"at most {BAR_MEMORY:.2f} x its peak memory: {peak}"
    )


def methods_table(records: list[Record]) -> str:
    """What each method costs beside plain cross entropy."""
    heads = ["step", "timing", "method", "us [20 %, 80 %]", "x ce"]
    return table(
        heads,
        (
            [
                f"{r['model']}, {r['rows']} rows of {r['size']} px",
                r["kind"],
                r["variant"],
                spread(r),
                f"{r['of_ce']:.2f}",
            ]
            for r in records
        ),
    )


TEACHERS = {
    "ce": "no teacher",
    "half": "logits, half of the rows",
    "full": "logits, all rows",
    "hidden": "hidden states and weight, half of the rows",
    "top_k": "top 64, half of the rows",
}
LINEAR_LABELS = {**LABELS, "fused": "ours", "torch": "F.linear_cross_entropy", "liger": "Liger"}


def linear_table(records: list[Record]) -> str:
    """The loss from hidden states. Ratios are of the same rounds; memory without the weight's float32 gradient."""

    def shape(r: Record) -> tuple[Any, ...]:
        return r["rows"], r["features"], r["classes"], r["dtype"]

    ours = {(shape(r), r["loss"]): r["ratios"] for r in records if r["variant"] == "fused"}
    heads = ["teacher", "", "ms [20 %, 80 %]", "x products", "x ours", "peak MB", "error of hidden", "of weight"]
    parts = []
    for size in dict.fromkeys(map(shape, records)):
        here = [r for r in records if shape(r) == size]
        rows = []
        for r in sorted((r for r in here if "part" not in r), key=lambda r: list(TEACHERS).index(r["loss"])):
            over = ours.get((size, r["loss"]), {}).get(r["variant"])  # ours over this one
            rows.append(
                [
                    TEACHERS[r["loss"]],
                    LINEAR_LABELS.get(r["variant"], r["variant"]),
                    spread(r, 1e3),
                    f"{r['ratios']['products']['ratio']:.2f}",
                    f"{1 / over['ratio']:.2f}" if over else "1.00" if r["variant"] == "fused" else "-",
                    f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "-",
                    *(f"{r['errors'][name]:.1e}" for name in ("hidden", "weight")),
                ]
            )
        times = ", ".join(f"{r['loss']} {spread(r, 1e3)} ms" for r in here if "part" in r)
        what = "B={}, D={}, C={}, {}".format(*size)
        parts.append(f"{what}; the bare products: {times}.\n\n{table(heads, rows, right=True)}")
    return "\n\n".join(parts)


BENCHMARKS = {"last_batch": loss_table, "step": step_table, "methods": methods_table, "linear": linear_table}


def tables_of(path: Path) -> str:
    """The tables of a results file."""
    records, made = read(path), []
    for bench, draw in BENCHMARKS.items():
        wanted = latest([r for r in records if r.get("bench") == bench and "sweep" not in r])
        if wanted:
            made.append(f"{draw(wanted)}\n\n{origin(path, wanted)}")
    return "\n\n".join(made)


def views_table() -> str:
    """The loaders' views per second."""
    rows = read(newest("loader-cpu-[0-9]*.jsonl"))
    (run,) = [row for row in rows if row["what"] == "machine"]
    told = f"`{run['command']}`; {run['cpu']}, {run['cores']} cores, torch {run['torch']}, commit {run['commit'][:7]}."
    lines = []
    for row in rows:
        if row["what"] == "throughput" and "missing" not in row:
            views, cpu, over = row["views_per_s"], row["views_per_cpu_s"], row["over_A"]
            spread = f"{views['median']:,.0f} ({views['q25']:,.0f} to {views['q75']:,.0f})"
            lines.append((row["name"], spread, f"{cpu['median']:,.0f}", f"{over['median']:.2f}"))
    return f"{wrapped(told)}\n\n{table(('loader', 'views per second', 'per CPU second', 'over A'), lines, right=True)}"


def fidelity_table() -> str:
    """What a top-k teacher loses against the dense one."""
    from . import top_k_fidelity  # needs torch

    path = newest("top-k-fidelity-cpu-*.jsonl")
    records = read(path)
    about = "{words:,} words of text, {classes:,} classes, {rows} rows, after {steps} steps. ".format(**records[0])
    told = f"{about}`{path.name}`: {machine(records[0])}. `{records[0]['command']}`."
    return f"{top_k_fidelity.table(records)}\n\n{wrapped(told)}"


def noise_table() -> str:
    """Accuracy of the methods under label noise, as the report of the comparison has it."""
    text = (RESULTS / "digits-label-noise" / "report.md").read_text(encoding="utf-8")
    command = re.search(r"^Command: .*$", text, re.M)
    first = re.search(r"(?:^\|.*\n)+", text, re.M)
    if command is None or first is None:
        raise ValueError("tables: digits-label-noise/report.md has no command line or no table")
    return f"{command.group(0)}\n\n{first.group(0).strip()}"


def demo_table() -> str:
    """The methods of `make demo`, from the comparison of all methods on the same data."""
    text = (RESULTS / "digits-label-noise" / "noise-0.2" / "report.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:] if len(row) == len(rows[0])}
    ahead = {row[0].removeprefix("DLB - "): row[1:] for row in rows if row[0].startswith("DLB - ")}
    lines = []
    for method in ("CE", "CE + label smoothing 0.1", "two views, alpha=0", "DLB"):
        row = found[method]
        gap = " points, ahead in ".join(ahead[method]) + " seeds" if method in ahead else ""
        lines.append((method, row["last top-1 %"], row["best top-1 %"], row["last NLL"], gap))
    return table(("", "last top-1 %", "best top-1 %", "NLL", "DLB minus this"), lines)


# Pages


def sources() -> dict[str, Callable[[], str]]:
    """Table name -> what makes it."""
    from . import imagenet_plan, study_page  # need the trainer

    return {
        **imagenet_plan.TABLES,
        "loss": lambda: tables_of(newest("cpu-[0-9]*.jsonl")),
        "linear": lambda: tables_of(newest("linear-cpu-[0-9]*.jsonl")),
        "top k fidelity": fidelity_table,
        "steps": lambda: tables_of(newest("step-cpu-[0-9]*.jsonl")),
        "methods": lambda: tables_of(newest("methods-cpu-[0-9]*.jsonl")),
        "loaders": views_table,
        "label noise": noise_table,
        "demo": demo_table,
        "study": lambda: study_page.short_form(newest("cifar10-*.jsonl")),
    }


def fill(text: str) -> str:
    """A page with every marked table made anew. ValueError for an unknown name."""
    known = sources() if MARK.search(text) else {}

    def made(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise ValueError(f"tables: unknown table {match[2]!r}; known: {', '.join(known)}")
        return f"{match[1]}\n{known[match[2]]()}\n\n{match[3]}"

    return MARK.sub(made, text)


def main(argv: list[str] | None = None) -> int:
    """Write, check or print the tables; 1 when a page is stale under --check."""
    parser = argparse.ArgumentParser(prog="tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="print the tables of these files instead")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    args = parser.parse_args(argv)
    for path in args.results:
        print(tables_of(path))
    if args.results:
        return 0
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if (new := fill(text)) != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
