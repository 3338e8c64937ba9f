"""Wrong labels: drawn, the same ones in every tier, on every rank and from the command line; or those of a file."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import train, train_stopped
from PIL import Image
from torch.utils.data import DataLoader

from dlb_fast import cli
from dlb_fast.data import (
    ArrayDataset,
    ClassBatchSampler,
    EvalLoader,
    ImageFolder,
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    SampledLoader,
    collate_overlap,
    load_into_memory,
    open_dataset,
    with_label_noise,
)
from dlb_fast.data.datasets.arrays import CIFAR10_CLASSES
from dlb_fast.data.datasets.labels import LabelFile, read_labels, with_labels
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.flags import parse_flags
from dlb_fast.train.run import RunFolder, evaluate_run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of ten small images each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(10):
            colour = (label * 80, number * 20, 90)
            Image.new("RGB", (8, 8), colour).save(root / f"class{label}" / f"{number}.png")
    return root


def labels_by_id(batches) -> dict[int, int]:
    found: dict[int, int] = {}
    for batch in batches:
        for sample, label in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert found.setdefault(sample, label) == label  # both visits, every epoch
    return found


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_every_tier_sees_the_same_wrong_labels(kind, folder):
    files = ImageFolder(folder)
    clean = np.asarray(files.targets)
    noisy = with_label_noise(files, 0.3, kind, seed=5)
    memory = with_label_noise(load_into_memory(ImageFolder(folder)), 0.3, kind, seed=5)
    expected = dict(enumerate(np.asarray(noisy.targets).tolist()))
    assert sum(expected[i] != clean[i] for i in expected) == 9

    options = {"seed": 1, "drop_last": False}
    tiers = {"resident": list(ResidentLoader(memory, 8, **options)), "eval": list(EvalLoader(noisy, 7))}
    for threads in (1, 3):
        with OverlapLoader(noisy, 8, num_threads=threads, **options) as loader:
            tiers[f"{threads} threads"] = [batch for _ in range(2) for batch in loader]
    with OverlapLoader(noisy, 8, overlap=False, **options) as loader:
        tiers["plain"] = list(loader)
    ranks = [ResidentLoader(memory, 4, rank=rank, world_size=2, **options) for rank in range(2)]
    tiers["ranks"] = [batch for loader in ranks for batch in loader]
    sampler = OverlapBatchSampler(30, 8, **options)
    tiers["sampler"] = list(DataLoader(IndexedDataset(noisy), batch_sampler=sampler, collate_fn=collate_overlap))
    for name, batches in tiers.items():
        assert labels_by_id(batches) == expected, name
    # a sampler by class groups what is labelled alike, right or wrong
    for data in (noisy, memory):
        rows = SampledLoader(data, ClassBatchSampler(data.targets, 6, **options))
        for batch in rows:
            half = len(batch) // 2
            assert torch.equal(batch.targets[:half], batch.targets[half:])
        assert labels_by_id(rows).items() <= expected.items()


@pytest.mark.parametrize("kind", ["symmetric", "uniform", "pair"])
def test_the_seed_decides_and_nothing_else_does(kind):
    data = open_dataset("synthetic:300,5,8")
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    made = [np.asarray(with_label_noise(data, 0.4, kind, seed=seed).targets) for seed in (1, 1, 2)]
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_flags_reach_the_run_and_methods_share_the_labels(tmp_path):
    flags = ["--data", "synthetic:40,4,8", "--label-noise", "0.5", "--noise-kind", "pair", "--data-seed", "7"]
    config = parse_flags(RunConfig, RunConfig(), flags, "dlb-fast train")
    data = config.data
    assert (data.label_noise, data.noise_kind, data.data_seed) == (0.5, "pair", 7)
    labels = [
        np.asarray(open_data(override(config, method=m, seed=s).data).train.targets) for m, s in (("dlb", 0), ("ce", 9))
    ]
    assert (labels[0] == labels[1]).all()
    right = np.asarray(open_data(override(config, label_noise=0.0).data).train.targets)
    wrong = labels[0] != right
    assert wrong.mean() == 0.5 and (labels[0][wrong] == (right[wrong] + 1) % 4).all()
    short = override(config, batch_size=8, epochs=1, padding=1)
    losses = [
        train(override(short, label_noise=rate, noise_kind=kind), tmp_path / str(rate))["loss"]
        for rate, kind in ((0.0, "symmetric"), (0.5, "pair"))
    ]
    assert losses[0] != losses[1]
    assert RunFolder(tmp_path / "0.5").read_config().data.label_noise == 0.5


# The kinds, against tables written by hand


def with_counts(counts, classes=None, name="array"):
    """A dataset of one grey pixel per sample with so many samples of each class, in mixed order."""
    targets = np.repeat(np.arange(len(counts)), counts)
    targets = targets[np.random.default_rng(0).permutation(len(targets))]
    images = torch.zeros(len(targets), 1, 1, 1, dtype=torch.uint8)
    return ArrayDataset(images, targets, classes or [f"c{k}" for k in range(len(counts))], name)


def transitions(noisy):
    """counts[true, label]"""
    found = np.zeros((noisy.num_classes,) * 2, dtype=int)
    np.add.at(found, (noisy.clean_targets, np.asarray(noisy.targets)), 1)
    return found.tolist()


def test_pair_and_superclass_noise_follow_their_tables():
    data = with_counts([10, 20, 30, 40])
    assert transitions(with_label_noise(data, 0.3, "pair")) == [
        [7, 3, 0, 0], [0, 14, 6, 0], [0, 0, 21, 9], [12, 0, 0, 28],
    ]  # fmt: skip
    data.superclasses = np.array([1, 0, 1, 1])
    with pytest.raises(ValueError, match="class 'c1' is the only one of its superclass"):
        with_label_noise(data, 0.3, "superclass")
    data = with_counts([10, 20, 30, 40, 50])
    data.superclasses = np.array([1, 0, 1, 0, 1])
    assert transitions(with_label_noise(data, 0.3, "superclass")) == [
        [7, 0, 3, 0, 0], [0, 14, 0, 6, 0], [0, 0, 21, 0, 9], [0, 12, 0, 28, 0], [15, 0, 0, 0, 35],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="superclass noise needs the superclass of each class, which array does not"):
        with_label_noise(with_counts([5, 5]), 0.3, "superclass")


def test_cifar100_has_its_superclasses_and_its_blocks(tmp_path):
    """From the files, whose coarse label is here the fine one modulo 20: 0 is taken for 20, not for 1."""
    for name in ("train.bin", "test.bin"):
        records = np.zeros((500, 3074), np.uint8)
        records[:, 1] = np.arange(500) % 100
        records[:, 0] = records[:, 1] % 20
        records.tofile(tmp_path / name)
    config = override(RunConfig(), source=f"cifar100:{tmp_path}", label_noise=0.4)
    for kind, expected in (
        ("superclass", {0: 20, 63: 83, 80: 0, 99: 19}),
        ("asymmetric", {0: 1, 63: 64, 80: 81, 99: 95}),
    ):
        data = open_data(override(config, noise_kind=kind).data)
        found = np.array(transitions(data.train))
        assert (found.diagonal() == 3).all() and (found == 2).sum() == 100 and data.wrong_labels == 200
        assert {k: int(np.flatnonzero(found[k] == 2)[0]) for k in expected} == expected


def test_asymmetric_noise_is_that_of_the_papers_for_cifar():
    """CIFAR-10 by names, in any order; CIFAR-100 in blocks of five consecutive classes; nothing else."""
    for classes in (CIFAR10_CLASSES, sorted(CIFAR10_CLASSES, reverse=True)):
        place = {name: k for k, name in enumerate(classes)}
        table = np.diag([10] * 10)
        wrong = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
        for one, other in wrong.items():
            table[place[one], place[one]], table[place[one], place[other]] = 6, 4
        assert transitions(with_label_noise(with_counts([10] * 10, classes), 0.4, "asymmetric")) == table.tolist()
    found = np.array(transitions(with_label_noise(with_counts([5] * 100, name="cifar100"), 0.4, "asymmetric")))
    assert (found.diagonal() == 3).all() and (found == 2).sum() == 100
    assert {int(k): int(np.flatnonzero(found[k] == 2)[0]) for k in (0, 3, 4, 5, 98, 99)} == {
        0: 1, 3: 4, 4: 0, 5: 6, 98: 99, 99: 95,
    }  # fmt: skip
    noisy = with_label_noise(with_counts([10, 10, 10]), 0.3, "asymmetric", mapping={0: 2})
    assert transitions(noisy) == [[7, 0, 3], [0, 10, 0], [0, 0, 10]]
    with pytest.raises(ValueError, match=r"asymmetric noise is defined for the classes of CIFAR-10 .* not for array"):
        with_label_noise(with_counts([5, 5]), 0.3, "asymmetric")


def test_uniform_noise_includes_the_true_class_and_symmetric_noise_does_not():
    """Half of 8000 labels of 4 classes drawn: 4000 wrong, or 3000 of them, because a quarter is drawn right."""
    data = with_counts([2000] * 4)
    symmetric = with_label_noise(data, 0.5, "symmetric", seed=1)
    uniform = with_label_noise(data, 0.5, "uniform", seed=1)
    assert int((symmetric.targets != data.targets).sum()) == 4000
    assert int((uniform.targets != data.targets).sum()) == pytest.approx(3000, abs=4 * 28)  # sqrt(4000 * 3/16) = 27
    for noisy, right, other in ((symmetric, 1000, 333), (uniform, 1250, 250)):
        expected = np.full((4, 4), other) + np.diag([right - other] * 4)
        assert np.abs(np.array(transitions(noisy)) - expected).max() < 110  # of binomials with sigma below 27
    both = (symmetric.targets != data.targets) | (uniform.targets == data.targets)
    assert both.all()  # the same seed draws the same samples
    whole = with_label_noise(data, 1.0, "uniform")
    assert np.abs(np.array(transitions(whole)) - 500).max() < 80


def test_the_draw_of_a_seed_does_not_change():
    """Recorded: committed results depend on it."""
    data = with_counts([3, 3, 3])
    found = [transitions(with_label_noise(data, 2 / 3, kind, seed=5)) for kind in ("symmetric", "uniform")]
    assert found == [[[1, 0, 2], [1, 1, 1], [0, 2, 1]], [[1, 2, 0], [1, 2, 0], [1, 1, 1]]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rate": 1.5}, r"rate must be in \[0, 1\], got 1.5"),
        ({"rate": 0.1, "kind": "odd"}, "kind must be one of symmetric, uniform, pair, superclass, asymmetric, got"),
        ({"rate": 0.1, "kind": "pair", "mapping": {0: 1}}, "mapping belongs to"),
        ({"rate": 0.1, "kind": "asymmetric", "mapping": {0: 9}}, "mapping 0 -> 9 must join two classes"),
        ({"rate": 0.1, "kind": "asymmetric", "mapping": {1: 1}}, "mapping 1 -> 1 must join two classes"),
    ],
)
def test_noise_errors(options, match):
    with pytest.raises(ValueError, match=match):
        with_label_noise(with_counts([10, 10]), **options)


# Labels of a file


LABELS = [1, 0, 2, 0, 1, 2] * 5  # of the 30 images of `folder`, whose classes are 0, 1, 2 by tens


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_arrays_and_tables_give_the_same_labels(folder, tmp_path):
    data = ImageFolder(folder)
    names = [f"class{label}" for label in LABELS]
    paths = [name.decode() for name in data.files]
    np.save(tmp_path / "a.npy", np.array(LABELS, dtype=np.uint8))
    np.savez(tmp_path / "one.npz", only=LABELS)
    np.savez(tmp_path / "two.npz", worse=LABELS, clean=data.targets)
    order = np.random.default_rng(1).permutation(30)
    tables = {
        "index.csv": "index,label\n" + "".join(f"{k},{LABELS[k]}\n" for k in order),
        "path.csv": "path,other,label\n" + "".join(f"{paths[k]},,{names[k]}\n" for k in order),
        "bom.csv": "\ufefflabel,path\r\n" + "".join(f"{names[k]},{folder / paths[k]}\r\n" for k in order),
        "split.csv": "label,path\n" + "".join(f"{LABELS[k]},{folder.name}/{paths[k]}\n" for k in order),
        "both.csv": "index,path,label\n" + "".join(f"0,{paths[k]},{LABELS[k]}\n" for k in order),
    }
    sources = [tmp_path / "a.npy", tmp_path / "one.npz", f"{tmp_path}/two.npz:worse", f"{tmp_path}/two.npz:worse:clean"]
    sources += [written(tmp_path / name, text) for name, text in tables.items()]
    for source in map(str, sources):
        assert read_labels(source, data).tolist() == LABELS, source
    noisy = with_labels(data, read_labels(str(tmp_path / "a.npy"), data), "a.npy")
    assert noisy.targets.tolist() == LABELS and noisy.clean_targets.tolist() == data.targets.tolist()
    memory = load_into_memory(data)
    assert read_labels(str(tmp_path / "index.csv"), memory).tolist() == LABELS


def test_labels_in_another_order_are_brought_into_the_datas_by_the_true_ones(folder, tmp_path):
    """The k-th image of a class is the k-th of the class in the file, as for CIFAR-10N and a folder of CIFAR-10."""
    data = ImageFolder(folder)
    order = np.random.default_rng(2).permutation(30)
    true = data.targets[order]
    rank = np.array([int((true[:k] == true[k]).sum()) for k in range(30)])
    worse = (true + (rank == 4)) % 3  # the fifth of each class is wrong
    np.savez(tmp_path / "n.npz", worse=worse, true=true)
    found = read_labels(f"{tmp_path}/n.npz:worse:true", data)
    assert np.flatnonzero(found != data.targets).tolist() == [4, 14, 24] and found[[4, 14, 24]].tolist() == [1, 2, 0]
    np.savez(tmp_path / "other.npz", worse=worse, true=(true + (rank == 0) * (true == 1)) % 3)
    with pytest.raises(ValueError, match="other.npz:true has 9 images of class 'class1', the data set 10"):
        read_labels(f"{tmp_path}/other.npz:worse:true", data)


def test_an_order_that_agrees_by_chance_is_refused(tmp_path):
    data = with_counts([200] * 5)
    np.save(tmp_path / "x.npy", np.sort(np.asarray(data.targets)))
    with pytest.raises(ValueError, match=r"agrees with the data's own labels in \d\d\.\d % .* chance \(20.0 %\)"):
        read_labels(str(tmp_path / "x.npy"), data)
    for kind, rate in (("symmetric", 0.7), ("pair", 0.7)):
        noisy = np.asarray(with_label_noise(data, rate, kind).targets)
        np.save(tmp_path / "x.npy", noisy)
        assert read_labels(str(tmp_path / "x.npy"), data).tolist() == noisy.tolist()
    noisy = np.asarray(with_label_noise(data, 1.0, "pair").targets)
    text = "index,label\n" + "".join(f"{k},{label}\n" for k, label in enumerate(noisy))
    assert read_labels(written(tmp_path / "x.csv", text), data).tolist() == noisy.tolist()  # as it is


def test_labels_are_for_the_whole_data_set_and_reach_the_training_part_only(folder, tmp_path):
    """A held-out tenth, and digits' half: the split is made by the data's own labels, and its test images keep them."""
    np.save(tmp_path / "x.npy", LABELS)
    config = override(RunConfig(), source=f"imagefolder:{folder}", image_size=8, data_seed=3)
    clean = open_data(config.data)
    data = open_data(override(config, noise_kind=f"file:{tmp_path}/x.npy").data)
    assert len(data.train) == 27 and data.train.rows.tolist() == clean.train.rows.tolist()
    assert data.train.targets.tolist() == [LABELS[k] for k in clean.train.rows]
    assert data.test.targets.tolist() == clean.test.targets.tolist()
    wrong = int((data.train.targets != clean.train.targets).sum())
    said = f"label noise: labels of {tmp_path}/x.npy, {wrong} of 27 labels wrong ({100 * wrong / 27:.2f} %); normal"
    assert said in data.about
    fewer = open_data(override(config, noise_kind=f"file:{tmp_path}/x.npy", per_class=4).data)
    kept = open_data(override(config, per_class=4).data)
    assert fewer.train.rows.tolist() == kept.train.rows.tolist()
    assert fewer.train.targets.tolist() == [LABELS[k] for k in kept.train.rows]

    own = np.empty(1797, dtype=int)
    digits = override(RunConfig(), source="digits", data_seed=1)
    halves = open_data(digits.data)
    for part in (halves.train, halves.test):
        own[part.rows] = part.targets
    np.save(tmp_path / "d.npy", (own + (np.arange(1797) % 3 == 0)) % 10)
    noisy = open_data(override(digits, noise_kind=f"file:{tmp_path}/d.npy").data)
    wrong = noisy.train.targets.numpy() != halves.train.targets.numpy()
    assert (wrong == (halves.train.rows % 3 == 0)).all() and torch.equal(noisy.test.targets, halves.test.targets)
    np.save(tmp_path / "d.npy", own[halves.train.rows])
    with pytest.raises(ValueError, match=r"\(899,\), expected \(1797,\): .* training part and the held-out part toge"):
        open_data(override(digits, noise_kind=f"file:{tmp_path}/d.npy").data)


ARRAYS = {
    "a length": (LABELS[:29], r"has the shape \(29,\), expected \(30,\): a label per image of the data set in its own"),
    "a shape": ([LABELS], r"has the shape \(1, 30\), expected \(30,\)"),
    "floats": (np.array(LABELS, dtype=np.float32), "holds float32; expected class indices as integers"),
    "nan": (np.array([np.nan, *LABELS[1:]]), "holds float64; expected class indices as integers"),
    "bools": (np.array(LABELS) > 1, "holds bool; expected class indices as integers"),
    "text": ([f"class{k}" for k in LABELS], "holds <U6; expected class indices as integers"),
    "too large": ([3, *LABELS[1:]], r"label 3 at index 0; expected a class in \[0, 3\)"),
    "negative": ([*LABELS[:5], -1, *LABELS[6:]], r"label -1 at index 5; expected a class in \[0, 3\)"),
    "huge": (np.array([2**63 + 1, *LABELS[1:]], dtype=np.uint64), "label 9223372036854775809 at index 0"),
    "objects": (np.array([None] * 30), "cannot be read as an array of integers: Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("ending", ["npy", "npz:worse", "npz:clean:worse"])
def test_arrays_that_are_no_labels_are_refused(case, ending, folder, tmp_path):
    values, said = ARRAYS[case]
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    np.savez(tmp_path / "x.npz", worse=values, clean=ImageFolder(folder).targets)
    with pytest.raises(ValueError, match=f"labels: .*{said}"):
        read_labels(f"{tmp_path}/x.{ending}", ImageFolder(folder))


ALL = "".join(f"{k},{label}\n" for k, label in enumerate(LABELS))
TABLES = {
    "no header": (ALL, "expected a first line with the columns label and path or index, each once, got 0, 1"),
    "empty": ("", "expected a first line with .* got nothing"),
    "twice": ("index,label,label\n", "expected a first line with .* each once, got index, label, label"),
    "semicolons": ("index;label\n0;1\n", "expected a first line with .* got index;label"),
    "no label": ("index,class\n" + ALL, "expected a first line with .* got index, class"),
    "few fields": ("index,label\n0\n", "line 2: expected 2 fields as in the first line"),
    "many fields": ("index,label\n0,1,2\n", "line 2: expected 2 fields as in the first line"),
    "a float": ("index,label\n0,1.0\n", "line 2: the label '1.0' is no class of the data; the classes are 'class0'"),
    "nan": ("index,label\n0,nan\n", "line 2: the label 'nan' is no class of the data"),
    "no text": ("index,label\n0,\n", "line 2: the label '' is no class of the data"),
    "out of range": ("index,label\n" + ALL.replace("29,2", "29,3"), "line 31: the label '3' is no class of the data"),
    "negative": ("index,label\n0,-1\n", "line 2: the label '-1' is no class of the data"),
    "a typo": ("index,label\n0,clas1\n", "line 2: the label 'clas1' is no class of the data; did you mean class1"),
    "mixed": ("index,label\n0,1\n1,class1\n", "line 2: the label '1' is no class .* All labels are class names"),
    "no index": ("index,label\n1.0,1\n", r"line 2: index '1.0'; expected a whole number in \[0, 30\)"),
    "a far index": ("index,label\n30,1\n", r"line 2: index '30'; expected a whole number in \[0, 30\)"),
    "a minus": ("index,label\n-1,1\n", r"line 2: index '-1'; expected a whole number in \[0, 30\)"),
    "an index twice": ("index,label\n" + ALL + "7,1\n", "lines 9 and 32 are of the same image; delete one of them"),
    "a path twice": ("path,label\nclass0/1.png,1\n./class0//1.png,1\n", "lines 2 and 3 are of the same image"),
    "a path unknown": ("path,label\nclass0/x.png,1\n", "line 2: 'class0/x.png' is no image of the data set in "),
    "a part": ("index,label\n" + ALL[:16], "has no label for 26 of 30 training images, such as 'class0/4.png', 'clas"),
    "quotes": ('index,label\n0,"1\n', "is not a CSV: unexpected end of data"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_no_labels_are_refused(case, folder, tmp_path):
    text, said = TABLES[case]
    source, data = written(tmp_path / "x.csv", text), ImageFolder(folder)
    with pytest.raises(ValueError, match=f"labels: .*x.csv.*{said}"):
        with_labels(data, read_labels(source, data), source)


def test_other_files_are_refused(folder, tmp_path):
    data = ImageFolder(folder)
    np.savez(tmp_path / "x.npz", worse=LABELS, clean=LABELS)
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    (tmp_path / "folder.csv").mkdir()
    for source, error, said in (
        ("x.npz", ValueError, "x.npz has the arrays 'worse', 'clean'; name one, as in file:"),
        ("x.npz:wors", ValueError, "x.npz has no array 'wors'; did you mean worse"),
        ("x.npz:worse:true", ValueError, "x.npz has no array 'true'; it has 'worse', 'clean'"),
        ("bad.npy", ValueError, "bad.npy cannot be read as an array of integers"),
        ("bad.npz", ValueError, "bad.npz cannot be read as an array of integers"),
        ("gone.npy", FileNotFoundError, "labels: no file .*gone.npy"),
        ("folder.csv", FileNotFoundError, "labels: no file .*folder.csv"),
        ("x.pt", ValueError, "expected FILE.csv, FILE.npy or FILE.npz:KEY, got '.*x.pt'"),
        ("x.npy:worse", ValueError, "a key belongs to a .npz file, leave 'worse' out"),
    ):
        with pytest.raises(error, match=said):
            read_labels(f"{tmp_path}/{source}", data)
    assert LabelFile.of("a:b.npy/c.npz:k") == ("a:b.npy/c.npz", "k", None)


def test_classes_named_by_numbers_are_names(tmp_path):
    """Folders 1, 10 and 2 are the classes 0, 1 and 2 in the order of text: a label 2 is the folder 2."""
    data = with_counts([2, 2, 2], ["1", "10", "2"])
    text = "index,label\n" + "".join(f"{k},{label}\n" for k, label in enumerate([2, 10, 1, 1, 10, 2]))
    assert read_labels(written(tmp_path / "x.csv", text), data).tolist() == [2, 1, 0, 0, 1, 2]
    with pytest.raises(ValueError, match="line 2: the label '0' is no class of the data"):
        read_labels(written(tmp_path / "x.csv", "index,label\n0,0\n"), data)


def test_spaces_around_a_label_are_those_of_a_class_or_none(tmp_path):
    data = with_counts([2, 2, 2], ["a", " a", "b "])
    text = "index,label\n0, a\n1,a\n2, a \n3,b \n4,a\n5,b \n"
    assert read_labels(written(tmp_path / "x.csv", text), data).tolist() == [1, 0, 0, 2, 0, 2]
    numbers = "index,label\n" + "".join(f"{k}, {k % 3} \n" for k in range(6))
    assert read_labels(written(tmp_path / "x.csv", numbers), data).tolist() == [0, 1, 2, 0, 1, 2]


# A run


@pytest.fixture
def noisy_run(folder, tmp_path, monkeypatch):
    """The config of a run with a file of labels, in its folder; the run stops at step 3 of 6."""
    monkeypatch.chdir(tmp_path)
    np.save("given.npy", LABELS)
    config = override(
        RunConfig(), source=f"imagefolder:{folder}", image_size=8, model="small_cnn", batch_size=8, method="ce",
        noise_kind="file:given.npy", max_steps=6, checkpoint_every=3, eval_every=3,
    )  # fmt: skip
    train_stopped(config, tmp_path / "run", 3)
    return config


def test_a_run_keeps_its_labels_and_their_real_rate(noisy_run, folder, tmp_path, capsys):
    data = open_data(noisy_run.data)
    with open("run/labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == data.train.rows.tolist()
    assert [row["path"] for row in rows] == [name.decode() for name in data.train.files]
    assert [row["label"] for row in rows] == [f"class{k}" for k in data.train.targets]
    assert [row["clean"] for row in rows] == [f"class{k}" for k in data.train.clean_targets]
    rate = float((data.train.targets != data.train.clean_targets).mean())
    assert json.loads(Path("run/versions.json").read_text())["wrong_labels"] == rate > 0.5
    # they are a label file for another run
    again = override(noisy_run, noise_kind="file:run/labels.csv")
    assert open_data(again.data).train.targets.tolist() == data.train.targets.tolist()
    train(override(noisy_run, noise_kind="symmetric", max_steps=1), tmp_path / "clean")
    assert not Path("clean/labels.csv").exists()
    assert "wrong_labels" not in json.loads(Path("clean/versions.json").read_text())
    with pytest.raises(SystemExit):
        cli.main(["train", "--noise-kind", "asymetric"])
    assert "got 'asymetric'; did you mean asymmetric?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--noise-kind", "file:labels.pt"])
    assert "config: noise_kind: labels: expected FILE.csv, FILE.npy or FILE.npz:KEY, got" in capsys.readouterr().err
    assert cli.main(["train", "--label-noise", "0.1", "--noise-kind", "file:given.npy", "--data", "digits"]) == 2
    assert "label_noise=0.1 has no effect with noise_kind=file:given.npy" in capsys.readouterr().err


def test_a_run_resumes_with_the_same_labels_only(noisy_run, tmp_path, capsys):
    """A moved file is the same; without it the run folder has them. Other labels are refused."""
    swapped = [*LABELS[:2], *reversed(LABELS[2:4]), *LABELS[4:]]
    np.save("other.npy", swapped)
    with pytest.raises(ValueError, match="training images: the images are the same, their order or labels are not"):
        train(override(noisy_run, noise_kind="file:other.npy"), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="training images: the images are the same, their order or labels are not"):
        train(override(noisy_run, noise_kind="symmetric"), tmp_path / "run", resume=True)
    shutil.copytree("run", "whole")
    train(noisy_run, tmp_path / "whole", resume=True)
    Path("given.npy").rename("moved.npy")
    shutil.copytree("run", "gone")
    result = train(noisy_run, tmp_path / "gone", resume=True)
    assert result["finished"] and RunFolder("gone").read_config() == RunFolder("whole").read_config()
    result = train(override(noisy_run, noise_kind="file:moved.npy"), tmp_path / "run", resume=True)
    assert result["finished"] and RunFolder("run").read_config().data.noise_kind == "file:moved.npy"
    files = [Path(name, "checkpoints/last.safetensors").read_bytes() for name in ("whole", "gone", "run")]
    assert files[0] == files[1] == files[2]
    Path("moved.npy").unlink()
    assert evaluate_run("run", weights="last")["top1"] == result["test_top1"]  # which needs no training labels


def test_labels_in_the_run_folder_that_are_not_its_own_are_refused(noisy_run, tmp_path):
    file = Path("run/labels.csv")
    file.write_text(file.read_text().replace("class2,class0", "class1,class0", 1))
    with pytest.raises(ValueError, match=r"run/labels.csv has other labels than those that the run was trained on"):
        train(noisy_run, tmp_path / "run", resume=True)
    file.unlink()
    assert train(noisy_run, tmp_path / "run", resume=True)["finished"] and file.exists()


def test_a_killed_write_leaves_no_labels_of_another_run(noisy_run, tmp_path):
    """A run without a checkpoint may be replaced: nothing of its labels is left."""
    folder = RunFolder(tmp_path / "new")
    folder.create(noisy_run, "torch", data=open_data(noisy_run.data))
    assert folder.labels.exists()
    (tmp_path / "new" / ".labels.csv.123.tmp").write_text("cut")
    train(override(noisy_run, noise_kind="symmetric", max_steps=1), tmp_path / "new")
    assert not folder.labels.exists() and not list((tmp_path / "new").glob(".*"))


def test_the_smoke_of_a_run_with_a_file(noisy_run, folder, capsys):
    flags = ["--data", f"imagefolder:{folder}", "--image-size", "8", "--model", "small_cnn", "--method", "ce"]
    assert cli.main(["train", *flags, "--noise-kind", "file:given.npy", "--smoke", "--quiet"]) == 0
