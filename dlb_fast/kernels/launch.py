"""Launch parameters and workspaces of the Triton kernels: plain functions, no tuning on live data."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .counting import COUNT_PROGRAMS
from .last_batch_kernel import MAX_PROGRAMS, PARTIALS

RESIDENT_COLUMNS = 8192
"""Longest row that stays in registers: a tile of 16384 with two distributions spills at 1024 threads."""

LOOP_COLUMNS = 4096
"""Tile of longer rows."""

COUNT_HERE_ROWS = 4096
COUNT_HERE_BYTES = 16 << 20
COUNT_CHUNK = 8192


class Tiling(NamedTuple):
    """Pairs per tile, columns per tile, tiles per row, warps; columns of a lane of a long row and their axis."""

    rows: int
    block: int
    tiles: int
    warps: int
    vector: int
    axis: int


def next_power_of_two(value: int) -> int:
    """The smallest power of two >= ``value`` >= 1."""
    return 1 << (value - 1).bit_length()


def tiling(classes: int, itemsize: int, aligned: bool = True, warp_size: int = 32) -> Tiling:
    """How a row of ``classes`` logits of ``itemsize`` bytes is cut; ``aligned``: all rows start on 16 bytes.

    - ``C <= 1024``: tiles of about 1024 logits and 4 warps, so up to 32 pairs per program (several per warp for
      ``C <= 128``): small tiles keep many programs in flight, which is what hides latency here.
    - ``C <= 8192``: one pair, held in registers.
    - above: tiles of 4096, each read twice, in lanes of one thread (see ``row_tiles``). 512 threads fill a
      multiprocessor, so few rows are in flight and their second reads still find them in L2. Unaligned rows take 1024:
      one address and one mask per logit need registers too.
    - 8 logits per thread, 16 in the largest tile: by the compiler's own count 32 spill, and fewer than 8 leave the
      loads of 16-bit logits narrower than 16 bytes. float64 takes half tiles.
    - a warp of 64 threads (CDNA) halves the number of warps, which also keeps it within 16.
    """
    wide = 2 if itemsize == 8 else 1
    held = RESIDENT_COLUMNS // wide
    if classes <= held:
        block, tiles = max(next_power_of_two(classes), 2), 1
    else:
        block = LOOP_COLUMNS // wide if aligned else 1024 // wide
        tiles = -(-classes // block)
    rows = max(1, min(32, 1024 // wide // block))
    threads = min(max(128, rows * block * wide // 8), 512)
    if tiles == 1:
        return Tiling(rows, block, tiles, threads // warp_size, 1, 1)
    vector = 16 // itemsize if aligned else block // threads
    return Tiling(rows, block, tiles, threads // warp_size, vector, int(aligned))


def aligned_rows(value: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    return (value.stride(0) * value.element_size()) % 16 == 0 and value.data_ptr() % 16 == 0


class Workspace(NamedTuple):
    """Ticket, and whether a row repeats, (2,) int32 that every launch leaves at 0; partial sums and counts."""

    ticket: Tensor
    partials: Tensor
    counts: Tensor


_workspaces: dict[tuple[Any, ...], Workspace] = {}


def _new_workspace(device: torch.device, dtype: torch.dtype) -> Workspace:
    partials = torch.empty(PARTIALS.value * MAX_PROGRAMS.value, dtype=dtype, device=device)
    counts = torch.empty(2 * COUNT_PROGRAMS.value + 1, dtype=dtype, device=device)
    return Workspace(torch.zeros(2, dtype=torch.int32, device=device), partials, counts)


def _outside_of_pools(device: torch.device, dtype: torch.dtype) -> Workspace:
    """A workspace that belongs to no graph: torch sends to a pool what the thread that uses the pool allocates.

    Waits until it is zeroed, whichever stream launches first.
    """

    def make() -> Workspace:
        made = _new_workspace(device, dtype)
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def workspace(device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...] | None, Workspace]:
    """The workspace of the current stream, and its key: streams run at the same time, launches of one stream do not.

    A captured launch has one of its own from the pool of its graph, which may be replayed on any stream beside others;
    its zeroing is captured too, and its memory is the graph's.
    """
    if device.type == "cpu":
        key: tuple[Any, ...] = (device, dtype)
    elif device.type != "cuda":
        key = (device, dtype, torch.accelerator.current_stream(device).stream_id)
    elif torch.cuda.is_current_stream_capturing():
        return None, _new_workspace(device, dtype)
    else:
        key = (device, dtype, torch.cuda.current_stream(device).cuda_stream)
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = (_outside_of_pools if device.type == "cuda" else _new_workspace)(device, dtype)
    return key, found


def drop_workspace(key: tuple[Any, ...] | None) -> None:
    """After a failed launch the ticket may not be 0: the next launch starts with a new one."""
    if key is not None:
        _workspaces.pop(key, None)


def device_guard(device: torch.device) -> Any:
    """Make ``device`` current around a launch: Triton launches on the current device, wherever the pointers are."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if module.current_device() != device.index:
            return module.device(device)
    return contextlib.nullcontext()


def warp_size(device: torch.device) -> int:
    """Threads per warp; 64 on CDNA."""
    if device.type == "cuda" and torch.version.hip is not None:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def register_limit(tiles: Tiling, pair: bool, itemsize: int, nvidia: bool) -> dict[str, int]:
    """The launch option that limits registers (NVIDIA): 128 for a held row of the pair form, so that four programs run
    at a time; 168 for a long unaligned row, for which the compiler would rather spill. Elsewhere it does well alone."""
    if not nvidia or itemsize == 8:
        return {}
    if tiles.tiles > 1:
        return {} if tiles.axis else {"maxnreg": 168}
    return {"maxnreg": 128} if pair and tiles.rows == 1 else {}


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton name of a compute dtype."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32
