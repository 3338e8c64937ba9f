"""A loop around timm on a folder of images: python timm_images.py DATA [--epochs 20] [--resume]

DATA has train/CLASS/IMAGE and val/CLASS/IMAGE. What differs from a plain loop is marked `# dlb`. timm's own train.py
needs no loop: `python -m dlb_fast.integrations.timm train.py DATA ...`.
"""

import argparse
import os

import timm
import torch
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver, setup_default_logging
from torchvision.datasets import ImageFolder

from dlb_fast import LastBatchLoss
from dlb_fast.data import OverlapLoader
from dlb_fast.integrations.timm import LastBatchTask


def accuracy(model, loader):
    model.eval()
    right = seen = 0
    with torch.inference_mode():
        for images, labels in loader:
            right += (model(images).argmax(1) == labels).sum().item()
            seen += len(labels)
    return right / seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=20, help="each shows every image twice")
    parser.add_argument("--batch-size", type=int, default=64, help="rows, half of them repeated")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--aa", default="rand-m6-mstd0.5-inc1")
    parser.add_argument("--reprob", type=float, default=0.0)
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--output", default="output/timm")
    parser.add_argument("--resume", action="store_true", help="continue from the last epoch that --output has")
    args = parser.parse_args()
    setup_default_logging()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train = ImageFolder(f"{args.data}/train")
    classes = len(train.classes)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes).to(device)
    config = resolve_data_config({"img_size": args.size}, model=model)  # size, mean, std, interpolation, crop_pct
    augment = create_transform(
        **config, is_training=True, scale=(0.5, 1.0), hflip=0.0, auto_augment=args.aa, re_prob=args.reprob
    )
    val = create_loader(create_dataset("", args.data, split="val"), batch_size=args.batch_size, device=device, **config)

    task = LastBatchTask(model, LastBatchLoss(classes), device=device)  # dlb: in place of ClassificationTask
    loader = task.batches(OverlapLoader(train, args.batch_size, transform=augment, device=device))  # dlb
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs)
    os.makedirs(args.output, exist_ok=True)
    start = resume_task_checkpoint(task, f"{args.output}/last.pth.tar", optimizer) if args.resume else 0
    task.setup_ema(decay=0.99)
    saver = CheckpointSaver(model, optimizer, args, task=task, checkpoint_dir=args.output, recovery_dir=args.output)
    for epoch in range(start, args.epochs):
        scheduler.step(epoch)
        loader.set_epoch(epoch)
        model.train()
        for step, (images, labels) in enumerate(loader, 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                result = task(images, labels)  # loss, output, task_loss (cross entropy), kd_loss (last batch)
            (result["loss"] / args.accumulate).backward()
            if step % args.accumulate == 0 or step == len(loader):
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()
        share = accuracy(task.get_eval_model(), val)
        saver.save_checkpoint(epoch, metric=share)
    print(f"val accuracy {share:.3f}; rows with a teacher: {int(task.criterion.buffer.taught)}")


if __name__ == "__main__":
    main()
