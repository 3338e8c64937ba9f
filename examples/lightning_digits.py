"""A Lightning Trainer with the last mini-batch. What changed against the usual module:

1. the loader: any of `dlb_fast.data`, made in `train_dataloader()`,
2. the criterion: `self.criterion = LastBatchLoss(10)`, which also takes the sample ids,
3. `LastBatchCallback()` in the Trainer: it saves and loads the state of the criterion and of the loader,
   and logs both terms of the loss.

Validation is plain cross entropy: Lightning puts the module in eval mode, and the criterion with it. The run is resumed
from a checkpoint made in the middle of an epoch; the weights end bit-identical.
"""

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
from torch import nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import EvalLoader, OverlapLoader, digits
from dlb_fast.integrations.lightning import LastBatchCallback


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
        self.criterion = LastBatchLoss(num_classes=10)  # changed

    def train_dataloader(self):
        return OverlapLoader(digits("train"), batch_size=64, num_threads=1)  # changed

    def val_dataloader(self):
        return EvalLoader(digits("test"), 256)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch.images), batch.targets, batch.ids)  # changed

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch.images)
        self.log("val_loss", self.criterion(logits, batch.targets), batch_size=len(batch))
        self.log("accuracy", (logits.argmax(1) == batch.targets).float().mean(), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(folder: str, ckpt_path: str | None = None) -> tuple[Digits, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module = Digits()
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            LastBatchCallback(),  # changed
            pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=50, save_top_k=-1),
        ],
        # With several ranks: use_distributed_sampler=False where the loader is a DataLoader; ours are left alone.
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    with tempfile.TemporaryDirectory() as folder:
        whole, trainer = fit(folder)
        resumed, _ = fit(folder, ckpt_path=f"{folder}/step=50.ckpt")
    ends = zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in ends)
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"test accuracy {accuracy:.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
