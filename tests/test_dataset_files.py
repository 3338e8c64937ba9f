"""Datasets of files: class folders, list files, TinyImageNet, tar shards."""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from builders import contents, png, write_images

from dlb_fast.data import (
    ImageFolder,
    ListFile,
    OverlapLoader,
    SampleError,
    TarShards,
    TinyImageNet,
    open_dataset,
)
from dlb_fast.data.datasets import folder
from dlb_fast.data.datasets.verify import verify_data

Image = pytest.importorskip("PIL.Image")


FOLDER = ["b/2.png", "b/1.JPG", "a/deep/er/x.png", "c/0.jpeg", "a/y.PNG"]


def test_image_folder(tmp_path):
    write_images(tmp_path, [*FOLDER, ".hidden/z.png", "a/.z.png"])
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "readme.png").write_bytes(png(200))
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ["a", "b", "c"] and dataset.num_classes == 3 and len(dataset) == 5
    assert contents(dataset) == [(2, "a"), (4, "a"), (1, "b"), (0, "b"), (3, "c")]
    assert dataset.path(0) == str(tmp_path / "a" / "deep" / "er" / "x.png")
    assert dataset.read(2) == (tmp_path / "b" / "1.JPG").read_bytes()
    assert dataset[0][0].shape == (3, 5, 6) and dataset.targets.tolist() == [0, 0, 1, 1, 2]
    assert len(ImageFolder(tmp_path, extensions=(".png",), allow_empty=True)) == 3
    assert contents(dataset.select(np.array([4, 0]))) == [(3, "c"), (2, "a")]
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist; expected a folder"):
        ImageFolder(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        ImageFolder(tmp_path / "file")
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="has no class folders; expected .*CLASS/image"):
        ImageFolder(tmp_path / "flat")
    write_images(tmp_path / "set", FOLDER)
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in 'empty' of .* allow_empty=True"):
        ImageFolder(tmp_path / "set")
    dataset = ImageFolder(tmp_path / "set", allow_empty=True)
    assert dataset.classes == ["a", "b", "c", "empty"] and len(dataset) == 5
    with pytest.raises(ValueError, match="class folders that the given classes lack: 'c', 'empty'"):
        ImageFolder(tmp_path / "set", classes=["a", "b"])
    (tmp_path / "set" / "a" / "gone.png").symlink_to("nowhere")
    dataset = ImageFolder(tmp_path / "set", allow_empty=True)
    gone = next(i for i in range(len(dataset)) if dataset.path(i).endswith("gone.png"))
    with pytest.raises(FileNotFoundError, match="gone.png"):
        dataset.read(gone)


def test_links_are_followed_but_never_back(tmp_path, caplog):
    write_images(tmp_path / "set", ["cat/a.png", "dog/b.png"])
    write_images(tmp_path / "elsewhere", ["deep/c.png", "d.png"])
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    honest = [(0, "cat"), (1, "cat"), (0, "cat"), (1, "dog")]
    assert contents(ImageFolder(tmp_path / "set")) == honest and caplog.text == ""
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set" / "cat", target_is_directory=True)
    (tmp_path / "set" / "cat" / "root").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "cat" / "itself").symlink_to("itself")
    assert contents(ImageFolder(tmp_path / "set")) == honest
    assert re.search("cat/again links to .*cat, which is read already, and is not followed", caplog.text)
    assert "cat/root links to one of its parent folders and is not followed" in caplog.text
    assert "cat/up links to one of its parent folders" in caplog.text
    assert re.search("deep/back links to .*more, which is read already", caplog.text)


def test_links_that_fan_out_are_read_once(tmp_path, monkeypatch):
    """16 folders with two links each to the next are 65 536 paths to 16 folders."""
    write_images(tmp_path / "set", ["a/0.png", "b/1.png"])
    for level in range(16):
        (tmp_path / f"level{level}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"level{level}" / name).symlink_to(tmp_path / f"level{level + 1}", target_is_directory=True)
    write_images(tmp_path / "level16", ["2.png"])
    (tmp_path / "set" / "a" / "fan").symlink_to(tmp_path / "level0", target_is_directory=True)
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, look=os.scandir: listed.append(path) or look(path))
    dataset = ImageFolder(tmp_path / "set")
    assert [name for _, name in contents(dataset)] == ["a", "a", "b"] and len(listed) == 1 + 2 + 17
    listed.clear()
    assert verify_data(tmp_path / "set").files == 3 and len(listed) == 3 + 17


def test_one_file_in_two_classes_is_refused_and_twice_in_one_is_said(tmp_path, caplog):
    write_images(tmp_path, ["cat/a.png", "cat/b.png", "dog/c.png"])
    (tmp_path / "cat" / "z.png").symlink_to(tmp_path / "cat" / "a.png")
    os.link(tmp_path / "cat" / "b.png", tmp_path / "cat" / "y.png")
    assert len(ImageFolder(tmp_path)) == 5
    assert re.search(r"2 images are there twice, by links, such as .*cat/\w.png and .*cat/\w.png", caplog.text)
    os.link(tmp_path / "cat" / "b.png", tmp_path / "dog" / "b.png")
    with pytest.raises(ValueError, match=r"cat/\w.png and .*dog/b.png are the same file in two classes; remove one"):
        ImageFolder(tmp_path)
    (tmp_path / "dog" / "b.png").unlink()
    (tmp_path / "dog" / "more").symlink_to(tmp_path / "cat")
    with pytest.raises(ValueError, match="are the same file in two classes"):
        ImageFolder(tmp_path)


