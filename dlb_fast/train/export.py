"""Load the trained network of a run as a plain `nn.Module`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import CheckpointError, load_matching, read_weights
from .models import create_model
from .run import RunFolder

__all__ = ["load_model"]


def load_model(run: Path | str, *, weights: str = "best") -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of a run, in eval mode on the CPU, and the metadata of its weights; does not need the data.

    Args:
        run: run folder.
        weights: `best` or `last`.

    Returns:
        The network; its input is `(pixel / 255 - mean) / std`, float32 of shape (B, channels, *size).
        A dict with `model`, `num_classes`, `channels`, `size`, `mean`, `std`, `classes`, `files` (fingerprints of the
        training and test images), `initial_weights` (what it started from) and `step`.

    Raises:
        ValueError: there is no run.
        CheckpointError: the weights are missing or damaged.

    Example: `model, about = load_model("runs/first")`
    """
    folder = RunFolder(run)
    folder.read_config()  # raises where there is no run
    file = folder.checkpoints / f"{weights}.safetensors"
    if not file.exists():
        raise CheckpointError(f"load_model: {file} is missing; has the run finished an evaluation?")
    tensors, about = read_weights(file)
    if "num_classes" not in about:
        raise CheckpointError(f"load_model: {file} says nothing about its network; expected weights of a dlb_fast run")
    model = create_model(about["model"], about["num_classes"], about["channels"])
    load_matching(model, tensors, str(file))
    return model.eval(), about
