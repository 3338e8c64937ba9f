"""Accelerate on a folder of images: python accelerate_images.py DATA [--epochs 20] [--resume]

DATA has train/CLASS/IMAGE and val/CLASS/IMAGE. What differs from a plain loop is marked `# dlb`. Two processes:
`accelerate launch --multi_gpu --num_processes 2 accelerate_images.py DATA` on two GPUs; without a GPU
`ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 accelerate_images.py DATA`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapLoader
from dlb_fast.integrations.accelerate import register_last_batch


def folders(data, size):
    last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = [transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.ColorJitter(0.2, 0.2)]
    resize = [transforms.Resize(size), transforms.CenterCrop(size)]
    train = datasets.ImageFolder(f"{data}/train", transforms.Compose(augment + last))
    return train, datasets.ImageFolder(f"{data}/val", transforms.Compose(resize + last))


def accuracy(accelerator, model, loader):
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for images, labels in loader:
            found, labels = accelerator.gather_for_metrics((model(images).argmax(1), labels))
            right, seen = right + (found == labels).sum().item(), seen + len(labels)
    model.train()
    return right / seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=20, help="each shows every image twice")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per process, half of them repeated")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=4, help="that read and augment images")
    parser.add_argument("--mixed-precision", help="bf16, fp16; None takes what accelerate config says")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--output", type=Path, default="output/accelerate")
    parser.add_argument("--resume", action="store_true", help="continue from the last epoch that --output has")
    args = parser.parse_args()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulate,
        step_scheduler_with_optimizer=False,
    )
    accelerator.print(f"processes: {accelerator.num_processes}")
    set_seed(0)
    train, val = folders(args.data, args.size)
    model = models.resnet18(num_classes=len(train.classes))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    criterion = LastBatchLoss(len(train.classes))  # dlb
    # dlb: after Accelerator(), because the loader asks for its rank; not given to prepare, which would shard it again
    loader = OverlapLoader(train, args.batch_size, device=accelerator.device, num_threads=args.threads)
    register_last_batch(accelerator, criterion, loader)  # dlb: save_state and load_state save and load both
    model, optimizer, scheduler, val_loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(val, args.batch_size)
    )
    if args.resume:
        accelerator.load_state(args.output)
    for epoch in range(loader.epoch, args.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(batch.images), batch.targets, batch.ids)  # dlb: the ids too
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        accelerator.save_state(args.output)
        share = accuracy(accelerator, model, val_loader)
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, val accuracy {share:.3f}")
    rows = accelerator.reduce(criterion.buffer.taught, "sum")
    accelerator.print(f"val accuracy {share:.3f}; rows with a teacher: {int(rows)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
