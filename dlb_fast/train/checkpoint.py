"""Checkpoints: a crash at any moment leaves a valid checkpoint, and reading one executes no code from it.

A checkpoint is one `torch.save` zip of tensors, numbers, strings, lists and dicts, loaded with `weights_only=True`. It
is written to a temporary file, flushed to the disk and renamed; the checksums of the zip detect damage.

One file has the state of all ranks, so no rank can be missing. Weights, optimiser and schedule are equal on all ranks
(or shards) and are stored once, unsharded. The stored rows of the criterion, the random number generators and the
position in the data differ between ranks and are stored for every rank. The format does not depend on DDP or FSDP.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dlb_fast import LastBatchLoss
from dlb_fast.buffer import COUNTERS as ROW_COUNTERS
from dlb_fast.buffer import unpack_state

from .data import check_same_data
from .distributed import RankError, Ranks, distribute_like, distribute_optimizer_state, full_state

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = [
    "CheckpointError",
    "get_rng_state",
    "list_checkpoints",
    "load_matching",
    "load_newest",
    "load_trainer_state",
    "not_finite",
    "decoded_metadata",
    "read_checkpoint",
    "read_weights",
    "remove_leftovers",
    "save_checkpoint",
    "save_weights",
    "set_rng_state",
    "step_of_weights",
    "trainer_state",
    "write_atomically",
]

FORMAT = "dlb_fast.checkpoint"
VERSION = 1
NAME = re.compile(r"step-\d{9}\.pt")
TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")  # of `write_atomically`
COUNTERS = ("step", "epoch", "in_epoch", "images_seen", "seconds", "best", "stale", "last")


class CheckpointError(RuntimeError):
    """A checkpoint or run file could not be written or read; the message names the file and what to do."""


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], Any], remedy: str = "then continue with --resume"
) -> None:
    """Call `write(file)` on a temporary file in the same folder, flush it to the disk and rename it to `path`.

    `remedy`: end of the message about a write that failed.

    Raises:
        CheckpointError: the disk is full or not writable; the previous file at `path` is kept.
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
            f"cannot write {path}: {error}; {_free_space(path.parent)}. The previous file is kept; free some space, "
            f"{remedy}"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Delete the temporary files for files of these names that a killed process has left."""
    for file in folder.glob(".*.tmp"):
        if (found := TEMPORARY.fullmatch(file.name)) and names.fullmatch(found[1]):
            file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
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
    """Write `step-<step>.pt` into `folder`, then delete all but the newest `keep` checkpoints.

    Checkpoints of later steps count as the oldest, because a resume skipped them as unusable. Only files with exactly
    the name of a checkpoint or of its temporary file are deleted.

    Raises:
        CheckpointError: the write failed; the message names the last good checkpoint, which is kept.
    """
    path = folder / f"step-{state['step']:09d}.pt"
    remove_leftovers(folder, NAME)
    whole = {"format": FORMAT, "version": VERSION, **state, "contents": _contents(state)}
    try:
        write_atomically(path, lambda file: torch.save(whole, file))
    except CheckpointError as error:
        kept = list_checkpoints(folder)
        last = f"the last good checkpoint is {kept[0]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"{error}; {last}") from error
    for old in sorted(list_checkpoints(folder), key=lambda found: found <= path, reverse=True)[keep:]:
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path, map_location: str = "cpu") -> dict[str, Any]:
    """The state in a checkpoint file.

    Raises:
        CheckpointError: missing, truncated, damaged, of another program or of a newer version, or a part of the state
            is missing or of another type or shape than `save_checkpoint` wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
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
    written = state.pop("contents", None)
    found = _contents({name: value for name, value in state.items() if name not in ("format", "version")})
    if written != found:
        names = sorted(written.keys() | found.keys()) if isinstance(written, dict) else []
        different = next((name for name in names if written.get(name) != found.get(name)), "its list of contents")
        raise CheckpointError(f"{path} is incomplete or changed: {different} is not what was written")
    return state


def _contents(value: Any, name: str = "state") -> dict[str, str]:
    """The name of every part of a nested state with its type, and its shape or length: what a reader must find."""
    if isinstance(value, Tensor):
        return {name: f"{value.dtype} {tuple(value.shape)}"}
    if not isinstance(value, (dict, list, tuple)):
        return {name: type(value).__name__}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    found = {name: f"{type(value).__name__} {len(value)}"}
    for key, part in parts:
        if isinstance(value, dict) or isinstance(part, (Tensor, dict, list, tuple)):  # not each number of a list
            found |= _contents(part, f"{name}.{key}")
    return found


def not_finite(state: Mapping[str, Any]) -> str | None:
    """What is NaN or infinite of the network and its EMA, or NaN in the optimiser, by name; or None."""
    for group in (state["model"], (state.get("ema") or {}).get("model", {})):
        for name, value in group.items():
            if value.is_floating_point() and not value.isfinite().all():
                return str(name)
    for index, values in state.get("optimizer", {}).get("state", {}).items():
        for name, value in values.items():  # it would reach the weights in the next step
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                return f"{name} of parameter {index} in the optimiser"
    return None


