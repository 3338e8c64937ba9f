"""The weights that a run starts from: published ones of timm and torchvision, or those of a run or a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import FORMAT, CheckpointError, decoded_metadata, load_matching, not_finite, read_weights
from .config import ModelConfig
from .data import RunData, classes_differ
from .models import MODELS, architecture, create_model, import_timm

if TYPE_CHECKING:
    State = dict[str, Tensor]

__all__ = ["load_initial_weights", "read_state"]

TORCHVISION = {"resnet18_imagenet": "resnet18", "resnet50": "resnet50"}  # built-in name -> torchvision's, same weights
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which trainers save a state_dict


def load_initial_weights(model: nn.Module, config: ModelConfig, data: RunData) -> str:
    """Load the weights that a config names into a new model, in place; returns what was loaded, in words.

    The head, which is every parameter whose shape depends on the number of classes, keeps its new values where the
    weights were trained for other classes. Everything else has to be there, with the same shape, and finite.

    Args:
        model: network of the config for the data's classes and channels.
        config: one of `pretrained` and `init_from` is set.
        data: the data of the run; weights that were trained with another normalisation are reported.

    Raises:
        ValueError: both are set, there are no such published weights, or no such file.
        CheckpointError: the weights cannot be read or downloaded, or do not fit the network.
    """
    if config.pretrained and config.init_from is not None:
        raise ValueError("config: pretrained and init_from both name initial weights; leave one of them out")
    if config.init_from is None:
        if config.model in MODELS:
            return _from_torchvision(model, config.model, data)
        return _from_timm(model, config.model, data)
    tensors, about, origin = read_state(config.init_from)
    said = origin + (f", after step {about['step']}" if "step" in about else "")
    said += _load(model, config.model, data, tensors, origin, about.get("classes"))
    return said + _other_normalisation(about.get("mean"), about.get("std"), data)


def _from_torchvision(model: nn.Module, name: str, data: RunData) -> str:
    if name not in TORCHVISION:
        raise ValueError(
            f"config: there are no published weights of {name}; pretrained works with {', '.join(TORCHVISION)} and "
            "with timm:NAME, and init_from takes weights of your own"
        )
    try:
        from torchvision.models import get_model_weights
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise CheckpointError(
            f"--pretrained: the weights of {name} are torchvision's, whose import failed ({_why(error)}); install the "
            "torchvision that belongs to this torch, or name a file with --init-from"
        ) from error
    weights = get_model_weights(TORCHVISION[name]).DEFAULT
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _not_loaded(f"{weights} of torchvision", error, "TORCH_HOME") from error
    return f"{weights} of torchvision{_load(model, name, data, tensors, str(weights), None)}"


def _from_timm(model: nn.Module, name: str, data: RunData) -> str:
    timm, asked = import_timm(name), name.removeprefix("timm:")
    stem = architecture(name).removeprefix("timm:")
    known = timm.list_pretrained(f"{stem}.*")
    if not known or ("." in asked and asked not in known):
        has = f"those of {stem} are {', '.join(known)}" if known else f"it has none of {stem}"
        raise ValueError(f"config: timm {timm.__version__} has no weights {asked!r}; {has}")
    channels = data.channels
    try:
        # In a state of its own, because the network and the batches of a run depend on its seed only.
        with torch.random.fork_rng(devices=[]):
            made = timm.create_model(asked, pretrained=True, num_classes=data.num_classes, in_chans=channels)
    except Exception as error:
        raise _not_loaded(f"{asked} of timm", error, "HF_HOME") from error
    about: Mapping[str, Any] = made.pretrained_cfg
    state, classes = made.state_dict(), about["num_classes"]
    load_matching(model, state, asked)
    full = asked if "." in asked else f"{asked}.{about['tag']}"
    head = _kept_head(classes) if classes == data.num_classes else _new_head(classes, data.num_classes)
    return f"{full} of timm{head}" + _other_normalisation(about.get("mean"), about.get("std"), data)


def _not_loaded(what: str, error: Exception, home: str) -> CheckpointError:
    return CheckpointError(
        f"--pretrained: {what} could not be loaded ({_why(error)}); where there is no network, bring the {home} of a "
        "machine that has loaded them, or name a file with --init-from"
    )


def _why(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def read_state(source: str | Path) -> tuple[State, dict[str, Any], str]:
    """The tensors of a run folder or of a file of weights, the metadata of a run's own file, and where they were.

    A .safetensors file, or a file of `torch.save` that holds a state_dict, alone or under `state_dict`, `model` or
    `model_state_dict`. Reading it runs no code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder that is no run.
        CheckpointError: not a file of weights.
    """
    path = Path(source)
    if path.is_dir():
        file = path / "checkpoints" / "best.safetensors"
        if not file.is_file():
            raise ValueError(f"--init-from: {path} has no {file.relative_to(path)}; name a run folder or a file")
        path = file
    if not path.is_file():
        raise FileNotFoundError(f"--init-from: no file {path}; name a run folder, a .safetensors or a .pt file")
    with open(path, "rb") as opened:
        start = opened.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return (*read_weights(path), str(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options that trainers save beside the weights
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"--init-from: {path} is not a file of weights ({_why(error)}); expected a state_dict, saved by torch.save "
            "or as safetensors. A pickled network is not opened, because that runs code: save its state_dict()"
        ) from error
    if isinstance(found, Mapping) and found.get("format") == FORMAT:  # a checkpoint of a run
        average = (found.get("ema") or {}).get("model")
        about = {**decoded_metadata(found["metadata"]), "step": found["step"]}
        return dict(average or found["model"]), about, str(path)
    if _is_state(found):
        return dict(found), {}, str(path)
    for key in WRAPPERS:
        if isinstance(found, Mapping) and _is_state(found.get(key)):
            return dict(found[key]), {}, f"{path} [{key!r}]"
    keys = f"the keys {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else type(found).__name__
    raise CheckpointError(
        f"--init-from: {path} holds {keys}; expected a state_dict, alone or under {', '.join(WRAPPERS)}"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


def _load(
    model: nn.Module, name: str, data: RunData, tensors: State, origin: str, classes: Sequence[str] | None
) -> str:
    """Load a state_dict into the model, without its head if the classes are others; returns what was done."""
    own = model.state_dict()
    tensors = _without_prefix(tensors, own)
    for part in own.keys() - tensors.keys():
        if part.endswith(".num_batches_tracked"):  # older files lack this count, which torch fills in too
            tensors[part] = own[part]
    head = _head(name, data, own)
    here = [part for part in head if part in tensors]
    number = next((len(tensors[part]) for part in here if tensors[part].ndim), 0)
    fits = len(here) == len(head) and all(tensors[part].shape == own[part].shape for part in head)
    difference = "" if classes is None or not fits else classes_differ(classes, data.train.classes)
    if not here or (not fits and _is_head(tensors, own, head)) or difference:
        tensors |= {part: own[part] for part in head}
        said = _new_head(number, data.num_classes, difference)
    else:
        said = _kept_head(number) if classes is None else "; with the head of these classes"
    load_matching(model, tensors, origin)
    if (wrong := not_finite({"model": tensors})) is not None:
        raise CheckpointError(f"{origin} has NaN or infinite values in {wrong}")
    return said


def _kept_head(classes: int) -> str:
    return f"; with the head of their {classes} classes, taken to be those of the data in the same order"


def _new_head(before: int, now: int, difference: str = "") -> str:
    had = f"the head of their {before} classes" if before else "the head, which they lack,"
    return f"; {had} is replaced by a new one of {now}{f' ({difference})' if difference else ''}"


def _head(name: str, data: RunData, own: State) -> list[str]:
    """Names of the parameters and buffers whose shape depends on the number of classes."""
    numbers = (architecture(name), data.num_classes + 1, data.channels)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                other = create_model(*numbers)
        except Exception:  # a network whose constructor computes with its tensors
            other = create_model(*numbers)
    return [part for part, tensor in other.state_dict().items() if tensor.shape != own[part].shape]


def _is_head(tensors: State, own: State, head: Sequence[str]) -> bool:
    """Whether the tensors of these names differ from the model's in the number of classes only."""
    shapes = [(tuple(tensors[part].shape), tuple(own[part].shape)) for part in head if part in tensors]
    return len(shapes) == len(head) and all(
        len(one) == len(other) and one[1:] == other[1:] and one[:1] == shapes[0][0][:1] for one, other in shapes
    )


def _without_prefix(tensors: State, own: State) -> State:
    """The names without what wrappers put in front of all of them (`module.` of DDP, `_orig_mod.` of torch.compile)."""
    while tensors and not tensors.keys() & own.keys():
        first = {part.partition(".")[0] for part in tensors}
        if len(first) > 1 or not all("." in part for part in tensors):
            break
        tensors = {part.partition(".")[2]: tensor for part, tensor in tensors.items()}
    return tensors


def _other_normalisation(mean: Any, std: Any, data: RunData) -> str:
    """What to say if the weights were trained on images of another normalisation."""
    if mean is None or std is None:
        return ""
    before, now = (*mean, *std), (*data.mean, *data.std)
    if len(before) == len(now) and max(abs(a - b) for a, b in zip(before, now, strict=True)) < 0.02:
        return ""
    old, new = ([round(float(value), 3) for value in values] for values in (before, now))
    return f"; they were trained with mean and std {old}, the data of this run have {new}"
