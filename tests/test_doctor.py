"""The doctor never crashes, and tells the truth about what it examined."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlb_fast import _backends, doctor

ROOT = Path(doctor.__file__).parents[1]


def test_report_agrees_with_the_backends(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name, found in _backends.implementations().items():
        told = report["implementations"][name]
        assert told == {"available": found.available, "reason": found.reason, "state": found.state}
        assert found.available or told["reason"]
    assert report["auto"]["cpu"] == _backends.pick("auto", "cpu")


def test_text_names_every_implementation_with_its_reason(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Copy everything below into an issue.") and f"dlb_fast {doctor._package()['version']}" in out
    for name, found in _backends.implementations().items():
        assert name in out and found.reason in out and found.state in out


def test_self_test_runs_what_is_available(capsys):
    assert doctor.main(["--self-test", "--json"]) == 0
    tests = json.loads(capsys.readouterr().out)["self_test"]
    for name, found in _backends.implementations().items():
        assert tests[name]["ran"] == found.available
        assert tests[name].get("passed", False) == found.available
    assert tests["torch"]["worst_error"]["gradient"] < 1e-6


def test_self_test_finds_a_wrong_implementation(monkeypatch, capsys):
    from dlb_fast import reference

    original = reference.last_batch_loss

    def off(logits, *args, **kwargs):
        loss, parts = original(logits, *args, **kwargs)
        return (loss * 1.01 if logits.dtype.itemsize == 4 else loss), parts

    monkeypatch.setattr(reference, "last_batch_loss", off)
    found = doctor.self_test()
    assert not found["torch"]["passed"]
    monkeypatch.setattr(
        doctor, "_apart", lambda names: {name: {"installed": False} for name in names} | {"self_test": found}
    )
    assert doctor.main(["--self-test"]) == 1
    assert "self-test torch: FAILED" in capsys.readouterr().out


SABOTAGE = {
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
    "timm": "import os; os._exit(7)",
    "lightning": "print('garbage', flush=True); raise SystemExit(3)",
    "accelerate": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "transformers": "__version__ = '9.9'",
    "simplejpeg": "__version__ = '0.0.1'",
    "matplotlib": "syntax error here",
}


def run_doctor(folder, *flags, **environment):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment}
    command = [sys.executable, "-m", "dlb_fast", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_sabotaged_libraries_an_unwritable_home_and_no_path(tmp_path):
    """Whatever importing a library does to its process, the report is whole, and its JSON is JSON."""
    for name, code in SABOTAGE.items():
        (tmp_path / f"{name}.py").write_text(code)
    done = run_doctor(tmp_path, "--json", PATH="", HOME="/nonexistent", DLB_FAST_EXAMPLE="1")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    frameworks, libraries = report["frameworks"], report["libraries"]
    assert frameworks["torchvision"]["error"] == "RuntimeError: operator torchvision::nms does not exist"
    assert frameworks["timm"]["error"] == "ended its process with exit code 7"
    assert frameworks["lightning"]["error"] == "SystemExit: 3"
    assert frameworks["accelerate"]["error"] == "ended its process by SIGSEGV"
    assert frameworks["transformers"]["version"] == "9.9"
    assert libraries["matplotlib"]["error"].startswith("SyntaxError") and "error" not in libraries["numpy"]
    assert libraries["simplejpeg"]["version"] == "0.0.1" != libraries["simplejpeg"]["installed_version"]
    assert report["environment"]["variables"]["DLB_FAST_EXAMPLE"] == "1"
    assert not any(report["environment"]["tools"].values())
    assert all({"available", "reason", "state"} == state.keys() for state in report["implementations"].values())
    text = "\n".join(doctor._lines(report))
    assert (
        "torchvision broken (RuntimeError" in text and "simplejpeg 0.0.1 LOADED" in text and "none on the PATH" in text
    )


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("torch", "raise RuntimeError('this torch is broken')", "this torch is broken"),
        ("torch", "import os; os.abort()", "ended its process by SIGABRT"),
        ("tqdm", "syntax error here", "SyntaxError"),  # torch imports it half-way, and then crashes when Python ends
    ],
)
def test_a_torch_that_breaks_or_kills(name, code, said, tmp_path):
    (tmp_path / f"{name}.py").write_text(code)
    done = run_doctor(tmp_path, "--self-test")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"torch: {said}" in done.stdout or f"torch: RuntimeError: {said}" in done.stdout
    assert "numpy" in done.stdout and "self-test: " in done.stdout


def test_an_installation_without_compiled_parts(tmp_path):
    """DLB_FAST_BUILD=none: the compiled file and module are not there, and the doctor says what that means."""
    ignored = shutil.ignore_patterns("lib", "_build*", "__pycache__")
    shutil.copytree(Path(doctor.__file__).parent, tmp_path / "dlb_fast", ignore=ignored)
    done = run_doctor(tmp_path, "--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"dlb_fast {doctor._package()['version']} in {tmp_path}/dlb_fast" in done.stdout
    assert "DLB_FAST_BUILD=none" in done.stdout and 'impl="auto" on cpu: torch' in done.stdout
    assert "self-test cpu: not run" in done.stdout and "self-test torch: passed" in done.stdout


def test_a_library_that_never_comes_back(tmp_path, monkeypatch):
    (tmp_path / "lightning.py").write_text("import time; time.sleep(600)")
    (tmp_path / "timm.py").write_text("__version__ = '1'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "PATIENCE", 2.0)
    found = doctor._apart(["library lightning", "library timm"])
    assert found["library lightning"]["error"] == "did not come back within 2 seconds"
    assert found["library timm"] == {"installed": True, "version": "1"}


def test_where_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    assert doctor._apart(["library numpy"])["library numpy"]["installed"]


def test_what_breaks_in_this_process_only(monkeypatch, capsys):
    monkeypatch.setattr(_backends, "implementations", lambda: 1 / 0)
    assert doctor.main(["--json"]) == 1
    assert "ZeroDivisionError" in json.loads(capsys.readouterr().out)["implementations"]["error"]
