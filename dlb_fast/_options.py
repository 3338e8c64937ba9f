"""The options of the objective, read from ``options.h``, and the numbers that stand for names in an op's arguments."""

from __future__ import annotations

import re
from pathlib import Path

REDUCTION = {"mean": 0, "sum": 1, "none": 2}
TEACHER_KIND = {"none": 0, "logits": 1, "probabilities": 2, "virtual": 3, "top_k": 4}
PARTS = ("loss", "ce", "lb", "correct", "grad_scale", "valid")
"""Entries of the op's ``parts``. ``valid`` counts the rows of the KL. ``grad_scale`` is the power of two by which a
float16 gradient is stored multiplied, so that it neither underflows before the upstream gradient (a loss scale) reaches
it nor overflows; 1 for the other dtypes."""

_SCHEMA_TYPES = {"TENSOR": "Tensor?", "NUMBER": "float", "INTEGER": "int"}


def _read() -> dict[str, str]:
    text = Path(__file__).with_name("options.h").read_text()
    found = {}
    for kind, lines in re.findall(r"#define DLB_(\w+)_OPTIONS\(X\)((?:.*\\\n)+.*)", text):
        for name in re.findall(r"^\s*X\((\w+)", lines, re.MULTILINE):
            found[name] = _SCHEMA_TYPES[kind]
    return found


OPTIONS = _read()
"""Name -> type in the op's schema, in the order of the arguments."""
TENSORS = tuple(name for name, kind in OPTIONS.items() if kind == "Tensor?")
FLOATS = tuple(name for name, kind in OPTIONS.items() if kind == "float")
NUMBERS = tuple(name for name, kind in OPTIONS.items() if kind != "Tensor?")
