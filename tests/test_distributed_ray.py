"""examples/ray_train.py with the real Ray, where it is installed: `pip install "ray[train]"` beside torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import PATIENCE, environment, last_checkpoint, metrics_rows, wait_for
from nodes import descendants

pytest.importorskip("ray.train")
pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parent.parent / "examples/ray_train.py"


def workers(driver):
    """The processes of Ray's training workers, which name themselves."""
    return [pid for pid in descendants(driver.pid) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_killed_worker_is_restarted_and_the_run_continued(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--out", "runs/a", "--workers", "2", "--max-steps", "400"]
    log = tmp_path / "ray.log"
    with open(log, "w") as file:
        env = environment(RAY_USAGE_STATS_ENABLED="0")
        driver = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=file, stderr=file)
    try:
        wait_for(lambda: list(tmp_path.glob("runs/a/checkpoints/step-*.pt")), "a checkpoint", driver)
        os.kill(workers(driver)[-1], signal.SIGKILL)
        assert driver.wait(PATIENCE) == 0, log.read_text()[-6000:]
    finally:
        driver.terminate()
        driver.wait(PATIENCE)
    assert "continuing from" in log.read_text()
    assert json.loads((tmp_path / "runs/a/result.json").read_text())["step"] == 400
    state = last_checkpoint(tmp_path / "runs/a")
    assert len(state["others"]) == 1 and state["images_seen"] == 40 * 400 - 20
    assert [int(row["step"]) for row in metrics_rows(tmp_path / "runs/a")] == list(range(20, 401, 20))
