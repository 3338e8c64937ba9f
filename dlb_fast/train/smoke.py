"""A rehearsal: a few steps of a config through everything a long run goes through, in seconds."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from .build import evaluate_run, train_run
from .config import RunConfig, override
from .distributed import Ranks
from .run_folder import RunFolder

__all__ = ["rehearse", "shortened"]

STEPS, ROWS, CLASSES, PIXELS = 4, 16, 10, 64


def shortened(config: RunConfig, *, real_data: bool = False) -> RunConfig:
    """The config cut down to four steps of at most 16 rows, evaluated and saved at every second, without trackers.

    Its images become random ones of ten classes, of the size it asks for but at most 64 pixels, unless `real_data`.

    Example:
        >>> from dlb_fast.presets import load_preset
        >>> shortened(load_preset("cifar100-resnet32-dlb")).data.source
        'synthetic:160,10,32'
    """
    if not real_data:
        size = {"digits": 8, "synthetic": 8}.get(config.data.source.split(":")[0], min(PIXELS, config.data.image_size))
        source = f"synthetic:{ROWS * CLASSES},{CLASSES},{size}"
        # asymmetric noise confuses the classes of one certain set
        config = override(config, source=source, per_class=None, noise_kind="symmetric")
    rows = min(ROWS, config.data.batch_size)
    every: dict[str, Any] = {"eval_every": STEPS // 2, "checkpoint_every": STEPS // 2, "log_every": 1}
    return override(config, batch_size=rows, max_steps=STEPS, trackers=(), **every)


def rehearse(
    config: RunConfig, folder: Path | None = None, *, real_data: bool = False, quiet: bool = False, ranks: Ranks
) -> dict[str, Any]:
    """Train two steps, evaluate, save; resume, train to the end, evaluate the exported weights.

    Args:
        config: of the run that is rehearsed.
        folder: kept when it is given; otherwise a temporary one is used and removed.
        real_data: read the config's own data (all of its test set).
        quiet: as in `train_run`.
        ranks: this process among the others.

    Returns:
        The scores of the last weights, with `seconds`.
    Raises:
        RuntimeError: the evaluation of the weights that were written is not that of the run.
        Whatever a run raises.
    """
    short = shortened(config, real_data=real_data)
    started = time.perf_counter()
    path = folder or Path(ranks.on_main(lambda: tempfile.mkdtemp(prefix="dlb-fast-smoke-")))
    try:
        run = RunFolder(path)
        first = override(short, max_steps=STEPS // 2)
        train_run(first, run, quiet=quiet, ranks=ranks)
        result = train_run(short, run, resume=True, quiet=quiet, ranks=ranks)
        scores = ranks.on_main(lambda: evaluate_run(path, weights="last", device=config.train.device))
        if not ranks.several and abs(scores["top1"] - result["test_top1"]) > 1e-9:
            raise RuntimeError(
                f"smoke: top-1 of the written weights is {scores['top1']}, of the run {result['test_top1']}"
            )
    finally:
        if folder is None and ranks.is_main:
            shutil.rmtree(path, ignore_errors=True)
    return {**scores, "seconds": round(time.perf_counter() - started, 1)}