def load_newest(
    folder: Path,
    load: Callable[[dict[str, Any], str], None],
    say: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Path | None:
    """Call `load(state, origin)` with the newest valid checkpoint; report and skip checkpoints that do not load.

    Rank 0 reads and broadcasts the state. A checkpoint that fails on any rank is skipped on all.

    Returns:
        The path of the checkpoint, or None if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints but none can be used. (Starting over would hide the lost work.)
    """
    ranks = ranks or Ranks()
    reasons = []
    for path in ranks.run_on_main(lambda: list_checkpoints(folder)):
        error: str | None = None
        try:
            state = ranks.run_on_main(lambda path=path: read_checkpoint(path))  # type: ignore[misc]
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


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, the newest step first."""
    return sorted((file for file in folder.glob("step-*.pt") if NAME.fullmatch(file.name)), reverse=True)


def save_weights(path: Path, model: nn.Module | Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a model's weights (or a full `state_dict()`) and `metadata` as safetensors, atomically."""
    from safetensors.torch import save

    weights = full_state(model.state_dict()) if isinstance(model, nn.Module) else model
    # cloned, because safetensors refuses tensors that share memory (tied weights)
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}
    # one entry, because safetensors writes several in random order, and equal weights should give equal files
    note = {"dlb_fast": json.dumps(metadata)}
    write_atomically(path, lambda file: file.write(save(tensors, metadata=note)))


