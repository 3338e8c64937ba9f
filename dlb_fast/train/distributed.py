"""Training on several processes: the process group, work done on rank 0 only, DDP and FSDP2.

`torchrun --nproc-per-node N -m dlb_fast train ...` starts N ranks and describes the group in their environment. Only
rank 0 accesses the run folder. It broadcasts its results and errors, so that all ranks continue or stop together. These
messages use gloo on the hosts, not the GPUs.

Restarts are torchrun's: it notices that a rank ended, ends the others, waits for the machines and starts the command
again, on the machines that are there. The command then continues the run in its folder.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import pickle
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig

__all__ = [
    "RankError",
    "Ranks",
    "broadcast_buffers",
    "broadcast_weights",
    "distribute_like",
    "distribute_optimizer_state",
    "distributed_mode",
    "full_state",
    "gradient_sync",
    "is_sharded",
    "local_shard",
    "reshard",
    "started_by_torchrun",
    "wrap",
]

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# parts of the messages of gloo and NCCL when another process ended
CONNECTION_LOST = ("closed by peer", "Connection reset", "Broken pipe", "Socket closed", "Timed out", "remote process")


# How long a rank waits for another one whose machine vanished without closing its connections: NCCL's own default.
TIMEOUT = timedelta(minutes=10)


class RankError(RuntimeError):
    """Another rank failed or was lost; its own message says why."""


def started_by_torchrun() -> bool:
    """Whether the environment describes a rank of a process group, as torchrun sets it."""
    return all(name in os.environ for name in ENVIRONMENT)


@dataclass(frozen=True)
class Ranks:
    """This process and its group. `Ranks()` is a single process; its methods do not communicate.

    Attributes:
        rank: rank of this process, over all machines.
        world_size: number of processes, over all machines.
        local_rank: rank of this process on its machine; chooses the GPU.
        local_size: number of processes on this machine.
        grouped: whether there is a process group (also with a single rank).

    Example:
        >>> Ranks().sum([1.0, 2.0]), Ranks().is_main
        ([1.0, 2.0], True)
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    grouped: bool = False
    _hosts: Any = field(default=None, compare=False, repr=False)  # a gloo group; None if the default group has gloo

    @classmethod
    def join(cls) -> Ranks:
        """Join the process group of torchrun's environment; without one this is a single process.

        On a GPU machine the group uses NCCL for tensors on GPUs and gloo for those on the host.
        """
        if not started_by_torchrun() or (dist.is_available() and dist.is_initialized()):
            return cls.current()
        if torch.cuda.is_available():
            local = _environment_number("LOCAL_RANK", "RANK")
            if local < torch.cuda.device_count():  # otherwise resolve_device raises, unless the device is cpu
                torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, size = _store_of_this_start()
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
        return cls.current()

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the existing process group; without one this is a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = _environment_number("LOCAL_RANK", default=rank % max(1, torch.cuda.device_count()))
        local_size = _environment_number("LOCAL_WORLD_SIZE", default=size)
        return cls(rank, size, local_rank, local_size, True, _host_group())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    @property
    def may_restart(self) -> bool:
        """Whether torchrun may start this command again (`--max-restarts N`); the command then continues its run.

        TORCHELASTIC_RESTART_COUNT does not tell: it counts the restarts of one machine; one that joins has none.
        """
        return _environment_number("TORCHELASTIC_MAX_RESTARTS") > 0

    def check_shared(self, file: Path) -> None:
        """Raise on every rank if the command may be restarted and a machine does not see a file of rank 0.

        After a restart rank 0 may be on any machine; on one without the run folder it would start the run over.
        """
        if not self.may_restart or self.world_size == self.local_size:
            return
        missing = self.first_failure(None if file.exists() else f"{file} does not exist on {platform.node()}")
        if missing is not None:
            raise ValueError(
                f"run folder: with --max-restarts every machine has to see it, because any of them may be rank 0 after "
                f"a restart, but {missing}; name a folder on a shared file system with --out"
            )

    def exit_status(self, stopped_by: str | None) -> int:
        """The exit status of a run that a signal has stopped: 0, or 128 + the signal's number under torchrun.

        torchrun takes 0 for the end of the work, and would end the machines that could go on.
        """
        return 128 + signal.Signals[stopped_by] if stopped_by and started_by_torchrun() else 0

    def leave(self) -> None:
        """Destroy the process group after a successful run. (A failing process just exits; the others notice.)"""
        if self.grouped and dist.is_initialized():
            gc.collect()  # frees wrapped models, which keep the group and its threads alive
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the ranks in float64, bit-identical on all ranks; NaN stays NaN."""
        return self._all_reduce(values, dist.ReduceOp.SUM) if self.world_size > 1 else list(values)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over the ranks."""
        return self._all_reduce(values, dist.ReduceOp.MAX) if self.world_size > 1 else list(values)

    def _all_reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation, group=self._hosts)
        return numbers.tolist()

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]  # type: ignore[return-value]

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Rank 0 calls `function`; every rank returns its result or raises the same exception."""
        if self.world_size == 1:
            return function()
        value: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                value = function()
            except Exception as error:
                failure = error
        value, received = self.broadcast((value, _picklable(failure)))
        if failure is not None:
            raise failure
        if received is not None:
            raise received
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on rank 0; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, found, dst=0, group=self._hosts)
        return found or []

    def first_failure(self, error: str | None) -> str | None:
        """The error of the lowest rank that has one, or None."""
        if self.world_size == 1:
            return error
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, error, group=self._hosts)
        return next((f"rank {r}: {e}" for r, e in enumerate(found) if e is not None), None)

    def cat(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks concatenated along dimension 0, where their sizes may differ; no gradient."""
        if self.world_size == 1:
            return tensor
        rows = int(self.max([len(tensor)])[0])
        lengths = [int(n) for n in self.sum([len(tensor) * (r == self.rank) for r in range(self.world_size)])]
        padded = tensor.new_zeros(rows, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    @contextlib.contextmanager
    def explain_lost_connection(self) -> Iterator[None]:
        """Raise RankError if torch reports a broken connection, because then another rank ended."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(text in str(error) for text in CONNECTION_LOST)
            if self.world_size == 1 or not lost or isinstance(error, RankError):
                raise
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            raise RankError(
                f"rank {self.rank} of {self.world_size} lost the others ({reason}): another rank ended, its own "
                f"message says why; continue from the last checkpoint with --resume"
            ) from error


def _store_of_this_start() -> tuple[Any, int, int]:
    """The group's store under a name that no other start of the ranks has, with the rank and the number of ranks.

    torchrun keeps the store over its restarts (torch 2.13), so a rank would find the addresses of dead ranks in it. Its
    counts of restarts differ between machines. So every rank asks under a name of its own, which cannot be an old one;
    rank 0 answers whatever is asked with the name of this start, until all ranks have read it.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    name = uuid.uuid4().hex
    if rank:
        store.set(f"dlb_fast/asks/{rank}", name)
        name = store.get(f"dlb_fast/answer/{name}").decode()
        store.set(f"dlb_fast/{name}/{rank}", "")
    waiting, until = set(range(1, size)) if rank == 0 else set(), time.monotonic() + TIMEOUT.total_seconds()
    while waiting := {other for other in waiting if not store.check([f"dlb_fast/{name}/{other}"])}:
        if time.monotonic() > until:
            raise RankError(f"rank 0 of {size}: ranks {sorted(waiting)} did not start within {TIMEOUT}")
        for other in waiting:
            if store.check([f"dlb_fast/asks/{other}"]):
                store.set(f"dlb_fast/answer/{store.get(f'dlb_fast/asks/{other}').decode()}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store), rank, size


def _host_group() -> Any:
    """None if the default group can use gloo, else a gloo group, created once per default group.

    Creating a group is a collective, so all ranks must make their first call together.
    """
    if "gloo" in dist.get_backend_config():
        return None
    default = dist.group.WORLD
    if _host_groups.get("for") is not default:
        _host_groups.update({"for": default, "group": dist.new_group(timeout=TIMEOUT, backend="gloo")})
    return _host_groups["group"]


_host_groups: dict[str, Any] = {}


def _environment_number(*names: str, default: int = 0) -> int:
    return int(next((os.environ[name] for name in names if name in os.environ), default))


def _picklable(error: Exception | None) -> Exception | None:
    """The exception, or a RankError with its text if it cannot be pickled."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
        return copy if str(copy) == str(error) else RankError(f"rank 0: {type(error).__name__}: {error}")
    except Exception:
        return RankError(f"rank 0: {type(error).__name__}: {error}")


def distributed_mode(config: TrainConfig, ranks: Ranks, criterion: nn.Module, device: torch.device) -> str:
    """Resolve `config.distributed` to "none", "ddp" or "fsdp".

    Raises:
        ValueError: DDP or FSDP without ranks, ranks without either, SyncBatchNorm on a CPU, or FSDP2 with a method that
            copies the model (a rank has only a shard of it).
    """
    mode = config.distributed
    if mode == "auto":
        mode = "ddp" if ranks.world_size > 1 else "none"
    if mode == "none" and ranks.world_size > 1:
        raise ValueError(
            f"config: distributed=none expects one process, got {ranks.world_size} ranks; each would train the same "
            f"and write over the others. Start without torchrun, or use auto, ddp or fsdp"
        )
    if mode != "none" and not ranks.grouped:
        why = "the process group was not joined" if started_by_torchrun() else "this is a single process"
        raise ValueError(
            f"config: distributed={mode} expects ranks, but {why}; start with: torchrun --nproc-per-node N -m dlb_fast "
            f"train ... (in your own loop: torch.distributed.init_process_group first)"
        )
    if config.sync_bn and device.type == "cpu":
        raise ValueError(
            "config: sync_bn expects GPUs (torch's SyncBatchNorm has no CPU implementation), got device cpu; leave "
            "it out: each rank then normalises with its own rows"
        )
    if config.sync_bn and ranks.world_size == 1:
        raise ValueError("config: sync_bn=True has no effect on a single process; leave it out, or start several ranks")
    if mode == "fsdp" and getattr(criterion, "copies_model", False):
        raise ValueError(
            f"config: distributed=fsdp expects a method that does not copy the model, got {type(criterion).__name__}; "
            "use ddp"
        )
    return mode


def broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's weights and buffers to every rank."""
    if ranks.world_size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Copy rank 0's buffers (BatchNorm statistics) to every rank."""
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None, mode: str) -> nn.Module:
    """The module that a training step calls: the model, the model in DDP, or the model sharded by FSDP2.

    Args:
        model: the bare network, on this rank's device; evaluation and checkpoints use it.
        optimizer: optimiser of its parameters, before its first step; FSDP2 replaces them by shards.
        average: the EMA network, sharded the same way, or None.
        mode: "none", "ddp" or "fsdp".
    """
    if mode == "fsdp":
        _fully_shard(model, optimizer)
        if average is not None:
            _fully_shard(average, None)
    elif mode == "ddp":
        device = next(model.parameters()).device
        # No broadcast of BatchNorm statistics in the forward: two_pass runs two forwards before one backward, and DDP
        # would overwrite the statistics between them. Each rank keeps its own; an evaluation uses those of rank 0.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)
    return model


def gradient_sync(model: nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Context of one forward and backward of a wrapped model; `sync` reduces the gradients over the ranks."""
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if sync else model.no_sync()
    if is_sharded(model):
        model.set_requires_gradient_sync(sync)  # type: ignore[operator]
    return contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 gathered for a forward without a backward."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def _fully_shard(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Shard a model by FSDP2 over all ranks: each block of a sequence separately, the rest as one unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if optimizer is not None and optimizer.state:
        raise ValueError("Trainer: distributed=fsdp needs an optimiser that has made no step yet; make a new one")
    for parameter in model.parameters():  # FSDP2 does not support channels_last weights
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
    """Elements of sequences that have children: residual blocks, transformer layers."""
    sequences = (nn.Sequential, nn.ModuleList)
    elements = [child for parent in model.modules() if isinstance(parent, sequences) for child in parent.children()]
    return [e for e in elements if not isinstance(e, sequences) and any(e.children()) and list(e.parameters())]


def _is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor; does not import torch.distributed.tensor, which takes over a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded a module; does not import torch.distributed.fsdp."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself; a view."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def distribute_like(reference: Any, tensor: Any) -> Any:
    """`tensor`, passed whole by every rank, as a DTensor with `reference`'s placements, if `reference` is a DTensor."""
    if not _is_dtensor(reference) or _is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    full = tensor.to(reference.to_local().device)
    return distribute_tensor(full, reference.device_mesh, reference.placements, src_data_rank=None)


def full_state(state: Any) -> Any:
    """A nested state with every DTensor gathered on the host; a collective if there are DTensors."""
    if isinstance(state, dict):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value) for value in state)
    return state.detach().full_tensor().cpu() if _is_dtensor(state) else state


def distribute_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's saved state, its tensors with the placements of the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(_is_dtensor, parameters)):
        return state
    distributed = {
        index: {
            name: distribute_like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": distributed}
