"""Small inputs, commands and runs that several test files share."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a test gives up on another process or thread; a busy machine needs most of them


# Batches of logits


def problem(
    rows: int = 8,
    repeated: int = 4,
    classes: int = 12,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    scale: float = 3.0,
    drift: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (rows, classes), targets (rows,) and last logits (repeated, classes) on the default device.

    With `drift` the last logits are the logits of the same rows and so much noise, as in training.
    The values come from `generator`, or from a CPU generator with `seed`; they are the same for every dtype.
    """
    generator = generator or torch.Generator().manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, classes, generator=generator, dtype=torch.float64, device=generator.device)

    logits, last = scale * normal(rows), normal(repeated)
    last = scale * last if drift is None else logits[:repeated] + drift * last
    target = torch.randint(0, classes, (rows,), generator=generator, device=generator.device)
    device = torch.empty(0).device
    return logits.to(device, dtype), target.to(device), last.to(device, dtype)


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, upstream: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient of the logits in float64 on the CPU."""
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.backward(None if upstream is None else upstream.to(loss))
    assert leaf.grad is not None
    return loss.detach().double().cpu(), leaf.grad.double().cpu()


# Images and folders


def noise_image(seed: int = 0, height: int = 60, width: int = 80, channels: int = 3) -> np.ndarray:
    """A uint8 image (height, width, channels) of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def jpeg(seed: int = 0, height: int = 60, width: int = 80) -> bytes:
    """A JPEG file of random pixels."""
    return _encode(noise_image(seed, height, width), "JPEG", quality=90)


def png(value: int, size: tuple[int, int] = (6, 5)) -> bytes:
    """A PNG file of `size` (width, height) whose pixels all have the grey `value`."""
    return _encode(np.full((*size[::-1], 3), value, np.uint8), "PNG")


def _encode(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_images(root: Path, names: Iterable[str]) -> Path:
    """PNG files at these paths below `root`, folders included; the k-th is grey of value k."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def write_jpegs(root: Path, names: Iterable[str], height: int = 30, width: int = 24) -> Path:
    """JPEG files of random pixels at these paths below `root`, folders included."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed, height, width))
    return root


def contents(dataset: Any) -> list[tuple[int, str]]:
    """(grey value, class name) of every sample of a dataset of such files, decoded."""
    return [(int(dataset[i][0].unique()), dataset.classes[dataset.targets[i]]) for i in range(len(dataset))]


# Batches of loaders


def batches(loader: Iterable[Any], epochs: int = 3) -> list[Any]:
    """Every batch of so many epochs; a loader with `close` is closed afterwards."""
    try:
        return [batch for _ in range(epochs) for batch in loader]
    finally:
        getattr(loader, "close", lambda: None)()


def fields(batch: Any) -> dict[str, Any]:
    """The fields of a `Batch`, by name."""
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def assert_same_batches(first: Iterable[Any], second: Iterable[Any]) -> None:
    """The same number of batches, each equal in every field, bit for bit."""
    for number, (one, other) in enumerate(zip(list(first), list(second), strict=True)):
        assert_same(fields(one), fields(other), f"batch {number}")


# States


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal values, tensors bit for bit, in nested mappings and sequences."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, Mapping):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert first == second, where


def distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest absolute difference of two state dicts with the same names."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


# Runs of the trainer


def train(config: Any, path: Path, *, resume: bool = False, **options: Any) -> Any:
    """Train in this process, quietly, with `path` as the run folder."""
    from dlb_fast.train.run import RunFolder, train_run

    return train_run(config, RunFolder(path), resume=resume, **{"quiet": True, **options})


def stop_at(monkeypatch: Any, step: int) -> None:
    """Send this process a real SIGTERM while the trainer makes step `step` (from 1)."""
    from dlb_fast.train.loop import Trainer

    original = Trainer.optimizer_step

    def stopping(self: Trainer) -> None:
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    monkeypatch.setattr(Trainer, "optimizer_step", stopping)


def train_stopped(config: Any, path: Path, step: int) -> Any:
    """Train until a SIGTERM during step `step`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        result = train(config, path)
    assert result["stopped_by"] == "SIGTERM" and last_checkpoint(path)["step"] == step
    return result


def last_checkpoint(path: Path) -> dict[str, Any]:
    """The newest checkpoint of a run folder."""
    from dlb_fast.train.checkpoint import list_checkpoints, read_checkpoint

    return read_checkpoint(list_checkpoints(Path(path) / "checkpoints")[0])


def exported(path: Path, name: str = "last") -> bytes:
    """The file of a run's exported weights."""
    return (Path(path) / "checkpoints" / f"{name}.safetensors").read_bytes()


TIMES = {"seconds", "images_per_second", "data_wait", "waited"}


def metrics_rows(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the times."""
    with open(Path(path) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def without_times(state: Any) -> Any:
    """A checkpoint without times and log lengths; NaN as text, because it equals nothing."""
    if isinstance(state, dict):
        return {k: without_times(v) for k, v in state.items() if k not in TIMES | {"logs"}}
    if isinstance(state, (list, tuple)):
        return [without_times(v) for v in state]
    return "nan" if isinstance(state, float) and state != state else state


def assert_same_run(first: Path, second: Path) -> None:
    """Two run folders hold the same last checkpoint bit for bit, and the same metrics, each step once."""
    assert_same(without_times(last_checkpoint(first)), without_times(last_checkpoint(second)))
    assert metrics_rows(first) == metrics_rows(second)
    steps = [row["step"] for row in metrics_rows(second)]
    assert len(steps) == len(set(steps)) >= 3
    lines = [(Path(path) / "metrics.jsonl").read_text().count("\n") for path in (first, second)]
    assert lines[0] == lines[1]


# Other processes


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: the checkout is importable, one thread, offline, not a worker of pytest-xdist."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    base = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**base, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def python(*arguments: Any, cwd: Path | str = ROOT, check: bool = True, **changes: str) -> Any:
    """Run `python arguments` in a process of its own, with `changes` to its environment; its output is text."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert not check or done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen[Any] | None = None) -> Any:
    """Ask until `condition()` is true and return it; fail after `PATIENCE` seconds or when `process` has ended."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        ended = process is not None and process.poll() is not None
        if ended and (found := condition()):  # it happened between the two questions
            return found
        assert not ended, f"{what}: the process ended before"
        assert time.monotonic() < until, f"{what}: not within {PATIENCE} s"
        time.sleep(0.01)
    return found
