"""Nothing is lost on several ranks: stopped, killed, damaged, continued elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import (
    PATIENCE,
    assert_same,
    assert_same_run,
    distance,
    environment,
    exported,
    last_checkpoint,
    train,
    wait_for,
    without_times,
    write_images,
)
from nodes import children, documented
from ranks import make, trained, whole
from torch import nn

from dlb_fast.buffer import unpack_state
from dlb_fast.presets import load_preset
from dlb_fast.train.config import override

torch.set_num_threads(1)


def run(folder, kind, settings, resume=False, stop_at=None, alone=False):
    trainer = make(kind, folder, alone=alone, **settings)
    if resume:
        assert trainer.resume() is not None
    if stop_at is not None:
        original, last = trainer.optimizer_step, trainer.ranks.world_size - 1

        def stopping():
            trainer.stop._left = 1  # vote before every step
            if trainer.step + 1 == stop_at and trainer.ranks.rank == last:
                trainer.stop.signal = signal.SIGTERM
            original()

        trainer.optimizer_step = stopping
    result = trainer.fit()
    assert stop_at is None or (trainer.step, result["stopped_by"]) == (stop_at, "SIGTERM")
    return whole(trainer.model), result, trainer.state_dict()


HARD = {"norm": nn.BatchNorm2d, "dropout": 0.3, "ema": 0.9, "epochs": 3, "checkpoint_every": 4, "eval_every": 4}


@pytest.mark.parametrize(("kind", "adam"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_stopped_and_resumed_equals_uninterrupted(kind, adam, process_group, tmp_path):
    settings = {**HARD, "adam": adam, "amp": "none" if adam else "fp16"}
    if settings["amp"] == "fp16":
        settings["clip_grad"] = 1.0
    full = process_group(run, tmp_path / "whole", kind, settings)
    process_group(run, tmp_path / "part", kind, settings, False, 9)  # between two evaluations
    part = process_group(run, tmp_path / "part", kind, settings, True)
    for a, b in zip(full, part, strict=True):
        assert distance(a[0], b[0]) == 0.0
    a, b = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "part")
    assert_same(without_times(a), without_times(b))
    assert len(a["others"]) == 1
    assert not torch.equal(a["rng"]["torch"], a["others"][0]["rng"]["torch"])
    assert exported(tmp_path / "whole") == exported(tmp_path / "part")


CHANGES = [("ddp", None), (None, "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")]


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
    assert all(b[name] == 0 for b in buffers for name in ("mismatched", "unknown", "not_finite"))  # all had a teacher


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


def launch(folder, *flags):
    """`torchrun --nproc-per-node 2 -m dlb_fast train ...` in a folder; what it says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dlb_fast", "train", *flags]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    return process.communicate(timeout=PATIENCE)[1]


FLAGS = ["--batch-size", "20", "--max-steps", "60", "--eval-every", "20", "--checkpoint-every", "6"]


def expected_run(folder):
    config = override(load_preset("digits"), batch_size=20, max_steps=60, eval_every=20, checkpoint_every=6)
    train(config, folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_is_restarted_by_torchrun(process_group, tmp_path):
    """kill -9 takes one rank; torchrun ends the other and starts the documented command again, to the same bits."""
    process_group(expected_run, tmp_path / "expected")
    words = documented("--standalone")
    place = words.index("--preset")
    words[place : place + 4] = ["--preset", "digits", *FLAGS]
    words[words.index("--nproc-per-node") + 1] = "2"
    command = [*words[:3], "--max-restarts", "1", *words[3:]]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("runs/a/checkpoints/step-*.pt")), "a checkpoint", process)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, said = process.communicate(timeout=PATIENCE)  # long before the time-out of a group that lost a rank
    assert process.returncode == 0, said
    assert "continuing from" in said and said.count("done: test top-1") == 1
    assert "60 steps of 20 rows (2 ranks x 10, ddp) on cpu, lr 0.05" in said
    assert_same_run(tmp_path / "expected", tmp_path / "runs/a")


@pytest.mark.slow
def test_one_rank_s_error_ends_the_other_at_once(tmp_path):
    """A file that only one rank reads is damaged."""
    counts = (("train", 12), ("val", 2))
    names = [f"{split}/{label}/{k}.png" for split, count in counts for label in "ab" for k in range(count)]
    write_images(tmp_path / "images", names)
    (tmp_path / "images/train/b/5.png").write_bytes(b"broken")
    flags = "--data imagefolder:images --image-size 16 --batch-size 8 --max-steps 50 --num-threads 1 --out run"
    said = launch(tmp_path, *flags.split())  # within PATIENCE: nobody waits for a time-out of gloo
    assert "could not be loaded" in said and "5.png" in said, said
    assert "another rank ended" in said or "SIGTERM" in said
