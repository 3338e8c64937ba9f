"""A train script in the manner of timm's: a module with `parser`, `main`, and timm's `create_loader` and task by name.

The tests run it, and timm's own where that can be had, by `python -m dlb_fast.integrations.timm`.
"""

import argparse
import os
from contextlib import nullcontext

import torch
from timm import utils
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--resume", default="")
parser.add_argument("--output")
parser.add_argument("--experiment")
parser.add_argument("--device", default="cpu")
parser.add_argument("--aa", default=None)
parser.add_argument("--mixup-mode", default="batch")
parser.add_argument("--amp-dtype", default="bfloat16")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--input-size", nargs=3, type=int)
parser.add_argument("-b", "--batch-size", type=int, default=128)
for name, default in {
    "num-classes": None, "epochs": 1, "workers": 0, "seed": 42, "log-interval": 50, "mixup-off-epoch": 0,
    "grad-accum-steps": 1, "aug-repeats": 0, "aug-splits": 0, "warmup-epochs": 0,
}.items():  # fmt: skip
    parser.add_argument(f"--{name}", type=int, default=default)
for name, default in {
    "lr": 0.05, "mixup": 0.0, "cutmix": 0.0, "mixup-prob": 1.0, "mixup-switch-prob": 0.5, "smoothing": 0.1,
    "reprob": 0.0, "hflip": 0.5, "model-ema-decay": 0.99,
}.items():  # fmt: skip
    parser.add_argument(f"--{name}", type=float, default=default)
for name in ("amp", "model-ema", "no-prefetcher", "bce-loss", "jsd-loss"):
    parser.add_argument(f"--{name}", action="store_true")


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes).to(device)
    config = resolve_data_config(vars(args), model=model)
    common = {
        "input_size": config["input_size"], "batch_size": args.batch_size, "mean": config["mean"], "std": config["std"],
        "device": device, "distributed": args.distributed, "use_prefetcher": args.prefetcher,
        "num_workers": args.workers,
    }  # fmt: skip
    collate = None
    if args.mixup or args.cutmix:
        collate = FastCollateMixup(args.mixup, args.cutmix, num_classes=args.num_classes)
    loader = create_loader(
        create_dataset("", args.data_dir, split="train"), is_training=True, hflip=args.hflip, auto_augment=args.aa,
        re_prob=args.reprob, num_aug_repeats=args.aug_repeats, collate_fn=collate, **common,
    )  # fmt: skip
    val = create_loader(create_dataset("", args.data_dir, split="validation"), is_training=False, **common)
    if args.bce_loss:
        criterion = BinaryCrossEntropy()
    else:
        criterion = SoftTargetCrossEntropy() if collate else LabelSmoothingCrossEntropy(args.smoothing)
    task = ClassificationTask(model=model, criterion=criterion, device=device, verbose=utils.is_primary(args))
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)
    start = resume_task_checkpoint(task, args.resume, optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    saver = None
    if utils.is_primary(args):
        folder = utils.get_outdir(args.output, args.experiment) if not args.resume else os.path.dirname(args.resume)
        saver = utils.CheckpointSaver(
            task.get_trainable_module(), optimizer, args, task=task, checkpoint_dir=folder, recovery_dir=folder
        )
    for epoch in range(start, args.epochs):
        loader.batch_sampler.set_epoch(epoch)
        task.get_trainable_module().train()
        for step, (images, labels) in enumerate(loader):
            with torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext():
                loss = task(images.to(device), labels.to(device))["loss"] / args.grad_accum_steps
            loss.backward()
            if (step + 1) % args.grad_accum_steps == 0 or step + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()
        evaluated = task.get_eval_model().eval()
        with torch.inference_mode():
            found = [(evaluated(images.to(device)).argmax(1).cpu() == labels.cpu()) for images, labels in val]
        if saver is not None:
            saver.save_checkpoint(epoch, metric=100 * torch.cat(found).float().mean().item())
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
