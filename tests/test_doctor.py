"""The doctor never crashes, and tells the truth about what it examined."""

import json
import sys

import pytest

from dlb_fast import _backends, doctor


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
    assert doctor.main(["--self-test"]) == 1
    assert "self-test torch: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("torchvision::nms does not exist"), SystemExit(3), OSError("x")])
def test_a_broken_library_is_a_finding(error, monkeypatch, capsys):
    def broken(name):
        raise error

    monkeypatch.setattr("importlib.import_module", broken)
    monkeypatch.setattr(_backends, "implementations", lambda: broken(""))
    assert doctor.main(["--self-test"]) == 1
    out = capsys.readouterr().out
    assert f"broken ({type(error).__name__}" in out and "self-test: " in out
    assert doctor.main(["--json"]) == 0
    assert type(error).__name__ in json.loads(capsys.readouterr().out)["implementations"]["error"]


def test_torch_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.main([]) == 0
    assert "torch: ModuleNotFoundError" in capsys.readouterr().out
