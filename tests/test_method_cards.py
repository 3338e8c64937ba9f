"""The cards of docs/methods: every method has one, all have the same headings, and their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dlb_fast.presets import PRESETS
from dlb_fast.train.methods import CARDS, METHODS

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
HEADINGS = [
    "Formula", "How to use", "Hyper-parameters and where they come from", "State and extra cost", "Bad with", "Source",
]  # fmt: skip
FILES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_headings_and_code(path, capsys):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert re.search(r"\*\*(Official|reconstruction|third-party)\*\*", text.split("## Source")[1])
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, str(path), "exec"), {})
    for preset in re.findall(r"--preset ([\w-]+)", text):
        assert preset in PRESETS
    for flag in re.findall(r"`--([a-z-]+)(?: [\w.]+)?`", text):
        assert _is_a_field(flag.replace("-", "_")), flag


def _is_a_field(name):
    from dlb_fast.train.config import RunConfig, to_dict

    return any(name in part for part in to_dict(RunConfig()).values())


def test_the_teacher_of_contributing_runs():
    text = (FOLDER.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})


def test_every_method_has_its_card():
    assert set(CARDS) == set(METHODS)
    index = set(re.findall(r"\((\w+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert set(CARDS.values()) <= index <= {path.stem for path in FILES}
