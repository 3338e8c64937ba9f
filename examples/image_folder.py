"""A loop of your own on a folder of images, with torchvision's dataset, transforms and network.

    python examples/image_folder.py DATA                         # DATA/train/CLASS/*.jpg and DATA/val/CLASS/*.jpg
    python examples/image_folder.py DATA --resume                # after a kill: goes on in the middle of the epoch
    torchrun --nproc-per-node 2 examples/image_folder.py DATA    # --batch-size is that of each process

`DLB:` marks what the method changes. On a CPU a run that was killed and resumed ends with the same weights to the bit.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

from dlb_fast import LastBatchLoss
from dlb_fast.data import IndexedDataset, OverlapBatchSampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_data(root, size):
    normalise = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normalise])
    centre = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *normalise])
    return datasets.ImageFolder(root / "train", augment), datasets.ImageFolder(root / "val", centre)
    # return datasets.CIFAR10(root, True, augment), datasets.CIFAR10(root, False, centre)


def make_loader(train, batch_size, workers):
    # DLB: the first half of a batch repeats the batch before, so an epoch shows every image twice.
    sampler = OverlapBatchSampler(train, batch_size)
    # DLB: `IndexedDataset` adds the sample ids. `StatefulDataLoader` is torch's DataLoader with an exact position.
    own = {"num_workers": workers, "persistent_workers": workers > 0, "generator": torch.Generator()}
    return StatefulDataLoader(IndexedDataset(train), batch_sampler=sampler, pin_memory=torch.cuda.is_available(), **own)


@torch.inference_mode()
def evaluate(model, criterion, val, batch_size, workers, device):
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = Subset(val, range(rank, len(val), ranks))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    criterion.eval()  # DLB: torch's cross entropy; the remembered logits are kept for the next training batch
    for images, labels in DataLoader(share, batch_size, num_workers=workers, generator=torch.Generator()):
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        sums += torch.stack([criterion(logits, labels) * len(labels), (logits.argmax(1) == labels).sum()])
    model.train()
    criterion.train()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums / len(val)).tolist()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--model", default="resnet18", help="any classifier of torchvision.models")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch; half of them are new")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step of the optimizer")
    parser.add_argument("--lr", type=float, default=0.025)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--save-every", type=int, default=100, help="steps of the optimizer between checkpoints")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    if "RANK" in os.environ:  # started by torchrun; before the sampler, which takes its share from the process group
        dist.init_process_group()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(rank)

    train, val = open_data(args.data, args.size)
    if val.classes != train.classes:  # torchvision numbers the folders of each split on its own
        raise SystemExit(f"the classes of train and val differ: {set(train.classes) ^ set(val.classes)}")
    loader = make_loader(train, args.batch_size, args.workers)
    model = models.get_model(args.model, num_classes=len(train.classes)).to(device)
    net = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader) // args.accumulate)
    criterion = LastBatchLoss(num_classes=len(train.classes))  # DLB: in place of nn.CrossEntropyLoss()

    args.out.mkdir(parents=True, exist_ok=True)
    shared = {"model": model, "optimizer": optimizer, "schedule": schedule}
    own = {"criterion": criterion, "loader": loader}  # DLB: the remembered logits; both differ from rank to rank
    first, batches = 0, 0

    def save(epoch):
        mine = {name: part.state_dict() for name, part in own.items()} | {"rng": torch.get_rng_state()}
        all_of_them = [mine]
        if ranks > 1:
            all_of_them = [None] * ranks
            dist.all_gather_object(all_of_them, mine)
        if rank == 0:
            states = {name: part.state_dict() for name, part in shared.items()}
            states |= {"ranks": all_of_them, "epoch": epoch, "batches": batches}
            torch.save(states, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")  # a kill leaves a whole file

    if args.resume:
        saved = torch.load(args.out / "checkpoint.pt", map_location="cpu", weights_only=True)
        first, batches = saved["epoch"], saved["batches"]
        for name, part in shared.items():
            part.load_state_dict(saved[name])
        for name, part in own.items():
            part.load_state_dict(saved["ranks"][rank][name])
        torch.set_rng_state(saved["ranks"][rank]["rng"])

    for epoch in range(first, args.epochs):
        for images, labels, ids in loader:
            images, labels, ids = (part.to(device, non_blocking=True) for part in (images, labels, ids))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = net(images)
            loss = criterion(logits, labels, ids)  # DLB: takes the ids too
            (loss / args.accumulate).backward()
            batches += 1
            if batches % args.accumulate:
                continue
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if batches // args.accumulate % args.save_every == 0:
                if rank == 0:
                    parts = criterion.parts  # reading them is the only moment at which the host waits for a GPU
                    print(f"batch {batches}: cross entropy {parts.ce:.3f}, last-batch term {parts.lb:.4f}")
                save(epoch)
        loss, accuracy = evaluate(model, criterion, val, args.batch_size, args.workers, device)
        if rank == 0:
            print(f"epoch {epoch}: validation loss {loss:.3f}, accuracy {accuracy:.1%}", flush=True)
    if rank == 0:
        torch.save(model.state_dict(), args.out / "weights.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
