"""register_last_batch with a real Accelerator: save_state in the middle of an epoch, load_state, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from frameworks import reason_against
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dlb_fast import LastBatchLoss
from dlb_fast.data import (
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    collate_overlap,
    synthetic,
)

if REASON := reason_against("accelerate"):
    pytest.skip(REASON, allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

from accelerate import Accelerator, skip_first_batches  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, send_to_device, set_seed  # noqa: E402

from dlb_fast.integrations.accelerate import register_last_batch  # noqa: E402

DATA = synthetic("train", length=56, num_classes=4, size=8)
EPOCHS, STEPS = 3, 7


def torch_loader(workers=0, kind=StatefulDataLoader):
    data = IndexedDataset(DATA, lambda image, rng: image.float() / 255)
    sampler = OverlapBatchSampler(data, 16)
    # without a generator of its own a DataLoader draws the seed of its workers where the dropout draws
    options = {"num_workers": workers, "generator": torch.Generator()}
    return kind(data, batch_sampler=sampler, collate_fn=collate_overlap, **options)


LOADERS = {
    "resident": lambda: ResidentLoader(DATA, 16),
    "overlap": lambda: OverlapLoader(DATA, 16, num_threads=1),
    "DataLoader": torch_loader,
    "DataLoader with workers": lambda: torch_loader(2),
}


def run(folder, kind, *, save_after, resume=False, register=register_last_batch, accumulate=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net, optimizer = accelerator.prepare(net, optimizer)
    criterion = LastBatchLoss(4)
    loader = register(accelerator, criterion, LOADERS[kind]())
    if resume:
        accelerator.load_state(folder)
    steps, total = 0, EPOCHS * STEPS - (save_after if resume else 0)
    while steps < total:
        for batch in loader:
            with accelerator.accumulate(net):
                batch = send_to_device(batch, accelerator.device)
                accelerator.backward(criterion(net(batch.images), batch.targets, batch.ids))
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            if steps == save_after and not resume:
                accelerator.save_state(folder)
    assert criterion.buffer.mismatched == 0
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("save_after", [7, 11])
def test_resume_is_bit_identical(tmp_path, kind, save_after):
    whole = run(tmp_path, kind, save_after=save_after)
    assert torch.equal(run(tmp_path, kind, save_after=save_after, resume=True), whole)


def test_accumulation_is_continued_where_it_was(tmp_path):
    whole = run(tmp_path, "DataLoader", save_after=4, accumulate=2)
    assert torch.equal(run(tmp_path, "DataLoader", save_after=4, resume=True, accumulate=2), whole)


def test_registering_criterion_and_loader_alone_does_for_one_process(tmp_path):
    def register(accelerator, criterion, loader):
        accelerator.register_for_checkpointing(criterion, loader)
        return accelerator.prepare(loader)  # leaves our loaders as they are

    whole = run(tmp_path, "overlap", save_after=11, register=register)
    assert torch.equal(run(tmp_path, "overlap", save_after=11, resume=True, register=register), whole)


def test_a_prepared_criterion_is_saved_as_a_model_is(tmp_path):
    """safetensors takes tensors only, and the memory is one."""
    accelerator = Accelerator(cpu=True)
    criterion = accelerator.prepare(LastBatchLoss(4))
    criterion(torch.randn(4, 4), torch.arange(4), torch.arange(4))
    accelerator.save_state(tmp_path)
    kept = criterion.buffer.logits.clone()
    criterion.reset()
    accelerator.load_state(tmp_path)
    assert torch.equal(criterion.buffer.logits, kept)


def by_hand(batches, net, accumulate):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stored = None
    for number, batch in enumerate(batches):
        z = net(batch.images.double())
        loss = F.cross_entropy(z, batch.targets)
        if stored is not None:
            teacher, student = F.softmax(stored / 3, 1), F.log_softmax(z[: len(stored)] / 3, 1)
            loss = loss + 9 * F.kl_div(student, teacher, reduction="batchmean")
        stored = z[batch.num_old :].detach()
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:  # Accelerate counts on across epochs of a loader it has not prepared
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split_batches": True},
        {"even_batches": False},
        {"dispatch_batches": True},
        {"use_stateful_dataloader": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_are_those_of_a_plain_loop(options, accumulate):
    config = DataLoaderConfiguration(**options)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=config)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).double()
    plain = copy.deepcopy(net)
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    criterion = LastBatchLoss(4)
    loader = register_last_batch(accelerator, criterion, torch_loader())
    kept = []
    for _ in range(EPOCHS):
        for batch in loader:
            kept.append(batch)
            with accelerator.accumulate(net):
                accelerator.backward(criterion(net(batch.images.double()), batch.targets, batch.ids))
                optimizer.step()
                optimizer.zero_grad()
    got = torch.cat([value.flatten() for value in net.state_dict().values()])
    assert (got - by_hand(kept, plain, accumulate)).abs().max() < 1e-12
    assert criterion.buffer.mismatched == 0 and len(kept) == EPOCHS * STEPS


def test_skipped_batches_teach_nothing_and_shift_nothing():
    loader = skip_first_batches(torch_loader(), 3)
    criterion = LastBatchLoss(4)
    steps = []
    for batch in loader:
        steps.append(batch.step)
        criterion(torch.randn(len(batch), 4, requires_grad=True), batch.targets, batch.ids)
    assert steps == [3, 4, 5, 6]
    assert criterion.buffer.taught == 3 * 8 and criterion.buffer.mismatched == 0


def test_a_loader_prepared_after_it_was_registered_is_not_saved(tmp_path):
    """Its copy would be trained on, and the position of the registered one saved: step 0 for ever."""
    for register_first in (True, False):
        accelerator, loader = Accelerator(cpu=True), torch_loader()
        if register_first:
            register_last_batch(accelerator, LastBatchLoss(4), loader)
        accelerator.prepare(loader)
        with pytest.raises(TypeError, match="went through accelerator.prepare"):
            if register_first:
                accelerator.save_state(tmp_path)
            else:
                register_last_batch(accelerator, LastBatchLoss(4), loader)


def test_refusals():
    accelerator, criterion = Accelerator(cpu=True), LastBatchLoss(4)
    with pytest.raises(TypeError, match="went through accelerator.prepare"):
        register_last_batch(accelerator, criterion, accelerator.prepare(torch_loader(kind=DataLoader)))
    with pytest.raises(TypeError, match="expected a loader of dlb_fast.data, or a DataLoader with batch_sampler"):
        register_last_batch(accelerator, criterion, DataLoader(DATA))
    with pytest.raises(TypeError, match=r"got DataLoader, which draws batches ahead .*StatefulDataLoader"):
        register_last_batch(accelerator, criterion, torch_loader(kind=DataLoader))
    with pytest.raises(ValueError, match="made as rank 1 of 2, but this process is rank 0 of 1"):
        register_last_batch(accelerator, criterion, ResidentLoader(DATA, 16, rank=1, world_size=2))
    with pytest.raises(ValueError, match=r"makes batches on meta, the model is on cpu"):
        loader = ResidentLoader(DATA, 16)
        loader.device = torch.device("meta")
        register_last_batch(accelerator, criterion, loader)
    with pytest.raises(TypeError, match="expected an accelerate.Accelerator, got str"):
        register_last_batch("cpu", criterion, LOADERS["resident"]())


def test_an_accelerator_that_does_not_know_its_ranks(monkeypatch):
    """Under torchrun without a GPU and without cpu=True, Accelerate joins the process group and trains alone."""
    monkeypatch.setitem(register_last_batch.__globals__, "rank_and_size", lambda: (1, 2))  # of a module imported once
    with pytest.raises(ValueError, match="has 2 ranks, but this Accelerator .* alone.* set ACCELERATE_USE_CPU=true"):
        register_last_batch(Accelerator(cpu=True), LastBatchLoss(4), LOADERS["resident"]())


def test_a_prepared_loader_cannot_undo_a_resume():
    """What happens to those who prepare the DataLoader all the same: an error instead of the first epoch again."""
    loader = torch_loader(kind=DataLoader)
    loader.batch_sampler.load_state_dict({**loader.batch_sampler.state_dict(), "epoch": 2, "step": 3})
    with pytest.raises(ValueError, match=r"epoch 0 would undo the state that was just loaded \(epoch 2, step 3\)"):
        next(iter(Accelerator(cpu=True).prepare(loader)))
