"""Datasets: digits, CIFAR, folders, lists, TinyImageNet, tar shards, synthetic images; label noise and subsets."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
from builders import contents, write_images

from dlb_fast.data import (
    EvalLoader,
    ImageFolder,
    MapDataset,
    OverlapLoader,
    ResidentLoader,
    cifar,
    digits,
    eval_transform,
    load_into_memory,
    open_dataset,
    subset,
    synthetic,
    with_label_noise,
)
from dlb_fast.data.datasets.arrays import stratified_split

Image = pytest.importorskip("PIL.Image")
FROZEN_PIXELS = [62, 62, 54, 150]
FROZEN_TARGETS = [2, 1, 1, 2, 1, 3]


# Sets in memory


def test_digits_are_split_by_class_and_the_same_every_time():
    pytest.importorskip("sklearn")
    train, test = digits("train"), digits("test")
    assert len(train) + len(test) == 1797 and train.num_classes == 10 and train.images.shape[1:] == (1, 8, 8)
    assert abs(len(train) - len(test)) < 12 and int(train.images.max()) == 255 and train.images.dtype == torch.uint8
    for label in range(10):
        assert abs(int((train.targets == label).sum()) - int((test.targets == label).sum())) <= 1
    together = {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    assert len(together) == 0
    assert torch.equal(digits("test").images, test.images)
    assert not torch.equal(digits("test", seed=1).targets, test.targets)
    assert len(digits("test", test_share=0.1)) == pytest.approx(180, abs=6)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match="pip install scikit-learn"):
        digits()


def test_stratified_split_keeps_a_sample_of_every_class_on_both_sides():
    targets = np.array([0] * 10 + [1] * 2 + [2])
    for share in (0.01, 0.5, 0.99):
        train, test = stratified_split(targets, share, 0)
        assert sorted([*train, *test]) == list(range(13))
        assert {0, 1} == set(targets[test]) and {0, 1, 2} == set(targets[train])
    with pytest.raises(ValueError, match="test_share must be between 0 and 1, got 1"):
        stratified_split(targets, 1, 0)


def test_synthetic_images_are_frozen_and_can_be_learned():
    train = synthetic(length=600, num_classes=4, size=12)
    test = synthetic("test", length=600, num_classes=4, size=12)
    assert train.images.shape == (600, 3, 12, 12) and len(test) == 150
    assert train.targets.bincount().tolist() == [150] * 4
    assert train.images[0, 0, 0, :4].tolist() == FROZEN_PIXELS and train.targets[:6].tolist() == FROZEN_TARGETS
    means = torch.stack([train.images[train.targets == c].double().mean(0) for c in range(4)])
    nearest = ((test.images.double()[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == test.targets).double().mean() > 0.9
    single = ((test.images.double()[:, None] - train.images[:4].double()) ** 2).sum((2, 3, 4)).argmin(1)
    assert (train.targets[:4][single] == test.targets).double().mean() < 0.9  # not from one example of each
    assert not torch.equal(synthetic(length=600, num_classes=4, size=12, seed=1).images, train.images)


def write_cifar(folder, classes, records=7, bad_label=None):
    folder.mkdir(parents=True, exist_ok=True)
    labels = 1 if classes == 10 else 2
    names = (
        [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    for number, name in enumerate(names):
        data = np.zeros((records, labels + 3072), np.uint8)
        data[:, labels - 1] = (np.arange(records) + number) % classes
        if classes == 100:
            data[:, 0] = 2 * data[:, 1]
        data[:, labels:] = np.arange(3072) % 251 + 0
        data[:, labels] = number
        if bad_label is not None:
            data[3, labels - 1] = bad_label
        data.tofile(folder / name)
    return folder


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("nested", [True, False])
def test_cifar_binary(tmp_path, classes, nested, caplog):
    inner = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[classes]
    write_cifar(tmp_path / inner if nested else tmp_path, classes)
    train, test = (open_dataset(f"cifar{classes}:{tmp_path}", split) for split in ("train", "test"))
    assert len(train) == (35 if classes == 10 else 7) and len(test) == 7 and train.num_classes == classes
    pixels = train.images[3].reshape(-1)
    assert pixels[1:].tolist() == [k % 251 for k in range(1, 3072)] and int(pixels[0]) == 0
    assert train.images.shape[1:] == (3, 32, 32) and train.targets[:4].tolist() == [0, 1, 2, 3]
    assert int(test.images[0, 0, 0, 0]) == (5 if classes == 10 else 1)
    assert "7 images; the published file has" in caplog.text
    if classes == 10:
        assert train.classes[3] == "cat" and train.images[7, 0, 0, 0] == 1
    else:
        assert train.superclasses.tolist() == [0, 2, 4, 6, 8, 10, 12] + [-1] * 93
        assert train.select(np.array([5])).superclasses is train.superclasses


def test_cifar_class_names_come_from_the_files(tmp_path):
    write_cifar(tmp_path, 100)
    assert cifar(tmp_path, 100).classes[5] == "class_5"
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"thing {c}" for c in range(100)) + "\n")
    assert cifar(tmp_path, 100).classes[5] == "thing 5"


def test_cifar_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"cifar10: no folder {tmp_path}/nothing"):
        open_dataset(f"cifar10:{tmp_path}/nothing")
    (tmp_path / "py").mkdir()
    for k in range(1, 6):
        (tmp_path / "py" / f"data_batch_{k}").write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_1\.bin.*pickled.*not read"):
        cifar(tmp_path / "py", 10)
    folder = write_cifar(tmp_path / "cut", 10)
    with open(folder / "data_batch_3.bin", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: expected records of 3073 bytes .* got 5000 bytes"):
        cifar(folder, 10)
    (folder / "data_batch_3.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="got 0 bytes"):
        cifar(folder, 10)
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\.bin; get the binary"):
        cifar(folder, 10)
    write_cifar(tmp_path / "label", 10, bad_label=77)
    with pytest.raises(ValueError, match=r"record 3 \(byte 9219\) has label 77, expected below 10"):
        cifar(tmp_path / "label", 10)
    write_cifar(tmp_path / "coarse", 100, bad_label=2)  # the superclass of its neighbour
    with pytest.raises(ValueError, match="record 2 has the coarse label 4, others of its class 2 have 6: damaged"):
        cifar(tmp_path / "coarse", 100)


FOLDER = ["b/2.png", "b/1.JPG", "a/deep/er/x.png", "c/0.jpeg", "a/y.PNG"]


# Opening


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("mnist", "unknown kind 'mnist' .* expected one of digits, cifar10:PATH"),
        ("cifar10", "cifar10 needs a path, as in cifar10:/data/cifar10"),
        ("imagefolder:", "imagefolder needs a path"),
        ("digits:/somewhere", "digits takes no path"),
        ("synthetic:10,x", "expected synthetic"),
        ("synthetic:10,2,8,9", "expected synthetic"),
        ("synthetic:10,1", "C must be at least 2, got 1"),
        ("synthetic:1,2", "N must be at least 2, got 1"),
        ("synthetic:10,2,0", "SIZE must be at least 4, got 0"),
    ],
)
def test_open_dataset_errors(kind, match):
    with pytest.raises(ValueError, match=match):
        open_dataset(kind)


def test_open_dataset():
    assert open_dataset("synthetic:50,5,8").images.shape == (50, 3, 8, 8)
    assert open_dataset("synthetic:50,5").images.shape == (50, 3, 32, 32)
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'val\''):
        open_dataset("synthetic", "val")
    with pytest.raises(TypeError, match="expected a string"):
        open_dataset(None)


# What can be done to a dataset


def test_subset_is_balanced_nested_and_seeded():
    data = synthetic(length=100, num_classes=4, size=8)
    few, more = subset(data, 3), subset(data, 10)
    assert few.targets.bincount().tolist() == [3] * 4 and len(more) == 40
    kept = {image.numpy().tobytes() for image in more.images}
    assert all(image.numpy().tobytes() in kept for image in few.images)
    assert torch.equal(subset(data, 3).images, few.images)
    assert not torch.equal(subset(data, 3, seed=1).images, few.images)
    assert len(data) == 100
    with pytest.raises(ValueError, match="class 'class_0' has 25 samples; per_class=26 needs more"):
        subset(data, 26)


def test_subset_of_files_and_of_noisy_labels(tmp_path):
    write_images(tmp_path, [f"{c}/{k}.png" for c in "ab" for k in range(6)])
    files = subset(ImageFolder(tmp_path), 2)
    assert [name for _, name in contents(files)] == ["a", "a", "b", "b"]
    noisy = with_label_noise(synthetic(length=100, num_classes=4, size=8), 0.4)
    few = subset(noisy, 5)
    assert few.clean_targets.shape == (20,) and few.targets.bincount().tolist() == [5] * 4
    originals = {image.numpy().tobytes(): clean for image, clean in zip(noisy.images, noisy.clean_targets, strict=True)}
    assert [originals[image.numpy().tobytes()] for image in few.images] == few.clean_targets.tolist()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_symmetric_noise_is_exact_and_uniform(rate):
    data = synthetic(length=4000, num_classes=5, size=4)
    noisy = with_label_noise(data, rate, seed=3)
    wrong = noisy.targets != data.targets
    assert int(wrong.sum()) == round(4000 * rate)
    assert noisy.clean_targets.tolist() == data.targets.tolist() and noisy.images is data.images
    if rate:
        jumps = ((noisy.targets - data.targets)[wrong] % 5).bincount(minlength=5)[1:].double() / wrong.sum()
        assert (jumps - 0.25).abs().max() < 0.05
        assert not torch.equal(with_label_noise(data, rate, seed=4).targets, noisy.targets)
    assert torch.equal(with_label_noise(data, rate, seed=3).targets, noisy.targets)


def test_map_dataset_and_loading_into_memory(tmp_path):
    write_images(tmp_path, FOLDER)
    paths = [str(path) for path in sorted(tmp_path.rglob("*.*")) if path.is_file()]
    data = MapDataset(paths, lambda paths, index: (Image.open(paths[index]).convert("RGB"), index % 2))
    assert data.targets.tolist() == [0, 1, 0, 1, 0] and data.classes == ["0", "1"] and data[0][0].shape == (3, 5, 6)
    loaded = load_into_memory(data, eval_transform(4))
    assert loaded.images.shape == (5, 3, 4, 4) and [int(i.unique()) for i in loaded.images] == [2, 4, 1, 0, 3]
    assert len(next(iter(ResidentLoader(loaded, 4)))) == 2
    assert load_into_memory(ImageFolder(tmp_path)).images.shape == (5, 3, 5, 6)
    plain = load_into_memory([(torch.full((1, 2, 2), k, dtype=torch.uint8), k % 3) for k in range(4)])
    assert plain.targets.tolist() == [0, 1, 2, 0] and plain.classes == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"sample 1 has shape \(1, 3, 2\), sample 0 has \(1, 2, 2\)"):
        load_into_memory([(torch.zeros(1, 2 + i, 2, dtype=torch.uint8), 0) for i in range(2)])


def test_the_loaders_take_every_kind_of_dataset(tmp_path):
    write_images(tmp_path, [f"{c}/{k}.png" for c in "ab" for k in range(4)])
    files = ImageFolder(tmp_path)
    memory = load_into_memory(files)
    with OverlapLoader(files, 4, num_threads=1, seed=1) as loader:
        for got, expected in zip(loader, ResidentLoader(memory, 4, seed=1), strict=True):
            assert torch.equal(got.images, expected.images) and torch.equal(got.ids, expected.ids)
    for got, expected in zip(EvalLoader(files, 3), EvalLoader(memory, 3), strict=True):
        assert torch.equal(got.images, expected.images) and torch.equal(got.targets, expected.targets)
