"""The ImageNet recipe from end to end on a CPU: a made folder of small JPEGs with 1000 classes, through every command.

    python -m benchmarks.imagenet_dry_run --out benchmarks/results/imagenet-dry-run-DATE.jsonl

Makes the folder in ImageNet's layout (`train/nXXXXXXXX/*.JPEG`, `val/...`), then runs what a user runs, each as a
process of its own: `verify-data`, `train` with the preset (stopped by SIGTERM after its first checkpoint), `train
--resume`, `eval`, `report`. Only sizes are overridden (rows, crops, steps, threads, and at most the network); the
classes, the precision, the schedule and the loss are the recipe's. It shows that the path holds and what it writes.
It says nothing about accuracy, and its seconds say nothing about a GPU: the recipe's bfloat16 is slow on a CPU that has
none of its own, so the default sizes are small.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import harness

CHECKOUT = Path(__file__).resolve().parent.parent


def make_folder(root: Path, *, classes: int, per_class: int, val_per_class: int, pixels: int, seed: int = 0) -> int:
    """Write the JPEGs, smooth noise of `pixels` to 3/2 `pixels` a side, each of its own size; returns how many."""
    rng, count = np.random.default_rng(seed), 0
    for split, number in (("train", per_class), ("val", val_per_class)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(number):
                size = tuple(int(n) for n in rng.integers(pixels, 3 * pixels // 2 + 1, 2))
                small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                (folder / f"n{label:08d}_{index}.JPEG").write_bytes(file.getvalue())
                count += 1
    return count


class Runner:
    """Runs `dlb-fast` commands and keeps a row for each."""

    def __init__(self, environment: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.environment = environment

    def __call__(self, name: str, *arguments: str, until: Path | None = None) -> str:
        """One command; with `until`, SIGTERM as soon as that folder holds a checkpoint. Raises if it fails."""
        command = [sys.executable, "-m", "dlb_fast", *arguments]
        path = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": path}
        ) as process:
            if until is not None:
                while process.poll() is None and not list(until.glob("*.pt")):
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
            said = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said}")
        row = {"bench": "imagenet_dry_run", "stage": name, "seconds": round(time.perf_counter() - start, 2)}
        self.rows.append({**row, "dlb_fast": " ".join(arguments), **self.environment})
        print(f"{name:<12} {row['seconds']:>7.2f} s", flush=True)
        return said


def dry_run(root: Path, args: argparse.Namespace, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """All stages; returns their rows, the last one holding what came out."""
    data, run = root / "imagenet", root / "run"
    sizes = {"classes": args.classes, "per_class": args.per_class, "val_per_class": 1, "pixels": args.pixels}
    images = make_folder(data, **sizes)
    step = Runner({**environment, **sizes, "images": images})
    step("verify", "verify-data", str(data))
    flags = ["--preset", args.preset, "--data", f"imagefolder:{data}", "--out", str(run), "--device", "cpu"]
    flags += ["--batch-size", str(args.rows), "--image-size", str(args.image_size), "--eval-size", str(args.image_size)]
    flags += ["--eval-resize", "None", "--max-steps", str(args.steps), "--num-threads", "2", "--log-every", "1"]
    flags += ["--eval-every", str(args.steps), "--checkpoint-every", "1", "--keep", "1"]
    flags += ["--model", args.model] if args.model else []
    stopped = step("train", "train", *flags, until=run / "checkpoints")
    resumed = step("resume", "train", "--resume", "--out", str(run))
    scores = json.loads(step("eval", "eval", str(run), "--weights", "last", "--json").splitlines()[-1])
    step("report", "report", str(run))
    result = json.loads((run / "result.json").read_text())
    found = {
        "stage": "result",
        "stopped_mid_run": "stopped by SIGTERM" in stopped and "continuing from" in resumed,
        "steps": result["step"],
        "images_seen": result["images_seen"],
        "loss": result["loss"],
        "lb": result["lb"],
        "evaluated": scores["count"],
        "checkpoint_bytes": max(p.stat().st_size for p in (run / "checkpoints").glob("*.pt")),
        "weights_bytes": (run / "checkpoints" / "last.safetensors").stat().st_size,
        "peak_mib": result.get("peak_mib"),
    }
    return [*step.rows, {"bench": "imagenet_dry_run", **found, **step.environment}]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--preset", default="imagenet-resnet50-dlb")
    flags.add_argument("--classes", type=int, default=1000)
    flags.add_argument("--per-class", type=int, default=2, help="training images of each class (and 1 to evaluate on)")
    flags.add_argument("--pixels", type=int, default=48, help="shortest side of the JPEGs")
    flags.add_argument("--rows", type=int, default=16, help="batch_size: rows the model sees per step")
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--model", help="another network than the preset's")
    flags.add_argument("--out", type=Path, help="append JSON lines to this file")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Run all stages in a temporary folder and print what came out."""
    args = parser().parse_args(argv)
    environment = harness.environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = dry_run(Path(folder), args, environment)
    print(json.dumps({k: v for k, v in rows[-1].items() if k not in environment}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
