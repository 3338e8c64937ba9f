"""Wrong labels on purpose: one seed means the same ones in every tier, on every rank, and from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import train
from PIL import Image
from torch.utils.data import DataLoader

from dlb_fast.data import (
    ClassBatchSampler,
    EvalLoader,
    ImageFolder,
    IndexedDataset,
    OverlapBatchSampler,
    OverlapLoader,
    ResidentLoader,
    SampledLoader,
    collate_overlap,
    load_into_memory,
    open_dataset,
    with_label_noise,
)
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.flags import parse_flags
from dlb_fast.train.run import RunFolder

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of ten small images each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(3):
        (root / f"class{label}").mkdir()
        for number in range(10):
            colour = (label * 80, number * 20, 90)
            Image.new("RGB", (8, 8), colour).save(root / f"class{label}" / f"{number}.png")
    return root


def labels_by_id(batches) -> dict[int, int]:
    found: dict[int, int] = {}
    for batch in batches:
        for sample, label in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            assert found.setdefault(sample, label) == label  # both visits, every epoch
    return found


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_every_tier_sees_the_same_wrong_labels(kind, folder):
    files = ImageFolder(folder)
    clean = np.asarray(files.targets)
    noisy = with_label_noise(files, 0.3, kind, seed=5)
    memory = with_label_noise(load_into_memory(ImageFolder(folder)), 0.3, kind, seed=5)
    expected = dict(enumerate(np.asarray(noisy.targets).tolist()))
    assert sum(expected[i] != clean[i] for i in expected) == 9

    options = {"seed": 1, "drop_last": False}
    tiers = {"resident": list(ResidentLoader(memory, 8, **options)), "eval": list(EvalLoader(noisy, 7))}
    for threads in (1, 3):
        with OverlapLoader(noisy, 8, num_threads=threads, **options) as loader:
            tiers[f"{threads} threads"] = [batch for _ in range(2) for batch in loader]
    with OverlapLoader(noisy, 8, overlap=False, **options) as loader:
        tiers["plain"] = list(loader)
    ranks = [ResidentLoader(memory, 4, rank=rank, world_size=2, **options) for rank in range(2)]
    tiers["ranks"] = [batch for loader in ranks for batch in loader]
    sampler = OverlapBatchSampler(30, 8, **options)
    tiers["sampler"] = list(DataLoader(IndexedDataset(noisy), batch_sampler=sampler, collate_fn=collate_overlap))
    for name, batches in tiers.items():
        assert labels_by_id(batches) == expected, name
    # a sampler by class groups what is labelled alike, right or wrong
    for data in (noisy, memory):
        rows = SampledLoader(data, ClassBatchSampler(data.targets, 6, **options))
        for batch in rows:
            half = len(batch) // 2
            assert torch.equal(batch.targets[:half], batch.targets[half:])
        assert labels_by_id(rows).items() <= expected.items()


def test_the_seed_decides_and_nothing_else_does():
    data = open_dataset("synthetic:300,5,8")
    made = [np.asarray(with_label_noise(data, 0.4, seed=seed).targets) for seed in (1, 1, 2)]
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with_label_noise(data, 0.4, seed=3)
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_flags_reach_the_run_and_methods_share_the_labels(tmp_path):
    flags = ["--data", "synthetic:40,4,8", "--label-noise", "0.5", "--noise-kind", "asymmetric", "--data-seed", "7"]
    config = parse_flags(RunConfig, RunConfig(), flags, "dlb-fast train")
    data = config.data
    assert (data.label_noise, data.noise_kind, data.data_seed) == (0.5, "asymmetric", 7)
    labels = [
        np.asarray(open_data(override(config, method=m, seed=s).data).train.targets) for m, s in (("dlb", 0), ("ce", 9))
    ]
    assert (labels[0] == labels[1]).all()
    right = np.asarray(open_data(override(config, label_noise=0.0).data).train.targets)
    wrong = labels[0] != right
    assert wrong.mean() == 0.5 and (labels[0][wrong] == (right[wrong] + 1) % 4).all()
    short = override(config, batch_size=8, epochs=1, padding=1)
    losses = [
        train(override(short, label_noise=rate, noise_kind=kind), tmp_path / str(rate))["loss"]
        for rate, kind in ((0.0, "symmetric"), (0.5, "asymmetric"))
    ]
    assert losses[0] != losses[1]
    assert RunFolder(tmp_path / "0.5").read_config().data.label_noise == 0.5
