"""A folder of images: the loops of README and docs/own-loop.md, and the commands of docs/image-folder.md."""

from __future__ import annotations

import pickle
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ROOT, assert_same, python, write_jpegs
from with_torchvision import missing

from dlb_fast import cli

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "examples" / "image_folder.py"
START = ROOT / "tests" / "with_torchvision.py"
SMALL = ("--model", "shufflenet_v2_x0_5", "--size", 32, "--batch-size", 8, "--save-every", 3, "--workers", 1)
needs_torchvision = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"{split}/{c}/{k}.jpg" for split, n in (("train", 12), ("val", 4)) for c in "abc" for k in range(n)]
    return write_jpegs(tmp_path_factory.mktemp("folder"), names)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / "weights.pt", weights_only=True)


def test_every_command_of_the_page_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the page's order, on 40 images per class and with smaller numbers; what the page quotes is what is said."""
    page = (ROOT / "docs" / "image-folder.md").read_text(encoding="utf-8")
    write_jpegs(tmp_path, [f"photos/{label}/{k}.jpg" for label in ("cat", "dog", "horse") for k in range(40)])
    write_jpegs(tmp_path, [f"other-photos/{label}/{k}.jpg" for label in ("cat", "dog", "horse") for k in range(20)])
    write_jpegs(tmp_path, ["new/a.jpg", "new/b.jpg"])
    monkeypatch.chdir(tmp_path)
    smaller = {"resnet18_imagenet": "small_cnn", "224": "24", "64": "16", "45": "1", "90": "1", "60": "2"}
    commands = [
        shlex.split(line)
        for block in re.findall(r"```sh\n(.*?)```", page, re.S)
        for line in block.replace("\\\n", "").splitlines()
    ]
    said = ""
    for words in commands:
        assert words[0] == "dlb-fast"
        assert cli.main([smaller.get(word, word) for word in words[1:]]) == 0, words
        captured = capsys.readouterr()
        said += captured.out + captured.err
    said += caplog.text
    assert {words[1] for words in commands} == {"verify-data", "train", "eval", "predict", "report"}
    quoted = re.findall(r"```text\n(.*?)```", page, re.S)[-1].splitlines()
    assert len(quoted) == 2
    for line in quoted:
        assert re.sub(r"\b224\b", smaller["224"], line) in said
    assert (tmp_path / "runs/photos/report.html").exists() and (tmp_path / "predictions.csv").exists()


def test_every_option_of_the_page_exists(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "image-folder.md").read_text(encoding="utf-8")
    known = ""
    for command in ("train", "predict"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= set(re.findall(r"--[a-z][a-z-]+", known))


@needs_torchvision
def test_the_loop_of_the_readme_runs(tmp_path: Path) -> None:
    """With smaller numbers than a reader's."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (code,) = (block for block in blocks if "torchvision" in block)
    for number, smaller in (("224", "32"), ("range(45)", "range(2)"), ("num_workers=4", "num_workers=1")):
        assert number in code
        code = code.replace(number, smaller)
    (tmp_path / "loop.py").write_text(code)
    write_jpegs(tmp_path / "data", [f"train/{label}/{k}.jpg" for label in ("cat", "dog") for k in range(16)])
    python(START, "loop.py", cwd=tmp_path)


@needs_torchvision
def test_a_killed_run_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch, and between its last batch and its validation (an epoch has 9 batches)."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    first = (EXAMPLE, folder, *SMALL, "--epochs", 2, "--out", run)
    for batches, again in ((6, ()), (9, ("--resume",))):
        done = python(START, "--kill", 1 if again else 2, *first, *again, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert torch.load(run / "checkpoint.pt", weights_only=True)["batches"] == batches
    said = python(START, *first, "--resume", "--then", *first[:-1], whole).stdout
    assert said.count("epoch 0: validation loss") == said.count("epoch 1: validation loss") == 2
    assert_same(weights(run), weights(whole))


@needs_torchvision
def test_two_ranks_accumulate_and_continue(folder: Path, tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", START)
    first = (EXAMPLE, folder, *SMALL, "--accumulate", 3, "--save-every", 1, "--epochs", 1, "--out", tmp_path, "--amp")
    assert "batch 3: cross entropy" in python(*launch, *first).stdout  # of the 4 batches of an epoch
    whole = weights(tmp_path)
    python(*launch, *first, "--resume")
    assert_same(weights(tmp_path), whole)


@needs_torchvision
def test_the_same_file_trains_on_cifar10(tmp_path: Path) -> None:
    """With the line that it names in place of the one for a folder, on files like the published ones."""
    lines = EXAMPLE.read_text().splitlines(keepends=True)
    here = next(k for k, line in enumerate(lines) if line.startswith("    return datasets.ImageFolder("))
    assert lines[here + 1].startswith("    # return datasets.CIFAR10(")
    lines[here : here + 2] = lines[here + 1].replace("# ", "", 1)
    unchecked = "import torchvision.datasets.cifar\ntorchvision.datasets.cifar.check_integrity = lambda *names: True\n"
    (tmp_path / "cifar.py").write_text(unchecked + "".join(lines))
    files = tmp_path / "cifar-10-batches-py"
    files.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        pixels = generator.integers(0, 256, (8, 3072), dtype=np.uint8)
        (files / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(8))}))
    (files / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    done = python(START, tmp_path / "cifar.py", tmp_path, *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    assert "epoch 0: validation loss" in done.stdout
    assert weights(tmp_path / "run")["fc.weight"].shape[0] == 10
