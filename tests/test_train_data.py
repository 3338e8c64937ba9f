"""The trainer on every kind of data: folders of images, CIFAR's binary files, synthetic images, from file to scores."""

import json
import shutil

import numpy as np
import pytest
import torch
from builders import exported, train, train_stopped
from PIL import Image

from dlb_fast.cli import _base_config
from dlb_fast.data import SampleError, ViewPairSampler
from dlb_fast.data.decode.decode import MAX_PIXELS
from dlb_fast.presets import load_preset
from dlb_fast.train import run
from dlb_fast.train.checkpoint import read_weights
from dlb_fast.train.config import RunConfig, check_effects, override
from dlb_fast.train.data import open_data
from dlb_fast.train.models import create_model
from dlb_fast.train.run import evaluate_run

torch.set_num_threads(1)

BASE = override(
    load_preset("digits"), per_class=None, label_noise=0.0, batch_size=8, epochs=2, eval_every=None, num_threads=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 training and 7 test images of two classes that differ in colour, of different sizes, JPEG and PNG."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (13, 11)), ("val", (4, 3))):
        for label, count in enumerate(counts):
            (root / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (20 + number, 24, 3), dtype=np.uint8)
                pixels[..., label] += 150
                suffix = "jpg" if number % 2 else "png"
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{number}.{suffix}")
    return root


@pytest.mark.parametrize("method", ["dlb", "ce"])
def test_a_folder_of_images(method, folder, tmp_path):
    config = override(BASE, source=f"imagefolder:{folder}", image_size=16, method=method, epochs=4)
    result = train(config, tmp_path)
    steps = {"dlb": 6, "ce": 3}[method]  # 24 images: 4 or 8 drawn per step
    assert result["step"] == 4 * steps and result["test_count"] == 7
    assert result["images_seen"] == 8 * result["step"] - (4 if method == "dlb" else 0)
    assert result["best_top1"] > 0.8  # red against green
    assert (result["lb"] > 0) if method == "dlb" else (result["lb"] == 0)


def test_a_folder_run_resumes_mid_epoch(folder, tmp_path):
    """Worker threads, decoded files, random crops: still the same weights."""
    config = override(BASE, source=f"imagefolder:{folder}", image_size=16)
    train(config, tmp_path / "whole")
    train_stopped(config, tmp_path / "part", 8)
    assert train(config, tmp_path / "part", resume=True)["step"] == 12
    assert exported(tmp_path / "whole") == exported(tmp_path / "part")


def test_a_folder_is_evaluated_once_per_image(folder, tmp_path):
    """However the batches fall, every test image counts once, in order."""
    for rows in (2, 3, 7, 100):
        config = override(BASE, source=f"imagefolder:{folder}", image_size=16, eval_batch_size=rows)
        opened = open_data(config.data)
        labels = torch.cat([batch.targets for batch in opened.test_batches(torch.device("cpu"))])
        assert labels.tolist() == [0] * 4 + [1] * 3


def test_a_missing_or_damaged_image_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "train" / "class1" / "4.png").write_bytes(b"not an image")
    config = override(BASE, source=f"imagefolder:{copy}", image_size=16)
    with pytest.raises(SampleError, match=r"class1.4\.png"):
        train(config, tmp_path / "run")


def test_max_pixels_reaches_the_decoder_of_every_loader(folder):
    config = override(BASE, source=f"imagefolder:{folder}", image_size=16, max_pixels=24 * 20)
    opened, device = open_data(config.data), torch.device("cpu")
    pairs = ViewPairSampler(opened.train, 8)
    for make in (
        lambda: opened.train_loader(overlap=True, seed=0, device=device),
        lambda: opened.train_loader(overlap=False, seed=0, device=device, sampler=pairs),
        lambda: opened.test_batches(device),
    ):
        with pytest.raises(SampleError, match="more than max_pixels=480"):
            list(make())
    assert override(BASE).data.max_pixels == MAX_PIXELS


def write_cifar10(root):
    rng = np.random.default_rng(1)
    root.mkdir()
    for name, count in [*((f"data_batch_{k}.bin", 12) for k in range(1, 6)), ("test_batch.bin", 9)]:
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        np.concatenate((labels[:, None], pixels), axis=1).tofile(root / name)
    (root / "batches.meta.txt").write_text("\n".join(f"class{k}" for k in range(10)) + "\n")


