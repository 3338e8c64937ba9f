"""Protocols: what a file says, the order of its runs, equal steps, the tuning, and what is kept of a run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dlb_fast import cli
from dlb_fast.presets import load_preset
from dlb_fast.train import compare
from dlb_fast.train.config import load_config, override
from dlb_fast.train.data import open_data
from dlb_fast.train.evaluate import memorised
from dlb_fast.train.loop import TrainingDiverged
from dlb_fast.train.protocol import differences, load_protocol, noise_name

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
STUDY = """
common:
  preset: digits
  data: {per_class: 10, batch_size: 20, label_noise: 0.0}
  loss: {method: ce}
  train: {epochs: 2, eval_every: 5}
seeds: [0, 1]
networks:
  cnn:
  late: {schedule: {schedule: multistep, milestones: [1.0]}}
noises:
  none:
  sym: {data: {label_noise: 0.4}}
methods:
  ce: {label: CE, loss: {method: ce}}
  dlb: {loss: {method: dlb}, settings: [{loss: {alpha: 1.0}}, {loss: {alpha: 3.0}}]}
  both: {loss: {method: dlb}, augment: {cutout: 2}, chosen_of: [dlb]}
tuning: {network: cnn, noise: sym, seed: 9}
tables:
  - {network: cnn, methods: [ce, both], noises: [none, sym]}
  - {network: late, methods: [dlb], noises: [sym]}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "p.yaml").write_text(STUDY)
    return tmp_path / "p.yaml"


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "p.yaml"
    path.write_text(STUDY)
    return replace(load_protocol(path, load_preset), lengths={"cnn": 100, "late": 100})


def changed(path, **parts):
    values = yaml.safe_load(STUDY)
    for name, value in parts.items():
        place, *last = name.split("__")
        if last:
            values[place][last[0]] = value
        else:
            values[place] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_order_tuning_first_then_whole_tables_seed_by_seed(protocol):
    names = [cell.name for cell in protocol.cells()]
    assert names == [
        "tuning/dlb/0", "tuning/dlb/1",
        "cnn/ce/none/seed0", "cnn/both/none/seed0", "cnn/ce/sym/seed0", "cnn/both/sym/seed0",
        "cnn/ce/none/seed1", "cnn/both/none/seed1", "cnn/ce/sym/seed1", "cnn/both/sym/seed1",
        "late/dlb/sym/seed0", "late/dlb/sym/seed1",
    ]  # fmt: skip


def test_seeds_draw_the_noise_and_all_methods_share_it(protocol):
    cells = {cell.name: cell for cell in protocol.cells({"dlb": {"loss": {"alpha": 3.0}}})}
    first, second, other = (
        np.asarray(open_data(cells[name].config.data).train.targets)
        for name in ("cnn/ce/sym/seed0", "cnn/both/sym/seed0", "cnn/ce/sym/seed1")
    )
    assert (first == second).all() and not (first == other).all()
    assert {c.config.train.seed for n, c in cells.items() if n.endswith("seed1")} == {1}
    assert cells["cnn/ce/none/seed1"].config.data.data_seed == 1  # which draws the subset
    assert cells["tuning/dlb/0"].config.data.data_seed == 9


