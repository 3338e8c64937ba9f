"""What a run starts from: nothing that was named is at random, and weights are loaded whole or refused by name."""

import argparse
import builtins
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from builders import last_checkpoint, train, train_stopped
from frameworks import reason_against
from torch import nn

from dlb_fast import cli
from dlb_fast.presets import load_preset
from dlb_fast.report import read_run
from dlb_fast.train import weights
from dlb_fast.train.checkpoint import CheckpointError, list_checkpoints, save_weights
from dlb_fast.train.config import RunConfig, override
from dlb_fast.train.data import open_data
from dlb_fast.train.models import MODELS, architecture, create_model
from dlb_fast.train.run import build_trainer, load_model

torch.set_num_threads(1)
SMALL = override(
    RunConfig(), source="synthetic:24,3,8", model="small_cnn", batch_size=8, max_steps=2, log_every=1, seed=3
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A finished run on three classes."""
    path = tmp_path_factory.mktemp("weights") / "run"
    train(SMALL, path)
    return path


def started(path, **changes):
    """The state of the network before the first step, and what is said about it."""
    trainer = build_trainer(override(SMALL, init_from=str(path), **changes))
    return trainer.model.state_dict(), json.loads(trainer.metadata["initial_weights"])


def loaded(state, other, *, without=()):
    """Whether all tensors but some are equal to those of another state."""
    return [name for name in state if not torch.equal(state[name], other[name].to(state[name])) and name not in without]


HEAD = {"fc.weight", "fc.bias"}


# ---- --init-from


def test_a_run_starts_from_another_with_its_head(begun, tmp_path):
    model, _ = load_model(begun)
    for source in (begun, begun / "checkpoints/best.safetensors"):
        state, said = started(source)
        assert not loaded(state, model.state_dict())
        assert said == f"{begun}/checkpoints/best.safetensors, after step {2}; with the head of these classes"


def test_a_checkpoint_of_a_run_is_a_file_of_weights(begun, tmp_path):
    (path,) = list_checkpoints(begun / "checkpoints")
    state, said = started(path)
    assert not loaded(state, last_checkpoint(begun)["model"]) and "with the head of these classes" in said
    config = override(SMALL, ema=0.5)
    train(config, tmp_path / "ema")
    (path,) = list_checkpoints(tmp_path / "ema/checkpoints")
    assert not loaded(started(path)[0], load_model(tmp_path / "ema", weights="last")[0].state_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "synthetic:24,4,8"}, "; the head of their 3 classes is replaced by a new one of 4"),
        ({"source": "synthetic:24,2,8"}, "; the head of their 3 classes is replaced by a new one of 2"),
    ],
)
def test_the_head_is_new_where_the_classes_are_others(changes, said, begun):
    model, _ = load_model(begun)
    state, found = started(begun, **changes)
    assert re.search(said, found)
    assert not loaded(state, {**model.state_dict(), **{n: state[n] for n in HEAD}}) and state["fc.weight"].std() > 0
    fresh = build_trainer(override(SMALL, **changes)).model.state_dict()
    assert not loaded({n: state[n] for n in HEAD}, fresh)  # the seed decides it, whatever was loaded


def test_other_names_of_as_many_classes_are_other_classes(begun):
    data = open_data(SMALL.data)
    data.train.classes = ["x", "y", "z"]
    trainer = build_trainer(override(SMALL, init_from=str(begun)), data=data)
    said = json.loads(trainer.metadata["initial_weights"])
    assert "replaced by a new one of 3 (class 0 was 'class_0' and is 'x' here)" in said
    assert not torch.equal(trainer.model.state_dict()["fc.weight"], load_model(begun)[0].state_dict()["fc.weight"])


def wrapped(kind, state):
    """A file's content in one of the layouts that trainers write."""
    return {
        "alone": state,
        "state_dict": {"state_dict": state, "epoch": 3, "best_acc1": torch.tensor(0.5)},
        "model": {"model": state, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
        "module": {f"module.{name}": value for name, value in state.items()},
        "both": {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        "no counts": {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
        "no head": {name: value for name, value in state.items() if name not in HEAD},
    }[kind]


@pytest.mark.parametrize("kind", ["alone", "state_dict", "model", "module", "both", "half", "no counts", "no head"])
def test_the_layouts_of_other_trainers(kind, tmp_path):
    torch.manual_seed(7)
    other = create_model("small_cnn", 3, 3).state_dict()
    other["features.1.running_mean"] += 0.25
    torch.save(wrapped(kind, other), tmp_path / "w.pt")
    state, said = started(tmp_path / "w.pt")
    wanted = wrapped("half", other) if kind == "half" else other
    assert not loaded(state, wanted, without=HEAD if kind == "no head" else ())
    assert said.startswith(str(tmp_path / "w.pt"))
    assert ("the head, which they lack, is replaced" if kind == "no head" else "of their 3 classes, taken") in said


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "densenet40_12", "resnet18_imagenet", "wrn20_8"])
def test_the_head_of_every_kind_of_network(name):
    """In VGG the last of three linear layers, in every network the parameters that count the classes."""
    with torch.device("meta"):
        own = create_model(name, 3, 3).state_dict()
    data = SimpleNamespace(num_classes=3, channels=3)
    layer = {"vgg16": "classifier.4", "densenet40_12": "classifier"}.get(name, "fc")
    assert weights._head(name, data, own) == [f"{layer}.weight", f"{layer}.bias"]


def damaged(change):
    state = create_model("small_cnn", 3, 3).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("features.0.weight"), "features.0.weight: missing in the file"),
        (lambda s: s.update(extra=torch.ones(1)), "extra: unknown to the model"),
        (lambda s: s.update({"features.0.weight": torch.ones(16, 1, 3, 3)}), r"\(16, 1, 3, 3\) in the file, \(16, 3"),
        (lambda s: s.pop("fc.bias"), "fc.bias: missing in the file"),
        (lambda s: s.update({"fc.weight": torch.ones(3, 32)}), r"fc.weight: \(3, 32\) in the file, \(3, 64\)"),
        (lambda s: s.update({"fc.weight": torch.ones(5, 64)}), r"fc.weight: \(5, 64\) in the file"),
        (lambda s: s["features.0.weight"].fill_(float("nan")), "NaN or infinite values in features.0.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, said, tmp_path):
    torch.save(damaged(change), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=f"w.pt.*{said}"):
        started(tmp_path / "w.pt")


class Code:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.ran = True",))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, FileNotFoundError, "no file .*w.pt; name a run folder"),
        (b"text", CheckpointError, "is not a file of weights"),
        ({"a": {"b": 1}}, CheckpointError, "holds the keys a; expected a state_dict"),
        ([1, 2], CheckpointError, "holds list"),
        ({"model": Code()}, CheckpointError, "A pickled network is not opened"),
        (nn.Linear(1, 1), CheckpointError, "A pickled network is not opened"),
        ("folder", ValueError, "has no checkpoints.best.safetensors; name a run folder or a file"),
    ],
)
def test_what_is_no_file_of_weights(content, error, said, tmp_path):
    path = tmp_path / "w.pt"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=said):
        started(path)
    assert not hasattr(builtins, "ran")


