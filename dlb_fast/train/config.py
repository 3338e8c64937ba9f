"""The configuration of a run: frozen dataclasses that check their values.

A config comes from a preset, a YAML file and command-line flags, each overriding the one before. The resolved config is
saved in the run folder. tyro parses both files and flags. Field names are unique over all groups, so `--lr 0.1` needs
no prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from dlb_fast._args import did_you_mean
from dlb_fast.data import Cutout, Mix, RandAugment, RandomErasing
from dlb_fast.data.datasets.labels import LabelFile
from dlb_fast.data.datasets.noise import NOISE_KINDS
from dlb_fast.data.decode.decode import MAX_PIXELS
from dlb_fast.methods import METHODS, find

try:  # configs made in Python work without tyro
    import tyro
except ImportError:
    tyro = None  # type: ignore[assignment]
    _DATA_FLAG = None
else:
    _DATA_FLAG = tyro.conf.arg(name="data")

__all__ = [
    "EFFECTS",
    "METHOD_FIELDS",
    "AugmentConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check_effects",
    "from_dict",
    "load_config",
    "override",
    "parse",
    "read_yaml",
    "to_dict",
    "without_effect",
]


def _require(condition: bool, name: str, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"config: {name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class DataConfig:
    """Dataset, batch size, crop and flip."""

    source: Annotated[str, _DATA_FLAG] = "digits"
    """KIND[:PATH]: digits, cifar10:PATH, cifar100:PATH, imagefolder:PATH, synthetic[:N,C,SIZE], ..."""
    batch_size: int = 128
    """Rows per step over all ranks, an even number; with DLB half of them are repeated."""
    per_class: int | None = None
    """Keep only this many training images of each class."""
    label_noise: float = 0.0
    """Fraction of the training labels that are drawn anew; the run's first line has the fraction that is wrong."""
    noise_kind: str = "symmetric"
    """symmetric: any other class, uniformly. uniform: any class, the true one included. pair: the next class.
    superclass: the next class of the superclass (CIFAR-100). asymmetric: the customary confusions of CIFAR-10 and
    CIFAR-100. file:PATH: the labels of a file (.csv, .npy, .npz:KEY)."""
    data_seed: int = 0
    """Seed of splits, subset and label noise; separate from `seed`, so that runs with other seeds share the data."""
    padding: int | None = None
    """Random crop after zero padding by this many pixels, 0: no crop. Image files are first resized to image_size.
    None: 4 for datasets of a fixed size, and for image files a random resized crop (8 to 100 % of the area)."""
    flip: bool = True
    """Random horizontal flip."""
    image_size: int = 32
    """Height and width of the crops of image files, in pixels."""
    eval_size: int | None = None
    """Height and width in the evaluation, in pixels; None: image_size. Smaller crops in training than in evaluation
    cost less and are no worse (Touvron et al., NeurIPS 2019)."""
    eval_resize: int | None = None
    """Shorter side before the centre crop of the evaluation, in pixels; None: the crop's side, or without padding that
    / 0.875."""
    eval_batch_size: int = 512
    """Rows per forward in the evaluation."""
    num_threads: int = 2
    """Decoding threads for image folders."""
    max_pixels: int = MAX_PIXELS
    """Image files with more pixels (height x width) are refused before they are decoded."""
    on_error: Literal["raise", "replace"] = "raise"
    """raise: an image that cannot be read ends the run. replace: in the training another one stands in, in both views
    and named; in the evaluation it is left out. More than 1 % of a set end the run."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2 and self.batch_size % 2 == 0, "batch_size", "even and >= 2", self.batch_size)
        _require(self.per_class is None or self.per_class >= 1, "per_class", "at least 1", self.per_class)
        _require(0 <= self.label_noise <= 1, "label_noise", "in [0, 1]", self.label_noise)
        if self.label_file is not None:
            try:
                LabelFile.of(self.label_file)
            except ValueError as error:
                raise ValueError(f"config: noise_kind: {error}") from None
        elif self.noise_kind not in NOISE_KINDS:
            raise ValueError(
                f"config: noise_kind must be one of {', '.join(NOISE_KINDS)} or file:PATH, got {self.noise_kind!r}"
                f"{did_you_mean(self.noise_kind, NOISE_KINDS)}"
            )
        _require(self.padding is None or self.padding >= 0, "padding", "at least 0 or null", self.padding)
        _require(self.image_size >= 1, "image_size", "at least 1", self.image_size)
        _require(self.eval_size is None or self.eval_size >= 1, "eval_size", "at least 1 or null", self.eval_size)
        crop = self.image_size if self.eval_size is None else self.eval_size
        ok = self.eval_resize is None or self.eval_resize >= crop
        _require(ok, "eval_resize", f"at least the crop of the evaluation ({crop}) or null", self.eval_resize)
        _require(self.eval_batch_size >= 1, "eval_batch_size", "at least 1", self.eval_batch_size)
        _require(self.num_threads >= 1, "num_threads", "at least 1", self.num_threads)
        _require(self.max_pixels >= 1, "max_pixels", "at least 1", self.max_pixels)

    @property
    def label_file(self) -> str | None:
        """The file of the training labels as `noise_kind` names it, or None."""
        prefix, _, rest = self.noise_kind.partition(":")
        return rest if prefix == "file" else None

    @property
    def noisy(self) -> bool:
        """Whether training labels are drawn anew or are those of a file."""
        return self.label_noise > 0 or self.label_file is not None

    @property
    def kind(self) -> str:
        """The dataset's kind: `source` without its path."""
        return self.source.partition(":")[0]

    @property
    def path(self) -> Path:
        """Where the dataset is: `source` without its kind."""
        return Path(self.source.partition(":")[2])


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images beyond crop and flip; see docs/augmentation.md."""

    rand_augment: str | None = None
    """N,M: RandAugment with N operations of magnitude M (0 to 30); 2,9 is usual."""
    cutout: int = 0
    """Side of Cutout's black square, in pixels; 0 turns it off."""
    erase_prob: float = 0.0
    """Probability that a rectangle of a view is erased after the normalisation (random erasing); 0.25 is usual."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the rectangle's share of the image."""
    erase_mode: Literal["const", "rand", "pixel"] = "const"
    """Zeros (the mean), noise per channel, or noise per pixel."""
    mixup_alpha: float = 0.0
    """Mixup with weights from Beta(alpha, alpha); 0 turns it off. Both views of a sample are mixed alike."""
    cutmix_alpha: float = 0.0
    """CutMix with areas from Beta(alpha, alpha); 0 turns it off."""
    mix_prob: float = 1.0
    """Probability that rows are mixed, if mixup or CutMix is on."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix if both are on."""
    mix_mode: Literal["batch", "elem"] = "batch"
    """batch: one weight and box per half of a batch; elem: one per row."""

    def __post_init__(self) -> None:
        try:
            self.mix()
            self.erase()
            self.transforms()
        except (ValueError, TypeError) as error:
            raise ValueError(f"config: {error}") from None

    def mix(self) -> Mix | None:
        """Mixup and CutMix, or None."""
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            return None
        return Mix(self.mixup_alpha, self.cutmix_alpha, self.mix_prob, self.mix_switch_prob, self.mix_mode)

    def erase(self) -> RandomErasing | None:
        """Random erasing, or None."""
        if self.erase_prob == 0:
            return None
        return RandomErasing(self.erase_prob, area=self.erase_area, mode=self.erase_mode)

    def transforms(self) -> list[Any]:
        """The transforms on uint8 images after crop and flip."""
        steps: list[Any] = []
        if self.rand_augment is not None:
            try:
                operations, magnitude = (int(part) for part in self.rand_augment.split(","))
            except ValueError:
                raise ValueError(
                    f"rand_augment must be N,M (operations and magnitude), such as 2,9, got {self.rand_augment!r}"
                ) from None
            steps.append(RandAugment(operations, magnitude))
        if self.cutout != 0:
            steps.append(Cutout(self.cutout))
        return steps


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = "small_cnn"
    """A built-in name (resnet32, resnet110, wrn20_8, vgg16, ...), or timm:NAME; with pretrained also timm:NAME.TAG."""
    pretrained: bool = False
    """Start from published weights: timm's, or for resnet18_imagenet and resnet50 torchvision's."""
    init_from: str | None = None
    """Start from the weights of a run folder or a file (.safetensors, .pt); the head is new if the classes differ."""


