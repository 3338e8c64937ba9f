"""A Composer (MosaicML) Trainer with the last mini-batch. What changed against the usual script:

1. the loader: a DataLoader with `batch_sampler=OverlapBatchSampler(...)`,
2. the algorithm: `algorithms=[LastBatch(LastBatchLoss(10), ids_key=2)]`; the model keeps its own cross entropy,
3. `device_train_microbatch_size=64`, the rows of a batch: a micro-batch would not hold both halves.

The run is resumed from a checkpoint made in the middle of an epoch; the weights end bit-identical.
"""

import logging
import tempfile
import warnings

import torch
from composer import Trainer
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapBatchSampler, digits
from dlb_fast.integrations.composer import LastBatch


class Digits(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def train(folder: str, load_path: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model, images = Digits(), digits("train")
    data = TensorDataset(images.images / 255, images.targets, torch.arange(len(images)))  # the last column: sample ids
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_sampler=OverlapBatchSampler(data, 64)),  # changed
        algorithms=[LastBatch(LastBatchLoss(num_classes=10), ids_key=2)],  # changed
        device_train_microbatch_size=64,  # changed
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        max_duration="4ep",
        save_folder=folder,
        save_interval="50ba",
        save_filename="batch{batch}.pt",
        save_latest_filename=None,
        load_path=load_path,
        device="cpu",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    return model.net


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole = train(first)
        resumed = train(second, load_path=f"{first}/batch50.pt")
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    test = digits("test")
    share = (whole.eval()(test.images / 255).argmax(1) == test.targets).float().mean().item()
    print(f"test accuracy {share:.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
