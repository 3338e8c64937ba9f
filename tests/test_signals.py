"""A signal stops a run after its step, whenever it comes and however often; nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import assert_same_run, last_checkpoint, train

from dlb_fast import cli
from dlb_fast.presets import load_preset
from dlb_fast.train import checkpoint, distributed, loop, run
from dlb_fast.train.config import override
from dlb_fast.train.distributed import ENVIRONMENT, Ranks
from dlb_fast.train.loop import STOP_SIGNALS, Trainer
from dlb_fast.train.run import RunFolder

pytestmark = pytest.mark.usefixtures("no_page")
SMALL = override(load_preset("digits"), source="synthetic:40,2,8", per_class=None, label_noise=0.0, batch_size=20)
SMALL = override(SMALL, max_steps=12, eval_every=4, checkpoint_every=3, log_every=1)


@pytest.fixture
def outer():
    """Handlers that stand for what would end the process: the numbers of the signals that reached them."""
    reached = []
    before = {number: signal.signal(number, lambda n, _: reached.append(n)) for number in STOP_SIGNALS}
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    train(SMALL, path)
    return path


def before(monkeypatch, owner, name, act, call=1):
    """Call `act()` before the `call`-th call of a function."""
    original, calls = getattr(owner, name), []

    def acting(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, acting)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


PLACES = {
    "first step": (Trainer, "optimizer_step", 1),
    "between two checkpoints": (Trainer, "optimizer_step", 5),
    "evaluation": (run, "evaluate", 1),
    "checkpoint is written": (checkpoint.torch, "save", 2),
    "checkpoint is renamed": (checkpoint.os, "replace", 5),
    "weights are exported": (checkpoint, "save_weights", 2),
    "log": (loop.RunLog, "result", 1),
}
SCHEDULER = (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("place", PLACES)
def test_the_signals_of_a_scheduler_lose_nothing(place, whole, outer, tmp_path, monkeypatch):
    """SIGUSR1 before the limit, from srun and from torchrun, and SIGTERM while the run saves."""
    owner, name, call = PLACES[place]
    with monkeypatch.context() as patch:
        before(patch, owner, name, lambda: send(*SCHEDULER), call)
        result = train(SMALL, tmp_path)
    assert outer == [] and result["stopped_by"] in ("SIGUSR1", "SIGTERM")
    saved = last_checkpoint(tmp_path)["step"]
    assert 0 < saved < 12 and not (tmp_path / "result.json").exists()
    assert train(SMALL, tmp_path, resume=True)["step"] == 12
    assert_same_run(whole, tmp_path)


def test_a_second_ctrl_c_ends_at_once(outer, tmp_path, monkeypatch):
    before(monkeypatch, Trainer, "optimizer_step", lambda: send(signal.SIGINT, signal.SIGINT), 2)
    assert train(SMALL, tmp_path)["stopped_by"] == "SIGINT"
    assert outer == [signal.SIGINT]


def test_a_signal_in_the_last_step_stops_nothing(whole, outer, tmp_path, monkeypatch):
    before(monkeypatch, Trainer, "optimizer_step", lambda: send(signal.SIGTERM), 12)
    train(SMALL, tmp_path)
    assert (tmp_path / "result.json").exists() and last_checkpoint(tmp_path)["step"] == 12


def test_a_signal_before_the_first_step_leaves_a_run_that_starts(whole, outer, tmp_path, monkeypatch):
    original = Trainer.fit

    def fit(self):
        self.stop.signal = signal.SIGUSR1
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        result = train(SMALL, tmp_path)
    assert result["stopped_by"] == "SIGUSR1" and not list((tmp_path / "checkpoints").glob("step-*"))
    assert train(SMALL, tmp_path, resume=True)["step"] == 12
    assert_same_run(whole, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_worker_ignores_the_signals(outer, tmp_path, monkeypatch):
    """A scheduler or torchrun signals every process; the trainer needs the batches of its workers to end the step."""
    status = []

    def fork():
        child = os.fork()
        if child == 0:
            try:
                send(*SCHEDULER, signal.SIGINT)
            finally:
                os._exit(len(outer))
        status.append(os.waitpid(child, 0)[1])

    before(monkeypatch, Trainer, "optimizer_step", fork, 2)
    assert train(SMALL, tmp_path)["stopped_by"] is None
    assert status == [0]


# ---- restarts by torchrun


RUN = ["train", "--data", "synthetic:40,2,8", "--model", "small_cnn", "--batch-size", "20", "--checkpoint-every", "2"]


def test_a_command_that_torchrun_may_restart_continues_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for steps in ("2", "4"):
        assert cli.main([*RUN, "--max-steps", steps, "--out", "run"]) == 0
    assert "continuing from run/checkpoints/step-000000002.pt" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "run")["step"] == 4
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert cli.main([*RUN, "--max-steps", "4", "--out", "run"]) == 2
    assert "--resume continues it" in capsys.readouterr().err


def test_a_command_that_torchrun_may_restart_names_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.main([*RUN, "--max-steps", "2"]) == 2
    assert "name its run folder with --out" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_resume_with_data_starts_the_run(tmp_path, monkeypatch):
    """One command for the first start and for every other."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main([*RUN, "--max-steps", "2", "--resume", "--out", "run"]) == 0
    assert RunFolder("run").has_work()


def test_a_stopped_run_is_no_success_for_torchrun(monkeypatch):
    """torchrun would end the machines that could go on."""
    assert Ranks().exit_status("SIGTERM") == Ranks().exit_status(None) == 0
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    assert (Ranks().exit_status("SIGTERM"), Ranks().exit_status(None)) == (143, 0)


def starts(store, size, monkeypatch):
    """The stores that the ranks of one start get, in rank order."""
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, here.rank, size)]))
    here = threading.local()

    def rank(number):
        here.rank = number
        return distributed._store_of_this_start()[0]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_every_start_of_the_ranks_has_a_store_of_its_own(monkeypatch):
    """torchrun keeps its store over restarts: nothing of an earlier start, of more ranks or a killed one, is in it."""
    kept = torch.distributed.HashStore()
    kept.set("dlb_fast/asks/1", "a rank that was killed after it had asked")
    for size in (3, 1, 2, 2):
        stores = starts(kept, size, monkeypatch)
        assert not stores[0].check(["address"])
        stores[-1].set("address", str(size))
        assert {store.get("address") for store in stores} == {str(size).encode()}