@dataclass(frozen=True)
class _LossConfig:
    """The method and its options."""

    method: str = "dlb"
    """What teaches:"""
    alpha: float | None = None
    """Weight of the teacher's term; None: the method's own default (dlb: 1, of the community, not of the paper)."""
    temperature: float | None = None
    """Temperature of the teacher's term; None: the method's own (dlb: 3, of the community, not of the paper)."""
    label_smoothing: float = 0.0
    """Smoothing of the cross entropy, as in torch."""
    impl: Literal["auto", "cuda", "triton", "cpu", "torch"] = "auto"
    """Implementation of the loss; a named one runs or raises."""

    def __post_init__(self) -> None:
        find(self.method)
        ok = self.alpha is None or (math.isfinite(self.alpha) and self.alpha >= 0)
        _require(ok, "alpha", "finite and >= 0", self.alpha)
        ok = self.temperature is None or (math.isfinite(self.temperature) and self.temperature > 0)
        _require(ok, "temperature", "finite and > 0", self.temperature)
        _require(0 <= self.label_smoothing <= 1, "label_smoothing", "in [0, 1]", self.label_smoothing)


def _field_type(method: str, name: str, option: Any) -> Any:
    """The type of a method's option as a file or a flag can hold it, or None: the method's default."""
    union = typing.get_origin(option) in (typing.Union, types.UnionType)
    kinds = typing.get_args(option) if union else (option,)
    if torch.dtype in kinds:
        return Literal["float32", "bfloat16", "float16"] | None
    found = [kind for kind in kinds if kind in (bool, int, float, str)]
    if len(found) != 1:
        raise TypeError(
            f"Method {method!r}: option {name} must be annotated as one of bool, int, float, str and torch.dtype, "
            f"or be named in hidden=, got {option}"
        )
    return found[0] | None


