"""`dlb-fast find-labels`: the labels that a run doubts, by the margin of its logits, and how many are wrong."""

import csv
import shutil

import numpy as np
import pytest
import torch
from builders import train
from PIL import Image
from sklearn.metrics import average_precision_score

from dlb_fast import cli
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.find_labels import Doubts, average_precision, find_labels
from dlb_fast.train.run import RunFolder, load_model

torch.set_num_threads(1)
CLASSES = ("ant", "bee", "wasp, red")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run on images of three colours, 8 of 40 labels of each the next class's, with a folder `val`."""
    root = tmp_path_factory.mktemp("find")
    for split, count in (("train", 40), ("val", 3)):
        for colour, name in enumerate(CLASSES):
            for k in range(count):
                pixels = np.random.default_rng(100 * colour + k).integers(0, 120, (9, 11, 3), dtype=np.uint8)
                pixels[..., colour] += 100
                path = root / "images" / split / name / f"{k:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    config = override(
        RunConfig(), source=f"imagefolder:{root / 'images'}", model="small_cnn", image_size=8, padding=0, batch_size=24,
        method="ce", epochs=6, eval_every=30, lr=0.02, label_noise=0.2, noise_kind="pair",
    )  # fmt: skip
    train(config, root / "run")
    return root


def call(capsys, *arguments):
    code = cli.main(["find-labels", *map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_wrong_labels_come_first(root, capsys):
    code, out, _ = call(capsys, root / "run", "--weights", "last")
    rows = rows_of(root / "run/find-labels.csv")
    assert code == 0 and len(rows) == 120 and list(rows[0]) == ["index", "path", "label", "suggested", "score", "wrong"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    # colours are easy, so all 24 wrong labels are above all right ones, and the suggestion is the true class
    assert [row["wrong"] for row in rows] == ["1"] * 24 + ["0"] * 96
    assert all(row["suggested"] == row["path"].split("/")[0] != row["label"] for row in rows[:24])
    assert all(row["label"] == row["path"].split("/")[0] for row in rows[24:])
    assert out.splitlines() == [
        "the network prefers another class to 24 of 120 labels (score above 0): precision 1.0000, recall 1.0000",
        "24 labels are wrong; of the 24 most doubted 24 are: precision and recall 1.0000",
        "average precision 1.0000, in random order 0.2000",
        f"wrote {root / 'run/find-labels.csv'}",
    ]


def test_the_score_is_the_margin_of_the_evaluation(root):
    """Against the logits of every image by hand: no augmentation, eval mode, the label of the training."""
    found = find_labels(root / "run", weights="last")
    model, about = load_model(root / "run", weights="last")
    data = open_data(RunFolder(root / "run").read_config().data)
    listed = zip(found.data.rows.tolist(), found.score, found.suggested, found.data.targets, strict=True)
    loaded = {index: rest for index, *rest in listed}
    for index in range(0, 120, 7):
        image = Image.open(data.train.path(index)).resize((10, 8), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image)[:, 1:9].copy()).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
        with torch.no_grad():
            logits = model((pixels - mean) / std)[0].double().tolist()
        score, suggested, label = loaded[index]
        assert label == data.train.targets[index]
        others = {k: value for k, value in enumerate(logits) if k != label}
        assert suggested == max(others, key=others.get)
        assert score == pytest.approx(max(others.values()) - logits[label], abs=0.15)  # resized by another library


def test_precision_and_recall_by_hand():
    """Wrong at ranks 1, 3 and 4 of 5; the first two have a score above 0."""
    data = open_data(override(RunConfig(), source="synthetic:8,2,8").data).train.select(np.arange(5))
    wrong = np.array([True, False, True, True, False])
    doubts = Doubts(data, np.zeros(5, dtype=int), np.array([2.0, 1.0, 0.0, -1.0, -2.0]), wrong)
    assert doubts.summary().splitlines() == [
        "the network prefers another class to 2 of 5 labels (score above 0): precision 0.5000, recall 0.3333",
        "3 labels are wrong; of the 3 most doubted 2 are: precision and recall 0.6667",
        "average precision 0.8056, in random order 0.6000",  # (1 + 2/3 + 3/4) / 3
    ]
    doubts.score[:] = -1
    assert doubts.summary().startswith("the network prefers another class to 0 of 5 labels (score above 0)\n3 labels")
    doubts.wrong[:] = False
    assert doubts.summary().endswith("; none is wrong")
    doubts.wrong = None
    assert doubts.summary().endswith("which labels are wrong is not known: the run has no label noise")
    rng = np.random.default_rng(0)
    for share in (0.01, 0.4, 1.0):
        wrong = rng.random(500) < share
        for score in (-np.arange(500.0), -(np.arange(500) // 7.0), np.zeros(500)):  # ties
            assert average_precision(wrong, score) == pytest.approx(average_precision_score(wrong, score))
    assert np.isnan(average_precision(np.zeros(3, dtype=bool), np.zeros(3)))


def test_moved_data_and_the_table_as_a_label_file(root, tmp_path, capsys):
    call(capsys, root / "run", "--out", tmp_path / "here.csv")
    moved = shutil.copytree(root / "images", tmp_path / "moved")
    code, out, _ = call(capsys, root / "run", "--data", f"imagefolder:{moved}", "--out", tmp_path / "there.csv")
    assert code == 0 and (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()
    config = override(RunConfig(), source=f"imagefolder:{moved}", image_size=8, noise_kind=f"file:{tmp_path}/here.csv")
    assert open_data(config.data).wrong_labels == 24
    (moved / "train/ant/00.png").unlink()
    code, _, err = call(capsys, root / "run", "--data", f"imagefolder:{moved}")
    assert code == 2 and "made with other training images: class 'ant' had 40 and has 39" in err
    assert call(capsys, tmp_path, "--data", "digits")[0] == 2
    for out in ("x.txt", tmp_path / "none/x.csv"):
        code, _, err = call(capsys, root / "run", "--out", out)
        assert code == 2 and "--out must be a .csv file in a folder that exists" in err


def test_a_run_without_noise_and_one_whose_label_file_is_gone(tmp_path, capsys):
    """Stored images have an index and no path; without noise nothing is known to be wrong."""
    labels = tmp_path / "labels.npy"
    config = override(RunConfig(), source="synthetic:40,4,8", batch_size=20, max_steps=2, method="ce")
    clean = np.asarray(open_data(config.data).train.targets)
    np.save(labels, np.where(np.arange(40) % 10 == 3, (clean + 1) % 4, clean))
    train(config, tmp_path / "clean")
    train(override(config, noise_kind=f"file:{labels}"), tmp_path / "noisy")
    labels.unlink()
    for name, columns, said in (("clean", [], "not known"), ("noisy", ["wrong"], "4 labels are wrong")):
        code, out, _ = call(capsys, tmp_path / name)
        rows = rows_of(tmp_path / name / "find-labels.csv")
        assert code == 0 and said in out and list(rows[0]) == ["index", "label", "suggested", "score", *columns]
        assert sorted(int(row["index"]) for row in rows) == list(range(40))
        assert all(row["label"] != row["suggested"] for row in rows)
    assert {int(row["index"]) for row in rows if row["wrong"] == "1"} == {3, 13, 23, 33}


def test_an_unreadable_image_is_named_and_left_out(root, tmp_path, capsys, caplog):
    images, run = shutil.copytree(root / "images", tmp_path / "images"), shutil.copytree(root / "run", tmp_path / "run")
    (images / "train/bee/05.png").write_bytes(b"not an image")
    source = f"imagefolder:{images}"
    code, _, err = call(capsys, run, "--data", source)
    assert code == 1 and "1 images could not be read and are left out" in err and "bee/05.png" in caplog.text
    assert len(rows_of(run / "find-labels.csv")) == 119
