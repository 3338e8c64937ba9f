"""examples/slurm.sbatch, against stand-ins for srun and scontrol that do what SLURM's do with signals.

srun passes SIGUSR1 on to its tasks; SIGTERM makes it end them by SIGKILL ("forcing job termination"). Which processes
of a task get a signal depends on the cluster (ProctrackType): the task alone or everything it has started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders import PATIENCE, ROOT, environment, last_checkpoint, wait_for
from nodes import children

pytestmark = pytest.mark.skipif(not Path("/proc").exists() or not Path("/bin/bash").exists(), reason="needs Linux")

SRUN = """#!{python} -S
import os, signal, subprocess, sys
tasks, everything = [], os.environ.get("SRUN_SIGNALS") == "everything"

def below(pid):
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(open(f"/proc/{{name}}/stat").read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            yield int(name)
            yield from below(int(name))

def forward(number, frame):
    if number == signal.SIGTERM:
        print("srun: forcing job termination", flush=True)
    for task in tasks:
        kill = number == signal.SIGTERM
        for pid in [task.pid, *(below(task.pid) if everything or kill else [])]:
            try:
                os.kill(pid, signal.SIGKILL if kill else number)
            except ProcessLookupError:
                pass

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
open("srun.log", "a").write("started\\n")
for node in range(int(os.environ["SLURM_NNODES"])):
    tasks.append(subprocess.Popen(words, env={{**os.environ, "SLURM_PROCID": str(node)}}))
sys.exit(max(task.wait() % 256 for task in tasks))
"""

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then
  [ -z "$SIGNAL_EARLY" ] || { kill -USR1 "$(cat script.pid)"; sleep 0.1; }
  for _ in $(seq "$SLURM_NNODES"); do echo 127.0.0.1; done
else
  echo "$@" >> requeues
fi
"""

# Saves on SIGUSR1 and SIGTERM and ends with 1, as torchrun does; ends with 0 once there is a file named `finish`.
TORCHRUN = """#!/bin/bash
echo "$@" >> torchrun.log
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"
[ -z "$FAILS" ] || exit "$FAILS"
save() { sleep 0.3; echo saved >> "$out/saved"; [ ! -e late ] || echo {} > "$out/result.json"; exit 1; }
out=$2
trap save USR1 TERM
echo > "$out/started-$SLURM_RESTART_COUNT"
while [ ! -e finish ]; do sleep 0.02; done
echo {} > "$out/result.json"
"""


class Slurm:
    """A queue of one job in a folder; `submit` starts the job's script as the next start would."""

    def __init__(self, folder: Path, *, torchrun: str = TORCHRUN) -> None:
        self.folder, self.starts = folder, 0
        (folder / "bin").mkdir()
        scripts = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL, "torchrun": torchrun}
        for name, text in scripts.items():
            path = folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)

    def submit(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        env = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "NPROC": "1", **changes}
        env |= {"SLURM_RESTART_COUNT": str(self.starts)} if self.starts else {}
        path = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        command = ["bash", "-c", 'echo $$ > script.pid; exec bash "$@"', "bash", str(ROOT / "examples/slurm.sbatch")]
        self.log = self.folder / f"slurm-{self.starts}.out"
        with open(self.log, "w") as log:
            job = subprocess.Popen(
                [*command, *arguments], cwd=self.folder, env=environment(PATH=path, **env), stdout=log, stderr=log
            )
        self.starts += 1
        return job

    def running(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """A submitted job whose stand-in of torchrun trains."""
        job = self.submit(*arguments, **changes)
        mark = self.folder / "runs/slurm-4711" / f"started-{self.starts - 1 or ''}"
        wait_for(mark.exists, "the training", job)
        return job

    def ended(self, job: subprocess.Popen[str]) -> int:
        try:
            return job.wait(PATIENCE)
        finally:
            job.kill()

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeues(self) -> list[str]:
        return self.lines("requeues")


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


OUT = "runs/slurm-4711"


def test_a_signalled_run_is_saved_and_queued_again_until_it_is_finished(slurm):
    job = slurm.running("--preset", "digits", "--lr", "0.1")
    job.send_signal(signal.SIGUSR1)
    assert slurm.ended(job) == 0
    assert slurm.lines(f"{OUT}/saved") == ["saved"] and slurm.requeues == ["requeue 4711"]
    job = slurm.running("--preset", "digits", "--lr", "0.1")
    (slurm.folder / "finish").touch()
    assert slurm.ended(job) == 0 and slurm.requeues == ["requeue 4711"]
    first, second = slurm.lines("torchrun.log")
    for command in (first, second):
        assert command.endswith(f"-m dlb_fast train --resume --out {OUT} --preset digits --lr 0.1")
    assert "--rdzv-id=4711-1 " in first and "--rdzv-id=4711-2 " in second
    assert "start 2 of job 4711" in slurm.log.read_text() and "exit status 0" in slurm.log.read_text()


def test_two_signals_are_one(slurm):
    job = slurm.running()
    job.send_signal(signal.SIGUSR1)
    wait_for(lambda: job.poll() is not None or not job.send_signal(signal.SIGUSR1), "the second signal")
    assert slurm.ended(job) == 0
    assert slurm.lines(f"{OUT}/saved") == ["saved"] and slurm.requeues == ["requeue 4711"]


def test_sigterm_after_the_signal_does_not_end_the_saving(slurm):
    job = slurm.running()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        job.send_signal(number)
    assert slurm.ended(job) == 0
    assert slurm.lines(f"{OUT}/saved") == ["saved"] and slurm.requeues == ["requeue 4711"]
    assert "forcing job termination" not in slurm.log.read_text()


def test_a_run_that_finishes_at_the_signal_is_not_queued_again(slurm):
    (slurm.folder / "late").touch()
    job = slurm.running()
    job.send_signal(signal.SIGUSR1)
    assert slurm.ended(job) == 0 and not slurm.requeues


def test_a_signal_before_the_start_queues_the_job_again(slurm):
    assert slurm.ended(slurm.submit(SIGNAL_EARLY="1")) == 0
    assert slurm.requeues == ["requeue 4711"] and not slurm.lines("srun.log")


def test_a_failed_run_is_not_queued_again(slurm):
    assert slurm.ended(slurm.submit(FAILS="3")) == 3 and not slurm.requeues


def test_a_cancelled_run_is_not_queued_again(slurm):
    """scancel sends SIGTERM to the tasks and to the script."""
    job = slurm.running()
    job.send_signal(signal.SIGTERM)
    (srun,) = (pid for pid in children(job.pid) if b"srun" in Path(f"/proc/{pid}/cmdline").read_bytes())
    for task in children(srun):
        os.kill(task, signal.SIGTERM)
    assert slurm.ended(job) == 1
    assert slurm.lines(f"{OUT}/saved") == ["saved"] and not slurm.requeues


def test_the_starts_of_a_job_are_counted(slurm):
    job = slurm.running(MAX_STARTS="1")
    job.send_signal(signal.SIGUSR1)
    assert slurm.ended(job) == 1 and not slurm.requeues
    assert slurm.lines(f"{OUT}/saved") == ["saved"] and "MAX_STARTS is 1" in slurm.log.read_text()


def test_the_script_s_own_folder(slurm):
    (slurm.folder / "finish").touch()
    assert slurm.ended(slurm.submit(OUT="elsewhere/b")) == 0
    assert (slurm.folder / "elsewhere/b/result.json").exists() and not (slurm.folder / "runs").exists()


REAL = f"""#!/bin/sh
exec {sys.executable} -m torch.distributed.run "$@"
"""
RUN = "--data synthetic:200,4,8 --model small_cnn --batch-size 20 --eval-every 200 --checkpoint-every 50 --log-every 50"


@pytest.mark.slow
def test_the_real_torchrun_and_trainer(tmp_path):
    """Two nodes; the signal reaches all processes, and the ranks once more by torchrun. The next start finishes."""
    slurm = Slurm(tmp_path, torchrun=REAL)
    job = slurm.submit(*RUN.split(), "--max-steps", "1000000", SLURM_NNODES="2", SRUN_SIGNALS="everything")
    wait_for(lambda: list(tmp_path.glob(f"{OUT}/checkpoints/step-*.pt")), "a checkpoint", job)
    job.send_signal(signal.SIGUSR1)
    assert slurm.ended(job) == 0 and slurm.requeues == ["requeue 4711"], slurm.log.read_text()
    saved = last_checkpoint(tmp_path / OUT)
    assert f"stopped by SIGUSR1 at step {saved['step']} of" in slurm.log.read_text() and len(saved["others"]) == 1

    steps = saved["step"] + 100
    job = slurm.submit(*RUN.split(), "--max-steps", str(steps), SLURM_NNODES="2", SRUN_SIGNALS="everything")
    assert slurm.ended(job) == 0 and slurm.requeues == ["requeue 4711"], slurm.log.read_text()
    assert f"continuing from {OUT}/checkpoints/step-{saved['step']:09d}.pt" in slurm.log.read_text()
    assert json.loads((tmp_path / OUT / "result.json").read_text())["step"] == steps
    rows = [json.loads(line) for line in slurm.lines(f"{OUT}/metrics.jsonl")]
    logged = [row["step"] for row in rows if row["kind"] == "step"]
    assert logged == sorted({*range(50, steps + 1, 50), steps})