def _options_as_fields() -> list[tuple[str, Any, Any]]:
    """One field per option of any method."""
    kinds: dict[str, Any] = {}
    for method in METHODS.values():
        for name, option in method.options.items():
            kinds.setdefault(name, _field_type(method.name, name, option.type))
    own = {field.name for field in dataclasses.fields(_LossConfig)}
    return [(name, kind, None) for name, kind in kinds.items() if name not in own]


if TYPE_CHECKING:
    LossConfig = _LossConfig
else:
    # Built from the signatures of the methods, so that an option is declared in one place.
    LossConfig = dataclasses.make_dataclass("LossConfig", _options_as_fields(), bases=(_LossConfig,), frozen=True)
    LossConfig.__doc__, LossConfig.__module__ = _LossConfig.__doc__, __name__

METHOD_FIELDS = tuple(
    f.name for f in dataclasses.fields(LossConfig) if f.name not in ("method", "label_smoothing", "impl")
)
"""Fields of `LossConfig` that are options of methods; a method that lacks an option refuses it."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser."""

    optimizer: str = "sgd"
    """A class of torch.optim (sgd, adamw, nadam, rmsprop, ...) or a name of timm's (lion, lamb, ...; timm:adamw is
    timm's own). A change of the optimiser sets the numbers below to the new one's defaults unless they are given."""
    lr: float | None = None
    """Peak learning rate. None: the optimiser's default; sgd: 0.05."""
    momentum: float | None = None
    """Momentum. None: the optimiser's default; sgd: 0.9."""
    nesterov: bool | None = None
    """Nesterov momentum. None: the optimiser's default; sgd: True."""
    betas: tuple[float, ...] | None = None
    """Decay of the moments of Adam and its kin. None: the optimiser's default."""
    weight_decay: float | None = None
    """Weight decay. None: the optimiser's default; sgd: 0.0005."""
    optimizer_options: tuple[str, ...] = ()
    """Further options of the optimiser as NAME=VALUE, such as eps=1e-6 amsgrad=True."""
    decay_norm_and_bias: bool = True
    """False: no weight decay for parameters with at most one dimension (norms, biases)."""

    def __post_init__(self) -> None:
        _require(self.lr is None or (math.isfinite(self.lr) and self.lr > 0), "lr", "finite and > 0", self.lr)
        _require(self.momentum is None or 0 <= self.momentum < 1, "momentum", "in [0, 1)", self.momentum)
        decay = self.weight_decay
        _require(decay is None or 0 <= decay < math.inf, "weight_decay", "finite and at least 0", decay)
        _require(self.betas is None or all(0 <= b < 1 for b in self.betas), "betas", "in [0, 1)", self.betas)
        _require(self.momentum != 0 or not self.nesterov, "nesterov", "False when momentum is 0", self.nesterov)
        names = [text.partition("=")[0] for text in self.optimizer_options]
        ok = all("=" in text for text in self.optimizer_options) and len(set(names)) == len(names)
        _require(ok, "optimizer_options", "distinct options NAME=VALUE", self.optimizer_options)

    def switched(self, optimizer: str) -> OptimConfig:
        """This config for an optimiser: another one gets its own numbers, because a rate of SGD is none of AdamW."""
        if optimizer == self.optimizer:
            return self
        return OptimConfig(optimizer, decay_norm_and_bias=self.decay_norm_and_bias)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate schedule; it is updated every step."""

    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """Shape of the rate after the warm-up."""
    warmup_epochs: float = 0.0
    """Linear warm-up from lr / warm-up steps to lr, in epochs."""
    milestones: tuple[float, ...] = ()
    """multistep: epochs at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """multistep: factor on the rate at a milestone."""
    min_lr: float = 0.0
    """cosine: final learning rate."""

    def __post_init__(self) -> None:
        _require(self.warmup_epochs >= 0, "warmup_epochs", "at least 0", self.warmup_epochs)
        _require(self.min_lr >= 0, "min_lr", "at least 0", self.min_lr)
        _require(self.gamma > 0, "gamma", "above 0", self.gamma)
        _require(list(self.milestones) == sorted(set(self.milestones)), "milestones", "increasing", self.milestones)
        given = bool(self.milestones) == (self.schedule == "multistep")
        _require(given, "milestones", "given with schedule=multistep and only there", self.milestones)


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, distribution and output of the training."""

    epochs: int = 30
    """Passes of the loader. A DLB epoch samples every image once and trains on it twice, a ce epoch once."""
    max_steps: int | None = None
    """Optimiser steps in all; overrides epochs."""
    forward: Literal["joint", "two_pass", "partners"] = "joint"
    """joint: one forward over all rows (the paper). two_pass: two forwards (the official code). partners: the second
    half without gradient (always used by cs_kd)."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Autocast of the network; the loss computes in float32. fp16 scales the loss."""
    accumulate: int = 1
    """Batches per optimiser step. The teacher is then the previous batch, not the previous step."""
    clip_grad: float | None = None
    """Maximum gradient norm."""
    ema: float | None = None
    """Decay of averaged weights, which are then evaluated and exported."""
    channels_last: bool = False
    """Memory format of the network and the images; faster for convolutions on a GPU."""
    distributed: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """auto: ddp under torchrun. ddp: a copy of the model on every rank. fsdp: a shard on every rank (FSDP2)."""
    sync_bn: bool = False
    """BatchNorm statistics over the rows of all ranks (SyncBatchNorm; GPUs only) instead of each rank's own."""
    compile: bool = False
    """Train with torch.compile; the evaluation stays eager."""
    eval_every: int | None = None
    """Steps between evaluations, each a row of metrics; None: every epoch."""
    patience: int | None = None
    """End the training after this many evaluations in a row without a better test accuracy; None: never."""
    log_every: int = 50
    """Steps between progress lines in metrics.jsonl and checks for a loss that is not finite."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (the last step always has one); None: at every evaluation."""
    keep: int = 2
    """Number of checkpoints kept."""
    nan_check: bool = True
    """Stop when the loss is not finite; checked at log points only, because the check synchronises."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Experiment trackers beside metrics.csv and metrics.jsonl."""
    seed: int = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "log_every", "keep"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_steps", "eval_every", "patience", "checkpoint_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1 or null", value)
        _require(self.clip_grad is None or self.clip_grad > 0, "clip_grad", "above 0 or null", self.clip_grad)
        _require(self.ema is None or 0 < self.ema < 1, "ema", "in (0, 1) or null", self.ema)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        known = ("tensorboard", "trackio", "wandb")
        ok = set(self.trackers) <= set(known) and len(set(self.trackers)) == len(self.trackers)
        _require(ok, "trackers", f"distinct names of {', '.join(known)}", self.trackers)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Example:
        >>> override(RunConfig(), lr=0.1, seed=3).optim.lr
        0.1
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


