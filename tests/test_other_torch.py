"""The library built beside one torch, unchanged, under others: the tests of the losses in other interpreters.

``DLB_FAST_TORCH_PYTHONS`` names the interpreters (separated as in PATH), each with another torch >= 2.10 and pytest:

    python -m venv v && v/bin/pip install torch==2.14.1 numpy pytest hypothesis
    DLB_FAST_TORCH_PYTHONS=v/bin/python python -m pytest tests/test_other_torch.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from dlb_fast import _backends

ROOT = Path(__file__).parent.parent
PYTHONS = [path for path in os.environ.get("DLB_FAST_TORCH_PYTHONS", "").split(os.pathsep) if path]
FILES = ("test_last_batch", "test_last_batch_edges", "test_ops_contract", "test_reference", "test_buffer")
FILES += ("test_criterion_calls", "test_autograd")


@pytest.mark.slow
@pytest.mark.skipif(bool(_backends.load_library()), reason=_backends.load_library() or "built")
@pytest.mark.parametrize("python", PYTHONS or [pytest.param("", marks=pytest.mark.skip("no other torch is named"))])
def test_the_built_library_under_another_torch(python):
    """Triton is left out: every torch brings its own, and none of it is in the library."""
    code = "import torch; from dlb_fast import _backends; assert not _backends.load_library(); print(torch.__version__)"
    known = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert known.returncode == 0, known.stderr
    assert known.stdout.strip() != torch.__version__
    files = [f"tests/{name}.py" for name in FILES]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"torch {known.stdout}{done.stdout[-4000:]}{done.stderr[-2000:]}"
