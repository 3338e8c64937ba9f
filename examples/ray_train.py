"""Train a preset under Ray Train; Ray restarts the workers, and the run goes on from its last checkpoint.

    python examples/ray_train.py --preset digits --out /shared/runs/a --workers 2

Each worker is a rank of the process group that Ray makes (NCCL with --gpu, otherwise gloo), so the run is the one of
`torchrun`: the same folder, files and results. The folder has to be on a file system that all machines share.

Tried with: ray 2.60, two workers on CPUs of one machine, one of them killed (tests/test_distributed_ray.py). Unproven:
GPUs, several machines, a worker that Ray asks to leave (its signals do not reach the training, which runs in a thread:
the run goes on from the last checkpoint that was due).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(settings: dict[str, Any]) -> None:
    """What every worker does: train the preset in the run folder, from the start or from its newest checkpoint."""
    from dlb_fast.presets import load_preset
    from dlb_fast.train.config import override
    from dlb_fast.train.run import RunFolder, train_run

    config = override(load_preset(settings["preset"]), **settings["changes"])
    train_run(config, RunFolder(settings["out"]), resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--out", type=Path, required=True, help="run folder, on a file system that all machines share")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker")
    args = parser.parse_args()
    out = args.out.resolve()  # a worker has a working folder of its own
    trainer = TorchTrainer(
        train,
        train_loop_config={"preset": args.preset, "out": str(out), "changes": {"max_steps": args.max_steps}},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(
            name=out.name, storage_path=str(out.parent / "ray"), failure_config=FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()
    print((out / "result.json").read_text())


if __name__ == "__main__":
    main()