FILE_KINDS = ("imagefolder", "list", "tar", "tinyimagenet")  # kinds whose images are files; the others have one size
SPLIT_KINDS = ("cifar10", "cifar100", "tinyimagenet")  # kinds that come with their test set

# option -> (options that decide, whether it has an effect, what it needs). Options that are not here always have one;
# those of methods are checked by `dlb_fast.train.methods`.
_IMAGE_FILES = (("data",), lambda c: c.data.kind in FILE_KINDS, f"image files (data={', '.join(FILE_KINDS)})")
_ERASING = (("erase_prob",), lambda c: c.augment.erase_prob > 0, "erase_prob above 0")
_MIXING = (
    ("mixup_alpha", "cutmix_alpha"),
    lambda c: c.augment.mixup_alpha > 0 or c.augment.cutmix_alpha > 0,
    "mixup_alpha or cutmix_alpha above 0",
)


def _optimizer_has(name: str) -> tuple[tuple[str, ...], Callable[[RunConfig], bool], str]:
    def has(config: RunConfig) -> bool:
        from .optim import find_optimizer  # which imports this file

        return name in find_optimizer(config.optim.optimizer)[1]

    return ("optimizer",), has, f"an optimizer that has {name}"


def _decays(config: RunConfig) -> bool:
    from .optim import resolve_optimizer

    return bool(resolve_optimizer(config.optim).weight_decay)


