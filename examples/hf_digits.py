"""Hugging Face's Trainer with the last mini-batch. What changed against the usual script:

1. `LastBatchTrainer(..., criterion=LastBatchLoss(10))` in place of `Trainer(...)`: its batches, loss and checkpoints,
2. twice the steps per epoch: `per_device_train_batch_size` counts the rows the model sees, half of them repeated.

Model, dataset, collator and arguments are the usual ones, gradient accumulation included. Evaluation is plain cross
entropy. The run is resumed from a checkpoint made in the middle of an epoch; the weights end bit-identical.
"""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments, set_seed
from transformers.utils import logging

from dlb_fast import LastBatchLoss
from dlb_fast.data import digits
from dlb_fast.integrations.hf import LastBatchTrainer


class Digits(Dataset):
    def __init__(self, split: str) -> None:
        self.images = digits(split)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        image, label = self.images[index]
        return {"pixel_values": image.float() / 255, "labels": label}


def accuracy(prediction: object) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def train(folder: str, resume_from_checkpoint: str | None = None) -> LastBatchTrainer:
    set_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )
    arguments = TrainingArguments(
        folder,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=4,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        save_steps=15,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
    )
    trainer = LastBatchTrainer(  # changed
        model,
        arguments,
        train_dataset=Digits("train"),
        eval_dataset=Digits("test"),
        compute_metrics=accuracy,
        criterion=LastBatchLoss(num_classes=10),  # changed
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        whole = train(first)
        resumed = train(second, resume_from_checkpoint=f"{first}/checkpoint-15")
        share = whole.evaluate()["eval_accuracy"]
    ends = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in ends)
    print(f"test accuracy {share:.3f}; stopped and resumed: {'bit-identical' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
