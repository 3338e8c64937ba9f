"""`dlb-fast predict`: the classes that the evaluation would count, for files of every kind, damaged ones named."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from builders import train
from PIL import Image

from dlb_fast import cli
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.predict import find_images, predict
from dlb_fast.train.run import evaluate_run, load_model

torch.set_num_threads(1)
CLASSES = ("ant", "bee", "wasp, red")
BASE = override(RunConfig(), model="small_cnn", image_size=8, batch_size=8, num_threads=2, eval_batch_size=4, lr=0.02)


def write(path, colour, seed, size=(9, 11)):
    pixels = np.random.default_rng(seed).integers(0, 120, (*size, 3), dtype=np.uint8)
    pixels[..., colour] += 100
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run on three colours, and its folder with `val`."""
    root = tmp_path_factory.mktemp("predict")
    for split, count in (("train", 8), ("val", 3)):
        for colour, name in enumerate(CLASSES):
            for k in range(count):
                write(root / "images" / split / name / f"{k}.png", colour, 10 * k + colour, (9 + k, 11))
    train(override(BASE, source=f"imagefolder:{root / 'images'}", epochs=6), root / "run")
    return root


def images_of(root):
    return sorted(map(str, (root / "images/val").rglob("*.png")))


def call(capsys, *arguments):
    code = cli.main(["predict", *map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, [line.split("\t") for line in out.splitlines()], err


def test_the_predictions_are_those_of_the_evaluation(begun, capsys):
    """Same transform, same weights: the share of right answers is eval's top-1, the probabilities give its nll."""
    for weights in ("best", "last"):
        code, rows, _ = call(capsys, begun / "run", begun / "images/val", "--weights", weights, "--top", 3)
        assert code == 0 and len(rows) == 27
        scores = evaluate_run(begun / "run", weights=weights)
        first = rows[::3]
        right = [name.split("/")[-2] == label for name, label, _ in first]
        assert sum(right) / 9 == pytest.approx(scores["top1"]) and [row[0] for row in first] == images_of(begun)
    found = dict(predict(begun / "run", images_of(begun), top=3, weights="last"))
    nll = [-np.log(dict(answers)[name.split("/")[-2]]) for name, answers in found.items()]
    assert np.mean(nll) == pytest.approx(scores["nll"], rel=1e-5)
    for answers in found.values():
        values = [value for _, value in answers]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)


def test_files_folders_and_lists_name_the_same_images(begun, tmp_path, capsys):
    names = images_of(begun)
    _, wanted, _ = call(capsys, begun / "run", *names)
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, name in enumerate(names):
        shutil.copy(name, flat / f"{k}.png")
    (flat / "notes.md").write_text("no image")
    shutil.copytree(begun / "images/val", tmp_path / "deep/a/b")
    (tmp_path / "list.txt").write_text("# a list\n\n" + "\n".join(names))
    (tmp_path / "labels").write_text("".join(f"flat/{k}.png\twasp, red\n" for k in range(9)))
    (tmp_path / "words.lst").write_text("".join(f"flat/{k}.png ant\n" for k in range(9)))
    lists = (tmp_path / "list.txt", f"list:{tmp_path / 'labels'}", tmp_path / "words.lst")
    for source in (flat, tmp_path / "deep", *lists):
        code, rows, _ = call(capsys, begun / "run", source)
        assert code == 0 and [row[1:] for row in rows] == [row[1:] for row in wanted], source
    assert find_images([*names, begun / "images/val"]) == names  # each once


def test_csv_and_json(begun, tmp_path, capsys):
    _, rows, _ = call(capsys, begun / "run", begun / "images/val", "--top", 2, "--out", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [[row["file"], row["class"], f"{float(row['probability']):.4f}"] for row in found] == rows
    assert len(rows) == 18
    call(capsys, begun / "run", begun / "images/val", "--top", 99, "--out", tmp_path / "p.json")
    listed = json.loads((tmp_path / "p.json").read_text())
    assert [entry["file"] for entry in listed] == images_of(begun)
    assert [(c["class"], c["probability"]) for c in listed[0]["classes"]] == next(
        predict(begun / "run", images_of(begun), top=3)
    )[1]


def test_an_output_that_cannot_be_written_keeps_the_old_one(begun, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.csv").write_text("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code = cli.main(["predict", str(begun / "run"), str(begun / "images/val"), "--out", str(tmp_path / "p.csv")])
    said = capsys.readouterr().err
    assert code and re.search(r"cannot write .*p.csv: .*No space left .*free some space, then repeat the command", said)
    assert (tmp_path / "p.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_name_is_one_field_of_one_line(begun, tmp_path, capsys):
    shutil.copy(begun / "images/val/ant/0.png", tmp_path / "a\tb\nc.png")
    _, rows, _ = call(capsys, begun / "run", tmp_path)
    assert [row[0] for row in rows] == [rf"{tmp_path}/a\tb\nc.png"]


def test_damaged_and_missing_files_are_named_and_the_exit_code_says_so(begun, tmp_path, capsys):
    folder = shutil.copytree(begun / "images/val/ant", tmp_path / "some")
    (folder / "1.png").write_bytes(b"not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "0.heic").write_bytes(b"?")
    code, rows, said = call(capsys, begun / "run", folder, "--out", tmp_path / "p.csv")
    _, wanted, _ = call(capsys, begun / "run", folder / "0.png", folder / "2.png")
    assert code == 1 and rows == wanted and len((tmp_path / "p.csv").read_text().splitlines()) == 3
    assert f"skipped {folder}/1.png: not an image of a format that is read" in said
    assert f"skipped {folder}/empty.jpg: empty file (0 bytes)" in said and "2 of 4 files were skipped" in said
    (tmp_path / "list.txt").write_text("some/0.png\nsome/gone.png\n")
    code, rows, said = call(capsys, begun / "run", tmp_path / "list.txt")
    assert code == 1 and len(rows) == 1 and "some/gone.png: No such file or directory" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.jpg"], "no file or folder gone.jpg"),
        (["."], "has no images"),
        (["x.png", "--top", "0"], "--top must be at least 1"),
        (["x.png", "--out", "p.xls"], "--out must be a .csv or .json file"),
        (["x.png", "--out", "missing/p.csv"], "in a folder that exists"),
    ],
)
def test_refusals(arguments, said, begun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, begun / "run", *arguments)
    assert code == 2 and said in err
    assert call(capsys, tmp_path / "none", "x.png")[0] == 2


def test_a_pipe_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    for source in (f"{tmp_path}/list.txt", f"list:{tmp_path}/list.txt"):
        with pytest.raises(ValueError, match="list.txt is a pipe, socket or device; expected a file that lists"):
            find_images([source])


def test_a_run_on_stored_images_says_what_it_takes(tmp_path, capsys):
    """Digits: grey files of 8 x 8 give what the network says to the stored images; colours are no digits."""
    config = override(BASE, source="digits", per_class=4, image_size=32, epochs=1)
    train(config, tmp_path / "run")
    images = open_data(config.data).test.images[:6]
    for k, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k}.png")
    write(tmp_path / "red.png", 0, 0)
    model, about = load_model(tmp_path / "run")
    with torch.no_grad():
        wanted = model((images / 255 - about["mean"][0]) / about["std"][0]).argmax(1)
    code, rows, said = call(capsys, tmp_path / "run", *(tmp_path / f"{k}.png" for k in range(6)))
    assert code == 0 and [row[1] for row in rows] == [str(int(k)) for k in wanted]
    assert "the stored images of digits: files are read as grey" in said and "the middle 8 x 8 pixels" in said
    code, rows, said = call(capsys, tmp_path / "run", tmp_path / "red.png")
    assert code == 1 and not rows and "an image in colour" in said
