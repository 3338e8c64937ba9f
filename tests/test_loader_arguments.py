"""What the data side refuses, and how: the operation, the argument, what was expected, what came, what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loader_files import make_files

from dlb_fast.data import (
    ArrayDataset,
    EvalLoader,
    IndexedDataset,
    Mix,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    SampledLoader,
    SampleError,
    TwoViews,
    ViewPairSampler,
    ViewRng,
    collate_overlap,
    collate_rows,
)

IMAGES = torch.zeros(24, 3, 8, 8, dtype=torch.uint8)


class Memory:
    """Images in memory with any targets."""

    def __init__(self, targets: Any) -> None:
        self.images, self.targets = IMAGES, targets

    def __len__(self) -> int:
        return 24


def overlap(data: Any, **options: Any) -> OverlapLoader:
    return OverlapLoader(data, 8, num_threads=1, **{"timeout": 20, **options})


def first_of(loader: Any) -> Any:
    with loader:
        return next(iter(loader))


FLOATS: list[Any] = [[0.9] * 24, np.full(24, 0.9), torch.full((24,), 0.9), ["1"] * 24]
TAKERS: dict[str, Callable[[Any], Any]] = {
    "OverlapLoader": lambda targets: overlap(Memory(targets)),
    "ResidentLoader": lambda targets: ResidentLoader(Memory(targets), 8),
    "SampledLoader": lambda targets: SampledLoader(Memory(targets), ViewPairSampler(24, 8)),
    "EvalLoader": lambda targets: EvalLoader(Memory(targets), 8),
    "mine": lambda targets: ArrayDataset(IMAGES, targets, ["a", "b"], name="mine"),
}


@pytest.mark.parametrize("targets", FLOATS, ids=["list", "array", "tensor", "strings"])
@pytest.mark.parametrize("name", TAKERS)
def test_targets_that_a_cast_would_change_are_refused(name: str, targets: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: targets must be integer class labels, got .*; a cast would round"):
        TAKERS[name](targets)


KINDS: list[Any] = [list, np.array, torch.tensor, lambda t: np.array(t, np.uint8), lambda t: [*map(np.int8, t)]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TAKERS if name != "mine"])
def test_integers_of_every_kind_are_targets(name: str, kind: Any) -> None:
    targets = [i % 2 for i in range(24)]
    batch = next(iter(TAKERS[name](kind(targets))))
    assert batch.targets.tolist() == [targets[i] for i in batch.ids.tolist()]
    assert TAKERS["mine"](kind(targets)).targets.tolist() == targets


def test_targets_of_single_items_are_not_rounded_either() -> None:
    data = [(image, 0.9) for image in IMAGES]
    with overlap(data, load=lambda d, i: d[i]) as loader, pytest.raises(SampleError, match="label, got 0.9; a cast"):
        next(iter(loader))
    with pytest.raises(SampleError, match="EvalLoader: a target must be an integer class label, got 0.9"):
        next(iter(EvalLoader(data, 8)))
    whole = [(image, np.int64(3)) for image in IMAGES[:12]] + [(image, torch.tensor(3)) for image in IMAGES[12:]]
    assert set(first_of(overlap(whole, load=lambda d, i: d[i])).targets.tolist()) == {3}
    one = first_of(overlap(data, load=lambda d, i: (d[i][0], np.array([3]))))  # as some sets have them
    assert set(one.targets.tolist()) == {3}
    for wrong, got in ((np.array([1, 2]), r"\(2,\)"), (torch.eye(2), r"\(2, 2\)"), (None, "None")):
        with overlap([wrong] * 24, load=lambda d, i: (IMAGES[i], d[i])) as bad, pytest.raises(SampleError, match=got):
            next(iter(bad))
    for collate, sampler in ((collate_overlap, OverlapBatchSampler(24, 8)), (collate_rows, ViewPairSampler(24, 8))):
        for kind, targets in ((IndexedDataset(whole), [3] * 4), (IndexedDataset(data), None)):
            items = [kind[i] for i in next(iter(sampler))[:4]]
            if targets is None:
                with pytest.raises(TypeError, match=f"^{collate.__name__}: targets must be integer .* got float64"):
                    collate(items)
            else:
                assert collate(items).targets.tolist() == targets


def test_a_bad_file_is_met_with_options_that_the_loader_has(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    for path in files.paths:
        path.write_bytes(b"")

    def message(loader: Any) -> str:
        with pytest.raises(SampleError) as caught:
            next(iter(loader))
        assert str(pickle.loads(pickle.dumps(caught.value)))
        return str(caught.value)

    for sampled in (EvalLoader(files, 8), SampledLoader(files, ViewPairSampler(24, 8))):
        assert message(sampled).endswith('all of them) or pass on_error="replace".')
    with overlap(files) as loader:
        assert message(loader).endswith('all of them) or pass on_error="replace".')
    with overlap(files, on_error="replace", max_failures=2) as loader:
        assert message(loader).endswith("all of them) or pass a larger max_failures.")


@pytest.mark.parametrize("collate", [collate_overlap, collate_rows])
@pytest.mark.parametrize(
    "items,got",
    [
        ([(IMAGES[0], 1)], r"\(Tensor, int\)"),
        ([(IMAGES[0], 1, 7)], r"\(Tensor, int, int\)"),
        ([IMAGES[0]], "Tensor"),
        ([{"image": 1}], "dict"),
        ([], "none"),
    ],
)
def test_items_without_an_index_are_refused(collate: Any, items: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"{collate.__name__}: expected items .*, got {got}; wrap the dataset in"):
        collate(items)


class Endless:
    """What an `IterableDataset` is: no length."""

    images, targets = IMAGES, [0] * 24

    def __iter__(self) -> Any:
        return iter(())


MEMORY = Memory([0] * 24)
FILES, PAIRS = SimpleNamespace(read=bytes, targets=[0] * 24), ViewPairSampler(24, 8)
MIX = Mix(mixup_alpha=0.4)


@pytest.mark.parametrize(
    "make,error,match",
    [
        (lambda: overlap(MEMORY, timeout="5"), TypeError, "OverlapLoader: timeout: expected seconds or None, got '5'"),
        (lambda: overlap(MEMORY, timeout=True), TypeError, "timeout: expected seconds or None, got True"),
        (lambda: overlap(MEMORY, timeout=0), ValueError, "timeout: expected seconds above 0 or None .*got 0"),
        (lambda: overlap(MEMORY, timeout=float("nan")), ValueError, "timeout: .*got nan"),
        (lambda: overlap(MEMORY, timeout=float("inf")), ValueError, r"or None \(for ever\), got inf"),
        (lambda: overlap(MEMORY, mean=0.5, std=0.5), TypeError, r"mean: expected one number per channel, .* got 0\.5"),
        (lambda: overlap(MEMORY, mean=(0.5,), std="1"), TypeError, "std: expected one number per channel, .* got '1'"),
        (lambda: overlap(MEMORY, mean=["a"], std=[1]), TypeError, r"mean: expected one number .* got \['a'\]"),
        (lambda: overlap(MEMORY, mean=(float("nan"),), std=(1,)), ValueError, "mean: expected finite numbers"),
        (lambda: overlap(MEMORY, dtype="float32"), TypeError, "dtype: expected a torch.dtype such as"),
        (lambda: overlap(MEMORY, dtype=float), TypeError, "dtype: expected a torch.dtype .* got <class 'float'>"),
        (lambda: overlap(MEMORY, dtype="float32", mix=MIX), TypeError, "dtype: expected a torch.dtype"),
        (lambda: ResidentLoader(MEMORY, 8, dtype="float32", mix=MIX), TypeError, "dtype: expected a torch.dtype"),
        (lambda: overlap(MEMORY, max_failures=float("nan")), ValueError, "max_failures: expected an int or a fraction"),
        (lambda: overlap(MEMORY, max_failures=float("inf")), ValueError, "max_failures: .*got inf"),
        (lambda: overlap(Endless()), TypeError, "OverlapLoader: dataset must have a length, Endless has none"),
        (lambda: SampledLoader(FILES, PAIRS), TypeError, "SampledLoader: dataset must have a length, Simple"),
        (lambda: EvalLoader(Endless(), 8), TypeError, "EvalLoader: dataset must have a length, Endless has none"),
        (lambda: overlap(MEMORY, decoder=3), TypeError, r"decoder must be callable or None, got 3 \(int\)"),
        (lambda: overlap(MEMORY, load=3), TypeError, "OverlapLoader: load must be callable or None, got 3"),
        (lambda: overlap(MEMORY, transform=3), TypeError, "OverlapLoader: transform must be callable or None, got 3"),
        (lambda: ResidentLoader(MEMORY, 8, transform=3), TypeError, "ResidentLoader: transform must be callable"),
        (lambda: EvalLoader(MEMORY, 8, transform=3), TypeError, "EvalLoader: transform must be callable"),
        (lambda: SampledLoader(MEMORY, PAIRS, transform="x"), TypeError, "SampledLoader: transform must be callable"),
        (lambda: IndexedDataset(MEMORY, 3), TypeError, "IndexedDataset: transform must be callable"),
        (lambda: TwoViews(MEMORY, None), TypeError, "TwoViews: transform must be callable, got None"),
    ],
)
def test_arguments_are_checked_where_the_loader_is_made(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def uneven(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    return image[:, : 4 + rng.sample % 2]


@pytest.mark.parametrize("kind", ["sampled", "sampled files", "resident", "eval"])
def test_views_of_different_sizes_are_named(kind: str, tmp_path: Path) -> None:
    files, name = make_files(tmp_path), {"resident": "ResidentLoader", "eval": "EvalLoader"}.get(kind, "SampledLoader")
    loader: Any = {
        "sampled": lambda: SampledLoader(MEMORY, ViewPairSampler(24, 8, shuffle=False), transform=uneven),
        "sampled files": lambda: SampledLoader(files, ViewPairSampler(24, 8, shuffle=False), transform=uneven),
        "resident": lambda: ResidentLoader(MEMORY, 8, transform=uneven, shuffle=False),
        "eval": lambda: EvalLoader(files, 8, transform=uneven),
    }[kind]()
    with pytest.raises(ValueError, match=rf"^{name}: sample 1 has shape \(3, 5, .* sample 0 of its batch has \(3, 4,"):
        next(iter(loader))


def test_a_view_that_is_no_image_is_named(tmp_path: Path) -> None:
    for loader in (
        SampledLoader(make_files(tmp_path), ViewPairSampler(24, 8, shuffle=False), transform=lambda i, r: i.numpy()),
        ResidentLoader(MEMORY, 8, shuffle=False, transform=lambda image, rng: image.numpy()),
    ):
        with pytest.raises(TypeError, match=r"transform: expected a \(c, h, w\) tensor, got ndarray for sample 0"):
            next(iter(loader))
