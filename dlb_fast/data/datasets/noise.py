"""Change a dataset: keep fewer samples per class, or give some samples wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data.datasets.arrays import CIFAR10_CLASSES
from dlb_fast.data.rng import NOISE, SUBSET, fold_array, key_of, permutation

__all__ = ["subset", "with_label_noise"]

# The confusions of Patrini et al., CVPR 2017, for CIFAR-10: truck, bird, deer, cat, dog.
_CIFAR10_CONFUSED = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def subset(dataset: Any, per_class: int, seed: int = 0) -> Any:
    """A dataset with only `per_class` samples of every class, chosen by the seed.

    A larger `per_class` contains the samples of a smaller one. Sample ids start again at 0.

    Raises:
        ValueError: a class has fewer samples; the message names it.
    """
    per_class = as_int(per_class, "subset", "per_class", 1)
    targets = np.asarray(dataset.targets)
    chosen = []
    for label in range(dataset.num_classes):
        members = np.flatnonzero(targets == label)
        if len(members) < per_class:
            raise ValueError(
                f"subset: class {dataset.classes[label]!r} has {len(members)} samples; "
                f"per_class={per_class} needs more, use a smaller one"
            )
        order = permutation(key_of(seed, SUBSET, label), len(members))
        chosen.append(members[order[:per_class]])
    indices = np.sort(np.concatenate(chosen))
    result = dataset.select(indices)
    if hasattr(dataset, "clean_targets"):
        result.clean_targets = dataset.clean_targets[indices]
    return result


def with_label_noise(
    dataset: Any,
    rate: float,
    kind: str = "symmetric",
    seed: int = 0,
    *,
    mapping: Mapping[int, int] | None = None,
) -> Any:
    """A dataset with wrong labels for an exact fraction of the samples; `clean_targets` keeps the true labels.

    Args:
        dataset: has `targets` and `with_targets`.
        rate: fraction of wrong labels, in [0, 1].
        kind: "symmetric" gives `round(rate * N)` samples another class, uniformly. "asymmetric" gives
            `round(rate * n)` of the n samples of every class in `mapping` the class it maps to.
        seed: chooses the samples and their classes.
        mapping: class -> class, for "asymmetric". None means the usual CIFAR-10 confusions (truck to automobile, bird
            to airplane, deer to horse, cat and dog to each other) if the dataset has CIFAR-10's class names, else every
            class to the next.

    Raises:
        ValueError: a rate outside [0, 1], another kind, a single class, a mapping to itself or out of range.
    """
    name = "with_label_noise"
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: rate must be in [0, 1], got {rate}")
    if kind not in ("symmetric", "asymmetric"):
        raise ValueError(f'{name}: kind must be "symmetric" or "asymmetric", got {kind!r}')
    if kind == "symmetric" and mapping is not None:
        raise ValueError(f'{name}: mapping belongs to kind="asymmetric"')
    classes = dataset.num_classes
    if classes < 2:
        raise ValueError(f"{name}: needs at least two classes, got {classes}")
    clean: NDArray[np.int64] = np.asarray(dataset.targets).astype(np.int64)
    noisy = clean.copy()
    if kind == "symmetric":
        order = permutation(key_of(seed, NOISE, 0), len(clean))
        wrong = order[: round(rate * len(clean))]
        bits = fold_array(key_of(seed, NOISE, 1), wrong)
        shift = ((bits >> np.uint64(32)) * np.uint64(classes - 1)) >> np.uint64(32)
        noisy[wrong] = (clean[wrong] + 1 + shift.astype(np.int64)) % classes
    else:
        for label, other in _confusions(dataset, mapping).items():
            members = np.flatnonzero(clean == label)
            order = permutation(key_of(seed, NOISE, 2, label), len(members))
            noisy[members[order[: round(rate * len(members))]]] = other
    result = dataset.with_targets(noisy)
    result.clean_targets = clean
    return result


def _confusions(dataset: Any, mapping: Mapping[int, int] | None) -> dict[int, int]:
    classes = dataset.num_classes
    if mapping is None:
        if tuple(dataset.classes) == CIFAR10_CLASSES:
            return dict(_CIFAR10_CONFUSED)
        return {label: (label + 1) % classes for label in range(classes)}
    for label, other in mapping.items():
        if not (0 <= label < classes and 0 <= other < classes) or label == other:
            raise ValueError(f"with_label_noise: mapping {label} -> {other} must join two classes in [0, {classes})")
    return dict(mapping)
