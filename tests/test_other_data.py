"""A run knows its classes and its files: a resume, an evaluation and a comparison refuse or name other data."""

import json
import os
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import png, train, write_images
from PIL import Image

from dlb_fast import cli
from dlb_fast.data.datasets.folder import FileDataset
from dlb_fast.train import compare
from dlb_fast.train.config import RunConfig, override, to_dict
from dlb_fast.train.data import _by_name, check_same_data, classes_differ, fingerprint, identity, open_data
from dlb_fast.train.run import evaluate_run, load_model

torch.set_num_threads(1)
CLASSES = ("ant", "bee", "café")
NAMES = [f"{name}/{part}{k}.png" for name in CLASSES for part in ("", "more/") for k in range(4)]
BASE = override(
    RunConfig(), model="small_cnn", image_size=8, batch_size=8, max_steps=2, num_threads=1, log_every=1, seed=1
)


def folder_of(root, split="train"):
    validation = [f"val/{name}/v{k}.png" for name in CLASSES for k in (1, 2)]
    return write_images(root, [f"{split}/{name}" for name in NAMES] + validation)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Runs of two steps: on a folder with `val`, and on one whose tenth is held out."""
    root = tmp_path_factory.mktemp("begun")
    folder_of(root / "split")
    write_images(root / "whole", NAMES)
    for name in ("split", "whole"):
        train(override(BASE, source=f"imagefolder:{root / name}"), root / f"run-{name}")
    return root


@pytest.fixture
def here(begun, tmp_path):
    """Copies of the folders and runs, in another place."""
    return Path(shutil.copytree(begun, tmp_path / "moved"))


def resume(here, name="split", **changes):
    config = override(BASE, source=f"imagefolder:{here / name}", max_steps=3, **changes)
    return train(config, here / f"run-{name}", resume=True)


def files_of(run):
    return {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}


# ---- the fingerprint


def test_the_fingerprint_is_of_the_list_alone(tmp_path, monkeypatch):
    """Names in order, and labels; no image is opened, so broken ones have one too."""
    write_images(tmp_path, NAMES)
    dataset = open_data(override(BASE, source=f"imagefolder:{tmp_path}").data).train
    before = fingerprint(dataset)
    counts, names = zip(*before["classes"], strict=True)
    assert counts == (7, 7, 7) and len(set(names)) == 3
    for name in NAMES:
        (tmp_path / name).write_bytes(b"")
    assert fingerprint(open_data(override(BASE, source=f"imagefolder:{tmp_path}").data).train) == before
    swapped = dataset.select(np.array([1, 0, *range(2, len(dataset))]))
    assert fingerprint(swapped) != before


def listed(names, targets=(0, 0, 1, 1)):
    files = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
    return SimpleNamespace(files=files, targets=list(targets), classes=["a", "b"])


def test_the_same_names_on_another_system_or_in_another_place_are_the_same():
    names = ["a/é.png", "a/2.png", "b/1.png", "b/2.png"]
    same = fingerprint(listed(names))
    assert fingerprint(listed([unicodedata.normalize("NFD", name) for name in names])) == same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlb_fast.train.data.os", SimpleNamespace(**{**vars(os), "sep": "\\"}))
        assert fingerprint(listed([name.replace("/", "\\") for name in names])) == same
    one, other = (fingerprint(listed([f"{root}/{name}" for name in names])) for root in ("/data/x", "/mnt/y/z"))
    assert one == other
    assert fingerprint(listed(["a/e.png", *names[1:]])) != same
    assert fingerprint(listed(["d/" + name for name in names])) != same  # relative: another folder of the same list


def test_data_without_files_are_known_by_their_labels_and_sizes():
    sets = ["synthetic:16,2,8", "synthetic:16,2,12", "synthetic:18,2,8"]
    found = [fingerprint(open_data(override(BASE, source=source).data).train) for source in sets]
    found += [fingerprint(open_data(override(BASE, source=sets[0], data_seed=1).data).train)]
    assert len({json.dumps(one) for one in found}) == 4


def test_the_first_difference_of_class_names():
    assert classes_differ(["a", "b"], ["a", "c"]) == "class 1 was 'b' and is 'c' here"
    assert classes_differ(["a", "b"], ["b", "a"]).endswith("; the same names in another order")
    assert classes_differ(["a", "b"], ["a"]) == "class 1 was 'b' and is none here; 2 classes were, 1 are"
    assert classes_differ(["a"], ["a", "b"]) == "class 1 was none and is 'b' here; 1 classes were, 2 are"
    assert classes_differ(["é"], [unicodedata.normalize("NFD", "é")]) == ""


# ---- --resume


@pytest.mark.parametrize("name", ["split", "whole"])
def test_a_moved_folder_resumes(name, here):
    assert resume(here, name)["step"] == 3


def rename_class(root):
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "bug")


def reorder_classes(root):
    """Another name moves a class to another place: the number of classes and all other names are the same."""
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "zebra")


def add_class(root):
    for split in ("train", "val"):
        shutil.copytree(root / split / "bee", root / split / "cow")


def rename_file(root):
    (root / "train/bee/0.png").rename(root / "train/bee/9.png")


def replace_by_one_of_another_class(root):
    (root / "train/bee/0.png").rename(root / "train/ant/9.png")


def other_test_file(root):
    (root / "val/ant/v1.png").rename(root / "val/ant/v3.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_class, "other classes: class 1 was 'bee' and is 'bug' here"),
        (reorder_classes, "other classes: class 0 was 'ant' and is 'bee' here"),
        (add_class, "other classes: class 3 was none and is 'cow' here; 3 classes were, 4 are"),
        (rename_file, "other training images: class 'bee' has as many, but other file names"),
        (replace_by_one_of_another_class, "other training images: class 'ant' had 8 and has 9"),
        (other_test_file, "other test images: class 'ant' has as many, but other file names"),
    ],
)
def test_a_resume_with_other_data_is_refused_and_changes_nothing(change, said, here):
    run, before = here / "run-split", files_of(here / "run-split")
    change(here / "split")
    with pytest.raises(ValueError, match=f"step-000000002.pt was .*{said}.*--init-from") as error:
        resume(here)
    assert "skipped" not in str(error.value) and files_of(run) == before


@pytest.mark.parametrize("changes", [{"label_noise": 0.5}, {"label_noise": 0.5, "noise_kind": "pair"}])
def test_a_resume_with_other_labels_is_refused(changes, here):
    with pytest.raises(ValueError, match="training images: the images are the same, their order or labels are not"):
        resume(here, **changes)


def test_other_data_are_an_error_of_the_user(here, capsys):
    rename_class(here / "split")
    flags = ["--data", f"imagefolder:{here / 'split'}", "--max-steps", "3", "--quiet"]
    assert cli.main(["train", "--resume", "--out", str(here / "run-split"), *flags]) == 2
    assert "class 1 was 'bee' and is 'bug' here" in capsys.readouterr().err


def test_only_what_both_sides_know_is_compared():
    check_same_data({}, {"classes": "[]"}, "x")
    check_same_data({"classes": "[]", "files": "{}"}, {}, "x")


# ---- eval


def test_the_metadata_of_weights_are_those_of_the_data(begun):
    _, about = load_model(begun / "run-split")
    data = open_data(override(BASE, source=f"imagefolder:{begun / 'split'}").data)
    assert about["classes"] == list(CLASSES) and {"train", "test"} == set(about["files"])
    assert {name: json.dumps(about[name]) for name in ("classes", "files")} == identity(data)


def score(run, source=None):
    found = evaluate_run(run, source=source)
    return found["count"], found["nll"]


def in_place(here, name):
    """The run's config names the copied folder."""
    config = here / f"run-{name}" / "config.yaml"
    lines = config.read_text().splitlines()
    lines = [f"  source: imagefolder:{here / name}" if line.startswith("  source:") else line for line in lines]
    config.write_text("\n".join(lines))
    return here / f"run-{name}"


