"""The recipes: every file loads, every number has its source, the controls of a recipe are fair."""

from __future__ import annotations

import re

import pytest
import yaml

from dlb_fast.presets import PRESETS, describe_preset, load_preset, preset_file
from dlb_fast.train.config import override
from dlb_fast.train.distributed import Ranks
from dlb_fast.train.methods import resolve
from dlb_fast.train.run import rehearse


@pytest.mark.parametrize("name", PRESETS)
def test_preset_loads_and_says_what_it_is(name):
    config = resolve(load_preset(name))
    given = yaml.safe_load(preset_file(name).read_text())
    assert config.loss.method == given["loss"]["method"] and config.data.source == given["data"]["source"]
    assert len(describe_preset(name)) > 10


@pytest.mark.parametrize("name", PRESETS)
def test_preset_number_has_a_comment_or_its_group_has(name):
    group_comment = False
    for line in preset_file(name).read_text().splitlines():
        if re.match(r"\w+:", line):
            group_comment = "#" in line
        elif re.match(r"  \w+: \[?[\d.]", line):
            assert "#" in line or group_comment, line


def test_preset_unknown_name():
    with pytest.raises(ValueError, match=r"unknown preset 'digit'; did you mean digits or .*presets` lists all"):
        preset_file("digit")
    with pytest.raises(ValueError, match="unknown preset 'zzz'; known: cifar10-cpu, cifar10-resnet32-alpha0, "):
        load_preset("zzz")


@pytest.mark.parametrize("prefix", [name.removesuffix("-ls") for name in PRESETS if name.endswith("-ls")])
def test_preset_controls_see_as_many_images_as_dlb(prefix):
    ce, ls, alpha0 = (load_preset(f"{prefix}-{kind}") for kind in ("ce", "ls", "alpha0"))
    dlb = load_preset("digits" if prefix == "digits" else f"{prefix}-dlb")
    doubled = override(
        dlb,
        method="ce",
        epochs=2 * dlb.train.epochs,
        warmup_epochs=2 * dlb.schedule.warmup_epochs,
        milestones=tuple(2 * m for m in dlb.schedule.milestones),
    )
    assert ce == doubled
    assert ls == override(ce, label_smoothing=0.1)
    assert alpha0 == override(dlb, method="two_view")


@pytest.mark.slow  # those of CIFAR-10 are, with this network and synthetic images, the runs of CIFAR-100
@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith(("imagenet", "cifar10-"))])
def test_preset_can_be_rehearsed(name):
    config = override(load_preset(name), model="small_cnn")
    assert rehearse(config, quiet=True, ranks=Ranks())["count"] > 0
