"""The README is true: its Python runs, its commands exist, its table is generated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dlb_fast import _backends

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_python_blocks_run(number, capsys):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    exec(compile(code, f"README.md block {number}", "exec"), {"__name__": "readme"})


def test_state_table_is_generated():
    table = re.search(r"<!-- state_table.*?-->\n(.*?)\n<!-- end -->", README, re.S)
    assert table is not None
    assert table.group(1) == _backends.state_table()


def test_make_targets_and_presets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert f"\n{target}:" in makefile, target
    from dlb_fast.presets import load_preset

    for name in re.findall(r"--preset ([\w-]+)", README):
        load_preset(name)


def test_the_plain_lines_are_what_make_and_ci_do():
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    tools = '"setuptools>=77" wheel ninja "pybind11>=2.13" numpy'
    for line in (tools, '--no-build-isolation -e ".[dev]"', "torch==2.13.0"):
        assert all(line in text for text in (README, makefile, ci)), line
