"""Proof at first use, without a GPU: children that pass, lie, crash, hang and babble; caches damaged and raced."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dlb_fast import _backends, _proof, doctor
from dlb_fast._backends import Card

H200 = Card("NVIDIA H200", (9, 0), 150 << 30, 132, "12345678-9abc-def0-0123-456789abcdef", 13000)
CUDA = torch.device("cuda", 0)
PASSED = '{"cases": 3, "of": 3, "worst": 0.5}'


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that knows nothing, on a machine with an H200."""
    for name in ("DLB_FAST_BACKEND", "DLB_FAST_PROOF", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DLB_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_proof.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(_proof, "_KNOWN", {})
    monkeypatch.setattr(_proof, "_ASKED", {})
    monkeypatch.setattr(_backends, "compiled_for", lambda device: "")
    monkeypatch.setattr(_backends, "_triton_missing", lambda: "")
    monkeypatch.setattr(_backends, "card", lambda index: H200)
    monkeypatch.setattr(_backends, "cuda_build", lambda: (("90",), 13000))
    monkeypatch.setattr(_backends, "_digest", lambda path: "digest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _backends.forget_picks()
    yield
    _backends.forget_picks()


class Child:
    """What a child of each kind runs in place of a check, and how often one was started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.code = folder / "started", {"cuda": "", "triton": ""}
        popen = subprocess.Popen

        def start(command: list[str], **given: Any) -> Any:
            name = "triton" if "doctor" in command[-1] else "cuda"
            assert command[0] == sys.executable and given["start_new_session"]
            code = f"open({str(self.log)!r}, 'a').write({name!r} + chr(10)); {self.code[name]}"
            return popen([sys.executable, "-S", "-I", "-c", code], **given)

        monkeypatch.setattr(_proof.subprocess, "Popen", start)

    def says(self, line: str, name: str = "cuda") -> None:
        self.code[name] = f"print({line!r})"

    @property
    def started(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    return Child(tmp_path, monkeypatch)


def another_process() -> None:
    _proof._KNOWN.clear()
    _proof._ASKED.clear()
    _backends.forget_picks()


def test_a_kernel_is_checked_once_and_runs(child: Child, caplog: pytest.LogCaptureFixture) -> None:
    child.says(PASSED)
    with caplog.at_level("INFO", logger="dlb_fast"):
        assert [_backends.pick("auto", CUDA) for _ in range(3)] == ["cuda"] * 3
        another_process()
        assert _backends.pick("auto", CUDA) == "cuda"
    assert child.started == ["cuda"]
    first, second = [record.getMessage() for record in caplog.records]
    said = r"\"auto\" runs 'cuda' on cuda:0 \(NVIDIA H200, checked \d{4}-\d\d-\d\d in [\d.]+ s: 3 cases, .* 0.50 of"
    assert re.search(said, first) and first == second


# What a child does, whether that decides, and what is said.
CHILDREN: dict[str, tuple[str, bool | None, str]] = {
    "fails": ('print(\'{"failed": "float32, C=10: gradient off"}\')', False, "C=10: gradient off"),
    "cannot": ('print(\'{"undecided": "memory for the check: out of memory"}\')', None, "out of memory"),
    "lies": ('print(\'{"passed": true, "cases": 3, "of": 3, "worst": 7.5}\')', False, "off by 7.5 times"),
    "lies with NaN": ('print(\'{"passed": true, "cases": 3, "of": 3, "worst": NaN}\')', False, "off by nan"),
    "stops early": ('print(\'{"cases": 1, "of": 3, "worst": 0.5}\')', None, "after 1 of 3 cases"),
    "checks nothing": ('print(\'{"cases": 0, "of": 0, "worst": 0}\')', None, "after 0 of 0"),
    "babbles": ("print('hello'); import os; os.write(2, b'what'); os._exit(3)", None, "exit code 3 and no verdict: wh"),
    "prints no text": ("import os; os.write(1, bytes(range(256)))", None, "no verdict"),
    "is silent": ("pass", None, "exit code 0 and no verdict"),
    "prints another thing": ("print('[1, 2]')", None, "no verdict"),
    "crashes": ("import os; print('launch float32 C=10', flush=True); os.abort()", False, "SIGABRT in float32 C=10"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", None, "ended by SIGKILL"),
    "hangs in a kernel": ("print('launch x', flush=True); import time; time.sleep(60)", False, "x did not return"),
    "hangs before": ("import time; time.sleep(60)", None, "the machine or the GPU is busy"),
    "hangs between": ("print('launch x\\nback', flush=True); import time; time.sleep(60)", None, "busy"),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_what_a_child_does_decides_or_not(name, child, monkeypatch, caplog, tmp_path):
    code, passed, said = CHILDREN[name]
    monkeypatch.setitem(_proof.PATIENCE, "cuda", 1.0 if "hangs" in name else 60.0)
    child.code["cuda"] = code
    child.says(PASSED, "triton")
    with caplog.at_level("WARNING", logger="dlb_fast"):
        choice = _backends.pick("auto", CUDA)
        _backends.pick("auto", CUDA)
    # What is wrong is kept, and Triton takes its place; what is undecided is plain torch, and asked again next time.
    assert choice == ("triton" if passed is False else "torch")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert said in warning and f"runs {choice!r} on cuda:0" in warning
    kept = [json.loads(path.read_text())["passed"] for path in (tmp_path / "cache" / "proof").glob("cuda-*.json")]
    assert kept == ([False] if passed is False else [])
    another_process()
    child.says(PASSED)
    assert _backends.pick("auto", CUDA) == ("triton" if passed is False else "cuda")


@pytest.mark.parametrize("executable", ["", "/no/such/python"])
def test_no_child_means_plain_torch(executable, monkeypatch, caplog):
    monkeypatch.setattr(_backends.sys, "executable", executable)
    assert _backends.pick("auto", CUDA) == "torch"
    assert "could not be checked: no " in caplog.text and "doctor --prove" in caplog.text


def test_a_child_that_cannot_be_killed_is_not_waited_for(monkeypatch):
    class Unkillable:
        returncode = None

        def communicate(self, timeout: float) -> Any:
            raise subprocess.TimeoutExpired("", timeout, output=b"launch float32 C=10\n")

        def kill(self) -> None:
            pass

    monkeypatch.setattr(_proof.subprocess, "Popen", lambda *args, **given: Unkillable())
    assert _proof._child(["x"], {}, 0.0) == (False, "float32 C=10 did not return within 0 s")


@pytest.mark.parametrize(
    ("value", "choice", "started"), [("trust", "cuda", 0), ("never", "torch", 0), ("auto", "cuda", 1)]
)
def test_the_variable(value, choice, started, child, monkeypatch):
    child.says(PASSED)
    monkeypatch.setenv("DLB_FAST_PROOF", value)
    assert _backends.pick("auto", CUDA) == choice and len(child.started) == started


def test_again_checks_once_more_in_every_process(child, monkeypatch):
    child.says('{"failed": "wrong"}')
    child.says('{"failed": "wrong"}', "triton")
    assert _backends.pick("auto", CUDA) == "torch"
    another_process()
    child.says(PASSED)
    monkeypatch.setenv("DLB_FAST_PROOF", "again")
    assert _backends.pick("auto", CUDA) == _backends.pick("auto", CUDA) == "cuda"
    assert child.started == ["cuda", "triton", "cuda"]
    monkeypatch.setenv("DLB_FAST_PROOF", "sometimes")
    _backends.forget_picks()
    with pytest.raises(ValueError, match="DLB_FAST_PROOF must be one of auto, trust, never, again, got 'sometimes'"):
        _backends.pick("auto", CUDA)


def test_a_choice_is_never_changed_in_a_process(child, monkeypatch):
    child.says('{"undecided": "busy"}')
    assert _backends.pick("auto", CUDA) == "torch"
    child.says(PASSED)
    monkeypatch.setenv("DLB_FAST_PROOF", "trust")
    assert _backends.pick("auto", CUDA) == "torch" and child.started == ["cuda"]


def test_what_cuda_refuses_goes_to_triton_only_where_it_is_known_to_be_right(child, caplog):
    """A check of Triton compiles for half a minute, and float64 is rare: it starts none."""
    child.says(PASSED)
    with caplog.at_level("INFO", logger="dlb_fast"):
        assert _backends.pick("auto", CUDA, True) == "torch" and child.started == []
        assert _backends.pick("auto", CUDA) == "cuda"
    assert [record.getMessage().split(" on ")[0][-7:] for record in caplog.records] == ["'torch'", " 'cuda'"]
    _backends.forget_picks()
    child.says(PASSED, "triton")
    assert _backends.verdict("triton", 0, check=True).passed
    _backends.forget_picks()
    assert [_backends.pick("auto", CUDA, beyond) for beyond in (True, False)] == ["triton", "cuda"]


@pytest.mark.parametrize("missing", ["cuda", "nothing"])
def test_triton_is_checked_where_cuda_is_missing(missing, child, monkeypatch, caplog):
    child.says('{"failed": "wrong"}')
    child.says(PASSED, "triton")
    if missing == "cuda":
        monkeypatch.setattr(_backends, "cuda_missing", lambda index=None: "no nvcc")
    with caplog.at_level("INFO", logger="dlb_fast"):
        assert _backends.pick("auto", CUDA) == "triton"
    assert "compiles them once" in caplog.text
    assert child.started == (["triton"] if missing == "cuda" else ["cuda", "triton"])


def other_card(**change: Any) -> Callable[[pytest.MonkeyPatch], Any]:
    return lambda m: m.setattr(_backends, "card", lambda index: H200._replace(**change))


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "library": lambda m: m.setattr(_backends, "_digest", lambda path: "other"),
    "torch": lambda m: m.setattr(torch, "__version__", "9.9"),
    "package": lambda m: m.setattr(_backends, "__version__", "9.9"),
    "driver": lambda m: m.setattr(_backends, "_driver", lambda: "other"),
    "name": other_card(name="NVIDIA H100"),
    "slice": other_card(memory=1 << 34, processors=16),
    "CUDA": other_card(driver=13010),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_verdict_is_of_one_library_card_driver_and_torch(name, child, monkeypatch):
    child.says(PASSED)
    assert _backends.pick("auto", CUDA) == "cuda"
    another_process()
    CHANGES[name](monkeypatch)
    child.says('{"undecided": "busy"}')
    assert _backends.pick("auto", CUDA) == "torch"


def test_cards_of_a_kind_share_a_verdict(child, monkeypatch):
    child.says(PASSED)
    monkeypatch.setattr(_backends, "card", lambda index: H200._replace(uuid=f"{index}-2"))
    assert [_backends.pick("auto", torch.device("cuda", index)) for index in range(3)] == ["cuda"] * 3
    assert child.started == ["cuda"]


def test_the_child_sees_the_card_alone_and_nothing_that_was_injected(monkeypatch):
    seen: list[tuple[list[str], str | None]] = []

    def run(command: list[str], environment: dict[str, str], patience: float) -> tuple[bool | None, str]:
        assert not [name for name in environment if name.startswith(("LD_PRELOAD", "CUDA_INJECTION", "DLB_FAST"))]
        seen.append((command, environment.get("CUDA_VISIBLE_DEVICES")))
        return (True, "") if len(seen) == 2 else (None, "no such GPU is visible")

    for name in ("LD_PRELOAD", "CUDA_INJECTION64_PATH", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "MIG-1")
    monkeypatch.setattr(_proof, "_child", run)
    assert _backends.pick("auto", CUDA) == "cuda"  # in a MIG slice: under the name that this process knows it by
    assert [visible for _, visible in seen] == ["GPU-123456789abcdef00123456789abcdef", "MIG-1"]
    command = seen[0][0]
    assert command[1:3] == ["-S", "-I"] and command[-2:] == [str(_backends.KERNELS), "123456789abcdef00123456789abcdef"]


DAMAGE = ["", "{", "[]", "null", '{"key": "x"}', "\0" * 100, '{"key": 1, "passed": true, "said": "", "seconds": 0}']


@pytest.mark.parametrize("text", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_verdict_is_made_anew(text, child, tmp_path):
    child.says(PASSED)
    assert _backends.pick("auto", CUDA) == "cuda"
    (path,) = (tmp_path / "cache" / "proof").glob("cuda-*.json")
    whole = json.loads(path.read_text()) | {"time": 0.0, "seconds": 0.0}
    path.write_text(text)
    another_process()
    assert _backends.pick("auto", CUDA) == "cuda" and child.started == ["cuda"] * 2
    assert json.loads(path.read_text()) | {"time": 0.0, "seconds": 0.0} == whole
    path.write_text(json.dumps({**whole, "key": "of another card"}))
    another_process()
    assert _backends.pick("auto", CUDA) == "cuda" and len(child.started) == 3


def test_folders_that_cannot_be_used(child, tmp_path, monkeypatch):
    """A file in place of the cache: the temporary folder; both: this process alone. Root can write anywhere."""
    child.says(PASSED)
    (tmp_path / "cache").write_text("")
    assert _backends.pick("auto", CUDA) == "cuda"
    mine = tmp_path / "temp" / f"dlb_fast-{os.getuid()}"
    assert len([*mine.glob("cuda-*.json")]) == 1 and stat.S_IMODE(mine.stat().st_mode) == 0o700
    another_process()
    mine.chmod(0o777)  # somebody else may have written what is there
    assert _backends.pick("auto", CUDA) == "cuda" and child.started == ["cuda"] * 2
    _backends.forget_picks()
    assert _backends.pick("auto", CUDA) == "cuda" and len(child.started) == 2  # known to this process


def test_a_verdict_in_a_home_that_is_only_read_is_used(child, tmp_path, monkeypatch):
    child.says(PASSED)
    assert _backends.pick("auto", CUDA) == "cuda"
    another_process()
    monkeypatch.setattr(_proof, "_writable_folder", lambda: None)
    assert _backends.pick("auto", CUDA) == "cuda" and child.started == ["cuda"]


def test_racing_processes_check_once(child):
    """Each as a thread with a process's memory of its own: the lock is per open file."""
    child.code["cuda"] = f"import time; time.sleep(0.3); print({PASSED!r})"

    def rank(_: int) -> bool | None:
        return _proof.verdict("cuda", "k", [sys.executable]).passed

    with ThreadPoolExecutor(4) as ranks:
        assert [*ranks.map(rank, range(4))] == [True] * 4
    assert child.started == ["cuda"]


def test_a_lock_that_is_held_for_ever_is_not_waited_for(child, tmp_path, monkeypatch):
    import fcntl

    child.says(PASSED)
    folder = tmp_path / "cache" / "proof"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(_proof, "LOCK_PATIENCE", 0.2)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert _backends.pick("auto", CUDA) == "cuda"


def _pick(queue: Any) -> None:
    queue.put(_backends.pick("auto", CUDA))


def test_a_forked_worker_has_the_choice_of_its_parent(child):
    child.says(PASSED)
    assert _backends.pick("auto", CUDA) == "cuda"
    fork = multiprocessing.get_context("fork")
    queue: Any = fork.SimpleQueue()
    worker = fork.Process(target=_pick, args=(queue,), daemon=True)
    worker.start()
    assert queue.get() == "cuda"
    worker.join()
    assert child.started == ["cuda"]


@pytest.mark.slow  # imports the compiler
def test_a_choice_made_while_tracing_is_a_constant(child, monkeypatch):
    child.says(PASSED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler asks it about more
    monkeypatch.setattr(_backends, "cuda_missing", lambda index=None: "")

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _backends.pick("auto", CUDA) == "cuda" else x - 1

    assert traced(torch.zeros(())).item() == 1 and child.started == ["cuda"]


def test_the_doctor_shows_verdicts_and_makes_them(child, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = doctor.implementations()
    assert found["auto"]["cuda:0"] == "torch" and child.started == []
    assert all("not checked here yet" in said for said in found["verdicts"]["cuda:0"].values())
    child.says(PASSED)
    child.says('{"failed": "wrong"}', "triton")
    assert doctor.prove() == {"cuda:0": False} and child.started == ["cuda", "triton"]
    found = doctor.implementations()
    assert found["auto"]["cuda:0"] == "cuda" and "3 cases" in found["verdicts"]["cuda:0"]["cuda"]
    report = {"version": "0", "folder": "", "implementations": found, "build": {"error": ""}, "libraries": {}}
    text = "\n".join(doctor._lines({**report, "variables": {}, "environment": ""}))
    assert re.search(r"  cuda on cuda:0: checked .*: 3 cases", text) and "  triton on cuda:0: checked" in text


def test_tritons_check_passes_and_finds_a_fault(monkeypatch, capsys):
    """By plain torch in the place of Triton: what the check does with results."""
    import dlb_fast

    class OnCpu(dlb_fast.LastBatchLoss):
        factor = 1.0

        def __init__(self, *args: Any, impl: str, **given: Any) -> None:
            super().__init__(*args, impl="torch", **given)
            self.checked = impl == "triton"

        def forward(self, logits: Any, *args: Any, **given: Any) -> Any:
            loss = super().forward(logits, *args, **given)
            return loss * self.factor if self.checked else loss

    monkeypatch.setattr(dlb_fast, "LastBatchLoss", OnCpu)
    doctor.prove_triton("", "cpu", (10, 100))
    passed, said = _proof._judged(capsys.readouterr().out.splitlines(), 0, "")
    assert passed and said.startswith("3 cases")
    OnCpu.factor = 1.001
    doctor.prove_triton("", "cpu", (10, 100))
    assert "off by" in json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