def step_of_weights(path: Path) -> int | None:
    """The step after which a run exported the weights in a file; None if it is missing, damaged or does not say."""
    try:
        return read_weights(path)[1].get("step")
    except CheckpointError:
        return None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and the metadata that a run wrote into it ({} in another's file).

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = json.loads((file.metadata() or {}).get("dlb_fast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, decoded_metadata(texts)
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def decoded_metadata(texts: Mapping[str, str]) -> dict[str, Any]:
    """Metadata of weights as values; all entries but the name of the model are JSON."""
    return {name: text if name == "model" else json.loads(text) for name, text in texts.items()}


def load_matching(model: nn.Module, tensors: dict[str, Any], origin: str) -> None:
    """`model.load_state_dict(tensors)`.

    Raises:
        CheckpointError: they are of another architecture or number of classes; the message has names and both shapes.
    """
    own = model.state_dict()
    wrong = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    wrong += [f"{name}: missing in the file" for name in sorted(own.keys() - tensors.keys())]
    wrong += [f"{name}: unknown to the model" for name in sorted(tensors.keys() - own.keys())]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{origin} does not fit this model ({shown}); was it made with another model or number of classes?"
        )
    model.load_state_dict({name: distribute_like(own[name], tensor) for name, tensor in tensors.items()})


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
    """Restore every global generator."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    *internal, gauss = state["python"]
    random.setstate((3, tuple(internal), gauss))


def trainer_state(trainer: Trainer) -> dict[str, Any]:
    """The state of a trainer, complete on rank 0 only; a collective."""
    parts = trainer.ranks.gather(_rank_state(trainer))
    ema = trainer.ema
    return {
        **{name: getattr(trainer, name) for name in COUNTERS},
        "metadata": trainer.metadata,
        "model": full_state(trainer.model.state_dict()),
        "optimizer": full_state(trainer.optimizer.state_dict()),
        "optimizer_class": _class_name(trainer.optimizer),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ema": None if ema is None else full_state(ema.state_dict()),
        "logs": trainer.log.positions(),
        **(parts[0] if parts else {}),
        "others": parts[1:],
    }


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    """The part of the state that differs between ranks."""
    own = {
        "criterion": trainer.criterion.state_dict(),
        "loader": trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None,
        "metrics": trainer.metrics.state_dict(),
        "rng": get_rng_state(),
    }
    if not trainer.ranks.is_main:  # the buffers of rank 0 are part of the model's state
        own["buffers"] = {name: buffer.cpu() for name, buffer in trainer.model.named_buffers()}
    return own


def load_trainer_state(trainer: Trainer, state: dict[str, Any], origin: str) -> None:
    """Continue where `trainer_state` was called; every rank passes the same state. See `Trainer.load_state_dict`.

    Raises:
        ValueError: the state was made with other data.
        CheckpointError: it does not fit this trainer.
    """
    check_same_data(state["metadata"], trainer.metadata, origin)
    try:
        _load_trainer_state(trainer, state, origin)
    except (CheckpointError, RankError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())  # torch, the loader and the criterion raise their own types for a wrong part
        raise CheckpointError(f"{origin} cannot be loaded ({type(error).__name__}: {why})") from error


def _load_trainer_state(trainer: Trainer, state: dict[str, Any], origin: str) -> None:
    if trainer.config.nan_check and (name := not_finite(state)) is not None:
        raise CheckpointError(f"{origin} has NaN or infinite values in {name}; --no-nan-check would accept them")
    load_matching(trainer.model, state["model"], origin)
    if (state["ema"] is None) != (trainer.ema is None):
        made = "without" if trainer.ema else "with"
        raise CheckpointError(f"{origin} was made {made} EMA; use the same setting")
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    _load_optimizer(trainer.optimizer, state["optimizer"], state["optimizer_class"], origin)
    if trainer.scheduler is not None and state["scheduler"] is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.scaler.load_state_dict(state["scaler"])
    for name in COUNTERS:
        setattr(trainer, name, state[name])
    trainer.metadata |= {name: state["metadata"][name] for name in ("initial_weights",) if name in state["metadata"]}
    _load_rank_state(trainer, _rank_state_of(trainer, state), origin)
    trainer.log.rewind(state["logs"])  # last, so that a refused state does not change the logs


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], made_by: str, origin: str) -> None:
    """Load the state of an optimiser of the same class with as many groups; its hyperparameters stay the run's own."""
    saved = f"{made_by} with {len(state['param_groups'])} groups"
    own = f"{_class_name(optimizer)} with {len(optimizer.param_groups)} groups"
    if saved != own:
        raise CheckpointError(
            f"{origin} was made with another optimiser ({saved}), here is {own}; use the same optimizer and "
            "decay_norm_and_bias"
        )
    optimizer.load_state_dict(distribute_optimizer_state(optimizer, state))


def _load_rank_state(trainer: Trainer, own: dict[str, Any], origin: str) -> None:
    try:
        trainer.criterion.load_state_dict(own["criterion"])
    except (RuntimeError, ValueError, LookupError, TypeError) as error:  # of another method's state
        why = " ".join(str(error).split())
        raise CheckpointError(
            f"{origin} does not fit {type(trainer.criterion).__name__} ({why}); was it made with another method or "
            "other numbers of it? Use the same, or start a new run"
        ) from error
    load = getattr(trainer.loader, "load_state_dict", None)
    if load is not None and own["loader"] is not None:
        load(own["loader"])
    trainer.metrics.load_state_dict(own["metrics"])
    buffers = dict(trainer.model.named_buffers())
    for name, value in own.get("buffers", {}).items():
        buffers[name].copy_(value)
    if own["rng"] is not None:
        set_rng_state(own["rng"])


def _rank_state_of(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of the state; computed from all parts if the number of ranks has changed.

    The global order of the samples continues (or the loader raises). The stored rows of all ranks, concatenated in rank
    order, are divided among the new ranks. Other methods store the same on all ranks. Additional ranks get new random
    numbers (dropout).
    """
    ranks = trainer.ranks
    parts = [state, *state.get("others", [])]
    if len(parts) == ranks.world_size:
        return parts[ranks.rank]
    trainer.log.say(
        f"the checkpoint has {len(parts)} ranks and continues on {ranks.world_size}: the samples keep their order, the "
        f"stored rows are divided among the new ranks"
    )
    rng = parts[ranks.rank]["rng"] if ranks.rank < len(parts) else None
    if rng is None:
        torch.manual_seed((state["rng"]["torch"].sum().item() << 20) + ranks.rank)
    criterion = parts[0]["criterion"]
    if isinstance(trainer.criterion, LastBatchLoss):
        buffers = [unpack_state(part["criterion"]["_extra_state"]) for part in parts]
        criterion = {**criterion, "_extra_state": _divide_buffer(buffers, ranks.rank, ranks.world_size)}
    metrics = _merge_metrics([part["metrics"] for part in parts])
    if not ranks.is_main:
        metrics |= {"sums": torch.zeros_like(metrics["sums"]), "batches": 0, "rows": 0, "with_parts": 0}
    return {"criterion": criterion, "loader": parts[0]["loader"], "metrics": metrics, "rng": rng}


def _divide_buffer(buffers: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """A rank's part of the rows stored on all ranks; empty if there are none or they do not divide evenly."""
    rows = sum(buffer.get("count", 0) for buffer in buffers)
    if not rows or rows % world_size:
        return {}
    share = rows // world_size
    own = slice(rank * share, (rank + 1) * share)
    joined = {
        name: torch.cat([buffer[name][: buffer["count"]] for buffer in buffers])[own].clone()
        for name in ("logits", "ids")
    }
    counters = {name: sum(buffer[name] for buffer in buffers) if rank == 0 else 0 for name in ROW_COUNTERS[1:]}
    counters["untaught"] = 0  # batches in a row on one rank: a sum over ranks says nothing
    place = {"rank": rank, "world_size": world_size, "count": share, "capacity": share}
    return {**buffers[0], **joined, **counters, **place}


def _merge_metrics(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all ranks (for rank 0), with the mean times (for every rank)."""
    merged = {name: sum(part[name] for part in parts) for name in ("sums", "batches", "rows", "with_parts")}
    return {**merged, **{name: sum(part[name] for part in parts) / len(parts) for name in ("waited", "seconds")}}
