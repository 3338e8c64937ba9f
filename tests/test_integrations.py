"""What the integrations share: state over ranks, refusals, and imports of frameworks that are missing or broken."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from builders import python
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapBatchSampler, OverlapLoader, ResidentLoader, synthetic
from dlb_fast.integrations._need import need
from dlb_fast.integrations.state import LastBatchState, check_ranks, stream_of

FRAMEWORKS = {
    "lightning": ("lightning.pytorch", "dlb_fast[lightning]"),
    "accelerate": ("accelerate", "dlb_fast[hf]"),
    "hf": ("transformers", "dlb_fast[hf]"),
    "timm": ("timm.task", "dlb_fast[timm]"),
}


def loader(rank=0, world_size=1, batch_size=8):
    data = synthetic("train", length=40, num_classes=4, size=8)
    return ResidentLoader(data, batch_size, rank=rank, world_size=world_size)


def steps(net, criterion, batches, count):
    for _, batch in zip(range(count), batches, strict=False):
        criterion(net(batch.images.flatten(1)), batch.targets, batch.ids)


def test_state_survives_the_disk_and_continues():
    net, first, source = nn.Linear(192, 4), LastBatchLoss(4), loader()
    steps(net, first, source, 4)
    file = io.BytesIO()
    torch.save(LastBatchState(first, source).state_dict(), file)
    file.seek(0)
    second, other = LastBatchLoss(4), loader()
    LastBatchState(second, other).load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second.buffer.logits, first.buffer.logits)
    batch = next(iter(other))
    assert (batch.epoch, batch.step) == (0, 4) and torch.equal(batch.ids[:4], second.buffer.ids)


def test_state_of_another_kind_or_number_of_ranks():
    criterion, source = LastBatchLoss(4), loader()
    steps(nn.Linear(192, 4), criterion, source, 2)
    state = LastBatchState(criterion, source).state_dict()
    fresh, other = LastBatchLoss(4), loader()
    with pytest.warns(UserWarning, match="saved by 2 ranks, loaded on 1; .* starts empty"):
        LastBatchState(fresh, other).load_state_dict({**state, "criteria": state["criteria"] * 2})
    assert fresh.buffer is None and other.state_dict()["step"] == 2
    for wrong, said in (({}, "got None"), ({**state, "version": 9}, "got 9"), ([1], "got 'list'")):
        with pytest.raises(ValueError, match=f"expected version 1, {said}"):
            LastBatchState(fresh, other).load_state_dict(wrong)


def test_loaders_without_a_state_or_a_plan_are_refused():
    data = TensorDataset(torch.arange(40))
    torch_loader = DataLoader(data, batch_sampler=OverlapBatchSampler(40, 8))
    with pytest.raises(TypeError, match=r"got DataLoader, which draws batches ahead .*StatefulDataLoader\(dataset"):
        LastBatchState(LastBatchLoss(4), torch_loader)
    with pytest.raises(TypeError, match="expected a loader with a state, got list; use a loader of dlb_fast.data"):
        LastBatchState(LastBatchLoss(4), [1])
    assert stream_of(torch_loader) is torch_loader.batch_sampler
    with pytest.raises(TypeError, match="expected a loader of dlb_fast.data, .* got list; without repeated rows"):
        stream_of([1])
    with pytest.raises(TypeError, match="got DataLoader with batch_sampler BatchSampler"):
        stream_of(DataLoader(data))
    check_ranks(loader(1, 2, 4), 1, 2)
    with pytest.raises(ValueError, match=r"ResidentLoader was made as rank 0 of 1, but this process is rank 1 of 2"):
        check_ranks(loader(), 1, 2)


def save_and_load_on_rank(folder):
    rank = dist.get_rank()
    torch.manual_seed(rank)
    criterion, source = LastBatchLoss(4), loader(rank, 2)
    steps(nn.Linear(192, 4), criterion, source, 3)
    state = LastBatchState(criterion, source).state_dict()
    assert len(state["criteria"]) == 2
    if rank == 0:  # as Accelerate and Lightning do
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    other, again = LastBatchLoss(4), loader(rank, 2)
    LastBatchState(other, again).load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
    assert torch.equal(other.buffer.logits, criterion.buffer.logits)
    assert torch.equal(other.buffer.ids, criterion.buffer.ids)
    batch = next(iter(again))
    assert torch.equal(batch.ids[: batch.num_old], other.buffer.ids)


def test_every_rank_gets_its_own_rows_back(tmp_path, process_group):
    process_group(save_and_load_on_rank, str(tmp_path))


def test_batches_travel():
    """What frameworks do to a batch: move it, pickle it, copy it."""
    batch = next(iter(loader()))
    for twin in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert torch.equal(twin.images, batch.images) and twin.num_old == batch.num_old
    with OverlapLoader(synthetic("train", length=40, num_classes=4, size=8), 8, num_threads=1) as threads:
        assert len(threads) == 10 and threads.sampler is threads


def test_averaged_copies_of_a_module_with_a_criterion():
    """`AveragedModel` (Lightning's WeightAveraging, torch's EMA) deep-copies what it averages."""
    module = nn.ModuleDict({"net": nn.Linear(192, 4), "criterion": LastBatchLoss(4)})
    steps(module["net"], module["criterion"], loader(), 2)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    assert averaged.module["criterion"].buffer is not module["criterion"].buffer


class Missing:
    """A finder by which a package is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_said_in_one_sentence(name, monkeypatch):
    module, install = FRAMEWORKS[name]
    framework = module.partition(".")[0]
    for loaded in [m for m in sys.modules if m.partition(".")[0] == framework]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Missing(framework), *sys.meta_path])
    monkeypatch.delitem(sys.modules, f"dlb_fast.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"dlb_fast.integrations: {framework} is not installed; ") as raised:
        integration = importlib.import_module(f"dlb_fast.integrations.{name}")
        integration.register_last_batch(None, None, None)  # Accelerate is imported by the call
    assert install in str(raised.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import a_dependency_that_is_missing", "ModuleNotFoundError: No module named 'a_dependency_that_is_missing'"),
        ("raise ImportError('libcudart.so.13')", "ImportError: libcudart.so.13"),
    ],
)
def test_a_broken_framework_is_a_sentence_too(tmp_path, monkeypatch, source, said):
    (tmp_path / "a_broken_framework.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="a_broken_framework is installed but its import fails") as raised:
        need("a_broken_framework", "pip install it")
    assert said in str(raised.value) and "reinstall it (pip install it)" in str(raised.value)
    reason = reason_against("a_broken_framework")
    assert "RuntimeError" in reason or "cannot be imported" in reason
    reason_against.cache_clear()


def test_a_part_of_a_framework_that_is_missing():
    with pytest.raises(ImportError, match=r"json has no json\.nonsense; newer"):
        need("json.nonsense", "newer")


def test_importing_the_package_needs_no_framework():
    code = "import sys, dlb_fast, dlb_fast.data, dlb_fast.integrations, dlb_fast.integrations.state; " + "; ".join(
        f"assert {module.partition('.')[0]!r} not in sys.modules" for module, _ in FRAMEWORKS.values()
    )
    python("-c", code)