@pytest.mark.parametrize("name", ["split", "whole"])
def test_eval_refuses_other_classes(name, here):
    run = in_place(here, name)
    base = here / name
    for folder in [base / "train", base / "val"] if name == "split" else [base]:
        (folder / "ant").rename(folder / "zebra")
    with pytest.raises(ValueError, match="other classes: class 0 was 'ant' and is 'bee' here"):
        evaluate_run(run)


def test_eval_refuses_a_held_out_tenth_that_has_changed(here, caplog):
    """A new file moves the tenth, and images of the training would be evaluated. A folder `val` does not move."""
    run = in_place(here, "whole")
    for k in range(10, 30):
        (here / "whole/bee" / f"{k}.png").write_bytes(png(k))
    with pytest.raises(ValueError, match="has changed since the training .class 'bee' had 1 and has 3.*--data"):
        evaluate_run(run)
    run = in_place(here, "split")
    rename_file(here / "split")
    assert score(run)[0] == 6 and "changed since" not in caplog.text
    other_test_file(here / "split")
    assert score(run)[0] == 6
    assert "test images of imagefolder:" in caplog.text and "changed since the training: class 'ant'" in caplog.text


def test_eval_on_the_runs_own_data_in_another_place_keeps_the_tenth(begun, here, caplog):
    shutil.rmtree(here / "run-whole")
    assert score(begun / "run-whole", f"imagefolder:{here / 'whole'}") == score(begun / "run-whole")
    assert "of which it held out these" in caplog.text


