"""Nothing is lost on several ranks: stopped, killed, damaged, continued elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import distance, make, trained, whole
from test_train_resume import assert_same_run, differences, final_state
from torch import nn

from dlb_fast.buffer import unpack_state
from dlb_fast.presets import load_preset
from dlb_fast.train import build
from dlb_fast.train import state as files
from dlb_fast.train.config import override
from dlb_fast.train.run_folder import RunFolder

torch.set_num_threads(1)


def run(folder, kind, settings, resume=False, stop_at=None, alone=False):
    trainer = make(kind, folder, alone=alone, **settings)
    if resume:
        assert trainer.resume() is not None
    if stop_at is not None:
        original, last = trainer._optimizer_step, trainer.ranks.world_size - 1

        def stopping():
            trainer.stop._left = 1  # vote before every step
            if trainer.step + 1 == stop_at and trainer.ranks.rank == last:
                trainer.stop.number = signal.SIGTERM
            original()

        trainer._optimizer_step = stopping
    result = trainer.fit()
    assert stop_at is None or (trainer.step, result["stopped_by"]) == (stop_at, "SIGTERM")
    return whole(trainer.model), result, trainer.state_dict()


HARD = {"norm": nn.BatchNorm2d, "dropout": 0.3, "ema": 0.9, "epochs": 3, "checkpoint_every": 4, "eval_every": 4}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("adam", [False, True])
def test_stopped_and_resumed_equals_uninterrupted(kind, adam, process_group, tmp_path):
    settings = {**HARD, "adam": adam, "amp": "none" if adam else "fp16"}
    if settings["amp"] == "fp16":
        settings["clip_grad"] = 1.0
    full = process_group(run, tmp_path / "whole", kind, settings)
    process_group(run, tmp_path / "part", kind, settings, False, 9)  # between two evaluations
    part = process_group(run, tmp_path / "part", kind, settings, True)
    for a, b in zip(full, part, strict=True):
        assert distance(a[0], b[0]) == 0.0
    a, b = final_state(tmp_path / "whole"), final_state(tmp_path / "part")
    assert differences(a, b) == [] and len(a["others"]) == 1
    assert not torch.equal(a["rng"]["torch"], a["others"][0]["rng"]["torch"])
    exported = [(tmp_path / n / "checkpoints" / "last.safetensors").read_bytes() for n in ("whole", "part")]
    assert exported[0] == exported[1]


CHANGES = [("ddp", None), ("fsdp", None), (None, "fsdp"), (None, "ddp"), ("fsdp", "ddp"), ("ddp", "fsdp")]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_goes_on_with_another_engine_or_number_of_ranks(before, after, process_group, tmp_path):
    """Same global batch: the samples, the remembered rows and the weights continue as if nothing had changed."""
    settings = {"epochs": 2, "checkpoint_every": 3, "ema": 0.9}
    expected = trained(alone=True, **settings)

    def go(kind, resume, stop_at=None):
        if kind is None:
            return run(tmp_path, "none", settings, resume, stop_at, True)
        return process_group(run, tmp_path, kind, settings, resume, stop_at)[0]

    go(before, False, 5)
    weights, result, state = go(after, True)
    assert distance(weights, expected.weights) < 1e-12
    for name in ("lb", "train_top1", "images_seen"):
        assert result[name] == pytest.approx(expected.result[name], rel=1e-12)
    parts = [state, *state["others"]]
    buffers = [unpack_state(part["criterion"]["_extra_state"]) for part in parts]
    assert torch.equal(torch.cat([b["ids"] for b in buffers]), expected.ids)
    assert sum(b["mismatched"] for b in buffers) == 0


def resumed_with_damage(folder, kind):
    trainer = make(kind, folder, checkpoint_every=3)
    said = []
    trainer.log.warn = said.append
    found = trainer.resume()
    return found.name, trainer.step, said


def test_a_damaged_checkpoint_is_skipped_by_all(process_group, tmp_path):
    process_group(run, tmp_path, "ddp", {"max_steps": 7, "checkpoint_every": 3})
    newest = sorted((tmp_path / "checkpoints").glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    first, second = process_group(resumed_with_damage, tmp_path, "fsdp")
    assert first[:2] == second[:2] == ("step-000000006.pt", 6)
    assert newest.name in first[2][0] and second[2] == []


# ---- from the command line


def launch(folder, *flags, wait=True):
    """`torchrun --nproc-per-node 2 -m dlb_fast train ...` in a folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(files.__file__).parents[2])}
    command = [*torchrun, "-m", "dlb_fast", "train", *flags]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    return process.communicate(timeout=200)[1] if wait else process


def ranks_of(process):
    """The processes torchrun started."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) == process.pid]


def _parent(path):
    try:
        return int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


FLAGS = ["--batch-size", "20", "--max-steps", "60", "--eval-every", "20", "--checkpoint-every", "6"]


def expected_run(folder):
    config = override(load_preset("digits"), batch_size=20, max_steps=60, eval_every=20, checkpoint_every=6)
    build.train_run(config, RunFolder(folder), quiet=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
def test_killed_and_resumed_by_torchrun(process_group, tmp_path):
    """kill -9 takes one rank, torchrun the other; the bare command goes on, to the same bits."""
    process_group(expected_run, tmp_path / "expected")
    process = launch(tmp_path, *FLAGS, "--out", "run", wait=False)
    until = time.time() + 120
    while not list(tmp_path.glob("run/checkpoints/step-*.pt")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.01)
    os.kill(max(ranks_of(process)), signal.SIGKILL)
    began = time.time()
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0 and time.time() - began < 60, said  # seconds on a free machine
    assert final_state(tmp_path / "run")["step"] < 60
    said = launch(tmp_path, "--resume", "--out", "run")
    assert "continuing from" in said and said.count("done: test top-1") == 1
    assert "60 steps of 20 rows (2 ranks x 10, ddp) on cpu, lr 0.05" in said
    assert_same_run(tmp_path / "expected", tmp_path / "run")


@pytest.mark.slow
def test_one_rank_s_error_ends_the_other_at_once(tmp_path):
    """A file that only one rank reads is damaged."""
    for split, count in (("train", 12), ("val", 2)):
        for label in "ab":
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                path = tmp_path / "images" / split / label / f"{number}.png"
                Image.new("RGB", (16, 16), (number, 9, 9)).save(path)
    (tmp_path / "images" / "train" / "b" / "5.png").write_bytes(b"broken")
    began = time.time()
    said = launch(
        tmp_path, "--data", "imagefolder:images", "--image-size", "16", "--batch-size", "8", "--max-steps", "50",
        "--num-threads", "1", "--per-class", "None", "--label-noise", "0", "--out", "run",
    )  # fmt: skip
    assert time.time() - began < 120  # nobody waited for a time-out
    assert "SampleError" in said and "5.png" in said, said
    assert "another rank ended" in said or "SIGTERM" in said
