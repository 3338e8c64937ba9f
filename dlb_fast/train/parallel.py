"""One network on several ranks: a copy on each (DDP) or a share on each (FSDP2), by torch's own engines.

Here is all that the loop needs to know of them: what to call, when gradients travel, and how weights and optimiser
states look to a checkpoint, which is always like those of a single process.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .distributed import Ranks, started_by_torchrun

__all__ = [
    "Parallel", "check_parallel", "is_shared", "local", "same_start", "share_optimizer_state", "shared_like",
    "whole_states",
]  # fmt: skip


class Parallel:
    """How one network trains on all ranks.

    Args:
        model: the bare network, on this rank's device. It stays the one to evaluate and to save.
        optimizer: over its parameters, before its first step; under FSDP2 it is given the shares instead.
        average: a second network of the same kind (EMA), shared out the same way; or None.
        kind: "none", "ddp" or "fsdp".
        compiled: whether training runs through `torch.compile`.

    Attributes:
        network: what a training step calls.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        *,
        kind: str,
        compiled: bool,
        ranks: Ranks,
    ) -> None:
        self.model, self.kind, self.ranks = model, kind, ranks
        self.network: nn.Module = model
        self._ddp: DistributedDataParallel | None = None
        if kind == "fsdp":
            _share(model, optimizer)
            if average is not None:
                _share(average, None)
        elif kind == "ddp":
            device = next(model.parameters()).device
            # Forwards come in pairs (two_pass), and writing into BatchNorm's statistics between them would spoil the
            # first one's backward: each rank keeps its own, and an evaluation takes rank 0's.
            known = inspect.signature(DistributedDataParallel).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {sync: False}
            self._ddp = DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)
            self.network = self._ddp
        if compiled:  # batches have two sizes, the first half batch and the rest: no reason for dynamic shapes
            self.network = torch.compile(self.network, dynamic=False)  # type: ignore[assignment]

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward of one batch of a step: gradients travel with the last one only."""
        if self._ddp is not None and not last:
            return self._ddp.no_sync()
        if self.kind == "fsdp":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self, module: nn.Module) -> Iterator[None]:
        """Around an evaluation: every rank has rank 0's buffers (BatchNorm statistics)."""
        if self.ranks.several:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
        yield
        for part in module.modules():
            if _is_fsdp(part):  # a forward without a backward leaves the weights gathered
                part.reshard()  # type: ignore[operator]


def same_start(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank rank 0's weights and buffers, before anything is made of them."""
    if ranks.several:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def _share(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """FSDP2 over all ranks: every block of a sequence is gathered on its own, the rest with the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if optimizer is not None and optimizer.state:
        raise ValueError("Trainer: distributed=fsdp needs an optimiser that has made no step yet; make a new one")
    for parameter in model.parameters():  # FSDP2 knows no channels_last weights; the images may still be so
        parameter.data = parameter.data.contiguous()
    before = {id(p): name for name, p in model.named_parameters()}
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if optimizer is not None:
        after = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [after[before[id(p)]] if id(p) in before else p for p in group["params"]]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Elements of sequences that are made of parts themselves: residual blocks, transformer layers."""
    sequences = (nn.Sequential, nn.ModuleList)
    elements = [child for parent in model.modules() if isinstance(parent, sequences) for child in parent.children()]
    return [e for e in elements if not isinstance(e, sequences) and any(e.children()) and list(e.parameters())]


def check_parallel(config: TrainConfig, ranks: Ranks, criterion: nn.Module, device: torch.device) -> str:
    """The engine of `config.distributed` here: "none", "ddp" or "fsdp".

    Raises:
        ValueError: an engine without ranks, ranks without an engine, SyncBatchNorm on a CPU, or a teacher that keeps
            copies of a model of which each rank has only a share.
    """
    kind = config.distributed
    if kind == "auto":
        kind = "ddp" if ranks.several else "none"
    if kind == "none" and ranks.several:
        raise ValueError(
            f"config: distributed=none expects one process, got {ranks.world_size} ranks; each would train the same "
            f"and write over the others. Start without torchrun, or use auto, ddp or fsdp"
        )
    if kind != "none" and not ranks.grouped:
        why = "the process group was not joined" if started_by_torchrun() else "this process is alone"
        raise ValueError(
            f"config: distributed={kind} expects ranks, but {why}; start with: torchrun --nproc-per-node N -m dlb_fast "
            f"train ... (in your own loop: torch.distributed.init_process_group first)"
        )
    if config.sync_bn and device.type == "cpu":
        raise ValueError(
            "config: sync_bn expects GPUs (torch's SyncBatchNorm has no CPU implementation), got device cpu; leave "
            "it out: each rank then normalises with its own rows"
        )
    if kind == "fsdp" and getattr(criterion, "copies_model", False):
        raise ValueError(
            "config: distributed=fsdp expects a method without copies of the model, got "
            f"{type(criterion).__name__}; use ddp"
        )
    return kind


def _is_share(value: Any) -> bool:
    """Whether a value is a DTensor, without importing them (over a second) where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _is_fsdp(module: nn.Module) -> Any:
    """Whether FSDP2 manages a module; likewise without an import."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_shared(model: nn.Module) -> bool:
    """Whether each rank holds a share of the weights only."""
    return _is_fsdp(model)


def local(tensor: Tensor) -> Tensor:
    """This rank's share, or the tensor itself; a view."""
    return tensor.to_local() if _is_share(tensor) else tensor  # type: ignore[attr-defined]


def shared_like(reference: Any, tensor: Any) -> Any:
    """`tensor` shared out as `reference` is; nothing to do for a plain one. Every rank brings the full tensor."""
    if not _is_share(reference) or _is_share(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    full = tensor.to(reference.to_local().device)
    return distribute_tensor(full, reference.device_mesh, reference.placements, src_data_rank=None)


def whole_states(state: Any) -> Any:
    """A nested state with every share made whole, on the host; a collective where there are shares."""
    if isinstance(state, dict):
        return {key: whole_states(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole_states(value) for value in state)
    return state.detach().full_tensor().cpu() if _is_share(state) else state


def share_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's saved state with its tensors shared out as the parameters they belong to are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(_is_share, parameters)):
        return state
    shared = {
        index: {
            name: shared_like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": shared}
