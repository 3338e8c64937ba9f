"""Whether the human labels of a file belong to these images, or only to their classes.

    python -m benchmarks.label_order RUN --data cifar10:DIR --labels FOLDER/cifar10n-labels.npz:worse_label:clean_label

RUN is a run that was trained on right labels. Where people gave an image a wrong label, the network should find that
label more probable on this image than on the others of its class. If the labels were in another order within the
classes, the two would be equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dlb_fast.train.config import override
from dlb_fast.train.data import eval_loader, evaluation_config, open_data
from dlb_fast.train.predict import with_logits
from dlb_fast.train.run import RunFolder, load_model


def preference(
    log_p: NDArray[np.float64], human: NDArray[np.int64], right: NDArray[np.int64]
) -> tuple[float, float, int]:
    """Of the images that people labelled wrongly: `log p(human label)` minus its mean over the right class's images.

    Args:
        log_p: (N, C) log-probabilities of a network.
        human: (N,) labels of people.
        right: (N,) the right ones.

    Returns:
        Mean, standard error, number of images.

    Example:
        >>> log_p = np.log([[0.9, 0.1], [0.7, 0.3]])  # the second image looks more like class 1
        >>> preference(log_p, np.array([0, 1]), np.array([0, 0]))[0] == np.log(0.3) - (np.log(0.1) + np.log(0.3)) / 2
        True
    """
    of_class = np.stack([log_p[right == label].mean(axis=0) for label in range(log_p.shape[1])])
    wrong = np.flatnonzero(human != right)
    found = log_p[wrong, human[wrong]] - of_class[right[wrong], human[wrong]]
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found))), len(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the preference, and that of labels shuffled within their classes."""
    parser = argparse.ArgumentParser(prog="label_order", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", required=True, help="KIND:PATH, as in dlb-fast train")
    parser.add_argument("--labels", required=True, help="file of labels, as in --noise-kind file:PATH")
    args = parser.parse_args(argv)
    model, about = load_model(args.run)
    before = RunFolder(args.run).read_config()
    config = override(before, source=args.data, noise_kind=f"file:{args.labels}", label_noise=0.0, per_class=None)
    train, rows = open_data(config.data).train, []
    loader = eval_loader(train, evaluation_config(before.data, about), about["mean"], about["std"], torch.device("cpu"))
    for _, logits in with_logits(model, loader):
        rows.append(logits.double().log_softmax(dim=1))
    log_p, human, right = torch.cat(rows).numpy(), np.asarray(train.targets), np.asarray(train.clean_targets)
    shuffled, draw = human.copy(), np.random.default_rng(0)
    for label in range(log_p.shape[1]):
        here = np.flatnonzero(right == label)
        shuffled[here] = draw.permutation(human[here])
    for name, given in (("in the file's order", human), ("shuffled within the classes", shuffled)):
        mean, error, count = preference(log_p, given, right)
        print(f"{name}: {mean:+.3f} +- {error:.3f} nats for {count} wrong labels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