def test_equal_steps_and_the_chosen_setting(protocol):
    """100 images, 20 rows: two epochs of cross entropy are 10 steps; a DLB epoch has 10 steps, so a milestone moves."""
    assert {c.name for c in protocol.cells() if c.config is None} == {
        c.name for c in protocol.cells() if c.method != "ce" and c.tried is None
    }
    cells = protocol.cells({"dlb": {"loss": {"alpha": 3.0}}})
    assert {(c.config.train.max_steps, c.config.train.eval_every) for c in cells} == {(10, 5)}
    late = next(c for c in cells if c.name == "late/dlb/sym/seed0").config
    assert late.schedule.milestones == (0.5,)  # one epoch of cross entropy
    assert {c.config.loss.alpha for c in cells if c.method != "ce" and c.tried is None} == {3.0}
    assert {c.config.loss.method for c in cells if c.method == "both"} == {"dlb"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"methds": {}}, "unknown key methds; did you mean methods?"),
        ({"networks__cnn": {"model": {"modle": "vgg16"}}}, "networks.cnn: unknown field model.modle; did you mean"),
        ({"methods__ce": {"loss": {"method": "cee"}}}, "methods.ce: loss.method must be one of"),
        ({"methods__ce": {"loss": {"method": "ce"}, "optm": {"lr": 1}}}, "methods.ce: unknown group 'optm'; did you"),
        ({"noises__sym": {"data": {"label_noise": 2}}}, "noises.sym: label_noise must be in [0, 1], got 2.0"),
        ({"tuning__noise": "smy"}, "tuning.noise names 'smy', which is not there; did you mean sym?"),
        ({"tuning__seed": 1}, "tuning.seed must be none of the seeds of the study, got 1"),
        ({"seeds": [0, 0]}, "seeds must be distinct"),
        ({"methods__both": {"chosen_of": ["ce"]}}, "methods.both.chosen_of names 'ce', which is not there; known: dlb"),
        (
            {"methods__ce": {"loss": {"method": "ce"}, "settings": [{"loss": {"label_smoothing": 0.1}}]}},
            "as many settings to choose from, got ce 1, dlb 2",
        ),
        ({"seeds": 3}, "seeds must be a list of at least one entry, got 3"),
        ({"tables": []}, "tables must be a list of at least one entry, got []"),
        (
            {"tables": [{"network": "cnn", "methods": [], "noises": ["none"]}]},
            "tables[0].methods must be a list of at least one entry, got []",
        ),
        (
            {"tables": [{"network": "cnn", "methods": "ce", "noises": ["none"]}]},
            "tables[0].methods must be a list of at least one entry, got 'ce'",
        ),
        ({"methods__ce": {"loss": {"method": "ce", "alpha": 2.0}}}, "loss.alpha is not used by method ce"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(study, parts, message):
    with pytest.raises(ValueError, match="p.yaml: protocol: ") as error:
        load_protocol(changed(study, **parts), load_preset)
    assert message in str(error.value)


@pytest.mark.parametrize("text", [STUDY + "seeds: [3]\n", STUDY.replace("  none:\n", "  none:\n  none: {data: {}}\n")])
def test_a_key_that_is_there_twice_is_refused(study, text):
    """The last of them would be taken in silence. The same holds for a config; a merged key is no second one."""
    study.write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*p.yaml: (seeds|none) is there twice"):
        load_protocol(study, load_preset)
    study.write_text("optim: {lr: 0.1, lr: 0.2}")
    with pytest.raises(ValueError, match=r"config: cannot read .*p.yaml: lr is there twice"):
        load_config(study)
    study.write_text("optim: &a {lr: 0.1}\ntrain: {epochs: 3}\nmodel: {<<: {model: vgg16}, model: small_cnn}\n")
    assert load_config(study).model.model == "small_cnn"


def test_flags_change_the_common_part_only(study, capsys):
    command = ["compare", "--protocol", str(study), "--out", str(study.parent / "o"), "--list"]
    assert cli.main([*command, "--max-steps", "4"]) == 0
    assert "0 of 12 runs are done, 12 are missing" in capsys.readouterr().out
    for flags, message in (
        (["--alpha", "2"], "--alpha has no effect, because methods.dlb.settings of the protocol sets it"),
        (["--label-noise", "0.2"], "--label-noise has no effect, because noises.sym of the protocol sets it"),
        (["--methods", "ce"], "--methods has no effect with --protocol"),
        (["--only", "cnn/ce/nnoe/seed0"], "fits none of 12 runs; did you mean cnn/ce/none/seed0?"),
        (["--only", "cnn/*", "--only", "late/ce/*"], "--only late/ce/* fits none of 12 runs"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
    ):
        assert cli.main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["compare", "--list"]) == 2
    assert "--list belongs to --protocol" in capsys.readouterr().err
    assert not (study.parent / "o").exists()


def test_a_run_with_its_tuning(study, monkeypatch, capsys):
    """The tuning is scored on held-out images with wrong labels; what it chose is written and taken elsewhere."""
    held = []
    original = compare._without_test_set
    monkeypatch.setattr(compare, "_without_test_set", lambda *a: held.append(original(*a)) or held[-1])
    out = study.parent / "o"
    command = ["compare", "--protocol", str(study), "--jobs", "1"]
    assert cli.main([*command, "--out", str(out), "--only", "cnn/both/sym/seed0"]) == 0
    lines = compare.read_results(out / "results.jsonl")
    assert [line["kind"] for line in lines] == ["tuning", "tuning", "chosen", "run"]
    tried = [line["last"]["test_top1"] for line in lines[:2]]
    assert [one["held_out_top1"] for one in lines[2]["tried"]] == tried
    assert lines[2]["setting"] == {"loss": {"alpha": (1.0, 3.0)[tried.index(max(tried))]}}
    assert lines[3]["config"]["alpha"] == lines[2]["setting"]["loss"]["alpha"]
    for data in held:
        assert (len(data.train), len(data.test)) == (90, 10)
        assert not (np.asarray(data.test.targets) == np.asarray(data.test.clean_targets)).all()
    run = lines[3]
    rows = [json.loads(x) for x in (out / "cnn/both/sym/seed0/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "eval"]
    assert [round(row["test_top1"], 5) for row in rows] == [point["test_top1"] for point in run["curve"]]
    assert (run["steps"], run["images"], run["wrong_labels"], run["train_images"]) == (10, 190, 0.4, 100)
    assert run["last"] == run["curve"][-1] and run["best"]["test_top1"] == max(p["test_top1"] for p in run["curve"])
    assert {"train_right_top1", "train_wrong_top1", "train_wrong_true"} <= run["last"].keys()
    assert str(study.parent) not in (out / "results.jsonl").read_text()

    monkeypatch.setattr(compare, "train_run", lambda *a, **k: pytest.fail("trained again"))
    assert cli.main([*command, "--out", str(out), "--only", "cnn/both/sym/seed0"]) == 0
    state = compare.run_protocol(
        load_protocol(study, load_preset), study.parent / "new", tuned=out / "results.jsonl",
        only=["cnn/both/*/seed1"], dry=True,
    )  # fmt: skip
    assert state.chosen == {"dlb": lines[2]["setting"]}
    with pytest.raises(ValueError, match="both/sym/seed0 was run with another config .*cutout 2, now 3"):
        other = {"loss": {"method": "dlb"}, "augment": {"cutout": 3}, "chosen_of": ["dlb"]}
        compare.run_protocol(load_protocol(changed(study, methods__both=other), load_preset), out, dry=True)


def test_two_commands_on_one_folder(study, tmp_path):
    from dlb_fast.train.run import lock_folder

    (tmp_path / "o").mkdir()
    handle = lock_folder(tmp_path / "o", "")
    with pytest.raises(ValueError, match=r"another process works in .*; wait for it or end it"):
        compare.run_protocol(load_protocol(study, load_preset), tmp_path / "o", jobs=1)
    os.close(handle)


@pytest.fixture
def made(study, monkeypatch):
    """Calls `run_protocol` with runs that are not trained; returns the names of those made."""
    trained = []

    def train_one(work, threads):
        trained.append(work.about["cell"])
        last = {"test_top1": 0.5, "step": 10}
        return {**work.about, "last": last, "seconds": 1.0, "config": differences(compare.from_dict(work.config))}

    monkeypatch.setattr(compare, "_train_one", train_one)

    def call(out, **options):
        trained.clear()
        compare.run_protocol(load_protocol(study, load_preset), study.parent / out, jobs=1, **options)
        return list(trained)

    return call


def test_damage_of_the_results_is_named(made, study):
    file = study.parent / "o" / "results.jsonl"
    names = made("o", only=["cnn/ce/*"])
    assert len(names) == 4 and made("o", only=["cnn/ce/*"]) == []
    whole = file.read_bytes()
    for damage in (
        whole[:-30],
        whole[:20] + b"\n" + whole,
        b"\xff\x00\n" + whole,
        b"{}\n" + whole,
        b'{"kind": "run"}\n' + whole,
        b'{"kind": "chosen"}\n' + whole,
        whole + b"[1]\n",
        b"1\n" + whole,
    ):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"results.jsonl:[145]: not a summary .*; delete the line, and its run is"):
            made("o")
    file.write_bytes(whole + b"\n")  # an empty line is none
    assert made("o", only=["cnn/ce/*"]) == []


def test_results_alone_in_a_new_folder_continue_the_study(made, study):
    made("o", only=["cnn/ce/*/seed0", "tuning/*"])
    (study.parent / "new").mkdir()
    (study.parent / "new" / "results.jsonl").write_bytes((study.parent / "o" / "results.jsonl").read_bytes())
    assert made("new", only=["cnn/ce/*", "cnn/both/none/seed0"]) == [
        "cnn/both/none/seed0", "cnn/ce/none/seed1", "cnn/ce/sym/seed1"
    ]  # fmt: skip


def test_nothing_is_tuned_where_the_settings_are_given(made, study):
    assert made("o", only=["late/dlb/sym/seed0"])[:2] == ["tuning/dlb/0", "tuning/dlb/1"]
    names = made("new", tuned=study.parent / "o" / "results.jsonl")
    assert len(names) == 10 and not any(name.startswith("tuning") for name in names)


def test_data_of_another_kind_than_the_protocol_s(made, study, tmp_path):
    """A command goes on with the kind that the first one was given, and no other."""
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        records = torch.randint(256, (8, 3073), dtype=torch.uint8)
        records[:, 0] = torch.arange(8) % 4
        (tmp_path / name).write_bytes(records.numpy().tobytes())
    common = {"preset": "cifar10-cpu", "data": {"source": "imagefolder", "batch_size": 8}}
    changed(
        study, common=common, networks={"cnn": {}}, tables=[{"network": "cnn", "methods": ["ce"], "noises": ["none"]}]
    )
    data = f"cifar10:{tmp_path}"
    assert made("o", data=data, only=["*/seed0"]) == ["cnn/ce/none/seed0"]
    assert made("o", data=data) == ["cnn/ce/none/seed1"]
    lines = compare.read_results(study.parent / "o" / "results.jsonl")
    assert [line["config"]["source"] for line in lines] == ["cifar10", "cifar10"]
    with pytest.raises((FileNotFoundError, ValueError)):
        made("o", data=str(tmp_path))


def test_methods_may_be_taken_out_of_a_protocol(made, study):
    """Its results and its choice stay in the file; another setting of a tuned method is refused."""
    made("o", only=["cnn/ce/none/seed0", "cnn/both/none/seed0"])
    changed(study, methods__dlb={"loss": {"method": "dlb"}, "settings": [{"loss": {"alpha": 2.0}}] * 2})
    with pytest.raises(ValueError, match="'alpha': 1.0}} was chosen for dlb; the protocol has no such setting"):
        made("o")
    values = {name: values for name, values in yaml.safe_load(STUDY)["methods"].items() if name == "ce"}
    changed(study, methods=values, tables=[{"network": "cnn", "methods": ["ce"], "noises": ["none"]}])
    assert made("o") == ["cnn/ce/none/seed1"]
    assert [line["kind"] for line in compare.read_results(study.parent / "o" / "results.jsonl")] == [
        "tuning", "tuning", "chosen", "run", "run", "run"
    ]  # fmt: skip


def test_a_missing_or_wrong_label_file_is_found_before_the_first_run(made, study):
    changed(study, noises={"none": None, "sym": {"data": {"noise_kind": "file:x.npy"}}})
    with pytest.raises(FileNotFoundError, match=r"labels: no file .*x.npy"):
        made("o", labels=study.parent)
    np.save(study.parent / "x.npy", np.zeros(5, dtype=int))
    with pytest.raises(ValueError, match=r"labels: .*x.npy has the shape \(5,\)"):
        made("o", labels=study.parent)
    assert not (study.parent / "o").exists()
    assert made("o", only=["*/none/*"])


def test_lines_that_another_command_writes_meanwhile_are_kept(made, study, monkeypatch):
    """A command reads the results before it waits for the folder; another may have ended in between."""
    file, before = study.parent / "o" / "results.jsonl", compare.claimed
    made("o", only=["cnn/ce/none/seed0"])
    line = {**compare.read_results(file)[0], "cell": "gone/x", "extra": 1}

    def late(path, asked):
        file.write_text(file.read_text() + json.dumps(line) + "\n")
        return before(path, asked)

    monkeypatch.setattr(compare, "claimed", late)
    made("o", only=["cnn/ce/none/seed1"])
    assert [one["cell"] for one in compare.read_results(file)] == ["cnn/ce/none/seed0", "gone/x", "cnn/ce/none/seed1"]


def test_a_diverged_run_is_of_its_config(study, monkeypatch):
    """It is done, and with another setting it is another run."""

    def diverge(*args, **options):
        raise TrainingDiverged("the loss became NaN; lower the learning rate")

    monkeypatch.setattr(compare, "train_run", diverge)
    out, only = study.parent / "o", ["cnn/ce/none/seed0"]
    compare.run_protocol(load_protocol(study, load_preset), out, jobs=1, only=only)
    (line,) = compare.read_results(out / "results.jsonl")
    assert line["diverged"] == "the loss became NaN" and line["config"]["per_class"] == 10
    with pytest.raises(ValueError, match="none/seed0 was run with another config .*lr"):
        slower = changed(study, methods__ce={"optim": {"lr": 0.01}, "loss": {"method": "ce"}})
        compare.run_protocol(load_protocol(slower, load_preset), out, only=only, dry=True)


def test_what_waits_for_a_tuning_that_cannot_run_here_is_left_out(made, study, monkeypatch, capsys):
    networks = {"cnn": {"train": {"device": "cuda"}}, "late": None}
    changed(study, networks=networks, tables=[{"network": "late", "methods": ["ce", "dlb"], "noises": ["none"]}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made("o") == ["late/ce/none/seed0", "late/ce/none/seed1"]
    assert "the tuning of dlb needs a GPU" in capsys.readouterr().err


def test_memorised_by_hand():
    """Labels 0 0 1 1, true classes 0 1 1 2, answers 0 0 2 2: one of two right labels, one of two wrong ones learned."""
    labels, true, answers = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 2, 2])
    found = memorised(torch.nn.Identity(), [(torch.eye(3)[answers], labels * 3 + true)], 3)
    assert found == {"train_right_top1": 0.5, "train_wrong_top1": 0.5, "train_wrong_true": 0.5}


def test_places_are_no_difference(protocol):
    config = protocol.common
    one = override(config, source="imagefolder:/a", noise_kind="file:/l/x.npz:k:c", device="cpu")
    other = override(config, source="imagefolder:b", noise_kind="file:x.npz:k:c", num_threads=7)
    assert noise_name(one) == noise_name(other) == "file:x.npz:k:c"
    assert differences(one) == differences(other) != differences(override(other, noise_kind="file:x.npz:other:c"))


def test_the_protocol_of_the_study():
    """Its configs are valid, every tuned method has as many settings, and all runs of a network make equal steps."""
    protocol = load_protocol(ROOT / "benchmarks" / "protocol-cifar10.yaml", load_preset)
    lengths = {name: 10 * (protocol.base(name).data.per_class or 5000) for name in protocol.networks}
    protocol = replace(protocol, lengths=lengths)
    chosen = {name: entry.settings[0] for name, entry in protocol.methods.items() if entry.settings}
    cells = [cell for cell in protocol.cells(chosen) if cell.tried is None]
    assert list(protocol.seeds) == [0, 1, 2]
    drawn = {c.noise: c.config.data.data_seed for c in cells if c.network == "airbench_small" and c.seed == 2}
    assert drawn == {"none": 0, "symmetric-0.4": 2, "human-worst": 0}
    for network in protocol.networks:
        assert len({(c.config.train.max_steps, c.config.data.batch_size) for c in cells if c.network == network}) == 1


@pytest.mark.slow
def test_a_killed_process_of_a_run_is_told():
    with pytest.raises(RuntimeError, match="compare: the process of a run was killed"), compare._executor(1) as pool:
        pool.submit(os._exit, 9).result()


@pytest.mark.slow
def test_an_interrupted_command_ends_its_runs(study, tmp_path):
    """The signal comes to the command alone; the runs save and end, 20 000 steps before their end."""
    command = [sys.executable, "-m", "dlb_fast", "compare", "--protocol", str(study), "--jobs", "2", "--out", "o"]
    command += ["--max-steps", "20000", "--eval-every", "10", "--only", "cnn/ce/*/seed0"]
    where = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=where, stderr=subprocess.DEVNULL)
    runs, end = [tmp_path / f"o/cnn/ce/{name}/seed0" for name in ("none", "sym")], time.monotonic() + 100
    while not all(list(run.glob("checkpoints/step-*.pt")) for run in runs) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not any((run / "result.json").exists() for run in runs)


@pytest.mark.slow
def test_killed_in_the_middle_and_continued(study, tmp_path):
    """Workers end with a killed command, and the next command gives the same weights as an uninterrupted one."""
    command = [sys.executable, "-m", "dlb_fast", "compare", "--protocol", str(study), "--jobs", "2"]
    command += ["--max-steps", "200", "--eval-every", "20", "--only", "cnn/ce/*/seed0"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = subprocess.Popen([*command, "--out", str(cut)], cwd=ROOT, stderr=subprocess.DEVNULL)
    run, end = cut / "cnn/ce/sym/seed0", time.monotonic() + 100
    while not list(run.glob("checkpoints/step-*.pt")) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists()
    subprocess.run([*command, "--out", str(whole)], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*command, "--out", str(cut)], cwd=ROOT, check=True, capture_output=True)
    for name in ("none", "sym"):
        path = f"cnn/ce/{name}/seed0/checkpoints/last.safetensors"
        assert (whole / path).read_bytes() == (cut / path).read_bytes()
    one, other = (compare.read_results(path / "results.jsonl") for path in (whole, cut))
    for a, b in zip(*(sorted(lines, key=lambda line: line["cell"]) for lines in (one, other)), strict=True):
        assert a["curve"] == b["curve"] and a["config"] == b["config"]
