"""The command as a user types it (in this process, except where a process is the point)."""

import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from builders import last_checkpoint, stop_at, write_images

from dlb_fast import cli
from dlb_fast.data.datasets.source import SampleError
from dlb_fast.presets import PRESETS, load_preset, preset_file
from dlb_fast.train.checkpoint import CheckpointError
from dlb_fast.train.config import RunConfig, load_config
from dlb_fast.train.methods import resolve
from dlb_fast.train.models import MODELS
from dlb_fast.train.run import RunFolder

torch.set_num_threads(1)

SMALL = ["--preset", "digits", "--per-class", "4", "--batch-size", "20", "--epochs", "2", "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, made by the command."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", *SMALL, "--out", str(path)]) == 0
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_leaves_its_files(finished):
    config = load_config(finished / "config.yaml")
    assert (config.data.per_class, config.train.epochs, config.loss.method) == (4, 2, "dlb")
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["implementation"] in ("cpu", "torch")
    assert versions["python"] == sys.version.split()[0] and "commit" in versions
    assert (finished / "metrics.csv").read_text().startswith("step,epoch,images_seen,lr,loss")
    names = {p.name for p in (finished / "checkpoints").iterdir()}
    assert {"best.safetensors", "last.safetensors", "step-000000008.pt"} <= names
    assert json.loads((finished / "result.json").read_text())["stopped_by"] is None
    assert "<svg" in (finished / "report.html").read_text()


def test_flags_override_the_file_and_the_file_the_preset(here):
    Path("c.yaml").write_text("optim: {lr: 0.5}\nloss: {alpha: 0.25}\n")
    flags = ["--config", "c.yaml", "--alpha", "0.75", "--data", "synthetic:40,3,8", "--per-class", "None", "--no-flip"]
    assert cli.main(["train", *SMALL, *flags, "--out", "r"]) == 0
    config = RunFolder("r").read_config()
    assert (config.optim.lr, config.loss.alpha) == (0.5, 0.75)
    assert (config.data.source, config.data.flip) == ("synthetic:40,3,8", False)
    assert config.data.label_noise == load_preset("digits").data.label_noise  # from the preset


def test_the_start_says_where_the_numbers_come_from(here, capsys):
    Path("c.yaml").write_text("optim: {lr: 0.5}\ndata: {source: 'synthetic:40,2,8', per_class: null}\n")
    flags = ["--batch-size", "20", "--max-steps", "2", "--lr", "0.25"]
    assert cli.main(["train", "--preset", "digits", "--config", "c.yaml", *flags, "--out", "r"]) == 0
    data, said = capsys.readouterr().err.splitlines()[:2]
    assert data == (
        "data synthetic:40,2,8: 2 classes, 40 training images, 10 test images (drawn separately, data_seed 0); "
        "subset: none; label noise: symmetric, 8 of 40 labels wrong (20.00 %); normalised by the mean and std of the "
        "training images"
    )
    assert said == (
        "config from preset digits; then c.yaml: source digits -> synthetic:40,2,8, per_class 20 -> None, "
        "lr 0.05 -> 0.5; then flags: batch_size 40 -> 20, lr 0.5 -> 0.25, max_steps None -> 2"
    )
    assert cli.main(["train", "--config", "c.yaml", "--batch-size", "20", "--max-steps", "2", "--out", "s"]) == 0
    data, said = capsys.readouterr().err.splitlines()[:2]
    assert "label noise: none" in data and said.startswith("config from defaults; then c.yaml: source digits -> synth")


def test_smoke_goes_through_everything_and_leaves_nothing(here, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr(tempfile, "tempdir", None)
    flags = ["--preset", "cifar100-resnet32-dlb", "--model", "small_cnn", "--trackers", "wandb"]  # never started
    assert cli.main(["train", "--smoke", *flags]) == 0
    out, err = capsys.readouterr()
    assert (
        "training, evaluation, checkpoint, resume and export work: 4 steps of 16 rows with 160 training and 40" in out
    )
    assert "synthetic:160,10,32: 2 steps of 16 rows" in err and "continuing from" in err
    assert [path for path in here.iterdir() if "inductor" not in path.name] == []  # that one is torch's


def test_smoke_on_real_data_in_a_named_folder(here, capsys):
    """Nothing is written there, so that the same command without --smoke starts the run."""
    command = ["train", "--preset", "digits", "--data", "digits", "--out", "r", "--quiet"]
    assert cli.main([*command, "--smoke"]) == 0
    said = capsys.readouterr().out
    assert (
        "4 steps of 16 rows with 200 training and 64 test images of digits, in " in said and "nothing is kept" in said
    )
    assert not Path("r").exists()
    assert cli.main([*command, "--max-steps", "2"]) == 0
    assert "already holds a run" in failing([*command, "--smoke"], capsys)
    assert "leave --resume out" in failing(["train", "--smoke", "--resume", "--out", "r"], capsys)


def test_smoke_of_a_large_folder_lists_few_files(here, capsys, monkeypatch):
    """300 images per class, of which a few are listed: a folder is not read to its end."""
    names = [f"data/{s}/{c}/{k // 100}/{k}.png" for s in ("train", "val") for c in "abcde" for k in range(300)]
    for start in range(0, len(names), 250):
        write_images(here, names[start : start + 250])
    seen, original = [], os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = original(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                seen.append(entry.path)
                yield entry

        def close(self):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Counted)
    flags = ["--data", "imagefolder:data", "--image-size", "8", "--per-class", "250"]
    assert cli.main(["train", "--smoke", *flags]) == 0
    out, err = capsys.readouterr()
    assert "4 steps of 16 rows with 65 training and 64 test images of imagefolder:data" in out
    assert "data imagefolder:data: 5 classes, 65 training images" in err
    assert len([path for path in seen if path.startswith(str(here)) and path.endswith(".png")]) < 300
    Path("data/val/f").mkdir()
    said = failing(["train", "--smoke", *flags], capsys)
    assert "data/val" in said and "smoke-" not in said


def test_smoke_finds_what_would_fail_later(here, capsys, monkeypatch):
    monkeypatch.setattr("dlb_fast.train.run._scores_of_export", lambda *a, **k: {"top1": 2.0})
    assert "top-1 of the written weights is 2.0" in failing(["train", "--smoke", "--preset", "digits"], capsys, 1)


def test_resume_of_a_finished_run_changes_nothing(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert cli.main(["train", "--resume", "--out", str(finished)]) == 0
    said = capsys.readouterr().err
    assert "already complete (8 steps)" in said
    assert said.startswith("data digits: 10 classes, 40 training images, ")
    assert "subset: 4 images per class of 89" in said and "label noise: symmetric, 8 of 40 labels wrong" in said
    kept = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert kept.keys() == before.keys()
    assert all(kept[p] == before[p] for p in before if p.name in ("metrics.csv", "metrics.jsonl", "config.yaml"))
    assert cli.main(["train", "--resume", "--out", str(finished), "--lr", "0.9"]) == 0
    assert "already complete (8 steps); nothing is left to train, so its config stays" in capsys.readouterr().err
    assert (finished / "config.yaml").read_bytes() == before[finished / "config.yaml"]  # as it was trained


def test_resume_can_train_longer_and_says_what_changed(here, capsys):
    assert cli.main(["train", *SMALL, "--out", "runs/a"]) == 0
    assert cli.main(["train", "--resume", "--epochs", "3", "--quiet"]) == 0  # alone: the newest under runs/
    assert "changed for the rest of the run: epochs 2 -> 3" in capsys.readouterr().err
    assert RunFolder("runs/a").read_config().train.epochs == 3
    assert json.loads(Path("runs/a/result.json").read_text())["step"] == 12


def test_eval_repeats_the_runs_own_numbers(finished, capsys):
    result = json.loads((finished / "result.json").read_text())
    assert cli.main(["eval", str(finished), "--weights", "last", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["top1"] == result["test_top1"] and scores["nll"] == pytest.approx(result["test_nll"])
    assert cli.main(["eval", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result["best_top1"]
    assert cli.main(["eval", str(finished)]) == 0
    assert f"over {result['test_count']} images" in capsys.readouterr().out


def failing(arguments, capsys, expected=2):
    """Run a command that must be refused in words, without a type of error or a traceback; the message as one line."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:  # wrong flags end in the parser, with 2
        code = exit.code
    said = " ".join(capsys.readouterr().err.split())
    assert code == expected
    assert "Traceback" not in said and "[Errno" not in said and not re.match(r"dlb-fast \S+: \w+Error:", said)
    return said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "digit"], "unknown preset 'digit'; did you mean digits"),
        (["--model", "resnet23"], "unknown model 'resnet23'; did you mean 'resnet"),
        (["--data", "imagefolder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--data", "mnist"], "unknown kind 'mnist'"),
        (["--temperature", "-1"], "temperature must be finite and > 0, got -1.0"),
        (["--batch-size", "7"], "batch_size must be even"),
        (["--batch-size", "200"], "lower batch_size"),
        (["--per-class", "100000"], "per_class"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
        (["--impl", "cuda"], "cuda"),
        (["--image-size", "64"], "image_size=64 has no effect with data=digits, only with image files"),
        (["--gamma", "0.5"], "gamma=0.5 has no effect with schedule=cosine, only with schedule=multistep; leave"),
        (["--smoke", "--min-lr", "1", "--schedule", "constant"], "min_lr=1.0 has no effect with schedule=constant"),
    ],
)
def test_wrong_use_is_told_before_anything_is_written(flags, message, here, capsys):
    said = failing(["train", *SMALL, "--out", "r", *flags], capsys)
    assert message in said
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 2, ""),
        ("--help", 0, ""),
        ("--version", 0, ""),
        ("trian", 2, "unknown command 'trian'; did you mean train?"),
        ("fly", 2, "unknown command 'fly'; known: train, eval, "),
        ("train --lr", 2, "--lr"),
        ("train --batchsize 4", 2, "unknown option --batchsize; did you mean --batch-size?"),
        ("train --learning-rate 1", 2, "unknown option --learning-rate; did you mean --lr?"),
        ("train --no-resume", 2, "unknown option --no-resume; did you mean --resume?"),
        ("train stray", 2, "unexpected 'stray': a value follows the name of its option, such as --out FOLDER"),
        ("train --preset", 2, "--preset: expected one argument"),
        ("train --milestones 3", 2, "milestones must be given with schedule=multistep"),
        ("train --optimizer lbfgs", 2, "'lbfgs' evaluates the loss several times per step"),
        ("train --model picky", 2, "model picky does not take images of 8 x 8 with 1 channels (too small)"),
        ("train --out file", 2, "file"),
        ("train --resume --out .", 2, "there is no run in ."),
        ("eval", 2, "required: run"),
        ("eval nowhere", 2, "there is no run in nowhere"),
        ("eval . --weights first", 2, "invalid choice: 'first'"),
        ("eval . --weigths last", 2, "did you mean --weights?"),
        ("eval . --on-error ignore", 2, "invalid choice: 'ignore'"),
        ("compare --methods ce,dbl --seeds 1", 2, "methods must be distinct names of"),
        ("compare --seeds 0", 2, "seeds must be at least 1, got 0"),
        ("compare --seeds x", 2, "invalid int value: 'x'"),
        ("compare --jobs 0", 2, "jobs must be at least 1, got 0"),
        ("compare --seed 3", 2, "--seed has no effect here: the seeds are 0 .. SEEDS-1; use --seeds"),
        ("compare --method ce", 2, "--method has no effect here: use --methods"),
        ("compare --sedes 3", 2, "did you mean --seeds?"),
        ("compare --noises 0,x", 2, "--noises must be shares such as 0,0.2,0.4, got '0,x'"),
        ("compare --patience 3", 2, "patience would end the methods after different numbers of steps"),
        ("compare --methods ce,ls --alpha 0.5", 2, "alpha=0.5 has no effect with the methods ce, ls; leave it out"),
        ("compare --methods ce,dlb --omega 0.2", 2, "omega=0.2 has no effect with the methods ce, dlb"),
        ("demo --data synthetic", 2, "dlb-fast compare --data"),
        ("report nowhere", 2, "nowhere"),
        ("report", 2, "required: runs"),
        ("presets show digit", 2, "did you mean digits"),
        ("presets shw", 2, "invalid choice: 'shw'"),
        ("verify-data nowhere", 2, "nowhere does not exist"),
        ("verify-data empty", 1, ""),
        ("bench nonsense", 2, "expected one of last_batch"),
        ("doctor --jsn", 2, "--jsn"),
    ],
)
def test_a_mistake_is_a_sentence_with_the_exit_code_of_its_kind(arguments, code, words, here, capsys, monkeypatch):
    def picky(classes, channels):
        network = torch.nn.Linear(1, 1)
        network.forward = lambda images: (_ for _ in ()).throw(RuntimeError("too small"))
        return network

    monkeypatch.setitem(MODELS, "picky", picky)
    Path("empty").mkdir()
    Path("file").write_text("")
    assert words in failing(arguments.split(), capsys, code)
    assert sorted(path.name for path in here.iterdir() if path.name != "runs") == ["empty", "file"]
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("config: lr must be above 0"), 2, "config: lr must be above 0"),
        (ValueError("presets: said once"), 2, "said once"),
        (FileNotFoundError(2, "No such file or directory", "a/b.png"), 2, "a/b.png: No such file or directory"),
        (NotADirectoryError(20, "Not a directory", "a/b.png"), 2, "a/b.png: Not a directory"),
        (PermissionError(13, "Permission denied", "a/b.png"), 1, "a/b.png: Permission denied"),
        (SampleError("a.png", 3, 0, "empty file"), 1, "sample 3 of epoch 0 could not be loaded: a.png: empty file. "),
        (CheckpointError("the disk is full"), 1, "the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
        (ModuleNotFoundError("No module named 'tyro'", name="tyro"), 1, "No module named 'tyro'"),
    ],
)
def test_one_rule_of_words_and_exit_codes(error, code, words, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "presets", fail)
    assert cli.main(["presets"]) == code
    said = capsys.readouterr().err
    assert said.splitlines()[0].startswith(f"dlb-fast presets: {words}") and "Traceback" not in said


@pytest.mark.parametrize(
    "error", [KeyError("lr"), TypeError("no"), RuntimeError("shapes"), AssertionError(), IndexError()]
)
def test_a_fault_of_the_code_keeps_its_traceback(error, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "presets", fail)
    assert cli.main(["presets"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and type(error).__name__ in said.splitlines()[-1]


def test_ctrl_c_and_a_closed_pipe(monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "presets", fail)
    assert cli.main(["presets"]) == 130


def test_help_shows_the_numbers_that_would_be_used(capsys):
    def shown(*arguments):
        assert failing(["train", *arguments, "--help"], capsys, 0) == ""
        return " ".join(helped[-1].split())

    helped = []
    original = capsys.readouterr

    def reading():
        found = original()
        helped.append(found.out)
        return found

    capsys.readouterr = reading
    page = shown()
    defaults = resolve(RunConfig())
    for part in ("data", "augment", "model", "optim", "schedule", "train"):
        for field in dataclasses.fields(getattr(defaults, part)):
            assert f"--{'data' if field.name == 'source' else field.name.replace('_', '-')}" in page
            text = page.split(f"--{'data' if field.name == 'source' else field.name.replace('_', '-')}", 1)[1]
            value = getattr(getattr(defaults, part), field.name)
            if isinstance(value, (int, float, str)):
                assert f"[{value:g}]" in text if type(value) is float else f"[{value}]" in text
    assert "[0.05]" in page and "--omega" in page and "bake: how far" not in page
    assert "--omega FLOAT how far the predictions spread over the batch, in [0, 1). [0.5]" in shown("--method", "bake")
    page = shown("--preset", "imagenet-resnet50-dlb", "--optimizer", "adamw")
    assert "--lr FLOAT Peak learning rate. None: the optimiser's default; sgd: 0.05. [0.001]" in page
    assert "in pixels. [176]" in page


def test_help_names_the_exit_codes(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {code}  " in out.replace(":", " ") for code in (0, 1, 2, 130))


def test_a_comparison_refuses_a_number_without_effect(here, capsys, monkeypatch):
    flags = ["compare", "--preset", "digits", "--max-steps", "2", "--out", "r"]
    assert "betas=(0.5, 0.5) has no effect" in failing([*flags, "--betas", "0.5", "0.5"], capsys)
    assert "betas=(0.5, 0.5) has no" in failing([*flags, "--betas", "0.5", "0.5", "--noises", "0,0.2"], capsys)
    trained = []

    def record(config, **_):
        trained.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("dlb_fast.train.compare.run", record)
    for noises, kind in (("0,0.2", "symmetric"), ("0.2,0", "pair")):  # no kind where there is no noise
        assert "enough" in failing([*flags, "--noise-kind", "pair", "--noises", noises], capsys)
        assert trained.pop().data.noise_kind == kind
    file = ["--label-noise", "0", "--noise-kind", "file:x.npy"]
    assert "leave it or --noise-kind file:x.npy out" in failing([*flags, *file, "--noises", "0"], capsys)


def test_resume_without_a_run(here, capsys):
    assert "there is no run under runs/" in failing(["train", "--resume"], capsys)
    assert "there is no run in nowhere" in failing(["train", "--resume", "--out", "nowhere"], capsys)


def test_a_run_is_not_overwritten(finished, capsys):
    said = failing(["train", *SMALL, "--out", str(finished)], capsys)
    assert "already holds a run" in said and "--resume" in said


def test_eval_of_wrong_things(finished, here, capsys):
    assert "there is no run in" in failing(["eval", "."], capsys)
    said = failing(["eval", str(finished), "--data", "synthetic:40,3,8"], capsys)
    assert "synthetic:40,3,8 has images of classes that the network does not know: 'class_0', 'class_1'" in said
    (Path("copy") / "checkpoints").mkdir(parents=True)
    Path("copy/config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    assert "best.safetensors is missing" in failing(["eval", "copy"], capsys, 1)
    Path("copy/checkpoints/best.safetensors").write_bytes(b"nonsense")
    assert "not a readable safetensors file" in failing(["eval", "copy"], capsys, 1)


def test_unknown_commands_and_help(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert cli.main(["fly"]) == 2 and "unknown command 'fly'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(flag in out for flag in ("--preset", "--data", "--out", "--resume", "--temperature", "--lr"))


def test_every_command_named_exists():
    import importlib

    for target, _ in cli.COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_debug_shows_the_traceback(monkeypatch, here):
    monkeypatch.setenv("DLB_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["train", "--preset", "nothing"])


def test_presets_list_and_show(here, capsys):
    assert cli.main(["presets", "list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(PRESETS)
    assert "CIFAR-100, ResNet-32: DLB" in out
    assert cli.main(["presets"]) == 0 and capsys.readouterr().out == out
    assert cli.main(["presets", "show", "cifar100-resnet32-dlb"]) == 0
    assert capsys.readouterr().out == preset_file("cifar100-resnet32-dlb").read_text()
    said = failing(["presets", "show", "cifar10-dlb"], capsys)
    assert "did you mean" in said and "cifar10-resnet32-dlb" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 0.1}", "unknown field optim.lrr; did you mean optim.lr?"),
        ("optm: {lr: 0.1}", "unknown group 'optm'; did you mean optim?"),
        ("lr: 0.1", "unknown group 'lr'; did you mean optim.lr?"),
        ("optim: {epochs: 3}", "unknown field optim.epochs; did you mean train.epochs?"),
        ("optim: {lr: fast}", "optim.lr must be None or FLOAT, got 'fast'"),
        ("data: {flip: 'no'}", "data.flip must be one of 'True', 'False', got 'no'"),
        ("train: {amp: fp8}", "train.amp must be one of 'none', 'bf16', 'fp16', got 'fp8'"),
        ("loss: {method: dbl}", "got 'dbl'; did you mean dlb?"),
        ("optim: [lr]", "optim must hold fields, got ['lr']"),
        ("- lr", "expected groups (data, augment, model"),
        ("optim: {lr: [", "cannot read c.yaml"),
        ("train: {trackers: [mlflow]}", "trackers must be one of 'tensorboard', 'trackio', 'wandb', got 'mlflow'"),
    ],
)
def test_a_wrong_config_file_is_told_with_what_was_meant(text, message, here, capsys):
    Path("c.yaml").write_text(text)
    said = failing(["train", "--config", "c.yaml", "--out", "r"], capsys)
    assert message in said and "c.yaml" in said and not Path("r").exists()


def test_a_wrong_flag_is_told_with_what_was_meant(here, capsys):
    assert "did you mean --lr?" in failing(["train", "--lrr", "0.1"], capsys)
    assert "--lr must be None or FLOAT, got 'fast'" in failing(["train", "--lr", "fast"], capsys)


def test_data_without_a_preset_start_from_the_defaults(here, capsys):
    """Neither the subset nor the label noise of the digits recipe reaches other data."""
    flags = ["--data", "synthetic:40,2,8", "--batch-size", "20", "--max-steps", "2", "--out", "r"]
    assert cli.main(["train", *flags]) == 0
    config = RunFolder("r").read_config()
    assert (config.data.per_class, config.data.label_noise, config.train.epochs) == (None, 0.0, 30)
    data, said = capsys.readouterr().err.splitlines()[:2]
    assert "40 training images" in data and "subset: none; label noise: none" in data
    assert said.startswith("config from defaults; then flags: source digits -> synthetic:40,2,8, batch_size 128 -> 20")


def test_the_numbers_of_another_optimiser_are_said(here, capsys):
    flags = ["--preset", "digits", "--optimizer", "nadam", "--max-steps", "1", "--out", "r"]
    assert cli.main(["train", *flags]) == 0
    said = capsys.readouterr().err
    assert "then flags: optimizer sgd -> nadam, lr 0.05 -> 0.002, momentum 0.9 -> None, nesterov True -> None, " in said
    assert "40 rows on cpu, lr 0.002" in said and RunFolder("r").read_config().optim.betas == (0.9, 0.999)
    assert "another optimiser" in failing(["train", "--resume", "--out", "r", "--optimizer", "radam"], capsys, 1)


def test_the_demo_is_for_its_own_data(here, capsys):
    """Its subset and wrong labels would reach other data."""
    assert "dlb-fast compare --data" in failing(["demo", "--data", "synthetic:40,2,8", "--max-steps", "1"], capsys)


def test_a_signal_saves_and_exits_cleanly(here, capsys, monkeypatch):
    stop_at(monkeypatch, 3)
    assert cli.main(["train", *SMALL[:-1], "--out", "run"]) == 0
    said = capsys.readouterr().err
    assert "stopped by SIGTERM at step 3 of 8, everything is saved; continue with: dlb-fast train --resume" in said
    assert last_checkpoint(Path("run"))["step"] == 3


def test_verify_data_names_the_bad_file(here, capsys):
    Path("a").mkdir()
    Path("a/1.png").write_bytes(b"not an image")
    assert cli.main(["verify-data", "a"]) == 1
    assert "1.png" in capsys.readouterr().out
