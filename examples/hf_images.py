"""Hugging Face's Trainer on a folder of images: python hf_images.py --data DATA [--num_train_epochs 20] [--resume]

DATA has train/CLASS/IMAGE and val/CLASS/IMAGE. Options of TrainingArguments work as always. What differs from a plain
script is marked `# dlb`. Two processes: `torchrun --nproc-per-node 2 hf_images.py --data DATA`.
"""

from dataclasses import dataclass, field

import torch
from torchvision import datasets, transforms
from transformers import AutoModelForImageClassification, HfArgumentParser, ResNetConfig, TrainingArguments, set_seed

from dlb_fast import LastBatchLoss
from dlb_fast.integrations.hf import LastBatchTrainer


@dataclass
class Arguments:
    data: str
    size: int = 224
    model: str = field(
        default="", metadata={"help": "a name of the hub, such as microsoft/resnet-18; else random weights"}
    )
    resume: bool = False


def folders(data, size):
    last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = [transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.ColorJitter(0.2, 0.2)]
    resize = [transforms.Resize(size), transforms.CenterCrop(size)]
    train = datasets.ImageFolder(f"{data}/train", transforms.Compose(augment + last))
    return train, datasets.ImageFolder(f"{data}/val", transforms.Compose(resize + last))


def collate(items):
    images, labels = zip(*items, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="output/hf",
        num_train_epochs=20,  # each shows every image twice
        per_device_train_batch_size=64,  # rows per process, half of them repeated
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
    )
    own, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    train, val = folders(own.data, own.size)
    labels = dict(enumerate(train.classes))
    if own.model:
        model = AutoModelForImageClassification.from_pretrained(
            own.model, num_labels=len(labels), id2label=labels, ignore_mismatched_sizes=True
        )
    else:
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", id2label=labels
        )
        model = AutoModelForImageClassification.from_config(config)
    trainer = LastBatchTrainer(  # dlb: Trainer; it makes batches whose rows repeat from train_dataset
        model,
        args,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collate,
        compute_metrics=accuracy,
        criterion=LastBatchLoss(len(labels)),  # dlb
    )
    trainer.train(resume_from_checkpoint=own.resume)
    share = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()  # the model alone: AutoModelForImageClassification.from_pretrained(args.output_dir)
    rows = trainer.accelerator.reduce(trainer.criterion.buffer.taught, "sum")
    if trainer.is_world_process_zero():
        print(f"val accuracy {share:.3f}; rows with a teacher: {int(rows)}")


if __name__ == "__main__":
    main()
