"""Change a dataset: keep fewer samples per class, or give some samples wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlb_fast._args import as_int
from dlb_fast.data.datasets.arrays import CIFAR10_CLASSES
from dlb_fast.data.datasets.folder import some
from dlb_fast.data.rng import NOISE, SUBSET, fold_array, key_of, permutation

__all__ = ["NOISE_KINDS", "relabelled", "subset", "with_label_noise"]

NOISE_KINDS = ("symmetric", "uniform", "pair", "superclass", "asymmetric")

# The confusions of Patrini et al., CVPR 2017, for CIFAR-10.
_CIFAR10_CONFUSED = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


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
    """A dataset with wrong labels for a fraction of the samples; `clean_targets` keeps the true labels.

    Args:
        dataset: has `targets` and `with_targets`.
        rate: fraction of the samples whose label is drawn anew, in [0, 1].
        kind: how. The first two draw `round(rate * N)` of all samples, the others `round(rate * n)` of the n of each
            class.

            - "symmetric": any *other* class, uniformly, so `rate` is the fraction of wrong labels (SCE, Co-teaching).
            - "uniform": any class, the true one included, so `rate * (C - 1) / C` are wrong (ELR, DivideMix).
            - "pair": the next class, and the first for the last (Co-teaching).
            - "superclass": the next class of the same superclass, in a circle; needs `dataset.superclasses`, which
              CIFAR-100 has.
            - "asymmetric": the classes of `mapping`.
        seed: chooses the samples and their classes.
        mapping: class -> class, for "asymmetric". None means what ELR's and SCE's code call so: for CIFAR-10, known by
            its class names, truck to automobile, bird to airplane, deer to horse, cat and dog to each other; for
            CIFAR-100 the next class in blocks of five consecutive classes, which are not its superclasses.

    Raises:
        ValueError: a rate outside [0, 1], another kind, a single class, a mapping to itself or out of range, a kind
            that the dataset does not have.

    Example:
        >>> from dlb_fast.data import open_dataset
        >>> noisy = with_label_noise(open_dataset("synthetic:40,4,8"), 0.5, "pair")
        >>> int((noisy.targets == (noisy.clean_targets + 1) % 4).sum())
        20
    """
    name = "with_label_noise"
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: rate must be in [0, 1], got {rate}")
    if kind not in NOISE_KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(NOISE_KINDS)}, got {kind!r}")
    if kind != "asymmetric" and mapping is not None:
        raise ValueError(f'{name}: mapping belongs to kind="asymmetric"')
    classes = dataset.num_classes
    if classes < 2:
        raise ValueError(f"{name}: needs at least two classes, got {classes}")
    clean: NDArray[np.int64] = np.asarray(dataset.targets).astype(np.int64)
    noisy = clean.copy()
    if kind in ("symmetric", "uniform"):
        order = permutation(key_of(seed, NOISE, 0), len(clean))
        drawn = order[: round(rate * len(clean))]
        first = int(kind == "symmetric")  # a shift by 0 keeps the true class
        bits = fold_array(key_of(seed, NOISE, 1), drawn)
        shift = ((bits >> np.uint64(32)) * np.uint64(classes - first)) >> np.uint64(32)
        noisy[drawn] = (clean[drawn] + first + shift.astype(np.int64)) % classes
    else:
        for label, other in _next_classes(dataset, kind, mapping).items():
            members = np.flatnonzero(clean == label)
            order = permutation(key_of(seed, NOISE, 2, label), len(members))
            noisy[members[order[: round(rate * len(members))]]] = other
    return relabelled(dataset, noisy)


def relabelled(dataset: Any, labels: NDArray[np.int64]) -> Any:
    """The dataset with these labels; `clean_targets` keeps its own."""
    result = dataset.with_targets(labels)
    result.clean_targets = np.asarray(dataset.targets).astype(np.int64)
    return result


def _next_classes(dataset: Any, kind: str, mapping: Mapping[int, int] | None) -> dict[int, int]:
    """The class that each class is taken for."""
    name, classes = "with_label_noise", dataset.num_classes
    if kind == "pair":
        return {label: (label + 1) % classes for label in range(classes)}
    if kind == "superclass":
        found = getattr(dataset, "superclasses", None)
        if found is None:
            raise ValueError(
                f"{name}: superclass noise needs the superclass of each class, which {dataset.name} does not have; "
                'CIFAR-100 in its binary version (cifar100:PATH) has them. "pair" takes the next of all classes'
            )
        members = [np.flatnonzero(found == one).tolist() for one in np.unique(found[found >= 0])]
        if alone := [group[0] for group in members if len(group) == 1]:
            raise ValueError(f"{name}: class {dataset.classes[alone[0]]!r} is the only one of its superclass")
        return {label: group[(k + 1) % len(group)] for group in members for k, label in enumerate(group)}
    if mapping is not None:
        for label, other in mapping.items():
            if not (0 <= label < classes and 0 <= other < classes) or label == other:
                raise ValueError(f"{name}: mapping {label} -> {other} must join two classes in [0, {classes})")
        return dict(mapping)
    place = {str(one): k for k, one in enumerate(dataset.classes)}
    if place.keys() == set(CIFAR10_CLASSES):
        return {place[one]: place[other] for one, other in _CIFAR10_CONFUSED.items()}
    if dataset.name == "cifar100":
        return {label: label // 5 * 5 + (label + 1) % 5 for label in range(classes)}
    raise ValueError(
        f"{name}: asymmetric noise is defined for the classes of CIFAR-10 and for cifar100:PATH, not for "
        f'{dataset.name} with the classes {some(dataset.classes)}. "pair" takes the next class; in Python mapping= '
        "names other confusions"
    )
