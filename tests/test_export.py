"""A run's network for use elsewhere: it is the one that was evaluated, and torch exports it."""

from __future__ import annotations

import pytest
import torch
from builders import train

from dlb_fast.presets import load_preset
from dlb_fast.train.checkpoint import CheckpointError, read_weights, save_weights
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.models import create_model
from dlb_fast.train.run import RunFolder, evaluate_run, load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    train(override(load_preset("digits"), per_class=4, batch_size=20, epochs=2, eval_every=None), path)
    return path


def test_load_model_is_the_one_that_was_evaluated(run):
    model, about = load_model(run, weights="last")
    other = create_model("small_cnn", 10, 1)
    other.load_state_dict(read_weights(run / "checkpoints/last.safetensors")[0])
    assert not model.training
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    data = open_data(RunFolder(run).read_config().data)
    assert about["classes"] == [str(name) for name in data.train.classes]
    assert (about["mean"], about["std"]) == (list(data.mean), list(data.std))
    assert about["size"] == [8, 8] and about["step"] == 8
    test = data.test
    images = (test.images / 255 - about["mean"][0]) / about["std"][0]
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == test.targets).float().mean().item()
    assert accuracy == pytest.approx(evaluate_run(run, weights="last")["top1"], abs=1e-6)


def test_load_model_refusals(run, tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        load_model(tmp_path)
    RunFolder(tmp_path / "new").create(RunConfig(), "torch")
    with pytest.raises(CheckpointError, match=r"best\.safetensors is missing; has the run finished an evaluation"):
        load_model(tmp_path / "new")
    (tmp_path / "new/checkpoints/best.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(tmp_path / "new")
    save_weights(tmp_path / "new/checkpoints/best.safetensors", create_model("small_cnn", 10, 1), {})
    with pytest.raises(CheckpointError, match="says nothing about its network"):
        load_model(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_lines_of_the_documentation_export(run, tmp_path):
    """Any batch size, and the logits of the network."""
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, about = load_model(run)
    example, batch = torch.randn(2, about["channels"], *about["size"]), {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=(batch,)), tmp_path / "m.pt2")
    torch.onnx.export(model, (example,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=(batch,))
    session = ReferenceEvaluator(str(tmp_path / "m.onnx"))
    for rows in (1, 7):
        images = torch.randn(rows, about["channels"], *about["size"])
        with torch.no_grad():
            want = model(images)
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(images), want, rtol=0, atol=1e-5)
        (got,) = session.run(None, {session.input_names[0]: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-5)