def test_a_safetensors_file_of_somebody_else(tmp_path):
    from safetensors.torch import save_file

    other = create_model("small_cnn", 3, 3).state_dict()
    save_file(other, tmp_path / "model.bin")  # known by its content
    state, said = started(tmp_path / "model.bin")
    assert not loaded(state, other) and "taken to be those of the data in the same order" in said


def test_weights_of_another_normalisation_are_named(begun, tmp_path):
    model, about = load_model(begun)
    texts = {name: json.dumps(about[name]) for name in ("classes", "std")} | {"mean": "[0.5, 0.5, 0.9]"}
    save_weights(tmp_path / "w.safetensors", model, texts)
    assert "; they were trained with mean and std [0.5, 0.5, 0.9, " in started(tmp_path / "w.safetensors")[1]


def test_copies_of_the_network_are_made_of_the_loaded_one(begun):
    """The averaged weights, and the first teacher of MrKD."""
    wanted = load_model(begun)[0].state_dict()
    trainer = build_trainer(override(SMALL, init_from=str(begun), ema=0.9, method="mr_kd"))
    assert not loaded(trainer.ema.model.state_dict(), wanted)
    assert not loaded(trainer.criterion.snapshots.model.state_dict(), wanted)


# ---- the record, and --resume


def test_the_record_says_where_the_weights_came_from(begun, tmp_path, capsys):
    train(override(SMALL, init_from=str(begun)), tmp_path / "new", quiet=False)
    said = f"{begun}/checkpoints/best.safetensors, after step 2; with the head of these classes"
    assert f"initial weights: {said}\n" in capsys.readouterr().err
    run = read_run(tmp_path / "new")
    assert run.versions["initial_weights"] == said and run.config.model.init_from == str(begun)
    assert load_model(tmp_path / "new")[1]["initial_weights"] == said
    assert read_run(begun).versions["initial_weights"] == "random"


