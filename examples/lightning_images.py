"""Lightning on a folder of images: python lightning_images.py DATA [--epochs 20] [--resume]

DATA has train/CLASS/IMAGE and val/CLASS/IMAGE. What differs from a plain module is marked `# dlb`.
"""

import argparse

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapLoader
from dlb_fast.integrations.lightning import LastBatchCallback


class Images(pl.LightningDataModule):
    def __init__(self, data, size, batch_size):
        super().__init__()
        self.batch_size = batch_size
        last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        augment = [transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.ColorJitter(0.2, 0.2)]
        resize = [transforms.Resize(size), transforms.CenterCrop(size)]
        self.train = datasets.ImageFolder(f"{data}/train", transforms.Compose(augment + last))
        self.val = datasets.ImageFolder(f"{data}/val", transforms.Compose(resize + last))

    def train_dataloader(self):
        return OverlapLoader(self.train, self.batch_size)  # dlb: half of the rows repeat; it knows its rank

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)


class Classifier(pl.LightningModule):
    def __init__(self, num_classes, lr):
        super().__init__()
        self.save_hyperparameters()
        self.model = models.resnet18(num_classes=num_classes)
        self.criterion = LastBatchLoss(num_classes)  # dlb

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self.model(batch.images), batch.targets, batch.ids)  # dlb: the ids too
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):  # Lightning has called eval(): plain cross entropy
        images, labels = batch
        logits = self.model(images)
        self.log("val_loss", self.criterion(logits, labels), sync_dist=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=20, help="each shows every image twice")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per process, half of them repeated")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, 16-mixed")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--output", default="output/lightning")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of --output")
    args = parser.parse_args()
    pl.seed_everything(0)
    images = Images(args.data, args.size, args.batch_size)
    module = Classifier(len(images.train.classes), args.lr)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        log_every_n_steps=5,
        logger=pl.loggers.CSVLogger(args.output),
        callbacks=[
            pl.callbacks.ModelCheckpoint(args.output, monitor="val_accuracy", mode="max", save_last=True),
            LastBatchCallback(),  # dlb: checkpoints hold the criterion and the position in the data
        ],
    )
    trainer.fit(module, images, ckpt_path="last" if args.resume else None)
    rows = trainer.strategy.reduce(module.criterion.buffer.taught, reduce_op="sum")
    if trainer.is_global_zero:
        print(f"val accuracy {trainer.callback_metrics['val_accuracy']:.3f}; rows with a teacher: {int(rows)}")


if __name__ == "__main__":
    main()
