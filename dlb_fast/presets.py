"""Recipes by name. Every number has its source beside it, because none of them was read from the paper's tables.

Sources: `base.py` is the official repository's cross-entropy baseline (Meta-knowledge-Lab/DLB@8949a46), whose schedule
is the only complete recipe it holds; `dlb.py` has no defaults for temperature, alpha, batch size, epochs or rate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dlb_fast.train.config import RunConfig, override, to_dict
from dlb_fast.train.methods import METHODS, resolve, sampled_rows

__all__ = ["PRESETS", "Preset", "get_preset", "to_yaml"]


@dataclass(frozen=True)
class Preset:
    """A recipe: what it is, its config, and where single numbers come from (field name -> reason)."""

    about: str
    config: RunConfig
    sources: dict[str, str]


_COMMUNITY = "community default, not a value read from the paper"
_DIGITS_SOURCES = {
    "per_class": "few images, so that plain cross entropy does not saturate (our choice)",
    "label_noise": "for the same reason (our choice)",
    "batch_size": "our choice",
    "epochs": "our choice: converged, and seconds long",
    "eval_every": "every second epoch (our choice)",
    "lr": "our choice, the same for every method",
    "weight_decay": "base.py",
    "momentum": "base.py",
    "alpha": _COMMUNITY,
    "temperature": _COMMUNITY,
    "padding": "our choice for 8x8 images",
    "flip": "a mirrored digit is another sign",
}
_CIFAR_SOURCES = {
    "batch_size": "128 rows = 64 drawn (base.py: --batch_size 64) + the 64 before",
    "padding": "my_dataloader.py: RandomCrop(32, padding=4)",
    "flip": "my_dataloader.py: RandomHorizontalFlip",
    "model": "models/resnet.py, resnet32",
    "alpha": _COMMUNITY,
    "temperature": _COMMUNITY,
    "lr": "base.py",
    "momentum": "base.py, dlb.py",
    "nesterov": "base.py, dlb.py",
    "weight_decay": "base.py, dlb.py",
    "milestones": "base.py: 150, 180, 210",
    "gamma": "base.py, dlb.py",
    "epochs": "base.py: 240; dlb.py at the same number makes as many steps of twice the rows",
}

_DIGITS = override(
    RunConfig(),
    source="digits",
    per_class=20,
    label_noise=0.2,
    batch_size=40,
    padding=1,
    flip=False,
    model="small_cnn",
    lr=0.05,
    weight_decay=5e-4,
    schedule="cosine",
    epochs=30,
    eval_every=20,
    log_every=10,
)


def _cifar(classes: int) -> RunConfig:
    return override(
        RunConfig(),
        source=f"cifar{classes}:data",
        batch_size=128,
        padding=4,
        flip=True,
        model="resnet32",
        lr=0.05,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        schedule=dataclasses.replace(RunConfig().schedule, schedule="multistep", milestones=(150.0, 180.0, 210.0)),
        epochs=240,
    )


def _controls(name: str, about: str, config: RunConfig, sources: dict[str, str]) -> dict[str, Preset]:
    """DLB and its controls over the same optimiser steps and rows per step."""
    twice = {"epochs": 2 * config.train.epochs, "warmup_epochs": 2 * config.schedule.warmup_epochs}
    schedule = dataclasses.replace(config.schedule, milestones=tuple(2 * m for m in config.schedule.milestones))
    passes = "twice DLB's: an epoch of distinct samples has half the steps, so images seen are equal"
    ce = override(config, method="ce", schedule=schedule, **twice)
    ce_sources = {**sources, "epochs": passes, "milestones": "doubled with the epochs"}
    ce_sources["warmup_epochs"] = "doubled with the epochs"
    smoothing = {**ce_sources, "label_smoothing": "the usual 0.1"}
    return {
        f"{name}-dlb": Preset(f"{about}: DLB", config, sources),
        f"{name}-alpha0": Preset(
            f"{about}: control, the same two views without the KL", override(config, method="two_view"), sources
        ),
        f"{name}-ce": Preset(f"{about}: control, cross entropy at equal images seen", ce, ce_sources),
        f"{name}-ls": Preset(
            f"{about}: control, label smoothing at equal images seen", override(ce, label_smoothing=0.1), smoothing
        ),
    }


_BAKE = "yxgeee/BAKE small_scale"
_BAKE_SOURCES = {
    "batch_size": f"{_BAKE}: --batch-size 128 = anchors and their companions",
    "model": f"{_BAKE}: CIFAR_ResNet18 (3x3 stem)",
    "alpha": f"{_BAKE}: --lamda 1",
    "temperature": f"{_BAKE}: --temp 4",
    "omega": f"{_BAKE}: --omega, 0.5 on CIFAR-100, 0.9 on TinyImageNet",
    "companions": f"{_BAKE}: --intra-imgs, 3 on CIFAR-100, 1 on TinyImageNet (4 or 2 times the images per epoch)",
    "lr": f"{_BAKE}: --lr 0.1",
    "momentum": f"{_BAKE}: 0.9",
    "nesterov": f"{_BAKE}: off",
    "weight_decay": f"{_BAKE}: --decay 1e-4",
    "epochs": f"{_BAKE}: 200",
    "milestones": f"{_BAKE}: half and three quarters, looked at after the epoch",
    "padding": f"{_BAKE}: RandomCrop(32, padding=4)",
    "image_size": f"{_BAKE}: RandomResizedCrop(32) for TinyImageNet",
}
_BAKE_IMAGENET = "yxgeee/BAKE imagenet configs"
_BAKE_IMAGENET_SOURCES = {
    "batch_size": f"{_BAKE_IMAGENET}: 512 over 8 GPUs with SyncBN and targets over all of them; here one device",
    "alpha": f"{_BAKE_IMAGENET}: LAMBDA 1",
    "temperature": f"{_BAKE_IMAGENET}: TEMP 4",
    "omega": f"{_BAKE_IMAGENET}: OMEGA 0.5",
    "companions": f"{_BAKE_IMAGENET}: 1, so that an epoch shows twice the images of the baseline",
    "lr": f"{_BAKE_IMAGENET}: 0.4, twice the baseline's",
    "nesterov": f"{_BAKE_IMAGENET}: on",
    "weight_decay": f"{_BAKE_IMAGENET}: 5e-5",
    "epochs": f"{_BAKE_IMAGENET}: 100",
    "warmup_epochs": f"{_BAKE_IMAGENET}: 5",
    "model": "ResNet-50, built in",
    "image_size": "224",
}
_TORCHVISION = "torchvision IMAGENET1K_V2"  # ResNet50_Weights; the command line is in pytorch/vision#3995
# Its references/classification/train.py takes 2e-5 * rows * 32 / epochs of the weights into the average every 32 steps.
_EMA = round((1 - 2e-5 * 1024 * 32 / 600) ** (1 / 32), 7)
_IMAGENET_SOURCES = {
    "batch_size": f"{_TORCHVISION}: 8 x 128 rows; with DLB half of them repeat the step before",
    "image_size": f"{_TORCHVISION}: --train-crop-size 176",
    "eval_size": f"{_TORCHVISION}: --val-crop-size 224",
    "eval_resize": f"{_TORCHVISION}: --val-resize-size 232",
    "rand_augment": f"{_TORCHVISION}: TrivialAugment (ta_wide), which is not built in; 2,9 is the usual RandAugment",
    "erase_prob": f"{_TORCHVISION}: --random-erase 0.1",
    "mixup_alpha": f"{_TORCHVISION}: 0.2",
    "cutmix_alpha": f"{_TORCHVISION}: 1",
    "eval_batch_size": "our choice",
    "num_threads": "our choice: one machine's cores",
    "model": "ResNet-50 v1.5, built in, torchvision's state names",
    "label_smoothing": f"{_TORCHVISION}: 0.1",
    "lr": f"{_TORCHVISION}: 0.5 at 1024 rows",
    "momentum": f"{_TORCHVISION}: 0.9",
    "nesterov": f"{_TORCHVISION}: off",
    "weight_decay": f"{_TORCHVISION}: 2e-5",
    "decay_norm_and_bias": f"{_TORCHVISION}: --norm-weight-decay 0",
    "schedule": f"{_TORCHVISION}: cosine",
    "warmup_epochs": f"{_TORCHVISION}: 5 passes, linear; an epoch of DLB shows every image twice",
    "epochs": f"{_TORCHVISION}: 600 passes = 300 epochs that show every image twice",
    "ema": f"{_TORCHVISION}: --model-ema-decay 0.99998 every 32 steps, as its train.py scales it, per step",
    "amp": "ours; the recipe of torchvision ran in fp16 autocast or float32",
    "channels_last": "ours: what Tensor Cores read",
    "eval_every": "our choice: every epoch",
    "alpha": _COMMUNITY,
    "temperature": _COMMUNITY,
}
_NVIDIA = "NVIDIA DeepLearningExamples, ResNet-50 v1.5"
_IMAGENET_SHORT_SOURCES = {
    **_IMAGENET_SOURCES,
    "batch_size": f"{_NVIDIA}: any, with the rate in proportion; 1024 as in the long recipe",
    "image_size": f"{_NVIDIA}: 224",
    "eval_size": "as the training crop",
    "eval_resize": f"{_NVIDIA}: 256",
    "rand_augment": f"{_NVIDIA}: none",
    "erase_prob": f"{_NVIDIA}: none",
    "mixup_alpha": f"{_NVIDIA}: none in 90 epochs (0.2 in its 250)",
    "cutmix_alpha": f"{_NVIDIA}: none",
    "label_smoothing": f"{_NVIDIA}: 0.1",
    "lr": f"{_NVIDIA}: 0.256 per 256 rows",
    "momentum": f"{_NVIDIA}: 0.875",
    "nesterov": f"{_NVIDIA}: off",
    "weight_decay": f"{_NVIDIA}: 1/32768",
    "decay_norm_and_bias": f"{_NVIDIA}: none on BatchNorm",
    "schedule": f"{_NVIDIA}: cosine",
    "warmup_epochs": f"{_NVIDIA}: 5 passes, linear; an epoch of DLB shows every image twice",
    "epochs": f"{_NVIDIA}: 90 passes = 45 epochs that show every image twice",
    "ema": f"{_NVIDIA}: none",
    "amp": "bf16 instead of NVIDIA's fp16",
}
_CSKD_SOURCES = {
    "batch_size": "alinlab/cs-kd: --batch-size 128 anchors, and as many partners",
    "model": "alinlab/cs-kd: CIFAR_ResNet18 (3x3 stem)",
    "alpha": "alinlab/cs-kd: --lamda 1",
    "temperature": "alinlab/cs-kd: --temp 4",
    "lr": "alinlab/cs-kd: 0.1",
    "momentum": "alinlab/cs-kd: 0.9",
    "nesterov": "alinlab/cs-kd: off",
    "weight_decay": "alinlab/cs-kd: 1e-4",
    "epochs": "alinlab/cs-kd: 200",
    "milestones": "alinlab/cs-kd: half and three quarters, looked at after the epoch",
    "padding": "alinlab/cs-kd: RandomCrop(32, padding=4)",
}
_PSKD_SOURCES = {
    "batch_size": "lgcnsai/PS-KD-Pytorch: 128",
    "model": "ours: the official code takes a pre-activation ResNet-18, which is not built in",
    "alpha": "lgcnsai/PS-KD-Pytorch: alpha_T 0.8, growing over the epochs",
    "lr": "lgcnsai/PS-KD-Pytorch: 0.1",
    "weight_decay": "lgcnsai/PS-KD-Pytorch: 5e-4",
    "nesterov": "lgcnsai/PS-KD-Pytorch: on",
    "epochs": "lgcnsai/PS-KD-Pytorch: 300",
    "milestones": "lgcnsai/PS-KD-Pytorch: 150, 225",
    "padding": "crop with padding 4",
}


def _imagenet() -> dict[str, Preset]:
    """ResNet-50 by two published recipes, the passes halved because DLB shows every image twice per epoch."""
    common: dict[str, Any] = {"source": "imagefolder:data", "batch_size": 1024, "num_threads": 16, "model": "resnet50"}
    common |= {"eval_batch_size": 256, "label_smoothing": 0.1, "nesterov": False, "decay_norm_and_bias": False}
    common |= {"schedule": "cosine", "warmup_epochs": 2.5, "amp": "bf16", "channels_last": True}
    long = override(
        RunConfig(), **common, image_size=176, eval_size=224, eval_resize=232, lr=0.5, momentum=0.9, weight_decay=2e-5,
        epochs=300, ema=_EMA, erase_prob=0.1, mixup_alpha=0.2, cutmix_alpha=1.0,
    )  # fmt: skip
    short = override(
        RunConfig(), **common, image_size=224, lr=1.024, momentum=0.875, weight_decay=1 / 32768, epochs=45
    )
    about = "ImageNet, ResNet-50"
    return {
        **_controls("imagenet-resnet50", f"{about}, 600 passes", long, _IMAGENET_SOURCES),
        **_controls("imagenet-resnet50-short", f"{about}, 90 passes", short, _IMAGENET_SHORT_SOURCES),
    }


def _steps_at(*milestones: float) -> Any:
    return dataclasses.replace(RunConfig().schedule, schedule="multistep", milestones=milestones)


def _family() -> dict[str, Preset]:
    """Published recipes of the siblings, and every sibling on digits."""
    small: dict[str, Any] = {"model": "resnet18", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
    halves = {"epochs": 200, "schedule": _steps_at(101.0, 151.0)}
    bake = override(
        RunConfig(), source="cifar100:data", batch_size=128, method="bake", alpha=1.0, temperature=4.0, omega=0.5,
        companions=3, padding=4, **small, **halves,
    )  # fmt: skip
    tiny = override(bake, source="tinyimagenet:data", omega=0.9, companions=1, image_size=32)
    imagenet = override(
        RunConfig(), source="imagefolder:data", batch_size=512, method="bake", alpha=1.0, temperature=4.0, omega=0.5,
        companions=1, model="resnet50", lr=0.4, weight_decay=5e-5, epochs=100, warmup_epochs=5.0, image_size=224,
        channels_last=True,
    )  # fmt: skip
    cs_kd = override(
        RunConfig(), source="cifar100:data", batch_size=256, method="cs_kd", alpha=1.0, temperature=4.0, padding=4,
        **small, **halves,
    )  # fmt: skip
    ps_kd = override(
        RunConfig(), source="cifar100:data", batch_size=128, method="ps_kd", alpha=0.8, model="resnet18", lr=0.1,
        weight_decay=5e-4, epochs=300, schedule=_steps_at(150.0, 225.0), padding=4,
    )  # fmt: skip
    control = {**_BAKE_SOURCES, "alpha": "0: the same batches without the teacher"}
    found = {
        "cifar100-resnet18-bake": Preset("CIFAR-100, ResNet-18: BAKE", bake, _BAKE_SOURCES),
        "cifar100-resnet18-bake-alpha0": Preset(
            "CIFAR-100, ResNet-18: control, BAKE's batches without the KL", override(bake, alpha=0.0), control
        ),
        "tinyimagenet-resnet18-bake": Preset("TinyImageNet at 32x32, ResNet-18: BAKE", tiny, _BAKE_SOURCES),
        "imagenet-resnet50-bake": Preset("ImageNet, ResNet-50: BAKE", imagenet, _BAKE_IMAGENET_SOURCES),
        "cifar100-resnet18-cskd": Preset("CIFAR-100, ResNet-18: CS-KD", cs_kd, _CSKD_SOURCES),
        "cifar100-resnet18-pskd": Preset("CIFAR-100, ResNet-18: PS-KD", ps_kd, _PSKD_SOURCES),
    }
    for name, method in METHODS.items():
        if name in ("dlb", "two_view", "ce"):
            continue
        own = override(_DIGITS, method=name)
        # as many steps as DLB: an epoch of a method that draws more new samples per step has fewer
        passes = own.train.epochs * 2 * sampled_rows(own) // own.data.batch_size
        card = {number: f"docs/methods/{method.card}.md" for number in method.options}
        sources = {**_DIGITS_SOURCES, **card, "epochs": "as many steps as the digits preset"}
        found[f"digits-{name.replace('_', '')}"] = Preset(
            f"digits: {method.about}", override(own, epochs=passes), sources
        )
    return found


PRESETS: dict[str, Preset] = {
    "digits": Preset("handwritten digits 8x8, few and noisy labels, small CNN: DLB", _DIGITS, _DIGITS_SOURCES),
    **{n: p for n, p in _controls("digits", "digits", _DIGITS, _DIGITS_SOURCES).items() if n != "digits-dlb"},
    **_controls("cifar10-resnet32", "CIFAR-10, ResNet-32", _cifar(10), _CIFAR_SOURCES),
    **_controls("cifar100-resnet32", "CIFAR-100, ResNet-32", _cifar(100), _CIFAR_SOURCES),
    **_imagenet(),
    **_family(),
}


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: unknown name; the message has the near ones.
    Example:
        >>> get_preset("digits").config.loss.method
        'dlb'
    """
    if name not in PRESETS:
        import difflib

        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}; {hint} (`dlb-fast presets` lists all)")
    return PRESETS[name]


def to_yaml(preset: Preset) -> str:
    """The preset as a config file with its sources as comments."""
    import yaml

    lines = [f"# {preset.about}"]
    for group, fields in to_dict(resolve(preset.config)).items():
        lines.append(f"{group}:")
        for name, value in fields.items():
            plain = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            source: Any = preset.sources.get(name if name != "source" else "data")
            lines.append(f"  {name}: {plain}" + (f"  # {source}" if source else ""))
    return "\n".join(lines) + "\n"