EFFECTS: dict[str, tuple[tuple[str, ...], Callable[[RunConfig], bool], str]] = {
    **dict.fromkeys(("image_size", "eval_size", "eval_resize", "num_threads", "max_pixels", "on_error"), _IMAGE_FILES),
    "label_noise": (("noise_kind",), lambda c: c.data.label_file is None, "a noise_kind that draws labels"),
    "noise_kind": (("label_noise",), lambda c: c.data.noisy, "label_noise above 0"),
    "data_seed": (
        ("data", "per_class", "label_noise"),
        lambda c: c.data.kind not in SPLIT_KINDS or c.data.per_class is not None or c.data.label_noise > 0,
        "per_class, label_noise, or data without a test set of their own",
    ),
    **dict.fromkeys(("erase_area", "erase_mode"), _ERASING),
    **dict.fromkeys(("mix_prob", "mix_mode"), _MIXING),
    "mix_switch_prob": (
        ("mixup_alpha", "cutmix_alpha"),
        lambda c: c.augment.mixup_alpha > 0 and c.augment.cutmix_alpha > 0,
        "mixup_alpha and cutmix_alpha above 0",
    ),
    "mixup_alpha": (
        ("mix_prob", "mix_switch_prob"),
        lambda c: c.augment.mix_prob > 0 and not (c.augment.cutmix_alpha > 0 and c.augment.mix_switch_prob == 1),
        "mix_prob above 0, and beside cutmix_alpha mix_switch_prob below 1",
    ),
    "cutmix_alpha": (
        ("mix_prob", "mix_switch_prob"),
        lambda c: c.augment.mix_prob > 0 and not (c.augment.mixup_alpha > 0 and c.augment.mix_switch_prob == 0),
        "mix_prob above 0, and beside mixup_alpha mix_switch_prob above 0",
    ),
    **{name: _optimizer_has(name) for name in ("momentum", "nesterov", "betas", "weight_decay")},
    "decay_norm_and_bias": (("optimizer", "weight_decay"), _decays, "weight_decay above 0"),
    "gamma": (("schedule",), lambda c: c.schedule.schedule == "multistep", "schedule=multistep"),
    "min_lr": (("schedule",), lambda c: c.schedule.schedule == "cosine", "schedule=cosine"),
}


