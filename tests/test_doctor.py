"""The doctor tells what works here, and a broken implementation or torch is a line of its report."""

from __future__ import annotations

import json

import pytest
import torch
from builders import ROOT, environment, python

from dlb_fast import _backends, doctor


@pytest.fixture(scope="module")
def report():
    return doctor.examine(with_self_test=True)


def test_doctor_agrees_with_the_backends(report):
    known = report["implementations"]["known"]
    assert known == {name: found._asdict() for name, found in _backends.implementations().items()}
    assert all(state["available"] or state["reason"] for state in known.values())
    assert report["implementations"]["auto"]["cpu"] == _backends.pick("auto", torch.device("cpu"))


def test_doctor_self_test_runs_what_is_available(report):
    usable = {name for name, found in _backends.implementations().items() if found.available}
    assert report["self_test"].keys() == usable
    assert all(test["passed"] for test in report["self_test"].values()), report["self_test"]
    assert report["self_test"]["torch"]["gradient_error"] < 1e-6


def test_doctor_text_and_json(report, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda with_self_test: report)
    assert doctor.main(["--self-test"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Copy everything below into an issue.") and f"dlb_fast {report['version']} in {ROOT}" in out
    for name, found in _backends.implementations().items():
        assert name in out and found.reason in out and found.state in out
    assert "self-test torch: passed" in out and "PyTorch version: " in out
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_doctor_self_test_finds_a_wrong_implementation(report, monkeypatch, capsys):
    from dlb_fast import reference

    original = reference.last_batch_loss

    def off(logits, *args, **kwargs):
        loss, parts = original(logits, *args, **kwargs)
        return (loss * 1.01 if logits.dtype.itemsize == 4 else loss), parts

    monkeypatch.setattr(reference, "last_batch_loss", off)
    found = doctor.self_test("torch")
    assert not found["passed"] and found["loss_error"] > 1e-3
    monkeypatch.setattr(doctor, "examine", lambda with_self_test: {**report, "self_test": {"torch": found}})
    assert doctor.main(["--self-test"]) == 1
    assert "self-test torch: FAILED (loss off by " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("no_such_call()", "AttributeError: .*no_such_call"),
        ("os.abort()", "ended by SIGABRT"),
        ("os._exit(7)", "ended with exit code 7"),
        ("sys.exit('stop')", "ended with exit code 1: stop"),
    ],
)
def test_doctor_survives_what_ends_a_child(call, said):
    with pytest.raises(AssertionError, match=said):
        assert not doctor._in_child(call)["error"]


@pytest.mark.slow
def test_doctor_without_compiled_parts(tmp_path):
    """DLB_FAST_BUILD=none: the library is not there, and the doctor says what that means."""
    package = tmp_path / "dlb_fast"
    package.mkdir()
    for path in (ROOT / "dlb_fast").iterdir():
        if path.name != "lib" and not path.name.startswith("_build"):
            (package / path.name).symlink_to(path)
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    done = python("-m", "dlb_fast", "doctor", "--self-test", cwd=tmp_path, PYTHONPATH=path)
    assert "DLB_FAST_BUILD=none" in done.stdout and 'impl="auto" on cpu: torch' in done.stdout
    assert "self-test cpu" not in done.stdout and "self-test torch: passed" in done.stdout