def test_a_resume_continues_its_own_weights_and_does_not_load_again(begun, tmp_path, monkeypatch):
    config = override(SMALL, init_from=str(tmp_path / "w.pt"), max_steps=4, checkpoint_every=1)
    torch.save(load_model(begun)[0].state_dict(), tmp_path / "w.pt")
    train(config, tmp_path / "whole")
    train_stopped(config, tmp_path / "part", 2)
    said = read_run_versions(tmp_path / "part")
    (tmp_path / "w.pt").unlink()
    assert train(config, tmp_path / "part", resume=True)["step"] == 4
    one, other = (last_checkpoint(tmp_path / name)["model"] for name in ("whole", "part"))
    assert not loaded(one, other) and said and read_run_versions(tmp_path / "part") == said
    for changes in ({"init_from": None}, {"init_from": str(begun)}, {"init_from": None, "pretrained": True}):
        with pytest.raises(ValueError, match="continues with its own weights; leave --pretrained and --init-from"):
            train(override(config, **changes), tmp_path / "part", resume=True)


def read_run_versions(path):
    return json.loads((path / "versions.json").read_text())["initial_weights"]


def test_a_resume_without_a_checkpoint_starts_from_the_named_weights(begun, tmp_path):
    config = override(SMALL, init_from=str(begun))
    train(config, tmp_path / "run")
    wanted = last_checkpoint(tmp_path / "run")["model"]
    for path in (tmp_path / "run/checkpoints").iterdir():
        path.unlink()
    (tmp_path / "run/result.json").unlink()
    train(config, tmp_path / "run", resume=True)
    assert not loaded(last_checkpoint(tmp_path / "run")["model"], wanted)


@pytest.mark.slow  # two runs on digits
def test_a_rehearsal_loads_them_too(tmp_path, capsys):
    """Once, and of digits on digits, whose images have one channel."""
    save_weights(tmp_path / "grey.safetensors", create_model("small_cnn", 10, 1), {})
    flags = ["--smoke", "--device", "cpu", "--preset", "digits", "--init-from", str(tmp_path / "grey.safetensors")]
    assert cli.main(["train", *flags]) == 0
    assert capsys.readouterr().err.count("initial weights: ") == 1


def test_both_sources_at_once_are_refused(begun):
    with pytest.raises(ValueError, match="pretrained and init_from both name initial weights"):
        started(begun, pretrained=True)


def test_a_refused_start_leaves_no_folder(tmp_path, capsys):
    flags = ["--data", "synthetic:24,3,8", "--model", "small_cnn", "--quiet", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags, "--init-from", str(tmp_path / "missing.pt")]) == 2
    assert "--init-from: no file" in capsys.readouterr().err
    assert cli.main(["train", *flags, "--pretrained"]) == 2
    assert "no published weights of small_cnn; pretrained works with resnet18_imagenet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- --pretrained: timm


