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
from collections.abc import Callable
from pathlib import Path

from .imagenet_plan import BLOCKS, RESULTS, newest, newest_file, table
from .tables import generated

DOCS = Path(__file__).resolve().parent.parent / "docs"
_MARK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.S)


def measured(pattern: str) -> Callable[[], str]:
    """The tables that `benchmarks.tables` makes of the newest results file of a name."""

    def made() -> str:
        return generated([newest_file(pattern)]).strip()

    return made


def views_table() -> str:
    """The loaders' views per second."""
    rows = newest("loader-cpu-[0-9]*.jsonl")
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
    "loss": measured("cpu-[0-9]*.jsonl"),
    "steps": measured("step-cpu-[0-9]*.jsonl"),
    "methods": measured("methods-cpu-[0-9]*.jsonl"),
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
