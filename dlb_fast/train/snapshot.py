"""What a continuation depends on: one state for all ranks, whatever engine and however many ranks made it.

Weights, optimiser and schedule are the same on every rank (or shares of one), and are stored once, whole. What a rank
has of its own (the rows its criterion remembers, its random numbers, its place in the data) lies beside them for every
rank, in the same file: there is no checkpoint with a rank missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dlb_fast import LastBatchLoss
from dlb_fast.buffer import unpack_state

from . import state as files
from .parallel import share_optimizer_state, whole_states

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ["put", "take"]

COUNTERS = ("step", "epoch", "in_epoch", "images_seen", "seconds", "best", "last")


def take(trainer: Trainer) -> dict[str, Any]:
    """The state of a trainer; on several ranks a collective that is complete on rank 0."""
    parts = trainer.ranks.gather(_own(trainer))
    ema = trainer.ema
    return {
        **{name: getattr(trainer, name) for name in COUNTERS},
        "metadata": trainer.metadata,
        "model": whole_states(trainer.model.state_dict()),
        "optimizer": whole_states(trainer.optimizer.state_dict()),
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "ema": None if ema is None else whole_states(ema.state_dict()),
        "logs": trainer.log.positions(),
        **(parts[0] if parts else {}),
        "others": parts[1:],
    }


def _own(trainer: Trainer) -> dict[str, Any]:
    """What this rank does not share with the others."""
    own = {
        "criterion": trainer.criterion.state_dict(),
        "loader": trainer.loader.state_dict() if hasattr(trainer.loader, "state_dict") else None,
        "window": trainer.window.state_dict(),
        "rng": files.get_rng_state(),
    }
    if not trainer.ranks.is_main:  # rank 0's are in its model
        own["buffers"] = {name: buffer.cpu() for name, buffer in trainer.model.named_buffers()}
    return own


def put(trainer: Trainer, state: dict[str, Any], origin: str) -> None:
    """Continue where `take` was called; every rank gives the same state. See `Trainer.load_state_dict`."""
    files.load_matching(trainer.model, state["model"], origin)
    if (state["ema"] is None) != (trainer.ema is None):
        made = "without" if trainer.ema else "with"
        raise files.CheckpointError(f"{origin} was made {made} EMA; use the same setting")
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    _put_optimizer(trainer.optimizer, state["optimizer"], origin)
    if trainer.scheduler is not None and state["scheduler"] is not None:
        trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.scaler.load_state_dict(state["scaler"])
    for name in COUNTERS:
        setattr(trainer, name, state[name])
    _put_own(trainer, _part_of(trainer, state), origin)
    trainer.log.rewind(state["logs"])  # last: what is refused cuts nothing off


def _put_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], origin: str) -> None:
    def form(groups: list[dict[str, Any]]) -> str:
        known = [name for name in ("momentum", "betas") if any(name in group for group in groups)]
        return f"{len(groups)} groups with {' and '.join(known) or 'neither momentum nor betas'}"

    saved, own = form(state["param_groups"]), form(optimizer.param_groups)
    if saved != own:
        raise files.CheckpointError(
            f"{origin} was made with another optimiser ({saved}), here are {own}; use the same optimizer and "
            "decay_norm_and_bias"
        )
    optimizer.load_state_dict(share_optimizer_state(optimizer, state))


def _put_own(trainer: Trainer, own: dict[str, Any], origin: str) -> None:
    try:
        trainer.criterion.load_state_dict(own["criterion"])
    except (RuntimeError, ValueError, LookupError, TypeError) as error:  # whatever a foreign state makes of it
        why = " ".join(str(error).split())
        raise files.CheckpointError(
            f"{origin} does not fit {type(trainer.criterion).__name__} ({why}); was it made with another method or "
            "other numbers of it? Use the same, or start a new run"
        ) from error
    load = getattr(trainer.loader, "load_state_dict", None)
    if load is not None and own["loader"] is not None:
        load(own["loader"])
    trainer.window.load_state_dict(own["window"])
    buffers = dict(trainer.model.named_buffers())
    for name, value in own.get("buffers", {}).items():
        buffers[name].copy_(value)
    if own["rng"] is not None:
        files.set_rng_state(own["rng"])


def _part_of(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's own part; made anew from all parts when the number of ranks has changed.

    The global order of the samples goes on (the loader refuses if it cannot), and so do the remembered rows: joined in
    rank order they are the whole half batch, which is cut into the new ranks' shares. Other teachers remember the same
    on all ranks. Random numbers of the network (dropout) begin anew on ranks that did not exist.
    """
    ranks = trainer.ranks
    parts = [state, *state.get("others", [])]
    if len(parts) == ranks.world_size:
        return parts[ranks.rank]
    trainer.log.say(
        f"the checkpoint is of {len(parts)} ranks and continues on {ranks.world_size}: the same samples in the same "
        f"order, the remembered rows shared out anew"
    )
    rng = parts[ranks.rank]["rng"] if ranks.rank < len(parts) else None
    if rng is None:
        torch.manual_seed((state["rng"]["torch"].sum().item() << 20) + ranks.rank)
    criterion = parts[0]["criterion"]
    if isinstance(trainer.criterion, LastBatchLoss):
        buffers = [unpack_state(part["criterion"]["_extra_state"]) for part in parts]
        criterion = {**criterion, "_extra_state": _cut(buffers, ranks.rank, ranks.world_size)}
    window = _merged([part["window"] for part in parts], ranks.world_size)
    if not ranks.is_main:
        window = {**window, "sums": torch.zeros_like(window["sums"]), "batches": 0, "rows": 0, "with_parts": 0}
    return {"criterion": criterion, "loader": parts[0]["loader"], "window": window, "rng": rng}


def _cut(buffers: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """A rank's rows of the buffers of all ranks; empty where there were none or they do not divide."""
    rows = sum(buffer.get("count", 0) for buffer in buffers)
    if not rows or rows % world_size:
        return {}
    share = rows // world_size
    mine = slice(rank * share, (rank + 1) * share)
    joined = {name: torch.cat([buffer[name] for buffer in buffers])[mine].clone() for name in ("logits", "ids")}
    missed = sum(buffer["mismatched"] for buffer in buffers) if rank == 0 else 0
    return {**buffers[0], **joined, "count": share, "capacity": share, "mismatched": missed}


def _merged(windows: list[dict[str, Any]], world_size: int) -> dict[str, Any]:
    """All ranks' sums, for rank 0; the times are means over the ranks, and every rank has them."""
    merged = {name: sum(window[name] for window in windows) for name in ("sums", "batches", "rows", "with_parts")}
    return {**merged, **{name: sum(w[name] for w in windows) / len(windows) for name in ("waited", "seconds")}}
