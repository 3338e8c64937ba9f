"""An Accelerate loop with the last mini-batch. What changed against the usual one:

1. the loader: `OverlapBatchSampler` in torchdata's `StatefulDataLoader`, made after `Accelerator()`, because the
   sampler asks for its rank, and not given to `prepare`; `ResidentLoader(..., device=accelerator.device)` works too,
2. the criterion: `LastBatchLoss`, which also takes the sample ids,
3. `register_last_batch(...)`: `save_state` and `load_state` then store both, for every rank.

Run it in one process, or in several: `accelerate launch --cpu --num_processes 2 examples/accelerate_digits.py`. It is
stopped in the middle of an epoch and resumed in new objects; the weights end bit-identical.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from dlb_fast import LastBatchLoss
from dlb_fast.data import EvalLoader, IndexedDataset, OverlapBatchSampler, collate_overlap, digits
from dlb_fast.integrations.accelerate import register_last_batch

EPOCHS = 4


def as_float(image: torch.Tensor, rng: object) -> torch.Tensor:
    return image.float() / 255  # an augmentation draws from rng, which is seeded by sample, epoch and view


def train(folder: str, stop_after: int | None = None, resume: bool = False) -> tuple[Accelerator, nn.Module]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = IndexedDataset(digits("train"), as_float)
    sampler = OverlapBatchSampler(data, 64)  # changed
    # Without a generator of its own the loader draws a seed where the dropout draws, also once more after a resume.
    loader = StatefulDataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=collate_overlap,
        generator=torch.Generator(),  # changed
    )
    criterion = LastBatchLoss(num_classes=10)  # changed
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = register_last_batch(accelerator, criterion, loader)  # changed
    if resume:
        accelerator.load_state(folder)
    steps = 0
    while sampler.epoch < EPOCHS:
        for batch in loader:
            loss = criterion(model(batch.images), batch.targets, batch.ids)  # changed
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps == stop_after:
                accelerator.save_state(folder)
                return accelerator, model
    return accelerator, model


def accuracy(accelerator: Accelerator, model: nn.Module) -> float:
    model.eval()
    right = torch.zeros((), device=accelerator.device)
    with torch.no_grad():
        for batch in EvalLoader(digits("test"), 256, device=accelerator.device):  # a rank's share, without padding
            right += (accelerator.unwrap_model(model)(batch.images).argmax(1) == batch.targets).sum()
    return accelerator.reduce(right).item() / len(digits("test"))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        Accelerator(cpu=not torch.cuda.is_available())  # starts the process group
        folder = broadcast_object_list([own])[0]
        accelerator, whole = train(folder)
        train(folder, stop_after=33)
        _, resumed = train(folder, resume=True)
        accelerator.wait_for_everyone()
    ends = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in ends)
    share = accuracy(accelerator, whole)
    accelerator.print(f"test accuracy {share:.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)
    accelerator.end_training()  # destroys the process group


if __name__ == "__main__":
    main()
