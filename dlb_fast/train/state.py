"""Checkpoints: written so that a crash at any moment leaves a valid one, read without running anyone's code.

A checkpoint is one `torch.save` zip of tensors, numbers, strings, lists and dicts, loaded with `weights_only=True`. It
is written beside its place, flushed to the disk and renamed over it; the zip's checksums tell a damaged one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from .distributed import ALONE, Ranks
from .parallel import shared_like, whole_states

__all__ = [
    "CheckpointError",
    "get_rng_state",
    "load_newest",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
    "save_weights",
    "set_rng_state",
    "write_atomically",
]

FORMAT = "dlb_fast.checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint or run file could not be written or read; the message names the file and what to do."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary file in the same folder, flush it to the disk and rename it to `path`.

    Raises:
        CheckpointError: the disk is full or not writable; whatever was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error}; {_free_space(path.parent)}. What was there before is kept; make room, then "
            f"continue with --resume"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there"
    except OSError:
        return f"{folder} cannot be reached"


def save_checkpoint(folder: Path, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `step-<step>.pt` into `folder` and, once it is safe, delete all but the newest `keep`.

    What lies beyond this step counts as older than everything before it: a resume has just passed it over as unusable.

    Raises:
        CheckpointError: naming the file, the cause and the last good checkpoint, which is kept.
    """
    path = folder / f"step-{state['step']:09d}.pt"
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink(missing_ok=True)
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, "version": VERSION, **state}, file))
    except CheckpointError as error:
        kept = _by_step(folder)
        last = f"the last good checkpoint is {kept[0]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"{error}; {last}") from error
    for old in sorted(_by_step(folder), key=lambda found: found <= path, reverse=True)[keep:]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path, map_location: str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint file.

    Raises:
        CheckpointError: missing, truncated, damaged, of another program or of a newer version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load alone does not compare the checksums
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile and torch raise half a dozen types for a broken file
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by dlb_fast (it has no format mark)")
    if state["version"] > VERSION:
        raise CheckpointError(f"{path} has format version {state['version']}, this dlb_fast reads up to {VERSION}")
    return state


def load_newest(
    folder: Path,
    load: Callable[[dict[str, Any], str], None],
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Path | None:
    """Give the newest checkpoint that is valid and fits to `load(state, origin)`; name and skip the others.

    Rank 0 reads; every rank is given the same state, and a checkpoint is skipped when it does not fit on any of them.

    Returns:
        Its path, or None where there is no checkpoint at all.
    Raises:
        CheckpointError: there are checkpoints but none can be used. (Starting over would hide that work is lost.)
    """
    reasons = []
    for path in ranks.on_main(lambda: _by_step(folder)):
        error: str | None = None
        try:
            state = ranks.on_main(lambda path=path: read_checkpoint(path))  # type: ignore[misc]
        except CheckpointError as refused:
            error = str(refused)
        else:
            try:
                load(state, str(path))
            except CheckpointError as refused:
                error = str(refused)
            error = ranks.first_failure(error)
            if error is None:
                return path
        reasons.append(error)
        say(f"skipped a checkpoint: {error}")
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} can be used; start a new run. Reasons: {'; '.join(reasons)}")
    return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a model's weights (or its whole `state_dict()`) alone as safetensors, atomically; `metadata` says what they
    belong to."""
    from safetensors.torch import save

    weights = whole_states(model.state_dict()) if isinstance(model, nn.Module) else model
    # clones: safetensors refuses tensors that share memory, and the file must not depend on tied weights
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}
    # one entry, because safetensors orders several at random and equal weights should make equal files
    note = {"dlb_fast": json.dumps(metadata)}
    write_atomically(path, lambda file: file.write(save(tensors, metadata=note)))


def load_weights(path: Path, model: nn.Module) -> None:
    """Load safetensors weights into a model.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another architecture or class count (all
            mismatched names with both shapes are in the message).
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    load_matching(model, tensors, str(path))


def load_matching(model: nn.Module, tensors: dict[str, Any], origin: str) -> None:
    """`model.load_state_dict(tensors)` with an error that says what differs and what to do."""
    own = model.state_dict()
    wrong = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    wrong += [f"{name}: missing in the file" for name in sorted(own.keys() - tensors.keys())]
    wrong += [f"{name}: unknown to the model" for name in sorted(tensors.keys() - own.keys())]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{origin} does not fit this model ({shown}); was it made with another model or number of classes?"
        )
    model.load_state_dict({name: shared_like(own[name], tensor) for name, tensor in tensors.items()})


def get_rng_state() -> dict[str, Any]:
    """The state of every global generator: torch on the CPU and on the current GPU, numpy, random."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *(float(r) for r in rest)],
        "python": [*random.getstate()[1], random.getstate()[2]],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every global generator back."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    *internal, gauss = state["python"]
    random.setstate((3, tuple(internal), gauss))
