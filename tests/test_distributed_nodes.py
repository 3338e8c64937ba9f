"""Machines come and go: torchrun restarts the ranks that are left, and the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from builders import last_checkpoint, metrics_rows, wait_for
from nodes import documented, ended, free_port, on, two_nodes, wait_for_text, with_data

from dlb_fast import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc"),
]

TRACKER = """
import json, os

class Run:
    def log(self, values, step): pass
    def finish(self): pass

def init(**options):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps([options["id"], options["resume"]]) + "\\n")
    return Run()
"""

FLAGS = "--max-steps 1000000 --eval-every 500 --checkpoint-every 100 --log-every 50 --trackers wandb"


@pytest.fixture
def nodes():
    yield from two_nodes()


def test_a_machine_is_killed_comes_back_and_leaves(nodes, tmp_path):
    """kill -9, on one machine, on two, SIGTERM on one, on the other: one run in one folder, nobody called."""
    first, second = nodes
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(TRACKER)
    port, elastic, run = free_port(), documented("--nnodes 1:4"), tmp_path / "runs/a"

    def start(node, log):
        command = on(node, first, port, with_data(elastic, "synthetic:200,4,8", *FLAGS.split()), **{"1:4": "1:2"})
        changes = {"TRACKED": str(tmp_path / "tracked"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        changes["PYTHONPATH"] = f"{tmp_path / 'fake'}:{Path(__file__).parent.parent}"
        return node.start(command, tmp_path, tmp_path / log, **changes)

    def checkpoints():
        return sorted((run / "checkpoints").glob("step-*.pt"))

    def newer(than):
        return wait_for(lambda: [path for path in checkpoints() if path > than[-1]], "a newer checkpoint", left)

    def continued(count, log="a.log"):
        """The checkpoint from which the run went on for the `count`-th time; in the log of the machine with rank 0."""
        said = wait_for_text(tmp_path / log, "continuing from", left, count)
        return tmp_path / re.findall(r"continuing from (\S+)", said)[count - 1]

    left = start(first, "a.log")
    lost = start(second, "b.log")
    agreed = wait_for(checkpoints, "a checkpoint", left)
    assert len(last_checkpoint(run)["others"]) == 1  # two ranks

    agreed = checkpoints()
    second.kill()
    assert continued(1) >= agreed[-1]
    agreed = newer(checkpoints())
    assert last_checkpoint(run)["others"] == []

    returned = start(second, "b2.log")
    assert continued(2) >= agreed[-1]
    agreed = newer(checkpoints())
    assert len(last_checkpoint(run)["others"]) == 1

    returned.send_signal(signal.SIGTERM)
    assert ended(returned, tmp_path / "b2.log") != 0
    assert continued(3) >= agreed[-1]
    said = (tmp_path / "a.log").read_text()
    stops = [int(step) for step in re.findall(r"stopped by SIGTERM at step (\d+)", said)]
    starts = [int(step) for step in re.findall(r"continuing from \S+/step-(\d+)", said)]
    assert starts[1:] == stops  # no step is lost where a machine joins or is told to leave
    newer(checkpoints())
    left.send_signal(signal.SIGTERM)
    ended(left, tmp_path / "a.log")

    state = last_checkpoint(run)
    assert state["others"] == [] and lost.poll() == -signal.SIGKILL
    assert state["images_seen"] == 20 * state["step"] - 10  # the very first batch has its new half only
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(50, state["step"] + 1, 50))
    assert [int(row["step"]) for row in metrics_rows(run)] == list(range(500, state["step"] + 1, 500))
    tracked = [json.loads(line) for line in (tmp_path / "tracked").read_text().splitlines()]
    assert len(tracked) == 4 and len({name for name, _ in tracked}) == 1 and tracked[0][1] == "allow"


def test_the_documented_commands_of_two_machines_and_of_one_gpu(nodes, tmp_path, monkeypatch, capsys):
    """As printed, with one process instead of the GPUs and small data; the one goes on where the other ended."""
    first, _ = nodes
    port, small = free_port(), ("synthetic:40,2,8", "--max-steps", "4")
    many = with_data(documented("--nnodes 2"), *small)
    pair = [node.start(on(node, first, port, many), tmp_path, tmp_path / f"{node is first}.log") for node in nodes]
    assert [ended(process, tmp_path / "True.log") for process in pair] == [0, 0]
    assert len(last_checkpoint(tmp_path / "runs/a")["others"]) == 1
    monkeypatch.chdir(tmp_path)
    assert cli.main([*with_data(documented("dlb-fast"), *small)[3:], "--max-steps", "6"]) == 0
    assert "continuing from runs/a/checkpoints/step-000000004.pt" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "runs/a")["step"] == 6
