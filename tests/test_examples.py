"""Every example runs, stops, resumes and proves it. Each in a process of its own, as a user would start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import reason_against

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
NEEDS = {
    "plain_loop": "torch",
    "lightning_digits": "lightning.pytorch",
    "accelerate_digits": "accelerate",
    "hf_digits": "transformers",
    "timm_digits": "timm.task",
}


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_is_known():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    if reason := reason_against(NEEDS[name]) or reason_against("sklearn"):  # the digits are scikit-learn's
        pytest.skip(reason)
    said = run(f"examples/{name}.py")
    accuracy = re.search(r"test accuracy (0\.\d+); stopped and resumed: bit-identical", said)
    assert accuracy is not None, said
    assert float(accuracy.group(1)) > 0.9, said


def test_accelerate_example_on_two_ranks():
    if reason := reason_against("accelerate"):
        pytest.skip(reason)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "stopped and resumed: bit-identical" in run(*launch, "examples/accelerate_digits.py")
