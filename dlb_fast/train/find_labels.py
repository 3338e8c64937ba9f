"""The training labels that the network of a run doubts most, and how many of them are wrong where that is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast.data.datasets.labels import table

from .checkpoint import write_atomically
from .config import override
from .data import check_same_data, eval_loader, evaluation_config, identity
from .predict import with_logits
from .run import RunFolder, load_model, open_own_data, resolve_device

__all__ = ["Doubts", "average_precision", "find_labels", "write_doubts"]


@dataclass
class Doubts:
    """Training samples, the most doubted label first.

    Attributes:
        data: the training set in this order; `targets` are the labels of the training.
        suggested: (N,) the most probable other class.
        score: (N,) its logit minus that of the label; above 0 the network prefers it. Falls from row to row.
        wrong: (N,) whether the label differs from the data's own; None for a run without label noise.
        unread: number of images that could not be read and are left out.
    """

    data: Any
    suggested: NDArray[np.int64]
    score: NDArray[np.float64]
    wrong: NDArray[np.bool_] | None
    unread: int = 0

    def summary(self) -> str:
        """Counts, and where the wrong labels are known precision, recall and average precision, in words."""
        count, contradicted = len(self.score), int((self.score > 0).sum())
        said = f"the network prefers another class to {contradicted} of {count} labels (score above 0)"
        if self.wrong is None:
            return f"{said}; which labels are wrong is not known: the run has no label noise"
        total = int(self.wrong.sum())
        if not total:
            return f"{said}; none is wrong"
        found, first = int(self.wrong[:contradicted].sum()), int(self.wrong[:total].sum())
        if contradicted:
            said += f": precision {found / contradicted:.4f}, recall {found / total:.4f}"
        return (
            f"{said}\n{total} labels are wrong; of the {total} most doubted {first} are: precision and recall "
            f"{first / total:.4f}\naverage precision {average_precision(self.wrong, self.score):.4f}, in random order "
            f"{total / count:.4f}"
        )


def average_precision(wrong: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """`mean over the ranks k of the wrong ones of (wrong ones among the first k) / k`; NaN if none is wrong.

    Samples of one score have the rank of the last of them, because their order says nothing.

    Args:
        wrong: (N,) the truth.
        score: (N,) falling.

    Example:
        >>> average_precision(np.array([True, False, True, False]), np.array([4.0, 3.0, 2.0, 1.0]))  # (1/1 + 2/3) / 2
        0.8333333333333333
        >>> average_precision(np.array([True, False, True, False]), np.zeros(4))  # 2/4
        0.5
    """
    ranks = np.searchsorted(-score, -score, side="right")[wrong]
    return float(np.mean(np.cumsum(wrong)[ranks - 1] / ranks)) if len(ranks) else float("nan")


def find_labels(run: Path | str, *, weights: str = "best", source: str | None = None, device: str = "auto") -> Doubts:
    """Sort the training samples of a run by how much its network doubts their labels.

    The score is the margin `max over c != y of z_c - z_y` of the logits z and the label y: the log of how many times
    more probable the best other class is. The images pass the transform of the evaluation, without augmentation, in
    float32. A network that has memorised its labels doubts none of them.

    Args:
        run: run folder.
        weights: `best` or `last`.
        source: KIND[:PATH] of the run's own data in another place; None means where they were.
        device: name of the device, or `auto`.

    Raises:
        ValueError: there is no run, or the training images or labels are not those of the run.
        CheckpointError: the weights are missing or damaged.

    Source: the margin of Pleiss et al., "Identifying mislabeled data using the area under the margin ranking",
        NeurIPS 2020, with the sign turned and of one state of the weights instead of the mean over the epochs.

    Example: `print(find_labels("runs/first").summary())`
    """
    where, folder = resolve_device(device), RunFolder(run)
    model, about = load_model(run, weights=weights)
    config = override(folder.read_config(), on_error="replace")  # what cannot be read is left out
    if source is not None:
        config = override(config, source=source)
    opened = open_own_data(folder, config)
    here = identity(opened)
    before = {name: json.dumps(about[name]) for name in here}
    check_same_data(before, here, f"find-labels: the network in {folder.path}")
    train = opened.train
    loader = eval_loader(train, evaluation_config(config.data, about), about["mean"], about["std"], where)
    other, score = np.zeros(len(train), dtype=np.int64), np.full(len(train), -np.inf)
    read = np.zeros(len(train), dtype=bool)
    for batch, logits in with_logits(model.to(where), loader):
        known = batch.targets >= 0  # the others could not be read
        rows, labels = batch.ids[known].cpu().numpy(), batch.targets[known][:, None]
        given = logits[known].gather(1, labels)
        largest, which = logits[known].scatter(1, labels, -float("inf")).max(dim=1)
        other[rows], score[rows], read[rows] = which.cpu(), (largest - given[:, 0]).cpu(), True
    order = np.argsort(-score, kind="stable")
    order = order[read[order]]
    clean = getattr(train, "clean_targets", None)
    wrong = None if clean is None else np.asarray(train.targets) != np.asarray(clean)
    return Doubts(
        train.select(order), other[order], score[order], None if wrong is None else wrong[order], int((~read).sum())
    )


def write_doubts(file: Path, doubts: Doubts) -> None:
    """Write `index`, for files `path`, `label`, `suggested`, `score` and, where known, `wrong` (0 or 1) as CSV."""
    names = np.asarray(doubts.data.classes, dtype=object)
    known = {} if doubts.wrong is None else {"wrong": doubts.wrong.astype(int).tolist()}
    content = table(
        doubts.data,
        label=names[np.asarray(doubts.data.targets)].tolist(),
        suggested=names[doubts.suggested].tolist(),
        score=[f"{value:.6g}" for value in doubts.score],
        **known,
    )
    write_atomically(file, lambda stream: stream.write(content), "then repeat the command")
