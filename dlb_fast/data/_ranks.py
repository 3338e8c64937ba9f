"""The arguments that all loaders share: rank and world size, batch size, the plan they make, device, what they call."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from dlb_fast.data.plan import OverlapPlan, as_bool, as_int


def resolve_ranks(operation: str, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size), each from torch.distributed where it is None and a process group exists, else (0, 1)."""
    grouped = dist.is_available() and dist.is_initialized()
    processes = os.environ.get("WORLD_SIZE", "1")
    if rank is None and world_size is None and not grouped and processes not in ("", "1"):
        warnings.warn(
            f"{operation}: WORLD_SIZE={processes}, but torch.distributed is not initialised yet, so this process takes "
            "all of the data as rank 0 of 1, like every other; make the loader after the process group (in Lightning: "
            "in train_dataloader()), or pass rank= and world_size=",
            stacklevel=4,
        )
    if world_size is None:
        world_size = dist.get_world_size() if grouped else 1
    if rank is None:
        if not grouped and world_size != 1:
            raise ValueError(
                f"{operation}: world_size={world_size} needs rank as well, because torch.distributed is not "
                "initialised; pass rank=... or call torch.distributed.init_process_group first"
            )
        rank = dist.get_rank() if grouped else 0
    world_size = as_int(world_size, operation, "world_size", 1)
    rank = as_int(rank, operation, "rank", 0)
    if rank >= world_size:
        raise ValueError(f"{operation}: rank must be below world_size = {world_size}, got {rank}")
    return rank, world_size


def half_of(operation: str, batch_size: int) -> int:
    """Half the rows the model sees; batch_size must be even and at least 2."""
    batch_size = as_int(batch_size, operation, "batch_size", 2)
    if batch_size % 2:
        raise ValueError(
            f"{operation}: batch_size must be even (half of the rows repeat the batch before), got {batch_size}; "
            f"use {batch_size - 1} or {batch_size + 1}"
        )
    return batch_size // 2


def make_plan(
    operation: str,
    length: int,
    batch_size: int,
    *,
    repeat: bool,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    rank: int | None,
    world_size: int | None,
    overlap: bool | None = None,
) -> tuple[OverlapPlan, int]:
    """(plan, rank) of a loader. With `repeat` a step draws half of the batch anew, without all of it.

    `overlap`: whether the new rows of a step are the old ones of the next; None: as `repeat` says.
    """
    drawn = half_of(operation, batch_size) if as_bool(repeat, operation, "repeat") else 0
    drawn = drawn or as_int(batch_size, operation, "batch_size", 1)
    rank, world_size = resolve_ranks(operation, rank, world_size)
    overlap = bool(repeat) if overlap is None else overlap
    plan = OverlapPlan(
        length, drawn, shuffle=shuffle, seed=seed, world_size=world_size, drop_last=drop_last, overlap=overlap
    )
    return plan, rank


def device_of(operation: str, device: torch.device | str | None) -> torch.device:
    """The device batches are made on; None is the CPU, and a GPU without a number the current one."""
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{operation}: device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{operation}: device: {str(found)!r} is not there, torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; pass device='cpu', or see `dlb-fast doctor`"
        )
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


def length_of(operation: str, dataset: Any) -> int:
    """`len(dataset)`; TypeError where it has none."""
    try:
        return len(dataset)
    except TypeError as error:
        raise TypeError(
            f"{operation}: dataset must have a length, {type(dataset).__name__} has none ({error}); give it `__len__`, "
            "or put an iterable into a list first"
        ) from error


def check_callable(operation: str, **arguments: Any) -> None:
    """TypeError for an argument that is neither None nor can be called."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{operation}: {name} must be callable or None, got {value!r} ({type(value).__name__})")
