"""Your own loop with the last mini-batch. What changed against the usual one:

1. the loader: `ResidentLoader` (for files `OverlapLoader`, or a DataLoader with an `OverlapBatchSampler`) yields
   batches `[repeated | new]`,
2. the criterion: `LastBatchLoss` in place of `nn.CrossEntropyLoss`; it also takes the sample ids,
3. the state of both in the checkpoint.

The run is stopped in the middle of an epoch and resumed in new objects; the weights end bit-identical.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import EvalLoader, ResidentLoader, digits

EPOCHS = 4


def train(folder: Path, stop_after: int | None = None, resume: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 16, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = ResidentLoader(digits("train"), batch_size=64)  # changed
    criterion = LastBatchLoss(num_classes=10)  # changed
    if resume:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        criterion.load_state_dict(saved["criterion"])
        loader.load_state_dict(saved["loader"])
        torch.set_rng_state(saved["rng"])
    steps = 0
    while loader.epoch < EPOCHS:
        for batch in loader:
            loss = criterion(model(batch.images), batch.targets, batch.ids)  # changed
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if steps == stop_after:
                parts = {"model": model, "optimizer": optimizer, "criterion": criterion, "loader": loader}
                saved = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**saved, "rng": torch.get_rng_state()}, folder / "checkpoint.pt")
                return model
    return model


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.inference_mode():
        right = sum((model(b.images).argmax(1) == b.targets).sum().item() for b in EvalLoader(digits("test"), 256))
    return right / len(digits("test"))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        whole = train(Path(name))
        train(Path(name), stop_after=61)
        resumed = train(Path(name), resume=True)
    ends = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in ends)
    print(f"test accuracy {accuracy(whole):.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