def without_effect(config: RunConfig) -> dict[str, Any]:
    """Options that differ from their default and have no effect with the config's others, with their defaults.

    Example:
        >>> without_effect(override(RunConfig(), gamma=0.5))  # the schedule is cosine
        {'gamma': 0.1}
    """
    defaults, values = _flat(RunConfig()), _flat(config)
    return {n: defaults[n] for n, (_, has, _) in EFFECTS.items() if values[n] != defaults[n] and not has(config)}


def check_effects(config: RunConfig) -> None:
    """Refuse an option that differs from its default and has no effect with the config's others.

    Raises:
        ValueError: such an option; the message says what it needs.
    """
    values = _flat(config)
    values["data"] = values["source"]
    found = without_effect(config)
    if not found:
        return
    from dlb_fast.data.datasets.open import check_kind

    check_kind(config.data.source)  # of an unknown kind nothing has an effect
    deciding, _, needs = reason = EFFECTS[next(iter(found))]
    alike = [name for name in found if EFFECTS[name] is reason]
    given, here = (", ".join(f"{name}={values[name]}" for name in names) for names in (alike, deciding))
    defaults = ", ".join(f"{name}={found[name]}" for name in alike)
    raise ValueError(
        f"config: {given} {'has' if len(alike) == 1 else 'have'} no effect with {here}, only with {needs}; leave it "
        f"out, or after a preset or file that sets it, set the default ({defaults})"
    )


def _flat(config: RunConfig) -> dict[str, Any]:
    """The fields of all groups; their names are unique."""
    return {n: getattr(getattr(config, group), n) for group, names in _fields().items() for n in names}


def override(config: RunConfig, **values: Any) -> RunConfig:
    """The config with fields replaced by name (in any group), or whole groups."""
    groups = _fields()
    homes = {name: group for group, names in groups.items() for name in names}
    if "optimizer" in values:
        config = dataclasses.replace(config, optim=config.optim.switched(values["optimizer"]))
    for name, value in values.items():
        if name in groups and dataclasses.is_dataclass(value):
            config = dataclasses.replace(config, **{name: value})  # type: ignore[arg-type]
        elif name in homes:
            part = dataclasses.replace(getattr(config, homes[name]), **{name: value})
            config = dataclasses.replace(config, **{homes[name]: part})
        else:
            raise ValueError(f"config: unknown field {name!r}{_suggestion(name, homes)}")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The config as a nested dict with lists in place of tuples and Python's numbers, as saved in config.yaml."""
    return {g: {k: _plain_value(v) for k, v in part.items()} for g, part in dataclasses.asdict(config).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(item) for item in value]
    return value.item() if hasattr(value, "item") else value  # a number of NumPy


