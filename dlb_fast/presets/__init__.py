"""Recipes by name: one YAML file each, complete as it stands. Its comments name the source of every number."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlb_fast.train.config import RunConfig

__all__ = ["PRESETS", "describe_preset", "load_preset", "preset_file"]

PRESETS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def preset_file(name: str) -> Path:
    """The file of a preset.

    Raises:
        ValueError: unknown name; the message has the near ones.

    Example:
        >>> preset_file("digits").name
        'digits.yaml'
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint} (`dlb-fast presets` lists all)")
    return Path(__file__).with_name(f"{name}.yaml")


def describe_preset(name: str) -> str:
    """The first line of the file, a comment that says what the recipe is."""
    with open(preset_file(name), encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def load_preset(name: str) -> RunConfig:
    """The config of a preset; what its file leaves out has the trainer's defaults.

    Example:
        >>> load_preset("digits").loss.method
        'dlb'
    """
    from dlb_fast.train.config import load_config

    return load_config(preset_file(name))
