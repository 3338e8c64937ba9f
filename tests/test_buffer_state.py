"""The criterion's memory inside a `state_dict()`: what savers and loaders of all kinds do with it."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from test_buffer import overlapping

from dlb_fast import LastBatchLoss


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)


def test_the_packed_state_is_one_tensor_that_can_be_damaged(generator):
    """safetensors and other savers of tensors write it; bytes that cannot be read are dropped with a warning."""
    batches = overlapping(generator, [4, 4])
    saved = LastBatchLoss(6, impl="torch")
    assert saved.state_dict()["_extra_state"].numel() == 0
    saved(*batches[0])
    state = saved.state_dict()
    packed = state["_extra_state"]
    assert packed.dtype == torch.uint8 and packed.dim() == 1 and torch.equal(packed, saved.get_extra_state())
    back = safetensors.torch.load(safetensors.torch.save(state))
    other = LastBatchLoss(6, impl="torch")
    other.load_state_dict(back)
    assert torch.equal(other.buffer.logits, batches[0][0]) and torch.equal(other.buffer.ids, batches[0][2])
    for damaged in (packed[:-200], torch.zeros_like(packed)):
        with pytest.warns(UserWarning, match="the saved buffer does not fit"):
            other.load_state_dict({"_extra_state": damaged})
        assert other.buffer is None


def test_weights_saved_without_a_criterion_load_strictly(generator):
    both = torch.nn.ModuleDict({"net": torch.nn.Linear(3, 6), "criterion": LastBatchLoss(6, impl="torch")})
    both["criterion"](*overlapping(generator, [4])[0])
    weights = {name: value for name, value in both.state_dict().items() if name.startswith("net.")}
    with pytest.warns(UserWarning, match="the checkpoint has no 'criterion._extra_state'; the buffer starts empty"):
        both.load_state_dict(weights)
    assert both["criterion"].buffer.count == 0
    with pytest.raises(RuntimeError, match='Missing key.*"net.bias"'), pytest.warns(UserWarning, match="no 'crit"):
        both.load_state_dict({"net.weight": weights["net.weight"]})


def test_a_state_from_before_the_first_batch_chooses_no_dtype(generator):
    """It holds no logits; float64 ones would else be taught by their float32 roundings."""
    fresh, criterion = (LastBatchLoss(6, capacity=4, impl="torch") for _ in range(2))
    criterion.load_state_dict(fresh.state_dict())
    logits = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    criterion(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(criterion.buffer.logits, logits)