def test_eval_on_a_folder_without_splits_takes_all_of_it_by_class_name(begun, tmp_path, caplog):
    """A class less would shift the labels of the others, and a tenth of a test set would be evaluated."""
    run = begun / "run-split"
    own = score(run)
    shutil.copytree(begun / "split/val", tmp_path / "test")
    assert score(run, f"imagefolder:{tmp_path / 'test'}") == own
    shutil.rmtree(tmp_path / "test/ant")
    shutil.copytree(tmp_path / "test", tmp_path / "fewer")
    found = evaluate_run(run, source=f"imagefolder:{tmp_path / 'fewer'}")
    assert found["count"] == 4 and "without images of 1 of the 3 classes: 'ant'" in caplog.text
    lines = "".join(f"{p}\t{p.parent.name}\n" for p in sorted((tmp_path / "fewer").rglob("*.png"), reverse=True))
    (tmp_path / "list.tsv").write_text(lines)
    assert evaluate_run(run, source=f"list:{tmp_path / 'list.tsv'}")["nll"] == pytest.approx(found["nll"])
    (tmp_path / "fewer/bee").rename(tmp_path / "fewer/wasp")
    with pytest.raises(ValueError, match="'wasp'"):
        evaluate_run(run, source=f"imagefolder:{tmp_path / 'fewer'}")


def test_eval_by_name_where_the_order_is_another(begun, tmp_path, caplog):
    """A tar numbers its classes by itself; they are those of the network by name."""
    import tarfile

    run, own = begun / "run-split", score(begun / "run-split")
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        tar.add(begun / "split/val", arcname="val")
    assert score(run, f"tar:{tmp_path / 'test.tar'}") == pytest.approx(own)
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        for name in ("bee", "café"):
            tar.add(begun / "split/val" / name, arcname=f"val/{name}")
    folder = shutil.copytree(begun / "split/val", tmp_path / "part")
    shutil.rmtree(folder / "ant")
    assert score(run, f"tar:{tmp_path / 'part.tar'}") == score(run, f"imagefolder:{folder}")


def test_classes_in_another_order_are_matched_by_name():
    dataset = FileDataset(["x", "y", "z"], [0, 1, 0], ["dog", "cat"], ".", "list")
    found, said = _by_name(dataset, ["ant", "cat", "dog"], "s")
    assert found.targets.tolist() == [2, 1, 2] and said == "; without images of 1 of the 3 classes: 'ant'"
    found, said = _by_name(dataset, ["cat", "dog"], "s")
    assert found.targets.tolist() == [1, 0, 1] and "another order" in said
    more = FileDataset(["x"], [0], ["cat", "never used"], ".", "list")
    assert _by_name(more, ["ant", "cat"], "s")[0].targets.tolist() == [1]


def test_eval_refuses_unknown_classes_and_images_of_another_shape(begun, tmp_path):
    with pytest.raises(ValueError, match="classes that the network does not know: 'class_0', 'class_1'"):
        evaluate_run(begun / "run-split", source="synthetic:8,2,8")
    config = override(BASE, source="synthetic:16,2,8", image_size=32, num_threads=2)
    result = train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="takes images of 3 x 8 x 8 .* those of synthetic:16,2,12 are 3 x 12 x 12"):
        evaluate_run(tmp_path / "run", source="synthetic:16,2,12")
    test = open_data(config.data).test  # the same pixels as files: not resized, not cropped
    for k, (image, label) in enumerate(test):
        file = tmp_path / f"files/class_{label}/{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    scores = evaluate_run(tmp_path / "run", source=f"imagefolder:{tmp_path / 'files'}")
    assert (scores["count"], scores["nll"]) == (len(test), pytest.approx(result["test_nll"], rel=1e-5))


# ---- compare


def test_a_comparison_killed_in_its_first_write_is_started(tmp_path, monkeypatch):
    config = override(RunConfig(), source="digits", per_class=2)
    asked = {"config": to_dict(config), "runs": {"ce-seed0": "CE"}, "command": "", "data": {}}

    def killed(source, target):
        (tmp_path / f".{compare.MARK}.7.tmp").write_bytes(Path(source).read_bytes()[:9])  # what a kill leaves
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            compare._claim(tmp_path, asked)
    compare._claim(tmp_path, asked)
    assert os.listdir(tmp_path) == [compare.MARK]


def test_a_comparison_is_not_continued_on_other_data(tmp_path):
    folder_of(tmp_path / "images")
    config = override(BASE, source=f"imagefolder:{tmp_path / 'images'}")
    options = {"methods": ["ce"], "seeds": 1, "jobs": 1, "folder": tmp_path / "out"}
    compare.run(config, **options)
    compare.run(config, **options)
    rename_file(tmp_path / "images")
    with pytest.raises(ValueError, match="the comparison in .*class 'bee' has as many, but other file names"):
        compare.run(config, **options)