def test_cifar_from_its_binary_files_with_the_papers_network(tmp_path):
    write_cifar10(tmp_path / "cifar")
    preset = load_preset("cifar10-resnet32-dlb")
    config = override(preset, source=f"cifar10:{tmp_path / 'cifar'}", batch_size=20, max_steps=3, forward="two_pass")
    result = train(config, tmp_path / "run")
    assert result["step"] == 3 and result["test_count"] == 9


def test_synthetic_images_and_the_other_options(tmp_path):
    options = {"optimizer": "adamw", "channels_last": True, "amp": "bf16", "ema": 0.9, "warmup_epochs": 0.5}
    config = override(BASE, source="synthetic:40,4,8", **options, decay_norm_and_bias=False, checkpoint_every=5)
    result = train(config, tmp_path)
    assert result["step"] == 20 and 0 <= result["test_ece"] <= 1
    scores = evaluate_run(tmp_path, weights="last")
    assert scores["top1"] == result["test_top1"]
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.pt"))
    assert names == ["step-000000015.pt", "step-000000020.pt"]


def test_the_same_config_gives_the_same_weights_and_another_seed_others(tmp_path):
    config = override(BASE, source="synthetic:40,4,8", epochs=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(override(config, seed=seed), tmp_path / name)
    a, b, c = (exported(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_label_noise_and_subset_reach_the_training_set_only():
    config = override(load_preset("digits"), per_class=10, label_noise=0.3)
    opened, clean = open_data(config.data), open_data(override(config, label_noise=0.0).data)
    assert len(opened.train) == len(clean.train) == 100
    wrong = (torch.as_tensor(opened.train.targets) != torch.as_tensor(clean.train.targets)).sum().item()
    assert wrong == 30
    assert torch.equal(torch.as_tensor(opened.test.targets), torch.as_tensor(clean.test.targets))
    assert torch.bincount(torch.as_tensor(clean.train.targets)).tolist() == [10] * 10


def test_exported_weights_say_what_they_are(tmp_path):
    from safetensors import safe_open

    config = override(BASE, source="synthetic:40,4,8", epochs=1)
    train(config, tmp_path)
    path = tmp_path / "checkpoints" / "last.safetensors"
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["dlb_fast"])
    assert {"model": "small_cnn", "num_classes": "4", "channels": "3", "step": "10"}.items() <= note.items()
    assert json.loads(note["size"]) == [8, 8]
    assert len(json.loads(note["mean"])) == len(json.loads(note["std"])) == 3
    assert json.loads(note["classes"]) == open_data(config.data).train.classes
    model = create_model("small_cnn", 4, 3)
    model.load_state_dict(read_weights(path)[0])


def test_plain_batches_hold_no_sample_twice():
    config = override(BASE, source="synthetic:40,4,8", batch_size=8)
    loader = open_data(config.data).train_loader(overlap=False, seed=0, device=torch.device("cpu"))
    epochs = [[batch.ids for batch in loader] for _ in range(2)]
    for batches in epochs:
        assert sorted(torch.cat(batches).tolist()) == list(range(40)) and {len(b) for b in batches} == {8}
    assert not torch.equal(epochs[0][0], epochs[1][0])


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Eight training and two test images of 32 x 32 pixels without loss, as a folder made from CIFAR."""
    root, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(2)
    for split, count in (("train", 4), ("val", 1)):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


def pixels_of(opened, dataset):
    """(N, 3, 32, 32): the files of a folder, normalised as the loaders do it."""
    names = sorted(p for p in dataset.rglob("*.png"))
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(name)).copy()).permute(2, 0, 1) for name in names])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (opened.mean, opened.std))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("padding", [0, 2])
def test_padding_crops_a_folder_of_small_images_as_the_recipe_says(padding, small_folder):
    """Every training view is a window of the zero-padded file, no part of it is enlarged; the test images are whole."""
    preset = load_preset("cifar10-resnet32-dlb")
    config = override(preset, source=f"imagefolder:{small_folder}", padding=padding, flip=False, batch_size=8)
    opened, device = open_data(config.data), torch.device("cpu")
    files = pixels_of(opened, small_folder / "train")
    black = -torch.tensor(opened.mean).view(3, 1, 1) / torch.tensor(opened.std).view(3, 1, 1)
    padded = black.expand(3, 32 + 2 * padding, 32 + 2 * padding).repeat(len(files), 1, 1, 1)
    padded[..., padding : padding + 32, padding : padding + 32] = files
    places = set()
    for batch in opened.train_loader(overlap=False, seed=0, device=device):
        for image, index in zip(batch.images, batch.ids.tolist(), strict=True):
            windows = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
            found = (windows - image).abs().amax((2, 3, 4)) < 1e-4
            assert found.sum() == 1
            places.add(tuple(found.nonzero()[0].tolist()))
    assert len(places) > 1 if padding else places == {(0, 0)}
    (batch,) = opened.test_batches(device)
    torch.testing.assert_close(batch.images, pixels_of(opened, small_folder / "val"), rtol=0, atol=1e-5)


def test_a_preset_of_small_images_keeps_its_padding_on_a_folder(small_folder):
    config = override(load_preset("cifar10-resnet32-dlb"), source=f"imagefolder:{small_folder}", batch_size=8)
    steps = repr(open_data(config.data)._train_transform(config.augment))
    assert "PadCrop" in steps and "RandomResizedCrop" not in steps
    photographs = override(config, padding=None)
    assert "RandomResizedCrop" in repr(open_data(photographs.data)._train_transform(config.augment))


def test_a_run_says_first_what_was_done_to_the_data(small_folder, tmp_path, capsys):
    """Classes, images, where the test images come from, subset and noise: of a folder with and without `val`."""
    held = tmp_path / "held"
    for label in ("a", "b"):
        for split in ("train", "val"):
            for path in (small_folder / split / label).iterdir():
                target = held / label / f"{split}{path.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    options = {"image_size": 16, "batch_size": 4, "max_steps": 1, "epochs": 1}
    config = override(RunConfig(), source=f"imagefolder:{small_folder}", model="small_cnn", **options)
    train(config, tmp_path / "run", quiet=False)
    assert capsys.readouterr().err.splitlines()[0] == (
        f"data imagefolder:{small_folder}: 2 classes, 8 training images, 2 test images (from val/); subset: none; "
        "label noise: none; normalised by the mean and std of imagenet; crops of 16 x 16 pixels"
    )
    other = override(config, source=f"imagefolder:{held}", data_seed=3, per_class=2, label_noise=0.5)
    assert open_data(other.data).about == (
        f"data imagefolder:{held}: 2 classes, 4 training images, 2 test images (a tenth of each class held out, "
        "data_seed 3); subset: 2 images per class of 8; label noise: symmetric, 2 of 4 labels wrong (50.00 %); "
        "normalised by the mean and std of imagenet; crops of 16 x 16 pixels"
    )
    digits = open_data(load_preset("digits").data).about
    assert "10 classes, 200 training images, " in digits and "(half of each class held out, data_seed 0)" in digits


@pytest.mark.parametrize("kind", ["imagefolder", "list", "tar"])
def test_a_run_without_a_preset_starts_from_neutral_numbers(kind):
    config, _ = _base_config(None, None, f"{kind}:mine")
    assert (config.data.per_class, config.data.label_noise, config.data.padding) == (None, 0.0, None)
    assert config.loss.label_smoothing == 0 and config.augment == RunConfig().augment


def test_a_rehearsal_takes_the_images_that_a_run_would_take(tmp_path):
    """Links that fan out and back are followed once, and hidden folders are left out."""
    folder = tmp_path / "set" / "train" / "cat"
    for path in (folder / "a.png", folder / "@eaDir" / "b.png", tmp_path / "level16" / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for level in range(16):
        (tmp_path / f"level{level}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"level{level}" / name).symlink_to(tmp_path / f"level{level + 1}")
    (folder / "fan").symlink_to(tmp_path / "level0")
    (folder / "up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    assert sorted(path.name for path in run._images_below(folder)) == ["a.png", "c.png"]


@pytest.mark.parametrize(
    ("source", "meant"), [("{}", "imagefolder:{}"), ("folder:{}", "imagefolder:{}"), ("{}/l.txt", "list:{}/l.txt")]
)
def test_an_unknown_kind_is_named_before_what_has_no_effect_on_it(tmp_path, source, meant):
    (tmp_path / "l.txt").write_text("")
    with pytest.raises(
        ValueError, match=rf"unknown kind .*expected one of digits, .*\(is {meant.format(tmp_path)} mean"
    ):
        check_effects(override(RunConfig(), source=source.format(tmp_path), image_size=8))
