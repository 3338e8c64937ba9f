"""A teacher's memory in checkpoints of other makers."""

from __future__ import annotations

import pytest
import torch

from dlb_fast import LsrKDLoss, PsKDLoss


def test_a_teacher_without_memory_saves_as_tensors_and_loads_from_weights_saved_without_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), LsrKDLoss())
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    model.load_state_dict(safetensors.load_file(tmp_path / "a.safetensors"))
    model.load_state_dict({f"0.{name}": value for name, value in model[0].state_dict().items()})
    model.load_state_dict({**model[0].state_dict(prefix="0."), "1._extra_state": {}})  # as saved until now
    with pytest.raises(RuntimeError, match="_extra_state"):
        PsKDLoss(4, 3).load_state_dict({})
