"""The small network that the tests of several ranks train, each rank on its share of the same batches."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from dlb_fast import LastBatchLoss
from dlb_fast.data import EvalLoader, ResidentLoader
from dlb_fast.train.distributed import Ranks, full_state, is_sharded
from dlb_fast.train.evaluate import evaluate
from dlb_fast.train.log import RunLog
from dlb_fast.train.loop import Trainer

CLASSES, ROWS = 5, 16  # rows of a step over all ranks


class digits:
    def __init__(self, count=56, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
        self.targets = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self):
        return len(self.targets)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))


def network(norm=nn.Identity, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, stride=2), norm(6) if norm is not nn.Identity else norm(), nn.Tanh()]
    layers += [Block(6), Block(6), nn.Flatten(), nn.Dropout(dropout), nn.Linear(6 * 9, CLASSES)]
    return nn.Sequential(*layers).double()


def make(kind="auto", folder=None, *, norm=nn.Identity, dropout=0.0, adam=False, alone=False, **settings):
    """A trainer on this rank's share of the same batches, in float64."""
    ranks = Ranks() if alone else Ranks.current()
    model = network(norm, dropout)
    if settings.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    torch.manual_seed(17 + ranks.rank)
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rows = ROWS // ranks.world_size
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    loader = ResidentLoader(digits(), rows, dtype=torch.float64, seed=1, **place)
    shares = EvalLoader(digits(23, 4), 11, dtype=torch.float64, **place)
    return Trainer(
        model,
        LastBatchLoss(CLASSES, capacity=rows // 2, alpha=1.3, temperature=2.0),
        optimizer,
        loader,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5),
        evaluate=lambda net: evaluate(net, shares, ranks=ranks),
        folder=folder,
        log=RunLog(folder if ranks.is_main else None, quiet=True),
        ranks=ranks,
        **{"distributed": kind, "epochs": 2, "log_every": 1, **settings},
    )


def whole(model):
    return {name: value.clone() for name, value in full_state(model.state_dict()).items()}


def trained(*arguments, **options):
    """Whole weights, the remembered rows and the result of a run."""
    trainer = make(*arguments, **options)
    result = trainer.fit()
    average = None if trainer.ema is None else whole(trainer.ema.model)
    buffer = trainer.criterion.buffer
    return SimpleNamespace(
        weights=whole(trainer.model),
        average=average,
        logits=buffer.logits.clone(),
        ids=buffer.ids.clone(),
        result=result,
        sharded=is_sharded(trainer.model),
        mismatched=int(buffer.mismatched),
    )

