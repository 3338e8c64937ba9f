"""Every example runs, stops, resumes and proves it. Each in a process of its own, as a user would start it."""

from __future__ import annotations

import re

import pytest
from builders import ROOT, python
from frameworks import reason_against

pytestmark = pytest.mark.slow
NEEDS = {
    "plain_loop": "torch",
    "lightning_digits": "lightning.pytorch",
    "accelerate_digits": "accelerate",
    "hf_digits": "transformers",
    "timm_digits": "timm.task",
}


def test_every_example_is_known():
    others = {"ray_train"}  # tests/test_distributed_ray.py
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS) | others


@pytest.mark.parametrize("name", NEEDS)
def test_example(name):
    if reason := reason_against(NEEDS[name]) or reason_against("sklearn"):  # the digits are scikit-learn's
        pytest.skip(reason)
    said = python(f"examples/{name}.py").stdout
    accuracy = re.search(r"test accuracy (0\.\d+); stopped and resumed: bit-identical", said)
    assert accuracy is not None, said
    assert float(accuracy.group(1)) > 0.9, said


def test_accelerate_example_on_two_ranks():
    if reason := reason_against("accelerate"):
        pytest.skip(reason)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "stopped and resumed: bit-identical" in python(*launch, "examples/accelerate_digits.py").stdout