def test_a_listing_without_inodes_accuses_nobody(tmp_path, monkeypatch):
    write_images(tmp_path, ["cat/a.png", "dog/b.png"])
    find = folder.image_files
    monkeypatch.setattr(folder, "image_files", lambda *args: [(path, (1, 0)) for path, _ in find(*args)])
    assert len(ImageFolder(tmp_path)) == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Root reads everything, so the refusal is made here."""
    write_images(tmp_path, ["a/0.png", "a/sub/1.png", "b/2.png"])
    look = os.scandir

    def refuse(path):
        if str(path).endswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for closed in ("sub", "b", str(tmp_path)):
        with pytest.raises(PermissionError, match=rf"cannot read the folder .*{closed} \(Permission denied\).*chmod"):
            ImageFolder(tmp_path)


def test_many_classes_take_no_more_than_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "class_folders", lambda *args: [f"{k:06}" for k in range(30_000)])
    monkeypatch.setattr(folder, "image_files", lambda root, name, *args: [(name + "/0.png", (1, int(name)))])
    started = time.process_time()  # what other processes take does not count
    assert len(ImageFolder(tmp_path)) == 30_000
    assert time.process_time() - started < 30  # a set of all classes made for each of them took minutes


@pytest.mark.parametrize("extensions", ["jpg", ".jpg"])
def test_one_string_is_not_a_list_of_extensions(tmp_path, extensions):
    write_images(tmp_path, ["a/0.jpg"])
    with pytest.raises(TypeError, match=r"ImageFolder: extensions: .* got the string .*; pass \(\"\.jpg\","):
        ImageFolder(tmp_path, extensions=extensions)


@pytest.mark.parametrize("give_path", [False, True])
def test_a_pipe_among_the_images_is_named_and_never_opened(tmp_path, give_path):
    write_images(tmp_path, ["a/0.png", "a/1.png", "a/2.png"])
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    dataset = ImageFolder(tmp_path, classes=["a"])
    if give_path:  # a user's dataset may name the file and leave the reading to the loader
        dataset.read = dataset.path
    with (
        OverlapLoader(dataset, 4, num_threads=1, timeout=20, drop_last=False) as loader,
        pytest.raises(SampleError, match=r"pipe\.jpg: .*not a regular file but a pipe, socket or device"),
    ):
        list(loader)


LEVELS = {  # a layout, and what is said of it
    "one level too deep": (
        ["data/cat/0.png", "data/dog/0.png"],
        r"'data' holds no images but the folders 'cat', 'dog'.*Pass .*/data,",
    ),
    "two levels too deep": (
        ["a/b/cat/0.png", "a/b/dog/0.png"],
        r"'a' holds no images but the folders 'b'.*Pass .*/a/b,",
    ),
    "splits too deep": (
        ["set/train/cat/0.png", "set/val/cat/0.png"],
        "'set' holds no images but the folders 'train', 'val'",
    ),
    "inside the only class": (["images/0.png", "images/1.png"], "a single class folder, 'images', so every answer"),
    "one class, deeper": (["cat/images/0.png"], "a single class folder, 'cat', so every answer"),
    "splits and classes swapped": (
        ["cat/train/0.png", "cat/val/0.png", "dog/train/0.png"],
        "'cat' holds no images but",
    ),
    "taxonomy": (
        ["pets/cat/0.png", "pets/dog/0.png", "farm/cow/0.png"],
        "'pets' holds no images but the folders 'cat', 'dog'",
    ),
    "container among classes": (
        ["cat/0.png", "dog/0.png", "more/lion/0.png", "more/tiger/0.png"],
        "'more' holds no images",
    ),
    "second copy": (
        ["cat/0.png", "dog/0.png", "data/cat/0.png", "data/1.png"],
        "data holds folders named like classes beside it",
    ),
    "split among classes": (
        ["cat/0.png", "dog/0.png", "holdout/cat/0.png"],
        "holdout holds folders named like classes",
    ),
    "thumbnails as a class": (
        ["cat/0.png", "dog/0.png", "Thumbnails/0.png"],
        "'Thumbnails' is named like a store of thumb",
    ),
    "thumbnails in a class": (
        ["cat/0.png", "cat/x/_thumbs/0.png", "dog/0.png"],
        "cat: the folder '_thumbs' is named like",
    ),
    "images and masks": (
        ["images/0.png", "masks/0.png"],
        "'images', 'masks': named like a part of a dataset, not like",
    ),
    "images and trimaps": (
        ["images/0.png", "annotations/trimaps/0.png"],
        "'annotations', 'images': named like a part of a dataset",
    ),
    "splits in the classes": (
        ["cat/0.png", "cat/val/1.png", "dog/0.png"],
        "cat: the folders 'val' are named like splits or like annotations",
    ),
    "masks in the classes": (["cat/0.png", "cat/masks/0.png", "dog/0.png"], "cat: the folders 'masks' are named like"),
    "flat splits of another name": (
        ["images_train/0.png", "images_val/0.png"],
        "'images_train', 'images_val' are named like splits",
    ),
    "splits in the names of classes": (
        ["testCat/0.png", "testDog/0.png", "trainCat/0.png", "trainDog/0.png"],
        "'testCat', 'trainCat' are named like splits",
    ),
}


@pytest.mark.parametrize("case", LEVELS)
def test_where_the_class_folders_are_has_to_be_certain(tmp_path, case):
    paths, match = LEVELS[case]
    write_images(tmp_path, paths)
    with pytest.raises(ValueError, match=match):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match=match):
        open_dataset(f"imagefolder:{tmp_path}")
    named = sorted({path.split("/")[0] for path in paths})
    assert len(ImageFolder(tmp_path, classes=named)) == len(paths)  # which is how a user says that they are certain


def test_the_folder_that_a_message_names_is_the_right_one(tmp_path):
    write_images(tmp_path, ["data/deep/cat/0.png", "data/deep/dog/0.png"])
    with pytest.raises(ValueError) as caught:
        ImageFolder(tmp_path)
    (right,) = re.findall(r"Pass (\S+),", str(caught.value))
    assert ImageFolder(right).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "paths",
    [
        ["n1/images/0.png", "n2/images/0.png"],  # TinyImageNet's training folder
        ["cat/cat/0.png", "dog/dog/0.png"],  # each class unzipped into a folder of its name
        ["cat/0.png", "cat/2020/0.png", "cat/2021/1.png", "dog/0.png"],
        ["bullet_train/0.png", "test_tube/0.png"],
        ["mask/0.png", "no_mask/0.png"],
    ],
)
def test_folders_inside_of_classes_that_leave_no_doubt(tmp_path, paths):
    write_images(tmp_path, paths)
    assert len(ImageFolder(tmp_path)) == len(paths) and ImageFolder(tmp_path).num_classes == 2


def test_what_is_not_used_is_said_in_one_line(tmp_path, caplog):
    write_images(tmp_path, [
        "cat/0.png", "dog/0.png", ".thumbnails/0.png", "__MACOSX/cat/._0.png", "cat/@eaDir/0.png/x.png",
        "dog/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", "lone.jpg", "$RECYCLE.BIN/1.png", "lost+found/1.png",
    ])  # fmt: skip
    for name in ("cat/Thumbs.db", "dog/.DS_Store", "cat/1.heic", "cat/2.heic", "dog/list.txt", "dog/1.GIF"):
        (tmp_path / name).write_bytes(b"")
    for name in ("lion.zip", "dog/n01.tar", "metadata.csv", "dog/notes.csv"):
        (tmp_path / name).write_bytes(b"")
    dataset = ImageFolder(tmp_path)
    assert [os.path.relpath(dataset.path(i), tmp_path) for i in range(len(dataset))] == ["cat/0.png", "dog/0.png"]
    assert dataset.classes == ["cat", "dog"]
    (line,) = [record.getMessage() for record in caplog.records]
    for part in (
        "not used: the folders '$RECYCLE.BIN', '.ipynb_checkpoints', '.thumbnails', '@eaDir', '__MACOSX' and 1 more",
        "images beside the class folders (1: 'lone.jpg')",
        "files of other extensions (1 .gif, 2 .heic)",
        "archives and tables, which may hold images or labels ('lion.zip', 'metadata.csv', 'n01.tar')",
        "images whose names begin with a dot (1)",
    ):
        assert part in line


def test_masks_beside_their_images_are_said(tmp_path, caplog):
    write_images(tmp_path, ["benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_1.png", "mask/maskA.png"])
    assert len(ImageFolder(tmp_path)) == 4
    assert "2 images are named like masks of others and are trained on: 'benign/b (1)_mask.png'" in caplog.text


def test_class_names_that_differ_in_case_only_are_said(tmp_path, caplog):
    write_images(tmp_path, ["Cat/0.png", "cat/0.png", "dog/0.png"])
    assert ImageFolder(tmp_path).classes == ["Cat", "cat", "dog"]
    assert "1 classes differ in case, spaces or the form of Unicode only, such as 'Cat', 'cat'" in caplog.text


NFC, NFD = "caf\u00e9", "cafe\u0301"  # of which macOS writes the second


def test_class_names_that_look_alike_are_said(tmp_path, caplog):
    write_images(tmp_path, [f"{NFC}/0.png", f"{NFD}/0.png", "dog/0.png"])
    assert ImageFolder(tmp_path).classes == [NFD, NFC, "dog"]
    assert (
        r"1 classes differ in case, spaces or the form of Unicode only, such as 'cafe\u0301', 'caf\xe9'" in caplog.text
    )
    (tmp_path / "list.txt").write_text("a.png\tcat\nb.png\tcat\u200b\ndog/0.png\tdog\n")
    assert ListFile(tmp_path / "list.txt").num_classes == 3 and r"such as 'cat', 'cat\u200b'" in caplog.text


@pytest.mark.parametrize(("train", "val"), [(NFC, NFD), (NFD, NFC)])
def test_a_split_that_another_system_unpacked_has_the_same_classes(tmp_path, train, val):
    write_images(tmp_path, [f"train/{train}/0.png", "train/dog/1.png", f"val/{val}/2.png", "val/dog/3.png"])
    dataset = open_dataset(f"imagefolder:{tmp_path}", "test")
    assert contents(dataset) == [(2, train), (3, "dog")] and dataset.classes == [train, "dog"]


def test_numbers_as_class_names_are_sorted_as_text(tmp_path, caplog):
    write_images(tmp_path, [f"{k}/0.png" for k in range(11)])
    assert ImageFolder(tmp_path).classes[:3] == ["0", "1", "10"]
    assert "the classes are sorted as text, as in torchvision: '2' is 2" not in caplog.text
    assert "the classes are sorted as text, as in torchvision: '10' is 2" in caplog.text


TRAIN = ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png"]
SPLITS = {  # further images, and the folder that is the validation set
    "val": (["val/cat/0.png", "val/dog/0.png"], "val"),
    "Val": (["Val/cat/0.png", "Val/dog/0.png"], "Val"),
    "VALID": (["VALID/cat/0.png", "VALID/dog/0.png"], "VALID"),
    "testing": (["testing/cat/0.png", "testing/dog/0.png"], "testing"),
    "val_images": (["val_images/cat/0.png", "val_images/dog/0.png"], "val_images"),
    "val before test": (
        ["test/cat/0.png", "test/dog/0.png", "validation/cat/0.png", "validation/dog/0.png"],
        "validation",
    ),
    "a test set without labels": (["test/0.png", "test/1.png"], None),
    "hidden": (["__MACOSX/cat/0.png", ".val/cat/0.png"], None),
    "none": ([], None),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_in_every_usual_spelling(tmp_path, caplog, case):
    more, validation = SPLITS[case]
    write_images(tmp_path, [*TRAIN, *more])
    train, test = (open_dataset(f"imagefolder:{tmp_path}", split) for split in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    if validation is None:
        assert (len(train), len(test)) == (2, 2) and "a stratified tenth (2 of 4) is held out" in caplog.text
        assert case != "a test set without labels" or "trains on train; not used: 'test'" in caplog.text
    else:
        assert len(train) == 4 and {test.path(i) for i in range(2)} == {str(tmp_path / path) for path in more[-2:]}
        assert ("tests on" in caplog.text) == (case not in ("val",))
    for record in caplog.records:  # what is said is said once, though both splits were opened
        assert sum(record.getMessage() == other.getMessage() for other in caplog.records) == 1


UNCERTAIN = {
    "two validation folders": (["val/cat/0.png", "Valid/cat/0.png"], "several folders for one split: 'Valid', 'val'"),
    "two training folders": (["Training/cat/0.png"], "several folders for one split: 'Training', 'train'"),
    "an unknown split": (["holdout/cat/0.png"], r"'holdout' beside 'train' has folders like the classes .*\('cat'\)"),
    "a class or a split": (["bus/0.png"], "'bus' beside 'train' holds images or nothing: is it a split or a class"),
    "val without classes": (["val/0.png"], "val has no class folders"),
    "another class in val": (
        ["val/cat/0.png", "val/cow/0.png"],
        "class folders that the given classes lack: 'cow'; the cl",
    ),
    "another case in val": (
        ["val/Cat/0.png", "val/Dog/0.png"],
        "lack: 'Cat', 'Dog'; the classes are 'cat', 'dog'. Rename",
    ),
}


@pytest.mark.parametrize("case", UNCERTAIN)
def test_splits_that_are_not_certain_are_refused(tmp_path, case):
    more, match = UNCERTAIN[case]
    write_images(tmp_path, [*TRAIN, *more])
    with pytest.raises(ValueError, match=match):
        open_dataset(f"imagefolder:{tmp_path}", "test")


def test_a_validation_folder_that_is_the_training_folder_is_refused(tmp_path):
    write_images(tmp_path, TRAIN)
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(
        ValueError, match="val is .*train, so the test images would be those of the training; remove it"
    ):
        open_dataset(f"imagefolder:{tmp_path}")


def test_a_class_of_the_validation_that_is_that_of_the_training_is_refused(tmp_path):
    write_images(tmp_path, [*TRAIN, "val/cat/0.png"])
    (tmp_path / "val" / "dog").symlink_to("../train/dog")
    with pytest.raises(ValueError, match="val/dog is .*train/dog, so its test images would be those of the training"):
        open_dataset(f"imagefolder:{tmp_path}", "test")


def test_classes_that_the_validation_folder_lacks_are_said(tmp_path, caplog):
    write_images(tmp_path, [*TRAIN, "val/dog/0.png"])
    assert open_dataset(f"imagefolder:{tmp_path}", "test").targets.tolist() == [1]
    assert "val lacks 1 of the 2 classes of" in caplog.text and "'cat'" in caplog.text


def test_train_may_be_a_class(tmp_path):
    vehicles = write_images(tmp_path / "vehicles", [f"{c}/{k}.png" for c in ("bus", "car", "train") for k in range(3)])
    assert open_dataset(f"imagefolder:{vehicles}").classes == ["bus", "car", "train"]
    lone = write_images(tmp_path / "lone", [f"train/{c}/{k}.png" for c in "ab" for k in range(3)])
    assert open_dataset(f"imagefolder:{lone}").classes == ["a", "b"]
    flat = write_images(tmp_path / "flat", ["train/0.png", "val/a/0.png"])
    with pytest.raises(ValueError, match="train has no class folders"):
        open_dataset(f"imagefolder:{flat}")


def test_open_image_folder_with_and_without_a_validation_folder(tmp_path, caplog):
    write_images(tmp_path / "two", [f"train/{c}/{k}.png" for c in "ab" for k in range(3)] + ["val/b/0.png"])
    train, test = (open_dataset(f"imagefolder:{tmp_path}/two", split) for split in ("train", "test"))
    assert len(train) == 6 and train.classes == test.classes == ["a", "b"] and test.targets.tolist() == [1]
    caplog.set_level("INFO", "dlb_fast.data")
    write_images(tmp_path / "one", [f"{c}/{k:02}.png" for c in "ab" for k in range(20)])
    train, test = (open_dataset(f"imagefolder:{tmp_path}/one", split) for split in ("train", "test"))
    assert np.bincount(train.targets).tolist() == [18, 18] and np.bincount(test.targets).tolist() == [2, 2]
    assert not {train.path(i) for i in range(36)} & {test.path(i) for i in range(4)}
    assert "held out" in caplog.text
    write_images(tmp_path / "few", ["a/0.png", "a/1.png", "b/0.png"])
    assert len(open_dataset(f"imagefolder:{tmp_path}/few", "test")) == 1
    assert "(1 of 3) is held out, without the 1 classes of a single image" in caplog.text
    write_images(tmp_path / "bare", ["train/0.png", "train/1.png"])
    with pytest.raises(ValueError, match="bare/train has no class folders"):
        open_dataset(f"imagefolder:{tmp_path}/bare")
    write_images(tmp_path / "lone", ["a/0.png", "b/0.png"])
    with pytest.raises(ValueError, match="nothing to hold out"):
        open_dataset(f"imagefolder:{tmp_path}/lone")


def test_paths_are_kept_in_one_array(tmp_path):
    names = [f"class/{'x' * (k % 40)}é{k}.jpg" for k in range(5000)]
    undecodable = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    dataset = folder.FileDataset([*names, undecodable], [0] * 5001, ["a"], "root", "test")
    assert [dataset.path(k) for k in range(5001)] == [f"root/{name}" for name in [*names, undecodable]]
    assert len(pickle.dumps(dataset)) < 5001 * (max(len(n.encode()) for n in names) + 8) + 2000
    assert dataset.select(np.array([7])).path(0) == f"root/{names[7]}"


def test_list_file(tmp_path):
    write_images(tmp_path / "images", ["x.png", "y z.png", "w.png"])
    lists = tmp_path / "images" / "train.txt"
    lists.write_text("# a comment\nx.png 2\n\ny z.png\t0\nw.png 2\n")
    dataset = ListFile(lists)
    assert contents(dataset) == [(0, "2"), (1, "0"), (2, "2")] and dataset.num_classes == 3
    lists.write_text("x.png dog\ny z.png cat\n")
    assert contents(ListFile(lists)) == [(0, "dog"), (1, "cat")] and ListFile(lists).classes == ["cat", "dog"]
    other = tmp_path / "other.txt"
    other.write_text("w.png cat\n")
    dataset = ListFile(other, root=tmp_path / "images", classes=["dog", "cat"])
    assert contents(dataset) == [(2, "cat")] and dataset.targets.tolist() == [1]
    other.write_text("w.png cat\nalone\n")
    with pytest.raises(ValueError, match="other.txt line 2: expected `path<TAB>label`, got 'alone'"):
        ListFile(other)
    other.write_text("w.png cow\n")
    with pytest.raises(ValueError, match="line 1: label 'cow' is not one of the given classes"):
        ListFile(other, classes=["cat"])
    other.write_text("\n")
    with pytest.raises(ValueError, match="lists no images"):
        ListFile(other)
    with pytest.raises(FileNotFoundError, match="no file .*gone"):
        ListFile(tmp_path / "gone")


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("x,y.jpg n3", "x,y.jpg", "n3"),
        ("a.jpg b.jpg   n3", "a.jpg b.jpg", "n3"),
        ("no extension n3", "no extension", "n3"),
        ("c.jpg\tgolden retriever, young", "c.jpg", "golden retriever, young"),
        ("a\tb.jpg\tdog", "a\tb.jpg", "dog"),
        ("deep/er/a.jpg\tn3", "deep/er/a.jpg", "n3"),
        ("/elsewhere/a.jpg n3", "/elsewhere/a.jpg", "n3"),
    ],
)
def test_the_label_of_a_line_follows_the_last_tab_or_is_the_last_word(tmp_path, line, path, label):
    write_images(tmp_path, ["0.jpg"] + ([] if path.startswith("/") else [path]))
    lists = tmp_path / "list.txt"
    lists.write_text("".join(f"{k}.jpg n{k}\n" for k in range(12)) + line + "\n")
    dataset = ListFile(lists)
    assert dataset.path(12) == str(tmp_path / path) and dataset.classes[dataset.targets[12]] == label


BAD_LISTS = {  # name: (the lines, what is said of them)
    "header with tabs": (
        "path\tlabel\n0.jpg\t1\n1.jpg\t0\n",
        r"line 1: .*got 'path\\tlabel', which names no image; if.*header",
    ),
    "header with spaces": ("filename label\n0.jpg 1\n", "line 1: .*which names no image; if it is a header, delete it"),
    "header of a csv": ("filename,label\n0.jpg,1\n", "line 1: .*which names no image; if it is a header"),
    "csv": ("0.jpg,1\n1.jpg,0\n", "line 1: .*got '0.jpg,1'; put a tab between path and label"),
    "csv with spaces": ("0.jpg, 1\n1.jpg, 0\n", "line 1: .*put a tab"),
    "csv with names of two words": ("0.jpg,golden retriever\n", "line 1: .*put a tab"),
    "semicolons": ("0.jpg;1\n", "line 1: .*put a tab"),
    "quotes": ('"0.jpg"\t1\n"1.jpg"\t0\n', "line 1: quotes are part of a path or label here"),
    "quoted labels": ("0.jpg\t'cat'\n", "line 1: quotes are part"),
    "label first": ("1 0.jpg\n0 1.jpg\n", "line 1: .*the path comes first, then the label"),
    "names of two words": ("0.jpg golden retriever\n", "line 1: .*put a tab"),
    "three columns": ("0.jpg\tcat\ttrain\n", "line 1: .*put a tab"),
    "two images": ("0.jpg 1.jpg cat\n", "line 1: .*put a tab"),
    "no label": ("0.jpg 1\n1.jpg\t\n", "line 2: expected `path<TAB>label`, got '1.jpg'"),
    "mixed labels": (
        "0.jpg 1\n1.jpg 0\n2.jpg dog\n",
        "line 3 has the label 'dog', line 1 the number '1', so it is not cert",
    ),
    "fractions": ("0.jpg 1.0\n1.jpg 0.0\n", "line 1: the label '1.0' is a number but no class index"),
    "signs": ("0.jpg -1\n1.jpg +1\n", "line 1: the label '-1' is a number but no class index"),
    "missing values": ("0.jpg cat\n1.jpg nan\n", "line 2: the label 'nan' is a number but no class index"),
    "one class": ("0.jpg cat\n1.jpg cat\n", "all 2 samples have the label 'cat', so every answer"),
    "one index": ("0.jpg 3\n1.jpg 3\n", "all 2 samples have the label '3', so every answer"),
    "two labels": ("0.jpg cat\n1.jpg dog\n./0.jpg dog\n", "line 3: ./0.jpg has the label 'dog', but 'cat' in line 1"),
    "several indices": (
        "0.jpg\t0 1\n1.jpg\t1 2\n",
        "line 1: expected one class index or one name, got the label '0 1'",
    ),
    "indices with commas": (
        "0.jpg 1\n1.jpg\t0,1\n",
        "line 2: expected one class index or one name, got the label '0,1'",
    ),
    "one-hot": ("0.jpg\t[0, 1]\n1.jpg\t[1, 0]\n", r"line 1: expected one .*label '\[0, 1\]'"),
    "a comma behind": ("0.jpg cat,\n1.jpg dog,\n", "line 1: expected one .*label 'cat,'"),
    "a zero byte": ("0.jpg 1\x00\n1.jpg 0\x00\n", "line 1: expected one .*got the label '1.x00'"),
    "thousands of digits": (f"0.jpg {'9' * 5000}\n1.jpg {'9' * 5000}0\n", "line 1: the label '9+' is a number but no"),
    "a number too many": (
        "0.jpg 0\n1.jpg 1\n2.jpg 999999\n",
        "line 3: label 999999: .* of the 1000000 classes .* only 3 occur",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_every_line_of_a_list_is_used_or_an_error(tmp_path, case):
    text, match = BAD_LISTS[case]
    write_images(tmp_path, [f"{k}.jpg" for k in range(3)])
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=f"list.txt:? {match}"):
        ListFile(tmp_path / "list.txt")


def test_one_image_by_two_paths_has_one_label(tmp_path):
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "list.txt").write_text(f"0.jpg cat\n1.jpg dog\n{tmp_path}/0.jpg dog\n")
    with pytest.raises(ValueError, match=r"line 3: .*/0.jpg has the label 'dog', but 'cat' in line 1"):
        ListFile(tmp_path / "list.txt")


def test_what_is_odd_about_a_list_is_said(tmp_path, caplog):
    write_images(tmp_path, [f"{k}.jpg" for k in range(3)])
    lists = tmp_path / "list.txt"
    lists.write_text("0.jpg 1\n1.jpg 2\n2.jpg 2\n2.jpg 2\n")
    assert ListFile(lists).targets.tolist() == [1, 2, 2, 2]
    assert "list.txt: 1 of the 3 classes have no image: '0' (do the labels count from 1?)" in caplog.text
    assert "list.txt: 1 lines repeat an image" in caplog.text
    lists.write_text("0.jpg cat\n1.jpg Cat\n")
    assert ListFile(lists).classes == ["Cat", "cat"]
    assert "1 classes differ in case, spaces or the form of Unicode only, such as 'Cat', 'cat'" in caplog.text


def test_relative_paths_begin_at_the_list(tmp_path):
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "list.txt").write_text("a.jpg 1\nb.jpg 0\n")
    with pytest.raises(
        FileNotFoundError, match=rf"line 1: no file .*a.jpg; relative paths begin at {tmp_path}, pass root"
    ):
        ListFile(tmp_path / "list.txt")
    assert contents(ListFile(tmp_path / "list.txt", root=tmp_path / "images")) == [(0, "1"), (1, "0")]


def test_a_list_with_a_mark_in_front(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg 1\r\ncaf\xe9.jpg 0\r\n")
    dataset = ListFile(tmp_path / "list.txt")
    assert dataset.path(0) == str(tmp_path / "a.jpg") and os.fsencode(dataset.path(1)).endswith(b"/caf\xe9.jpg")


def test_numbers_that_are_no_class_indices(tmp_path):
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "list.txt").write_text("a.jpg 20231105\nb.jpg 20231106\n")
    with pytest.raises(ValueError, match=r"list.txt: line 2: label 20231106: numbers are class indices, and of the"):
        ListFile(tmp_path / "list.txt")
    assert ListFile(tmp_path / "list.txt", classes=["20231105", "20231106"]).targets.tolist() == [0, 1]
    write_tar(tmp_path / "dates.tar", [("0.png", png(1)), ("0.cls", b"1"), ("1.png", png(1)), ("1.cls", b"999999")])
    with pytest.raises(ValueError, match=r"dates.tar': .*dates.tar: 1.png: label 999999: numbers are class indices"):
        TarShards(tmp_path / "dates.tar")


def test_tiny_imagenet(tmp_path):
    write_images(
        tmp_path,
        [
            "train/n2/images/n2_0.JPEG",
            "train/n1/images/n1_0.JPEG",
            "train/n1/images/n1_1.JPEG",
            "val/images/val_0.JPEG",
        ],
    )
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn2\t0\t32\t44\t62\n")
    assert contents(TinyImageNet(tmp_path)) == [(1, "n1"), (2, "n1"), (0, "n2")]
    assert contents(open_dataset(f"tinyimagenet:{tmp_path}", "test")) == [(3, "n2")]
    with pytest.raises(ValueError, match=f"TinyImageNet as published; use tinyimagenet:{tmp_path}"):
        open_dataset(f"imagefolder:{tmp_path}")
    annotations.write_text("val_0.JPEG\tn9\n")
    with pytest.raises(ValueError, match="val_annotations.txt line 1: expected"):
        TinyImageNet(tmp_path, "test")
    (tmp_path / "wnids.txt").unlink()
    with pytest.raises(FileNotFoundError, match="wnids.txt is missing"):
        TinyImageNet(tmp_path)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_shards_by_index(tmp_path):
    write_tar(tmp_path / "s0.tar", [("0.png", png(10)), ("0.cls", b"1"), ("1.png", png(11)), ("1.cls", b"0\n")])
    write_tar(tmp_path / "s1.tar", [("2.cls", b"2"), ("2.json", b"{}"), ("2.png", png(12))])
    dataset = TarShards(tmp_path)
    assert contents(dataset) == [(10, "1"), (11, "0"), (12, "2")] and dataset.num_classes == 3
    assert dataset.path(2) == f"{tmp_path}/s1.tar!2.png"
    assert contents(dataset.select(np.array([2, 0]))) == [(12, "2"), (10, "1")]
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda k: dataset.read(k % 3), range(300)))
    assert read == [png(10 + k % 3) for k in range(300)]
    dataset.close()
    assert dataset.read(0) == png(10)
    write_tar(tmp_path / "folders.tar", [("cat/7.png", png(1)), ("dog/7.png", png(2))])
    assert contents(TarShards([tmp_path / "folders.tar"])) == [(1, "cat"), (2, "dog")]


def add_link(path, name, target, kind):
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)


def test_links_and_hidden_members_of_a_tar(tmp_path):
    shard = tmp_path / "s.tar"
    hidden = [("dog/._e.jpg", b"xx"), (".trash/x.jpg", b"x"), ("dog/._e.cls", b"\xff\xfe")]
    write_tar(shard, [("./cat/a.jpg", png(1)), ("dog/b.jpg", png(2)), *hidden, ("dog/raw.bin", png(3))])
    add_link(shard, "cat/c.jpg", "./cat/a.jpg", tarfile.LNKTYPE)
    add_link(shard, "dog/d.jpg", "../dog/b.jpg", tarfile.SYMTYPE)
    add_link(shard, "dog/e.jpg", "d.jpg", tarfile.SYMTYPE)
    add_link(shard, "cat/f.jpg", "../dog/raw.bin", tarfile.SYMTYPE)
    assert contents(TarShards(shard)) == [(1, "cat"), (2, "dog"), (1, "cat"), (2, "dog"), (2, "dog"), (3, "cat")]
    for kind, target in ((tarfile.LNKTYPE, "cat/a.jpg"), (tarfile.SYMTYPE, "../cat/a.jpg")):
        other = tmp_path / "other.tar"
        write_tar(other, [("cat/a.jpg", png(1)), ("dog/b.jpg", png(2))])
        add_link(other, "dog/c.jpg", target, kind)
        with pytest.raises(ValueError, match=r"cat/a.jpg and dog/c.jpg are the same file, by a link, in two classes"):
            TarShards(other)
    add_link(shard, "cat/g.jpg", "../../outside.jpg", tarfile.SYMTYPE)
    with pytest.raises(ValueError, match=r"cat/g.jpg is a link to ../outside.jpg, which the tar does not contain"):
        TarShards(shard)
    loop = tmp_path / "loop.tar"
    write_tar(loop, [("cat/a.jpg", png(1))])
    add_link(loop, "cat/b.jpg", "c.jpg", tarfile.SYMTYPE)
    add_link(loop, "cat/c.jpg", "b.jpg", tarfile.SYMTYPE)
    with pytest.raises(ValueError, match=r"cat/b.jpg is a link to"):
        TarShards(loop)
    write_tar(tmp_path / "lone.tar", [("cat/a.jpg", png(1)), ("./0.jpg", png(1))])
    with pytest.raises(ValueError, match=r"./0.jpg has neither a ./0.cls beside it nor a class folder"):
        TarShards(tmp_path / "lone.tar")


P = png(7)
BAD_TARS = {  # name: (the members, what is said of them)
    "an image without a label": (
        [("c/0.png", P), ("c/0.cls", b"0"), ("c/1.png", P)],
        "c/1.png has no .cls, 1 of 2 images",
    ),
    "a label without an image": ([("0.png", P), ("0.cls", b"0"), ("1.cls", b"1")], "1.cls has no image"),
    "a label of another format": (
        [("0.png", P), ("0.cls", b"0"), ("1.heic", P), ("1.cls", b"1")],
        "1.cls has no image",
    ),
    "two images of a label": ([("0.left.png", P), ("0.right.png", P), ("0.cls", b"0")], "two images of the key '0'"),
    "two formats": (
        [("c/0.png", P), ("c/0.jpg", P), ("d/1.png", P)],
        "c/0.png and c/0.jpg are two images of the key 'c/0'",
    ),
    "an image and its mask": ([("0.png", P), ("0.seg.png", P), ("0.cls", b"0")], "0.png and 0.seg.png are two images"),
    "a mask in a class folder": (
        [("c/0.png", P), ("c/0.seg.png", P), ("d/1.png", P)],
        "are two images of the key 'c/0'",
    ),
    "two images of a json": (
        [("c/0.l.png", P), ("c/0.r.png", P), ("c/0.json", b"{}"), ("d/1.png", P)],
        "of the key 'c/0'",
    ),
    "twice": ([("c/0.png", P), ("d/1.png", P), ("./c/0.png", P)], "./c/0.png is there twice"),
    "an empty label": ([("0.png", P), ("0.cls", b" \n")], "0.cls: expected one label as text, .* got 2 bytes"),
    "a label of bytes": ([("0.png", P), ("0.cls", b"\xff\x03")], "0.cls: expected one label as text"),
    "two labels": ([("0.png", P), ("0.cls", b"3\n5\n")], "0.cls: expected one label as text"),
    "a long label": ([("0.png", P), ("0.cls", b"3" * 2000)], "0.cls: expected one label as text, .* got 2000 bytes"),
    "mixed labels": (
        [("0.png", P), ("0.cls", b"3"), ("1.png", P), ("1.cls", b"dog")],
        "1.png has the label 'dog', .*number '3'",
    ),
    "a fraction": (
        [("0.png", P), ("0.cls", b"3.0"), ("1.png", P), ("1.cls", b"1.0")],
        "the label '3.0' is a number but no",
    ),
    "one class": ([("c/0.png", P), ("c/1.png", P)], "all 2 samples have the label 'c'"),
    "two splits": (
        [("train/c/0.png", P), ("train/d/1.png", P), ("val/c/2.png", P)],
        "different folders \\('val' and 'train'\\)",
    ),
    "two depths": ([("c/0.png", P), ("d/1.png", P), ("d/more/2.png", P)], "different folders \\('d' and '.'\\)"),
    "a json in class folders": (
        [("0/a.png", P), ("0/a.json", b'{"label": 1}'), ("1/b.png", P)],
        "'0/a.json' may be the label of the image of its name, which has no .cls",
    ),
    "a text of another ending": (
        [("0/a.png", P), ("1/b.png", P), ("1/b.cls.txt", b"0")],
        "'1/b.cls.txt' may be the label",
    ),
    "one-hot": ([("0.png", P), ("0.cls", b"[0, 1]"), ("1.png", P), ("1.cls", b"[1, 0]")], r"0.png: .*label '\[0, 1\]'"),
    "a json as label": (
        [("0.png", P), ("0.cls", b'{"label": 1}'), ("1.png", P), ("1.cls", b"{}")],
        "0.png: .*brackets",
    ),
    "several labels": ([("0.png", P), ("0.cls", b"0 1"), ("1.png", P), ("1.cls", b"1 2")], "0.png: .*label '0 1'"),
    "a zero byte": ([("0.png", P), ("0.cls", b"0\0"), ("1.png", P), ("1.cls", b"1\0")], "0.png: .*label '0.x00'"),
    "images and masks": (
        [("images/0.png", P), ("masks/0.png", P)],
        "'images', 'masks': named like a part of a dataset",
    ),
    "thumbnails": ([("c/0.png", P), ("d/0.png", P), ("Thumbs/0.png", P)], "'Thumbs': named like a part of a dataset"),
    "flat splits": ([("x_train/0.png", P), ("x_test/0.png", P)], "'x_test', 'x_train' are named like splits"),
    "sessions": ([("c/2020/0.png", P), ("d/2020/1.png", P)], "different folders \\('d' and 'c'\\)"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_every_label_and_image_of_a_tar_is_certain(tmp_path, case):
    members, match = BAD_TARS[case]
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=match):
        TarShards(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        (["img.0000.jpg", "img.0000.cls=1", "img.0001.jpg", "img.0001.cls=0"], ["1", "0"]),
        (["x/img.0000.jpg", "x/img.0000.cls=1", "x/img.0001.jpg", "x/img.0001.cls=0"], ["1", "0"]),
        (["a.b.c.jpg", "a.b.cls=0", "a.d.jpg", "a.d.cls=1"], ["0", "1"]),
        (["0.input.png", "0.cls=1", "1.input.png", "1.cls=0"], ["1", "0"]),
        (["0.CLS=dog", "0.JPG", "1.CLS=cat", "1.JPG"], ["dog", "cat"]),
        (["cat/IMG.2020.01.jpg", "cat/IMG.2020.02.jpg", "dog/IMG.2020.01.jpg"], ["cat", "cat", "dog"]),
        (["set/cat/0.jpg", "set/dog/0.jpg", "__MACOSX/set/cat/._0.jpg"], ["cat", "dog"]),
        (["cat/@eaDir/0.jpg", "cat/0.jpg", "dog/0.jpg"], ["cat", "dog"]),
    ],
)
def test_dotted_names_keep_their_labels(tmp_path, members, labels):
    write_tar(tmp_path / "s.tar", [(m.partition("=")[0], m.partition("=")[2].encode() or P) for m in members])
    dataset = TarShards(tmp_path / "s.tar")
    assert [dataset.classes[label] for label in dataset.targets] == labels


def test_a_label_with_a_mark_in_front(tmp_path):
    members = [("0.png", P), ("0.cls", b"\xef\xbb\xbf1\r\n"), ("1.png", P), ("1.cls", b"0")]
    write_tar(tmp_path / "s.tar", members)
    assert TarShards(tmp_path / "s.tar").targets.tolist() == [1, 0]


ENDS = {  # name: what happens to a tar of four images of two blocks each, and its zeros
    "cut between two files": lambda data: data[: 2 * 1024],
    "cut in a header": lambda data: data[: 2 * 1024 + 100],
    "cut before the zeros": lambda data: data[: 4 * 1024],
    "a damaged header": lambda data: data[: 2 * 1024] + b"?" + data[2 * 1024 + 1 :],
    "zeros in the middle": lambda data: data[: 2 * 1024] + bytes(1024) + data[2 * 1024 :],
    "two tar files": lambda data: data + data,
    "bytes behind": lambda data: data + b"more",
}


@pytest.mark.parametrize("case", ENDS)
def test_a_tar_that_is_not_whole_is_refused(tmp_path, case):
    """`tarfile` takes each of these for the end, and the images behind would be missing."""
    shard = tmp_path / "s.tar"
    write_tar(shard, [(f"{k}/{name}.png", P) for k in "ab" for name in "xy"])
    data = shard.read_bytes()
    assert len(P) <= 512 and len(TarShards(shard)) == 4
    shard.write_bytes(data[: 4 * 1024 + 1024])  # two blocks of zeros are the least a tar may end with
    assert len(TarShards(shard)) == 4
    shard.write_bytes(ENDS[case](shard.read_bytes()))
    with pytest.raises(ValueError, match=r"s.tar: expected the end of the tar .zeros. at byte \d+; it is cut off or"):
        TarShards(shard)


def test_what_is_left_out_of_shards_is_said(tmp_path, caplog):
    write_tar(
        tmp_path / "a.tar", [("c/0.png", P), ("d/1.png", P), ("d/2.gif", P), ("__MACOSX/d/3.png", P), ("d/._1.png", P)]
    )
    write_tar(tmp_path / "b.tar", [])
    assert len(TarShards(tmp_path)) == 2
    assert re.search("TarShards: 1 of 2 files have no images: '.*b.tar'", caplog.text)
    assert (
        "not used: the folders '__MACOSX'; files of other extensions (1 .gif); images whose names begin" in caplog.text
    )


def test_a_shard_is_read_once_whatever_its_names(tmp_path):
    write_tar(tmp_path / "a.tar", [("c/0.png", P), ("d/1.png", P)])
    (tmp_path / "b.tar").symlink_to("a.tar")
    with pytest.raises(ValueError, match="b.tar' is listed twice"):
        TarShards(tmp_path)


def test_a_folder_of_shards_is_one_split(tmp_path):
    for name in ("train-0.tar", "train-1.tar"):
        write_tar(tmp_path / name, [(f"{name[6]}.png", P), (f"{name[6]}.cls", name[6].encode())])
    assert len(TarShards(tmp_path)) == 2
    write_tar(tmp_path / "val-0.tar", [("2.png", P), ("2.cls", b"1")])
    with pytest.raises(ValueError, match="shards of several splits .'train-0.tar', 'val-0.tar'.*a folder of its own"):
        TarShards(tmp_path)
    assert len(TarShards(sorted(tmp_path.glob("*.tar")))) == 3  # a list of files is certain
    with pytest.raises(ValueError, match="val-0.tar' is listed twice"):
        TarShards([tmp_path / "train-1.tar", tmp_path / "val-0.tar", tmp_path / "val-0.tar"])
    (tmp_path / "val-0.tar").unlink()
    write_tar(tmp_path / "train-2.tar.gz", [("2.png", P)], "w:gz")
    with pytest.raises(ValueError, match=r"also holds compressed tar files \('train-2.tar.gz'\)"):
        TarShards(tmp_path)


def test_a_member_is_read_in_pieces_if_need_be(tmp_path, monkeypatch):
    """One pread reads at most 2 GiB."""
    write_tar(tmp_path / "s.tar", [("c/0.png", png(1)), ("d/1.png", png(2))])
    dataset = TarShards(tmp_path / "s.tar")
    monkeypatch.setattr(os, "pread", lambda file, size, at, read=os.pread: read(file, min(size, 50), at))
    assert contents(dataset) == [(1, "c"), (2, "d")]


def test_a_sparse_member_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("c/0.png", png(1)), ("d/1.png", png(2))])
    data = bytearray((tmp_path / "s.tar").read_bytes())
    with tarfile.open(tmp_path / "s.tar") as tar:
        header = tar.getmember("d/1.png").offset
    data[header + 156 : header + 157] = tarfile.GNUTYPE_SPARSE
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match="d/1.png is stored as a sparse file"):
        TarShards(tmp_path / "s.tar")


def test_tar_shards_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tar files"):
        TarShards(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "splits" / split).mkdir(parents=True)
        write_tar(tmp_path / "splits" / split / "0.tar", [("c/0.png", png(1))])
    with pytest.raises(
        FileNotFoundError, match="no tar files at .*splits; pass one of '.*splits/train', '.*splits/val'"
    ):
        TarShards(tmp_path / "splits")
    write_tar(tmp_path / "a.tar.gz", [("c/0.png", png(1))], "w:gz")
    with pytest.raises(ValueError, match="expected an uncompressed tar"):
        TarShards(tmp_path / "a.tar.gz")
    write_tar(tmp_path / "b.tar", [("0.png", png(1))])
    with pytest.raises(ValueError, match=r"0.png has neither a 0.cls beside it nor a class folder"):
        TarShards(tmp_path / "b.tar")
    write_tar(tmp_path / "c.tar", [("x.txt", b"hello")])
    with pytest.raises(ValueError, match="no images"):
        TarShards(tmp_path / "c.tar")
    write_tar(tmp_path / "d.tar", [("c/0.png", png(1)), ("d/0.png", png(1))])
    dataset = TarShards(tmp_path / "d.tar")
    with open(tmp_path / "d.tar", "r+b") as file:
        file.truncate(520)
    with pytest.raises(OSError, match="the tar file is cut off"):
        dataset.read(0)
