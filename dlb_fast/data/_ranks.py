"""Which rank of how many this process is, and the checks every loader makes on its batch size."""

from __future__ import annotations

import torch.distributed as dist

from dlb_fast.data.plan import as_int


def resolve_ranks(operation: str, rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size), each from torch.distributed where it is None and a process group exists, else (0, 1)."""
    grouped = dist.is_available() and dist.is_initialized()
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
