"""`on_error` and `max_pixels` from the command line: which images reach the network."""

import json
from pathlib import Path

import pytest
import torch
from builders import png
from PIL import Image

from dlb_fast import cli
from dlb_fast.data import ClassBatchSampler, EvalLoader, SampledLoader, ViewPairSampler
from dlb_fast.data.datasets.open import open_dataset
from dlb_fast.data.datasets.source import SampleError
from dlb_fast.data.transforms.crops import eval_transform
from dlb_fast.train.evaluate import predictions

pytestmark = pytest.mark.usefixtures("no_page")
COUNT = 60  # of each class and split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 8x8 images, split; one training and one validation image is damaged, and one is large."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for k in range(COUNT):
                (root / split / name / f"{k:02}.png").write_bytes(png(100 * label + k, (8, 8)))
        (root / split / "b" / "07.png").write_bytes(b"not an image")
    return root


def flags(folder, *more):
    return [
        "train", "--data", f"imagefolder:{folder}", "--image-size", "8", "--batch-size", "20", "--max-steps", "24",
        "--eval-every", "12", "--quiet", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["dlb", "cs_kd"])
def test_a_run_replaces_an_image_and_leaves_one_out_of_the_evaluation(method, folder, tmp_path, capsys, caplog):
    run = str(tmp_path / "r")
    assert cli.main(flags(folder, "--method", method, "--out", run, "--on-error", "replace")) == 0
    assert [
        row["test_count"]
        for row in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
        if "test_count" in row
    ] == [2 * COUNT - 1] * 2
    said = [record.getMessage() for record in caplog.records]
    assert sum("left out sample 67: " in text for text in said) == 1  # once, not at every evaluation
    assert any("replaced sample 67: " in text for text in said)
    capsys.readouterr()
    assert cli.main(["eval", run]) == 0  # as in the run's config
    assert f"over {2 * COUNT - 1} images" in capsys.readouterr().out
    assert cli.main(["eval", run, "--on-error", "raise"]) == 1
    assert "07.png" in capsys.readouterr().err
    assert cli.main(["eval", run, "--on-error", "raise", "--max-pixels", "63"]) == 1
    assert "8 x 8 pixels, more than max_pixels=63" in capsys.readouterr().err


def test_a_run_stops_at_an_image_and_names_the_option(folder, tmp_path, capsys):
    assert cli.main(flags(folder, "--out", str(tmp_path / "r"))) == 1
    said = capsys.readouterr().err
    assert "07.png" in said and "or pass --on-error replace" in said and "Traceback" not in said


def test_a_seed_of_splits_has_no_effect_beside_an_own_test_set(folder, tmp_path, capsys):
    assert cli.main(flags(folder, "--out", str(tmp_path / "r"), "--data-seed", "3")) == 2
    assert "data_seed=3 has no effect with imagefolder:" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_more_than_a_hundredth_ends_the_run(folder, tmp_path, capsys):
    assert cli.main(flags(folder, "--out", str(tmp_path / "r"), "--on-error", "replace", "--max-pixels", "63")) == 1
    assert "more than max_pixels=63; raise max_pixels" in capsys.readouterr().err


def test_pillows_own_limit_does_not_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # the error is at twice as many
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{k}.png")
    data = open_dataset(f"imagefolder:{tmp_path}")
    assert len(list(EvalLoader(data, 4, transform=eval_transform(8, 8)))) == 2
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_substitute_has_the_same_class_where_the_batch_is_made_of_classes(folder):
    data = open_dataset(f"imagefolder:{folder}")
    targets = torch.as_tensor(data.targets)
    loader = SampledLoader(
        data, ClassBatchSampler(targets, 20), transform=eval_transform(8, 8), dtype=torch.uint8, on_error="replace"
    )
    drawn = 0
    for _ in range(4):
        for batch, rows in zip(loader, range(len(loader)), strict=True):
            planned = loader.sampler.views(batch.epoch, batch.step)[0]
            assert batch.targets.tolist() == targets[planned].tolist()
            assert 67 not in batch.ids and len(batch.ids) == 20 and rows >= 0
            assert batch.images[:, 0, 0, 0].tolist() == [100 * (i >= COUNT) + i % COUNT for i in batch.ids.tolist()]
            drawn += int((planned == 67).sum())
    assert drawn  # the damaged image was planned


def test_both_views_have_the_same_substitute(folder):
    data = open_dataset(f"imagefolder:{folder}")
    loader = SampledLoader(data, ViewPairSampler(len(data), 40), transform=eval_transform(8, 8), on_error="replace")
    drawn = 0
    for batch in loader:
        assert torch.equal(batch.ids[:20], batch.ids[20:]) and 67 not in batch.ids
        drawn += int((loader.sampler.views(0, batch.step)[0] == 67).sum())
    assert drawn == 2
    with pytest.raises(SampleError, match="07.png"):
        list(SampledLoader(data, ViewPairSampler(len(data), 40), transform=eval_transform(8, 8)))


def test_scores_are_those_of_the_readable_images(folder):
    data = open_dataset(f"imagefolder:{folder}", "test")
    model = torch.nn.Flatten()
    logits, targets = predictions(model, EvalLoader(data, 32, transform=eval_transform(8, 8), on_error="replace"))
    kept = [k for k in range(2 * COUNT) if k != 67]
    assert targets.tolist() == [k // COUNT for k in kept]
    assert (logits[:, 0] * 255).round().tolist() == [100 * (k // COUNT) + k % COUNT for k in kept]
