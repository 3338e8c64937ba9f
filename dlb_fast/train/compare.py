"""Compare methods over several seeds, with equal steps, rows per step and images seen.

A comparison is made of flags (`run`: methods x seeds) or of a protocol (`run_protocol`: networks x noises x methods x
seeds, with the tuning). Each run has a folder of its own. Running an interrupted comparison again continues it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fnmatch
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from dlb_fast._args import cores, did_you_mean
from dlb_fast.data.datasets.open import held_out

from .checkpoint import write_atomically
from .config import FILE_KINDS, SPLIT_KINDS, RunConfig, from_dict, override, to_dict
from .data import RunData, check_same_data, identity, open_data
from .loop import TrainingDiverged
from .methods import LABELS, VARIANTS, variant
from .protocol import Cell, Protocol, Values, differences, equal_steps, noise_name
from .run import RunFolder, lock_folder, resolve_device, train_run

__all__ = [
    "RESULTS", "check_used", "claimed", "equal_budget", "fitting", "located", "read_comparison", "read_results",
    "remaining_seconds", "run", "run_protocol", "runs_here", "states", "summary", "with_data", "write_results",
]  # fmt: skip

MARK = "comparison.json"
RESULTS = "results.jsonl"
Item = TypeVar("Item")


def equal_budget(config: RunConfig, names: Sequence[str]) -> dict[str, RunConfig]:
    """The config of every named method, all with the steps, evaluations and schedule of the config's own method."""
    length = len(open_data(config.data).train)
    return {name: equal_steps(variant(config, name), config, length) for name in names}


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
    _check_patience(config)
    if seeds < 1:
        raise ValueError(f"compare: seeds must be at least 1, got {seeds}")
    jobs = _jobs(jobs, config)
    configs = equal_budget(config, methods)
    data = identity(open_data(config.data))
    path = folder or RunFolder.named(label).path
    runs = [(name, seed) for seed in range(seeds) for name in methods]  # an interrupted comparison is balanced
    labels = {f"{name}-seed{seed}": LABELS[name] for name in methods for seed in range(seeds)}
    print(f"{len(runs)} runs ({', '.join(methods)}; {seeds} seeds), {jobs} at a time, in {path}", file=sys.stderr)
    done = 0

    def prepare(item: tuple[str, int]) -> Work:
        name, seed = item
        return Work(str(path / f"{name}-seed{seed}"), to_dict(override(configs[name], seed=seed)))

    def record(item: tuple[str, int], result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        _say(done, len(runs), f"{LABELS[item[0]]}, seed {item[1]}", f"test top-1 {100 * result['test_top1']:.2f} %")

    with claimed(path, {"config": to_dict(config), "runs": labels, "command": command, "data": data}):
        _work_through(runs, prepare, record, jobs)
    return path


def _check_patience(config: RunConfig) -> None:
    if config.train.patience is not None:
        raise ValueError("compare: patience would end the methods after different numbers of steps; leave it out")


def _jobs(jobs: int | None, config: RunConfig) -> int:
    if jobs is None:
        jobs = cores() if resolve_device(config.train.device).type == "cpu" else 1
    if jobs < 1:
        raise ValueError(f"compare: jobs must be at least 1, got {jobs}")
    return jobs


def _say(done: int, of: int, name: str, what: str) -> None:
    print(f"[{done}/{of}] {name}: {what}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def claimed(path: Path, asked: dict[str, Any]) -> Iterator[None]:
    """Claim the folder as `_claim` does and lock it: a second command on it is refused while this one works."""
    _claim(path, asked)
    lock = lock_folder(path, f"compare: another process works in {path}; wait for it or end it, or name another --out")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _claim(path: Path, asked: dict[str, Any]) -> None:
    """Write what the folder holds; refuse the folder of another comparison, of other data, or of something else.

    `asked`: `config` (None with a protocol, whose runs are compared one by one), `runs` (folder -> label), `command`
    and `data`.
    """
    mark = path / MARK
    for unfinished in path.glob(f".{MARK}.*.tmp"):  # of a kill, before which the folder was empty
        unfinished.unlink(missing_ok=True)
    if mark.exists():
        before = json.loads(mark.read_text(encoding="utf-8"))
        was, now = (from_dict(one["config"]) if one["config"] else None for one in (before, asked))
        if was != now:
            raise ValueError(f"compare: {path} holds a comparison with another config; choose another --out")
        check_same_data(before["data"], asked["data"], f"compare: the comparison in {path}")
        if now is None:
            asked = {**asked, "runs": {**before["runs"], **asked["runs"]}}
    elif path.exists() and any(entry.name != RESULTS for entry in path.iterdir()):
        raise ValueError(f"compare: {path} is not empty and holds no comparison; choose another --out")
    text = json.dumps(asked, indent=1).encode()
    write_atomically(mark, lambda file: file.write(text), "then repeat the command")


def read_comparison(path: Path) -> list[tuple[Path, str]]:
    """(run folder, label) of every finished run of a comparison, ordered by method; empty for any other folder."""
    mark = Path(path) / MARK
    if not mark.exists():
        return []
    runs = json.loads(mark.read_text(encoding="utf-8"))["runs"]
    return [(Path(path) / name, label) for name, label in runs.items() if (Path(path) / name / "result.json").exists()]


# The runs, here or in processes of their own


class Work(NamedTuple):
    """One run for `_train_one`. `about`: what its summary says beside the numbers; None: no summary is wanted.

    `held_out`: seed of the tenth of the training set that is held out and tested on; None: the test set.
    """

    path: str
    config: dict[str, Any]
    about: dict[str, Any] | None = None
    held_out: int | None = None


class _Here(concurrent.futures.Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


def _work_through(
    items: Sequence[Item],
    prepare: Callable[[Item], Work | None],
    record: Callable[[Item, dict[str, Any]], None],
    jobs: int,
) -> None:
    """Train `jobs` items at a time, in their order; an item that `prepare` returns None for waits for others' results.

    Raises:
        KeyboardInterrupt: a run was stopped by a signal; all runs have saved.
    """
    waiting, running = list(items), dict[Any, Item]()
    with _executor(jobs) if jobs > 1 else _Here() as pool:
        threads = max(1, cores() // jobs) if jobs > 1 else None
        while waiting or running:
            for item in list(waiting):
                if len(running) == jobs:
                    break
                if (work := prepare(item)) is not None:
                    waiting.remove(item)
                    running[pool.submit(_train_one, work, threads)] = item
            if not running:
                raise RuntimeError(f"compare: {len(waiting)} runs wait for results that no run gives")
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                item, result = running.pop(future), future.result()
                if result.get("stopped_by") is not None:
                    raise KeyboardInterrupt(f"{item} was stopped by {result['stopped_by']}")
                record(item, result)


@contextlib.contextmanager
def _executor(jobs: int) -> Iterator[concurrent.futures.Executor]:
    context = multiprocessing.get_context("spawn")  # fork after OpenMP has started its threads may hang
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pool:
            try:
                yield pool
            except BaseException as error:
                for process in list((pool._processes or {}).values()):
                    process.terminate()  # a run saves and ends on SIGTERM
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise RuntimeError(
                        "compare: the process of a run was killed, perhaps because the memory was full; the same "
                        "command continues, and fewer --jobs need less memory"
                    ) from error
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed: a run saves and ends on SIGTERM."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if hasattr(os, "getppid") and os.name != "nt":  # on Windows the id of the parent stays
        threading.Thread(target=watch, daemon=True).start()


def _train_one(work: Work, threads: int | None) -> dict[str, Any]:
    """Train one run, in this process or a worker; read a finished run, continue an unfinished one.

    Returns the run's result, or with `work.about` its summary.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config, folder, parent = from_dict(work.config), RunFolder(work.path), os.getppid()
    finished = folder.path / "result.json"
    data = None
    if work.about is not None:
        data = open_data(config.data)
        if work.held_out is not None:
            data = _without_test_set(data, work.held_out)
    if folder.exists() and (was := differences(folder.read_config())) != (now := differences(config)):
        what = f"the run in {folder.path} has another config ({_first(was, now)})"
        raise ValueError(f"compare: {what}; choose another --out")
    try:
        if finished.exists():
            result = json.loads(finished.read_text(encoding="utf-8"))
        else:
            result = train_run(config, folder, resume=folder.exists(), quiet=True, data=data)
    except TrainingDiverged as error:
        if work.about is None:
            raise
        return {**work.about, "diverged": str(error).partition(";")[0], "config": differences(config)}
    if threads is not None and os.getppid() != parent:
        os._exit(1)  # the parent was killed, and nobody waits for the result
    if work.about is None or result["stopped_by"] is not None:
        return result
    assert data is not None
    return {**work.about, **summary(folder, data)}


def _without_test_set(data: RunData, seed: int) -> RunData:
    """The data with a held-out tenth of the training set, with its wrong labels, in place of the test set."""
    parts = []
    for indices in held_out(data.train, seed):
        part = data.train.select(np.sort(indices))
        if hasattr(data.train, "clean_targets"):
            part.clean_targets = data.train.clean_targets[np.sort(indices)]
        parts.append(part)
    about = f"{data.about}; a tenth of the training images is held out in place of the test set"
    return replace(data, train=parts[0], test=parts[1], about=about)


def _first(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference of two sets of differences in words."""
    name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
    return f"{name} {was.get(name, 'default')}, now {now.get(name, 'default')}"


# Summaries

RUN_KEYS = ("cell", "network", "noise", "method", "seed")
CURVE = ("test_top1", "test_nll", "test_ece", "train_right_top1", "train_wrong_top1", "train_wrong_true")


def summary(folder: RunFolder, data: RunData) -> dict[str, Any]:
    """What is kept of a finished run: its numbers, without images, weights and labels of samples.

    `wrong_labels` is the real share in the training set. `epoch` counts the images seen over those of the training set,
    which is comparable over methods. `curve` has a point per evaluation.
    """
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    config, size = folder.read_config(), len(data.train)
    ran: dict[str, Any] = json.loads((folder.path / "versions.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = json.loads((folder.path / "result.json").read_text(encoding="utf-8"))
    wrong = (data.wrong_labels or 0) / size
    points = [
        {"epoch": round(row["images_seen"] / size, 2), "step": row["step"]}
        | {name: round(row[name], 5) for name in CURVE if row.get(name) is not None}
        for row in evaluations
    ]
    best = max(points, key=lambda point: point["test_top1"])  # the first of equals
    return {
        "wrong_labels": round(wrong, 5),
        "noise_kind": noise_name(config) if wrong else "none",
        "train_images": size,
        "test_images": len(data.test),
        "last": points[-1],
        "best": {name: best[name] for name in ("epoch", "step", "test_top1")},
        "curve": points,
        "images": evaluations[-1]["images_seen"],
        "steps": evaluations[-1]["step"],
        "seconds": round(evaluations[-1]["seconds"], 1),
        "peak_mib": result.get("peak_mib"),
        "config": differences(config),
        "implementation": ran["implementation"],
        "hardware": ran["gpu"] or _processor(),
        **{name: ran[name] for name in ("python", "torch", "dlb_fast", "commit", "threads")},
        "date": time.strftime("%Y-%m-%d", time.gmtime((folder.path / "result.json").stat().st_mtime)),
    }


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a summary file: `kind` is run, tuning or chosen. Empty where there is no file.

    Raises:
        ValueError: a line that is no JSON object with a `kind`; names the line.
    """
    path, found = Path(path), []
    lines = (path.read_bytes() if path.exists() else b"").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            kind = values.get("kind") if isinstance(values, dict) else None
            needed = {"run": RUN_KEYS, "tuning": RUN_KEYS, "chosen": ("method", "setting")}.get(str(kind), ())
            if kind is None or (missing := [key for key in needed if key not in values]):
                raise ValueError(f"expected an object with {', '.join(missing) if kind else 'kind'}")
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not a summary ({error}); delete the line, and its run is made again"
            ) from None
        found.append(values)
    return found


def write_results(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write a summary file, whole or not at all."""
    text = "".join(f"{json.dumps(one)}\n" for one in lines).encode()
    write_atomically(path, lambda file: file.write(text), "then repeat the command")


# A protocol


@dataclass
class State:
    """Where a protocol stands: its runs in their order, what is known of them, and the settings chosen."""

    cells: list[Cell]
    done: dict[str, dict[str, Any]]
    chosen: dict[str, Values]

    def asked(self, only: Sequence[str] = ()) -> list[Cell]:
        """The runs that `fitting` finds. No trial of a method with its setting chosen."""
        names = fitting([cell.name for cell in self.cells], only)
        return [
            cell
            for cell in self.cells
            if cell.name in names and (cell.tried is None or cell.name in self.done or cell.method not in self.chosen)
        ]


def fitting(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """The names of runs that fit one of the patterns; all without one.

    Raises:
        ValueError: a pattern that no name fits; the message has the nearest one.
    """
    for glob in only:
        if not fnmatch.filter(names, glob):
            hint = did_you_mean(glob, names) or f"; they are named like {names[-1]}"
            raise ValueError(f"compare: --only {glob} fits none of {len(names)} runs{hint}")
    return [name for name in names if not only or any(fnmatch.fnmatchcase(name, glob) for glob in only)]


def states(protocol: Protocol, results: Sequence[Mapping[str, Any]]) -> State:
    """Where a protocol stands after the lines of its summary file.

    Raises:
        ValueError: a run or a choice was made with another config than the protocol's.
    """
    chosen: dict[str, Values] = {}
    for line in results:
        if line["kind"] == "chosen":
            method, setting = line["method"], line["setting"]
            if method not in protocol.methods or not protocol.methods[method].settings:
                continue  # which the protocol does not tune any more
            if setting not in protocol.methods[method].settings:
                raise ValueError(f"compare: {setting} was chosen for {method}; the protocol has no such setting")
            chosen[method] = setting
    cells = protocol.cells(chosen)
    known, done = {cell.name: cell for cell in cells}, dict[str, dict[str, Any]]()
    for line in results:
        cell = known.get(line.get("cell", ""))
        if cell is None or cell.config is None:  # of a run that the protocol does not have any more
            continue
        now = json.loads(json.dumps(differences(cell.config)))
        if "config" in line and line["config"] != now:
            what = f"{cell.name} was run with another config ({_first(line['config'], now)})"
            raise ValueError(f"compare: {what}; choose another --out")
        done[cell.name] = dict(line)
    return State(cells, done, chosen)


def _choice(protocol: Protocol, state: State, method: str) -> dict[str, Any] | None:
    """The line that says which setting of a method is best on the held-out images; None before all are tried or after.

    The best last top-1 decides, of equals the first. A run that diverged is not chosen.
    """
    entry = protocol.methods[method]
    if not entry.settings or method in state.chosen:
        return None
    lines = [state.done.get(f"tuning/{method}/{number}") for number in range(len(entry.settings))]
    if any(line is None for line in lines):
        return None
    tried = [-1.0 if "diverged" in line else line["last"]["test_top1"] for line in lines if line is not None]
    if max(tried) < 0:
        raise ValueError(
            f"compare: {method} diverged with every setting of its tuning; take it out of the protocol, or give it "
            "other settings and choose another --out"
        )
    best = tried.index(max(tried))
    told = [{"setting": s, "held_out_top1": v if v >= 0 else None} for s, v in zip(entry.settings, tried, strict=True)]
    return {"kind": "chosen", "method": method, "setting": entry.settings[best], "tried": told}


def located(config: RunConfig, data: str | None, labels: Path | None) -> RunConfig:
    """The config with the folder of the data, and that of the label files (by default the same)."""
    folder, noise = labels or config.data.path, config.data.noise_kind
    if data is not None:
        kind, _, path = data.partition(":")
        if not path or kind not in (*FILE_KINDS, *SPLIT_KINDS):  # a folder without its kind
            kind, path = config.data.kind, data
        config = override(config, source=f"{kind}:{Path(path).resolve()}")
        folder = labels or config.data.path
    if noise.startswith("file:"):
        config = override(config, noise_kind=f"file:{folder.resolve() / noise.removeprefix('file:')}")
    return config


def with_data(protocol: Protocol, data: str | None, labels: Path | None) -> tuple[RunData, Protocol]:
    """The data of a protocol's common part, and the protocol with its place and the lengths of the training sets."""
    if data is not None:  # the kind may be another than the protocol's
        common = override(protocol.common, source=located(protocol.common, data, labels).data.source)
        protocol = replace(protocol, common=common)
    opened = open_data(located(protocol.common, data, labels).data)
    lengths = {}
    for network in protocol.networks:
        own = protocol.base(network).data
        same = (own.source, own.per_class) == (protocol.common.data.source, protocol.common.data.per_class)
        found = opened if same else open_data(located(protocol.base(network), data, labels).data)
        lengths[network] = len(found.train)
    return opened, replace(protocol, lengths=lengths)


def run_protocol(
    protocol: Protocol,
    out: Path,
    *,
    data: str | None = None,
    labels: Path | None = None,
    only: Sequence[str] = (),
    tuned: Path | None = None,
    jobs: int | None = None,
    command: str = "",
    dry: bool = False,
) -> State:
    """Train what is missing of a protocol; every run appends a line to `results.jsonl` in the folder.

    Args:
        protocol: the study.
        out: folder of its runs; one that holds a results.jsonl continues that study, also without the run folders.
        data: KIND:PATH of the data, or PATH for the protocol's own kind.
        labels: folder of the files of `noise_kind: file:NAME`; None: the folder of the data.
        only: patterns of names, such as `airbench/dlb/*/seed0`; none: all.
        tuned: a summary file whose chosen settings are taken, so that nothing is tuned.
        jobs: processes at a time, which share the cores; None means one per core on a CPU and one on a GPU.
        command: command line, for the record.
        dry: train nothing.

    Returns:
        Where the protocol stands now.

    Raises:
        ValueError: a folder of something else or in use, other data, or runs made with another config.
        FileNotFoundError: the data or a label file is missing.
    """
    _check_patience(protocol.common)
    jobs = _jobs(jobs, protocol.common)
    opened, protocol = with_data(protocol, data, labels)
    lines: list[dict[str, Any]] = []

    def read() -> State:
        lines[:] = read_results(out / RESULTS)
        if tuned is not None:
            known = {line["method"] for line in lines if line["kind"] == "chosen"}
            found = [line for line in read_results(tuned) if line["kind"] == "chosen"]
            if not found:
                raise ValueError(f"compare: --tuned {tuned} holds no chosen setting")
            lines.extend(line for line in found if line["method"] not in known)
        return states(protocol, lines)

    state = read()
    state.asked(only)
    if dry:
        return state
    _check_labels([cell for cell in state.asked(only) if cell.name not in state.done], data, labels)
    runs = {cell.name: protocol.methods[cell.method].label for cell in state.cells}
    asked = {"config": None, "runs": runs, "command": command, "data": identity(opened)}

    def keep() -> None:
        """Choose the settings whose trials are all done, and write."""
        nonlocal state
        state = states(protocol, lines)
        for method in protocol.methods:
            if (choice := _choice(protocol, state, method)) is not None:
                lines.append(choice)
        state = states(protocol, lines)
        write_results(out / RESULTS, lines)

    def prepare(cell: Cell) -> Work | None:
        cell = next(one for one in state.cells if one.name == cell.name)  # with the settings chosen since
        if cell.config is None:
            return None
        where = {name: getattr(cell, name) for name in ("network", "noise", "method", "seed")}
        about = {"kind": "run" if cell.tried is None else "tuning", "cell": cell.name, **where}
        about["label"] = protocol.methods[cell.method].label
        config = to_dict(located(cell.config, data, labels))
        return Work(str(out / cell.name), config, about, None if cell.tried is None else cell.seed)

    def record(cell: Cell, line: dict[str, Any]) -> None:
        lines.append(json.loads(json.dumps({**line, "jobs": jobs})))
        keep()
        top1 = line["diverged"] if "diverged" in line else f"top-1 {100 * line['last']['test_top1']:.2f} %"
        _say(len(state.done), len(state.cells), cell.name, top1)

    with claimed(out, asked):
        read()  # another command may have ended since
        keep()
        todo = _with_tuning(protocol, state, [c for c in state.asked(only) if c.name not in state.done])
        todo = [cell for cell in todo if runs_here(protocol.base(cell.network).train.device)]
        trials = {cell.name for cell in todo if cell.tried is not None}
        if lost := {
            c.method for c in _with_tuning(protocol, state, todo) if c.tried is not None and c.name not in trials
        }:
            print(
                f"the tuning of {', '.join(sorted(lost))} needs a GPU; what waits for it is left out", file=sys.stderr
            )
            todo = [cell for cell in todo if cell.tried is not None or not lost & {*protocol.needs(cell.method)}]
        print(f"{len(todo)} of {len(state.cells)} runs to do, {jobs} at a time, in {out}", file=sys.stderr)
        _work_through(todo, prepare, record, jobs)
    return state


def _check_labels(cells: Sequence[Cell], data: str | None, labels: Path | None) -> None:
    """Read the label files of runs once, so that a missing or wrong one is found now and not in hours."""
    files: dict[str, RunConfig] = {}
    for cell in cells:
        if cell.config is not None and cell.config.data.label_file is not None:
            files.setdefault(cell.config.data.label_file, cell.config)
    for config in files.values():
        open_data(located(config, data, labels).data)


def _with_tuning(protocol: Protocol, state: State, wanted: Sequence[Cell]) -> list[Cell]:
    """The runs with those of the tuning that they wait for, in the order of the protocol."""
    unchosen = {other for cell in wanted if cell.tried is None for other in protocol.needs(cell.method)}
    unchosen -= state.chosen.keys()
    names = {cell.name for cell in wanted}
    return [
        cell
        for cell in state.cells
        if cell.name not in state.done and (cell.name in names or (cell.tried is not None and cell.method in unchosen))
    ]


def runs_here(device: str) -> bool:
    """Whether a device is there: a network of a study may be for a GPU only (`device: cuda`)."""
    return not device.startswith("cuda") or torch.cuda.is_available()


def remaining_seconds(state: State, cells: Sequence[Cell]) -> float | None:
    """Training seconds of runs to come, one after the other, by those done of the same network and method, or network.

    None where no run of the network is done.
    """
    total = 0.0
    for cell in cells:
        lines = [line for line in state.done.values() if line["network"] == cell.network and "seconds" in line]
        same = [line for line in lines if line["method"] == cell.method] or lines
        if not same:
            return None
        total += statistics.median(line["seconds"] for line in same)  # a run may have been paused
    return total