def from_dict(values: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A config from nested plain values on top of `base`. The values are given to tyro as flags.

    Raises:
        ValueError: unknown group or field, or a value that its field does not take.
        TypeError: not a mapping of groups to fields.

    Example:
        >>> from_dict({"optim": {"lr": "1e-3"}}).optim.lr
        0.001
    """
    config, groups = base or RunConfig(), _fields()
    known = [f"{group}.{name}" for group, names in groups.items() for name in names]
    if not isinstance(values, Mapping):
        raise TypeError(f"config: expected groups ({', '.join(groups)}), got {type(values).__name__}")
    for group, part in values.items():
        if group not in groups:
            raise ValueError(f"config: unknown group {group!r}{_suggestion(str(group), [*groups, *known])}")
        if not isinstance(part, Mapping):
            raise TypeError(f"config: {group} must hold fields, got {part!r}")
        flags = []
        for name, value in part.items():
            if name not in groups[group]:
                raise ValueError(f"config: unknown field {group}.{name}{_suggestion(f'{group}.{name}', known)}")
            flags += _as_flag(f"{group}.{name}", "data" if name == "source" else name, value)
        current = getattr(config, group)
        if isinstance(current, OptimConfig) and isinstance(part.get("optimizer"), str):
            current = current.switched(part["optimizer"])
        try:
            made = _parsed(current, tuple(flags), tuple(map(type, vars(current).values())))
        except ValueError as error:
            text = str(error).removeprefix("config: ")
            for flag in re.findall(r"--[\w-]+", text):
                text = text.replace(flag, f"{group}.{flag[2:].replace('-', '_')}")
            raise ValueError(f"config: {text}") from None
        config = dataclasses.replace(config, **{group: made})
    return config


@functools.lru_cache(maxsize=1024)
def _parsed(current: Any, flags: tuple[str, ...], kinds: tuple[type[Any], ...]) -> Any:
    """A group with flags, remembered: a study has hundreds of configs, and tyro takes 25 ms. `kinds`: 1 is not 1.0."""
    return parse(type(current), current, flags, "config", "FlagConversionOff")


def read_yaml(who: str, path: Path | str) -> Any:
    """The content of a YAML file; ValueError that begins with `who` for an unreadable file or a repeated key."""
    import yaml

    class Loader(yaml.SafeLoader):  # which would take the last of equal keys
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            names = [(key.tag, key.value) for key in keys]
            for number, key in enumerate(keys):
                if names[number] in names[:number]:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is there twice", key.start_mark)
            return node

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"{who}: cannot read {path}: {why}") from error


def load_config(path: Path | str, base: RunConfig | None = None) -> RunConfig:
    """Read a YAML config; a missing, unreadable, wrong or (without `base`) empty file raises ValueError naming it."""
    values = read_yaml("config", path)
    if values is None and base is None:  # which would be a config of defaults
        raise ValueError(f"config: {path} is empty; expected the fields of a run")
    try:
        return from_dict({} if values is None else values, base)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _fields() -> dict[str, list[str]]:
    """Group -> the names of its fields."""
    groups = dataclasses.fields(RunConfig)
    return {g.name: [f.name for f in dataclasses.fields(g.default_factory)] for g in groups}  # type: ignore[arg-type]


def _suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the nearest of the known names, or the list of those in the same group."""
    group, _, last = name.rpartition(".")
    known = list(known)
    same = [other for other in known if other.endswith(f".{last}")]
    others = f"; known: {', '.join(other for other in known if other.startswith(group))}"
    return did_you_mean(same[0] if same else name, known) or others


def _as_flag(where: str, name: str, value: Any) -> list[str]:
    """The flag of one value of a YAML file."""
    if isinstance(value, (list, tuple)) and not any(isinstance(v, (list, tuple, Mapping)) for v in value):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, (list, tuple, Mapping)):
        raise ValueError(f"config: {where} must be one value or a list, got {value!r}")
    return [f"--{name}={value}"]


def parse(form: type[Any], default: Any, flags: Sequence[str], prog: str, how: str) -> Any:
    """`tyro.cli`, with its message about a wrong flag as a ValueError of one sentence."""
    if tyro is None:
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(form, prog=prog, args=list(flags), default=default, config=(getattr(tyro.conf, how),))
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ValueError(_sentence(complaint.getvalue())) from None


def _sentence(box: str) -> str:
    """tyro's boxed message in one line: what was expected, what came, and the flag that was probably meant."""
    lines = [re.sub(r"^[│─ -]+$|[│╭╮╰╯─]", "", line).strip() for line in box.strip().splitlines()]
    blocks = [block.split("\n") for block in "\n".join(lines[1:]).strip().split("\n\n")]
    said = " ".join(blocks[0])
    _, ours, checked = said.partition("config: ")
    if ours:  # raised by a config's own check
        return ours + checked
    if wrong := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.", said):
        return f"{wrong[2]} must be one of {wrong[3]}, got {wrong[1]}"
    explained = {block[0]: block[1:] for block in blocks[1:]}
    if (wrong := re.match(r"Error parsing (\S+): .*?('.*'|\[\])\]?\.?$", said)) and "Argument helptext:" in explained:
        expected = explained["Argument helptext:"][0].removeprefix(wrong[1]).strip().replace("{None}|", "None or ")
        expected = re.sub(r"\{?\[(\w+) \[\1 \.\.\.\]\]\}?", r"\1 \1 ...", expected)
        return f"{wrong[1]} must be {expected}, got {wrong[2].strip('[]')}"
    if word := re.match(r"Unrecognized options: ([^-]\S*)", said):
        return f"unexpected {word[1]!r}: a value follows the name of its option, such as --out FOLDER"
    return said
