"""The tables of the documentation, made from `benchmarks/results/` and the recipes; nobody types them.

    python -m benchmarks.docs_tables            write them into docs/ between their marks
    python -m benchmarks.docs_tables --check    say which are stale, without writing

A block is `<!-- table: NAME -->` ... `<!-- end -->`. `tests/test_docs.py` runs the check, so that a results file or a
recipe cannot change without its table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from .imagenet_plan import BLOCKS, RESULTS, newest, table

DOCS = Path(__file__).resolve().parent.parent / "docs"
_MARK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.S)


def origin(row: dict[str, Any]) -> str:
    """Where a number comes from, in one line."""
    return (
        f"`{row['command']}`; {row['hardware']}, {row['cores']} cores, {row['threads']} threads, "
        f"torch {row['versions']['torch']}, commit {row['commit']}, {row['date'][:10]}."
    )


def timed_table(pattern: str, kind: str, baseline: str) -> str:
    """Medians with their 20 and 80 % quantiles, a line per variant, and the ratio to a baseline of the same setting."""
    rows = [row for row in newest(pattern) if row.get("kind") == kind]
    settings: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:  # a setting measured twice: the later one counts
        keys = ("model", "rows", "classes", "size", "dtype", "path")
        settings.setdefault(tuple(row[key] for key in keys if key in row), {})[row["variant"]] = row
    lines = []
    for setting, variants in settings.items():
        for name, row in variants.items():
            base = variants.get(baseline)
            ratio = "" if base is None else f"{base['median_us'] / row['median_us']:.2f}"
            spread = f"{row['p20_us']:,.0f} to {row['p80_us']:,.0f}"
            lines.append((", ".join(map(str, setting)), name, f"{row['median_us']:,.0f}", spread, row["n"], ratio))
    head = ("setting", "variant", "median us", "20 to 80 %", "n", f"{baseline} / variant")
    commands = list(dict.fromkeys(origin(row) for row in rows))
    return "\n\n".join([*commands, table(head, lines)])


def loss_table() -> str:
    """The loss alone, forward and backward."""
    return timed_table("cpu-*.jsonl", "wall", "eager")


def methods_table() -> str:
    """A training step of every method."""
    return timed_table("methods-cpu-*.jsonl", "step", "ce")


def views_table() -> str:
    """The loaders' views per second."""
    rows = newest("loader-cpu-*.jsonl")
    (machine,) = [row for row in rows if row["what"] == "machine"]
    lines = []
    for row in rows:
        if row["what"] == "throughput" and "missing" not in row:
            views, cpu, over = row["views_per_s"], row["views_per_cpu_s"], row["over_A"]
            lines.append(
                (
                    row["name"],
                    f"{views['median']:,.0f} ({views['q25']:,.0f} to {views['q75']:,.0f})",
                    f"{cpu['median']:,.0f}",
                    f"{over['median']:.2f}",
                )
            )
    told = f"`{machine['command']}`; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, "
    told += f"commit {machine['commit'][:7]}."
    return f"{told}\n\n" + table(("loader", "views per second", "per CPU second", "over A"), lines)


def noise_table() -> str:
    """Accuracy of the methods under label noise, as its own report has it."""
    text = (RESULTS / "digits-label-noise" / "report.md").read_text(encoding="utf-8")
    command = re.search(r"^Command: .*$", text, re.M)
    first = re.search(r"(?:^\|.*\n)+", text, re.M)
    if command is None or first is None:
        raise ValueError("docs_tables: digits-label-noise/report.md has no command line or no table")
    return f"{command.group(0)}\n\n{first.group(0).strip()}"


TABLES = {
    **BLOCKS,
    "loss": loss_table,
    "methods": methods_table,
    "loaders": views_table,
    "label noise": noise_table,
}


def fill(text: str) -> str:
    """A page with every marked block made anew; an unknown name raises."""

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"docs_tables: unknown table {match[2]!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return _MARK.sub(made, text)


def main(argv: list[str] | None = None) -> int:
    """Write the blocks, or check them; 1 when some were stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := fill(text)) != text:
            stale.append(page.name)
            if not args.check:
                page.write_text(new, encoding="utf-8")
    print(json.dumps({"stale" if args.check else "written": stale}))
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
