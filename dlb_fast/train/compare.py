"""Compare methods over several seeds, with equal steps, rows per step and images seen.

Each run is in `<folder>/<method>-seed<k>`. Running an interrupted comparison again continues it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlb_fast._args import cores

from .checkpoint import write_atomically
from .config import RunConfig, from_dict, override, to_dict
from .data import check_same_data, identity, open_data
from .methods import LABELS, VARIANTS, sampled_rows, variant
from .run import RunFolder, resolve_device, train_run

__all__ = ["check_used", "equal_budget", "read_comparison", "run"]

MARK = "comparison.json"


def equal_budget(config: RunConfig, names: Sequence[str]) -> dict[str, RunConfig]:
    """The config of every named method, all with the steps, evaluations and schedule of DLB's epochs.

    DLB samples `batch_size / 2` new images per step, cross entropy `batch_size`; the network gets `batch_size` rows
    with every method. So equal steps mean equal images seen (except for DLB's first step, which has no repeated rows).
    Additional forwards of a method (the copies of MrKD) count as time, not as images.
    """
    rows = config.data.batch_size
    length = len(open_data(config.data).train)
    of_dlb = length // (rows // 2)
    steps = config.train.max_steps or max(1, config.train.epochs * of_dlb // config.train.accumulate)
    every = config.train.eval_every or max(1, of_dlb // config.train.accumulate)
    configs = {}
    for name in names:
        one = override(variant(config, name), max_steps=steps, eval_every=every)
        per_epoch = length // sampled_rows(one)
        if not per_epoch:
            raise ValueError(f"compare: {name} needs at least {sampled_rows(one)} training images, got {length}")
        if per_epoch != of_dlb:
            # the schedule counts epochs, and an epoch of this method has another number of steps
            factor = of_dlb / per_epoch
            schedule = dataclasses.replace(
                one.schedule,
                warmup_epochs=one.schedule.warmup_epochs * factor,
                milestones=tuple(m * factor for m in one.schedule.milestones),
            )
            one = dataclasses.replace(one, schedule=schedule)
        configs[name] = one
    return configs


def check_used(given: RunConfig, base: RunConfig, names: Sequence[str]) -> None:
    """Refuse options of the loss that differ from `base` and that none of the named methods takes.

    Raises:
        ValueError: such an option.
    """
    configs = [variant(given, name) for name in names]
    for name, value in vars(given.loss).items():
        unused = value != getattr(base.loss, name) and all(getattr(one.loss, name) != value for one in configs)
        if unused:
            raise ValueError(f"compare: {name}={value} has no effect with the methods {', '.join(names)}; leave it out")


def run(
    config: RunConfig,
    *,
    methods: Sequence[str],
    seeds: int,
    jobs: int | None = None,
    folder: Path | None = None,
    label: str = "compare",
    command: str = "",
) -> Path:
    """Train every method with seeds `0 .. seeds-1`; returns the folder, which `read_comparison` lists.

    Args:
        config: config shared by all runs.
        methods: names in `VARIANTS`.
        seeds: number of seeds.
        jobs: processes at a time, which share the cores; None means one per core on a CPU and one on a GPU.
        folder: folder of the comparison; an existing comparison is continued and must have the same config.
        label: part of a new folder's name.
        command: command line, for the record.

    Raises:
        ValueError: unknown or repeated method, no seed, or a folder of another comparison.
    """
    unknown = [m for m in methods if m not in VARIANTS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ValueError(f"compare: methods must be distinct names of {', '.join(VARIANTS)}, got {', '.join(methods)}")
    if config.train.patience is not None:
        raise ValueError("compare: patience would end the methods after different numbers of steps; leave it out")
    if seeds < 1:
        raise ValueError(f"compare: seeds must be at least 1, got {seeds}")
    if jobs is None:
        jobs = cores() if resolve_device(config.train.device).type == "cpu" else 1
    if jobs < 1:
        raise ValueError(f"compare: jobs must be at least 1, got {jobs}")
    configs = equal_budget(config, methods)
    data = identity(open_data(config.data))
    path = folder or RunFolder.named(label).path
    _claim(path, config, methods, seeds, command, data)
    work = [
        (name, seed, to_dict(override(configs[name], seed=seed)), str(path / f"{name}-seed{seed}"))
        for seed in range(seeds)  # seed by seed: an interrupted comparison is balanced
        for name in methods
    ]
    print(f"{len(work)} runs ({', '.join(methods)}; {seeds} seeds), {jobs} at a time, in {path}", file=sys.stderr)
    if jobs == 1:
        results = (_train_one(item, None) for item in work)
        _report_progress(work, results)
    else:
        _run_pool(work, jobs, max(1, cores() // jobs))
    return path


def _claim(
    path: Path, config: RunConfig, methods: Sequence[str], seeds: int, command: str, data: dict[str, str]
) -> None:
    mark = path / MARK
    for unfinished in path.glob(f".{MARK}.*.tmp"):  # of a kill, before which the folder was empty
        unfinished.unlink(missing_ok=True)
    asked = {"config": to_dict(config), "methods": list(methods), "seeds": seeds, "command": command, "data": data}
    if mark.exists():
        before = json.loads(mark.read_text(encoding="utf-8"))
        if from_dict(before["config"]) != config:
            raise ValueError(f"compare: {path} holds a comparison with another config; choose another --out")
        check_same_data(before["data"], data, f"compare: the comparison in {path}")
    elif path.exists() and any(path.iterdir()):
        raise ValueError(f"compare: {path} is not empty and holds no comparison; choose another --out")
    text = json.dumps(asked, indent=1).encode()
    write_atomically(mark, lambda file: file.write(text))


def _train_one(item: tuple[str, int, dict[str, Any], str], threads: int | None) -> dict[str, Any]:
    """Train one run, in this process or a worker; read a finished run, continue an unfinished one."""
    if threads is not None:
        torch.set_num_threads(threads)
    _, _, values, path = item
    config, folder = from_dict(values), RunFolder(path)
    finished = folder.path / "result.json"
    if finished.exists() and folder.read_config() == config:
        return json.loads(finished.read_text(encoding="utf-8"))
    return train_run(config, folder, resume=folder.exists(), quiet=True)


def _run_pool(work: list[Any], jobs: int, threads: int) -> None:
    context = multiprocessing.get_context("spawn")  # fork after OpenMP has started its threads may hang
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(work)), mp_context=context) as pool:

        def stop(number: int, frame: Any) -> None:
            for process in list((pool._processes or {}).values()):
                process.terminate()  # a run saves and ends on SIGTERM
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            futures = [pool.submit(_train_one, item, threads) for item in work]
            _report_progress(work, (future.result() for future in futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _report_progress(work: Sequence[Any], results: Any) -> None:
    for number, ((name, seed, _, path), result) in enumerate(zip(work, results, strict=True), 1):
        if result["stopped_by"] is not None:
            raise KeyboardInterrupt(f"{path} was stopped by {result['stopped_by']}")
        print(
            f"[{number}/{len(work)}] {LABELS[name]}, seed {seed}: test top-1 {100 * result['test_top1']:.2f} %",
            file=sys.stderr,
            flush=True,
        )


def read_comparison(path: Path) -> list[tuple[Path, str]]:
    """(run folder, label) of every finished run of a comparison, ordered by method; empty for any other folder."""
    mark = Path(path) / MARK
    if not mark.exists():
        return []
    asked = json.loads(mark.read_text(encoding="utf-8"))
    runs = [(Path(path) / f"{m}-seed{s}", LABELS[m]) for m in asked["methods"] for s in range(asked["seeds"])]
    return [(folder, label) for folder, label in runs if (folder / "result.json").exists()]
