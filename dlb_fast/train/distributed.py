"""Several processes that train one model: which of them this is, and how they agree.

`torchrun --nproc-per-node N -m dlb_fast train ...` starts N ranks and tells each its place in the environment. Only
rank 0 touches the run folder; what it read, decided or failed at is told to the others, so that all of them go on or
stop together. Small decisions travel between the hosts (gloo), never through the device.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "RankError", "Ranks", "started_by_torchrun"]

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# what gloo and NCCL say when the process at the other end is gone
_LOST = ("closed by peer", "Connection reset", "Broken pipe", "Socket closed", "Timed out", "remote process")


class RankError(RuntimeError):
    """Another rank failed or was lost; its own message says why."""


def started_by_torchrun() -> bool:
    """Whether the environment describes a place among several processes (`torchrun`, or anything like it)."""
    return all(name in os.environ for name in ENVIRONMENT)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. `Ranks()` is a process alone, for which everything here is free.

    Attributes:
        rank, world_size: over all machines. local_rank, local_size: on this machine; they choose its GPU.
        grouped: whether there is a process group (also one of a single rank).

    Example:
        >>> Ranks().total([1.0, 2.0]), Ranks().is_main
        ([1.0, 2.0], True)
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    grouped: bool = False
    _hosts: Any = field(default=None, compare=False, repr=False)  # gloo; None: the default group is

    @classmethod
    def join(cls) -> Ranks:
        """Join the process group that torchrun's environment describes; a process alone where there is none.

        On a GPU machine the group speaks NCCL for tensors on GPUs and gloo for those on the host.
        """
        if not started_by_torchrun() or (dist.is_available() and dist.is_initialized()):
            return cls.current()
        if torch.cuda.is_available():
            count, local = torch.cuda.device_count(), _number("LOCAL_RANK", "RANK")
            if local < count:  # otherwise resolving the device says what is wrong, unless the CPU is asked for
                torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls.current()

    @classmethod
    def current(cls) -> Ranks:
        """The place in the process group that exists already; a process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = _number("LOCAL_RANK", default=rank % max(1, torch.cuda.device_count()))
        local_size = _number("LOCAL_WORLD_SIZE", default=size)
        return cls(rank, size, local_rank, local_size, True, _hosts())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone speaks and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.world_size > 1

    def leave(self) -> None:
        """Dissolve the process group, after a run that ended well. (A failing process just ends: the others notice.)"""
        if self.grouped and dist.is_initialized():
            gc.collect()  # a wrapped model keeps the group, whose threads must not outlive the interpreter
            dist.destroy_process_group()

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the ranks, in float64, the same bits on all of them; NaN stays NaN."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.several else list(values)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over the ranks."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.several else list(values)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, how, group=self._hosts)
        return numbers.tolist()

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if not self.several:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self._hosts)
        return box[0]  # type: ignore[return-value]

    def on_main(self, function: Callable[[], T]) -> T:
        """Rank 0 calls `function`; its result, or the same exception, is everybody's."""
        if not self.several:
            return function()
        value: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                value = function()
            except Exception as error:
                failure = error
        value, told = self.from_main((value, _portable(failure)))
        if failure is not None:
            raise failure
        if told is not None:
            raise told
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on rank 0; an empty list on the others."""
        if not self.several:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, found, dst=0, group=self._hosts)
        return found or []

    def first_failure(self, error: str | None) -> str | None:
        """What went wrong on the lowest rank where something did; None when nothing did anywhere."""
        if not self.several:
            return error
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, error, group=self._hosts)
        return next((f"rank {r}: {e}" for r, e in enumerate(found) if e is not None), None)

    def joined(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors one after another along dimension 0, which may differ in length; no gradient."""
        if not self.several:
            return tensor
        rows = int(self.largest([len(tensor)])[0])
        lengths = [int(n) for n in self.total([len(tensor) * (r == self.rank) for r in range(self.world_size)])]
        padded = tensor.new_zeros(rows, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Say in words what a broken connection means: that another process ended."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)
            if not self.several or not lost or isinstance(error, RankError):
                raise
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            raise RankError(
                f"rank {self.rank} of {self.world_size} lost the others ({reason}): another rank ended, its own "
                f"message says why; continue from the last checkpoint with --resume"
            ) from error


ALONE = Ranks()


def _hosts() -> Any:
    """The group in which hosts talk: the default one if it can (None), else one of gloo, made once per default group.

    Making a group is a collective, so all ranks get here for the first time together.
    """
    if "gloo" in dist.get_backend_config():
        return None
    default = dist.group.WORLD
    if _made.get("for") is not default:
        _made.update({"for": default, "group": dist.new_group(backend="gloo")})
    return _made["group"]


_made: dict[str, Any] = {}


def _number(*names: str, default: int = 0) -> int:
    found = next((os.environ[name] for name in names if name in os.environ), default)
    return int(found)


def _portable(error: Exception | None) -> Exception | None:
    """An exception that survives the way to another process."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
        return copy if str(copy) == str(error) else RankError(f"rank 0: {type(error).__name__}: {error}")
    except Exception:
        return RankError(f"rank 0: {type(error).__name__}: {error}")
