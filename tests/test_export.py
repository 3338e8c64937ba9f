"""Exports: each format is read back by its own reader and must compute what the run's weights compute."""

import json
import shutil
import sys

import pytest
import torch

from dlb_fast import cli
from dlb_fast.train import export
from dlb_fast.train.config import RunConfig
from dlb_fast.train.models import create_model
from dlb_fast.train.run_folder import RunFolder
from dlb_fast.train.state import CheckpointError, load_weights, save_weights

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    flags = ["--preset", "digits", "--per-class", "4", "--batch-size", "20", "--epochs", "2", "--quiet"]
    assert cli.main(["train", *flags, "--out", str(path)]) == 0
    return path


def eager(run, weights="best"):
    model = create_model("small_cnn", 10, 1)
    load_weights(run / "checkpoints" / f"{weights}.safetensors", model)
    return model.eval()


def command(run, out, *flags, capsys):
    assert cli.main(["export", str(run), "--out", str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    return said


def test_safetensors(run, tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import load_file

    said = command(run, tmp_path / "m.safetensors", capsys=capsys)
    assert "largest difference to the model: 0 (largest logit: " in said
    tensors = load_file(tmp_path / "m.safetensors")
    want = eager(run).state_dict()
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[k], want[k]) for k in want)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        note = json.loads(file.metadata()["dlb_fast"])
    beside = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert {k: v if isinstance(beside[k], str) else json.loads(v) for k, v in note.items()} == beside


def test_torch_export(run, tmp_path, capsys):
    command(run, tmp_path / "m.pt2", "--format", "torch_export", "--weights", "last", capsys=capsys)
    extra = {"dlb_fast.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    model = eager(run, "last")
    for rows in (1, 3, 17):
        images = torch.randn(rows, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)
    assert json.loads(extra["dlb_fast.json"]) == json.loads((tmp_path / "m.pt2.json").read_text())


def onnx_runner(path):
    """onnxruntime where it is installed, else onnx's own reference."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(str(path))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_onnx(run, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    said = command(run, tmp_path / "m.onnx", "--format", "onnx", "--opset", "18", capsys=capsys)
    assert float(said.split("to the model: ")[1].split()[0]) < 1e-5
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "m.onnx",
        "m.onnx.json",
    ]  # weights inside, nothing left over
    model = onnx.load(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 18
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert (
        model.graph.input[0].name == "images" and shape[0].dim_param and [d.dim_value for d in shape[1:]] == [1, 8, 8]
    )
    assert [o.name for o in model.graph.output] == ["logits"]
    about = json.loads({p.key: p.value for p in model.metadata_props}["dlb_fast"])
    assert about == json.loads((tmp_path / "m.onnx.json").read_text()) and about["opset"] == 18
    session, reference = onnx_runner(tmp_path / "m.onnx"), eager(run)
    for rows in (1, 7):
        images = torch.randn(rows, 1, 8, 8)
        (got,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), reference(images), rtol=0, atol=1e-5)


def test_what_a_user_must_know_is_there(run):
    about = export.export_run(run)
    assert about["path"] == run / "export/best.safetensors" and about["max_error"] == 0.0
    assert about["classes"] == [str(i) for i in range(10)] and len(about["mean"]) == len(about["std"]) == 1
    assert about["input"]["shape"] == ["batch", 1, 8, 8] and about["output"]["shape"] == ["batch", 10]
    step = json.loads((run / "result.json").read_text())["best_step"]
    assert (about["weights"], about["step"], about["run"], about["torch"]) == ("best", step, "run", torch.__version__)


def test_the_data_are_not_needed_for_an_export(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "open_sets", lambda config: pytest.fail("the data were opened"))
    assert export.export_run(run, out=tmp_path / "m.safetensors")["max_error"] == 0.0


def test_weights_that_say_little_are_completed_from_the_data(run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    save_weights(path / "checkpoints/best.safetensors", eager(run), {"model": "small_cnn", "step": "3"})
    about = export.export_run(path)
    assert about["step"] == 3 and about["mean"] == export.export_run(run)["mean"]


@pytest.mark.parametrize("format", [f for f in export.FORMATS if f != "onnx"])
def test_an_export_that_computes_something_else_is_refused(run, tmp_path, monkeypatch, format):
    suffix, write, load = export.FORMATS[format]
    monkeypatch.setitem(
        export.FORMATS, format, (suffix, lambda *a: write(create_model("small_cnn", 10, 1), *a[1:]), load)
    )
    out = tmp_path / "sub" / f"m{suffix}"
    with pytest.raises(RuntimeError, match="differs from the model by .* nothing was written"):
        export.export_run(run, format=format, out=out)
    assert list(out.parent.iterdir()) == []
    assert export.export_run(run, format=format, out=out, check=False)["max_error"] is None and out.exists()


def test_a_model_of_another_shape(tmp_path):
    """Strided shortcuts without weights, three input channels, an image that is not square."""
    folder, path = RunFolder(tmp_path / "run"), tmp_path / "m.pt2"
    folder.create(RunConfig(), "torch")
    note = {"model": "resnet32a", "num_classes": "7", "channels": "3", "size": "[8, 10]", "mean": "[0.5]", "std": "[1]"}
    note |= {"classes": json.dumps(list("abcdefg")), "step": "5"}
    save_weights(folder.checkpoints / "last.safetensors", create_model("resnet32a", 7, 3), note)
    about = export.export_run(folder.path, format="torch_export", weights="last", out=path)
    assert about["max_error"] < 1e-4 and about["input"]["shape"] == ["batch", 3, 8, 10] and about["classes"][6] == "g"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_onnx_names_the_extra(run, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "m.onnx")]) == 1
    assert "pip install 'dlb_fast[export]'" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_wrong_use(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="format must be one of safetensors, onnx, torch_export, got 'tflite'"):
        export.export_run(run, format="tflite")
    with pytest.raises(ValueError, match="opset belongs to the format onnx"):
        export.export_run(run, opset=18)
    with pytest.raises(ValueError, match="there is no run in"):
        export.export_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"best\.safetensors is missing; has the run finished an evaluation"):
        RunFolder(tmp_path / "new").create(RunFolder(run).read_config(), "torch")
        export.export_run(tmp_path / "new")
    (tmp_path / "new/checkpoints/best.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        export.export_run(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export.export_run(run, out=tmp_path / "file" / "m.safetensors")