class Network(nn.Module):
    def __init__(self, num_classes, in_chans, value=None):
        super().__init__()
        self.body = nn.Conv2d(in_chans, 4, 3)
        self.head = nn.Linear(4, num_classes)
        self.pretrained_cfg = {"num_classes": 5, "tag": "a1", "mean": (0.5,) * 3, "std": (0.5,) * 3}
        if value is not None:
            nn.init.constant_(self.body.weight, value)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def timm(monkeypatch):
    """A timm with one network and two sets of weights for it."""
    values, made = {"net": 1.0, "net.a1": 1.0, "net.b2": 2.0}, []

    def create(name, pretrained=False, num_classes=1000, in_chans=3):
        made.append((name, pretrained))
        return Network(num_classes, in_chans, values[name] if pretrained else None)

    fake = SimpleNamespace(
        __version__="fake",
        is_model=lambda name: name.partition(".")[0] in ("net", "bare"),
        list_models=lambda: ["net", "bare"],
        list_pretrained=lambda pattern: ["net.a1", "net.b2"] if pattern == "net.*" else [],
        create_model=create,
        made=made,
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def test_a_tag_is_loaded_or_refused(timm):
    with pytest.raises(ValueError, match=r"'timm:net.b2' names weights.*--pretrained.*leave the tag out.*: timm:net$"):
        build_trainer(override(SMALL, model="timm:net.b2"))
    with pytest.raises(ValueError, match="--pretrained"):
        create_model("net.b2", 3)
    assert not timm.made
    for name, value, said in (("net.b2", 2.0, "net.b2"), ("timm:net.b2", 2.0, "net.b2"), ("timm:net", 1.0, "net.a1")):
        trainer = build_trainer(override(SMALL, model=name, pretrained=True))
        assert (trainer.model.body.weight == value).all()
        found = json.loads(trainer.metadata["initial_weights"])
        assert found.startswith(f"{said} of timm; the head of their 5 classes is replaced by a new one of 3; ")
        assert "trained with mean and std [0.5, 0.5, 0.5, 0.5" in found
    with pytest.raises(ValueError, match="no weights 'net.c3'; those of net are net.a1, net.b2"):
        build_trainer(override(SMALL, model="timm:net.c3", pretrained=True))
    with pytest.raises(ValueError, match="no weights 'bare'; it has none of bare"):
        build_trainer(override(SMALL, model="timm:bare", pretrained=True))


def test_a_tag_and_a_file_are_two_sources(timm, begun):
    with pytest.raises(ValueError, match="names weights of timm"):
        started(begun, model="timm:net.a1")


def test_a_run_from_published_weights_is_trained_resumed_and_opened(timm, tmp_path):
    config = override(SMALL, source="synthetic:20,5,8", model="timm:net.b2", pretrained=True, max_steps=4)
    train_stopped(config, tmp_path, 2)
    timm.made.clear()
    assert train(config, tmp_path, resume=True)["step"] == 4 and timm.made == [("net", False)]
    model, about = load_model(tmp_path)
    assert about["model"] == "timm:net" and isinstance(model, Network)
    assert "with the head of their 5 classes, taken to be those of the data" in about["initial_weights"]
    assert cli.main(["eval", str(tmp_path), "--device", "cpu"]) == 0


def test_a_network_that_cannot_be_downloaded_is_one_sentence(timm, monkeypatch, tmp_path, capsys):
    def offline(*_, **options):
        if options.get("pretrained"):
            raise OSError("We couldn't connect.\nMore lines.")
        return Network(3, 3)

    monkeypatch.setattr(timm, "create_model", offline)
    flags = ["--data", "synthetic:24,3,8", "--model", "timm:net.a1", "--pretrained", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "net.a1 of timm could not be loaded (OSError: We couldn't connect.); where there is no network" in said
    assert "More lines" not in said and not (tmp_path / "run").exists()


def test_the_name_without_a_tag():
    names = {"timm:a.b": "timm:a", "a.b": "timm:a", "timm:a": "timm:a", **{name: name for name in MODELS}}
    assert {name: architecture(name) for name in names} == names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's and the hub's own
def test_timm_itself_loads_what_lies_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    if reason := reason_against("timm"):
        pytest.skip(reason)
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = override(SMALL, source="synthetic:24,3,32", model="timm:test_resnet.r160_in1k", pretrained=True)
    with pytest.raises(CheckpointError, match="test_resnet.r160_in1k of timm could not be loaded .LocalEntryNotFound"):
        build_trainer(config)
    published = timm.create_model("test_resnet").state_dict()
    commit = tmp_path / "models--timm--test_resnet.r160_in1k" / "snapshots" / ("a" * 40)
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text(commit.name)
    save_file(published, commit / "model.safetensors", metadata={"format": "pt"})
    for name in ("timm:test_resnet.r160_in1k", "timm:test_resnet"):
        trainer = build_trainer(override(config, model=name))
        state = trainer.model.state_dict()
        assert not loaded(state, {**published, **{name: state[name] for name in HEAD}})
        assert json.loads(trainer.metadata["initial_weights"]).startswith(
            "test_resnet.r160_in1k of timm; the head of their 1000 classes is replaced by a new one of 3"
        )
    torch.save({"state_dict": published, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth.tar")
    state, _ = started(tmp_path / "w.pth.tar", source="synthetic:24,3,32", model="timm:test_resnet")
    assert not loaded(state, {**published, **{name: state[name] for name in HEAD}})


# ---- --pretrained: torchvision


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose weights of every network are those of ours, for 1000 classes."""
    published = {}

    def get_model_weights(name):
        class Weights:
            def __str__(self):
                return f"{name}_Weights.V1"

            def get_state_dict(self, **options):
                assert options == {"progress": False, "check_hash": True, "map_location": "cpu", "weights_only": True}
                if not published:
                    raise OSError("<urlopen error [Errno -2] Name or service not known>")
                return dict(published)

        return SimpleNamespace(DEFAULT=Weights())

    fake, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.get_model_weights = get_model_weights
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return published


def test_torchvisions_weights_in_our_networks(torchvision, monkeypatch):
    """With a small network in place of a ResNet; that its names are torchvision's is tested in test_models.py."""
    monkeypatch.setattr(weights, "TORCHVISION", {"small_cnn": "small"})
    config = override(SMALL, pretrained=True)
    with pytest.raises(CheckpointError, match=r"small_Weights.V1 of torchvision could not be .*OSError: .*--init-from"):
        build_trainer(config)
    other = create_model("small_cnn", 1000).state_dict()
    torchvision.update({name: value for name, value in other.items() if not name.endswith("num_batches_tracked")})
    trainer = build_trainer(config)
    state = trainer.model.state_dict()
    assert not loaded(state, {**other, **{name: state[name] for name in HEAD}})
    said = json.loads(trainer.metadata["initial_weights"])
    assert said == "small_Weights.V1 of torchvision; the head of their 1000 classes is replaced by a new one of 3"
    grey = override(load_preset("digits"), model="small_cnn", pretrained=True)
    with pytest.raises(CheckpointError, match=r"features.0.weight: \(16, 3, 3, 3\) in the file, \(16, 1, 3, 3\)"):
        build_trainer(grey)
    assert monkeypatch.undo() is None and set(weights.TORCHVISION) == {"resnet18_imagenet", "resnet50"}


def test_a_torchvision_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(CheckpointError, match="are torchvision's, whose import failed .*--init-from"):
        build_trainer(override(SMALL, model="resnet18_imagenet", pretrained=True))


# ---- a network that looks at images before its first step

WHITENED = override(SMALL, model="airbench_small")


def test_a_new_network_sees_training_images_once(tmp_path):
    """Normalised and without augmentation, and the same in every run of a seed."""
    data = open_data(WHITENED.data)
    trainer = build_trainer(WHITENED, data=data)
    expected = create_model("airbench_small", 3)
    pixels = torch.as_tensor(data.train.images).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    expected.init_from_images((pixels - mean) / std)
    torch.testing.assert_close(trainer.model.whiten.weight, expected.whiten.weight, atol=1e-4, rtol=1e-4)
    again = build_trainer(override(WHITENED, mixup_alpha=0.2), data=data).model.state_dict()
    assert not loaded(trainer.model.state_dict(), again)


def test_many_images_are_sampled_at_equal_distances():
    data = open_data(override(SMALL, source="synthetic:24,3,8").data)
    every = data.sample_images(100)
    assert len(every) == 24 and torch.equal(data.sample_images(4), every[[0, 7, 15, 23]])


def test_a_started_network_keeps_its_filters(tmp_path):
    """In the training, the export, a new run that takes them over, and a resumed one."""
    train(WHITENED, tmp_path / "whole")
    first = build_trainer(WHITENED).model.whiten.weight
    model, _ = load_model(tmp_path / "whole")
    assert torch.equal(model.whiten.weight, first)
    assert not torch.equal(model.fc.weight, build_trainer(WHITENED).model.fc.weight)
    other = override(WHITENED, source="synthetic:24,3,12", init_from=str(tmp_path / "whole"))
    assert torch.equal(build_trainer(other).model.whiten.weight, first)
    assert not torch.allclose(build_trainer(override(other, init_from=None)).model.whiten.weight, first, atol=1e-3)
    assert not torch.equal(build_trainer(WHITENED, initial=False).model.whiten.weight, first)


def test_loaded_weights_are_not_changed_by_images(begun, monkeypatch):
    """Published weights as well, which a run names in another way."""

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 8 * 8, 3)

        def forward(self, x):
            return self.fc(x.flatten(1))

        def init_from_images(self, images):
            raise AssertionError("seen")

    monkeypatch.setitem(MODELS, "sees", lambda n, c: Sees())
    monkeypatch.setattr("dlb_fast.train.run.load_initial_weights", lambda *_: "published")
    build_trainer(override(SMALL, model="sees", pretrained=True))
    with pytest.raises(AssertionError, match="seen"):
        build_trainer(override(SMALL, model="sees"))


def test_images_that_are_too_small_are_refused_before_a_network_sees_them():
    data = open_data(WHITENED.data)
    data.train.images = data.train.images[:, :, :1, :1]
    with pytest.raises(ValueError, match="model airbench_small does not take images of 1 x 1 with 3 channels"):
        build_trainer(WHITENED, data=data)
