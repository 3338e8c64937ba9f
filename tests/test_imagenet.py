"""The ImageNet recipes: complete, fair to their controls, and runnable from a folder of JPEGs to scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import write_jpegs
from PIL import Image

from dlb_fast import cli
from dlb_fast.data import OverlapPlan
from dlb_fast.presets import load_preset
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.loop import total_steps
from dlb_fast.train.models import create_model

torch.set_num_threads(1)

IMAGES = 1_281_167
RECIPES = ("imagenet-resnet50", "imagenet-resnet50-short")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_controls_make_the_same_steps_over_the_same_images(recipe):
    """Not exactly the same: an epoch of half as many steps drops another remainder."""
    dlb, ce, control = (load_preset(f"{recipe}-{name}") for name in ("dlb", "ce", "alpha0"))
    rows = dlb.data.batch_size
    steps = {}
    for name, config, half in (("dlb", dlb, rows // 2), ("ce", ce, rows)):
        loader = range(OverlapPlan(IMAGES, half).steps_per_epoch)
        steps[name] = total_steps(loader, config.train)
    assert steps["ce"] == pytest.approx(steps["dlb"], rel=1e-3)
    assert ce.schedule.warmup_epochs == 2 * dlb.schedule.warmup_epochs
    assert override(control, method="dlb", alpha=dlb.loss.alpha) == dlb


def test_the_recipes_network_is_built_in():
    with torch.device("meta"):
        model = create_model(load_preset("imagenet-resnet50-dlb").model.model, 1000)
        assert model(torch.empty(2, 3, 176, 176)).shape == (2, 1000)


def test_evaluation_crops_have_their_own_size(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "b").mkdir(parents=True)
        for label in "ab":
            Image.new("RGB", (40, 30)).save(tmp_path / split / label / "0.JPEG")
    config = override(RunConfig(), source=f"imagefolder:{tmp_path}", batch_size=2, image_size=8)
    for own, resize, side in ((None, None, 8), (12, None, 12), (12, 16, 12)):
        opened = open_data(override(config, eval_size=own, eval_resize=resize).data)
        (batch,) = opened.test_batches(torch.device("cpu"))
        assert batch.images.shape == (2, 3, side, side)
    with pytest.raises(ValueError, match=r"eval_resize must be at least the crop of the evaluation \(12\)"):
        override(config, eval_size=12, eval_resize=11)


def test_a_thousand_classes_through_the_whole_path(tmp_path, monkeypatch, capsys):
    """3000 JPEGs of 1000 classes, the recipe itself at small sizes: train, stop, continue, evaluate."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 2), ("val", 1)):
        write_jpegs(tmp_path / "data" / split, (f"n{k:04}/{i}.JPEG" for k in range(1000) for i in range(count)))
    sizes = "--batch-size 16 --image-size 24 --eval-size 24 --eval-resize None --num-threads 2 --model small_cnn"
    flags = f"--preset imagenet-resnet50-dlb --data imagefolder:data --device cpu {sizes} --quiet".split()
    assert cli.main(["train", *flags, "--out", "run", "--max-steps", "2", "--log-every", "1"]) == 0
    assert cli.main(["train", "--resume", "--out", "run", "--max-steps", "4", "--quiet"]) == 0
    result = json.loads(Path("run/result.json").read_text())
    assert (result["step"], result["test_count"]) == (4, 1000)
    assert result["images_seen"] == 4 * 16 - 8  # the first batch has no repeated half
    # Logarithm of 1000 classes for the cross entropy, and a last-batch term that is there from the second step.
    assert 5 < result["ce"] < 9 and result["lb"] > 0
    capsys.readouterr()
    assert cli.main(["eval", "run", "--weights", "last", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 1000
