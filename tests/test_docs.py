"""The documentation is true: its Python runs, its commands parse, its tables are made, its pages are found.

A Python block that cannot run here is preceded by `<!-- not run: REASON -->`, a file that a page shows by
`<!-- file: PATH -->`.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from benchmarks import tables
from dlb_fast import _backends, cli
from dlb_fast.methods import METHODS

pytestmark = pytest.mark.slow  # guards the documentation

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
OWN = [name for name in TEXTS if not name.startswith("docs/methods/")]  # test_methods.py runs those
_BLOCK = re.compile(r"(?:<!-- (?P<kind>not run|file): (?P<what>.*?) -->\n)?```python\n(?P<code>.*?)```", re.S)
BLOCKS = [(p, k, *m.group("code", "kind", "what")) for p in OWN for k, m in enumerate(_BLOCK.finditer(TEXTS[p]))]
PYTHON = [(p, k, code, what if kind else None) for p, k, code, kind, what in BLOCKS if kind != "file"]
FILES = [(page, code, what) for page, _, code, kind, what in BLOCKS if kind == "file"]


@pytest.mark.parametrize(("page", "number", "code", "reason"), PYTHON, ids=[f"{p}-{k}" for p, k, _, _ in PYTHON])
def test_python_blocks_run(page, number, code, reason, tmp_path, monkeypatch, capsys):
    program = compile(code, f"{page} block {number}", "exec")
    if reason is not None:
        assert reason.strip()
        pytest.skip(f"{page}: {reason}")
    if "torchvision" in code:
        pytest.skip("tests/test_image_folder.py runs it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with mock.patch.dict(METHODS):  # CONTRIBUTING registers a method, which later tests must not find
        exec(program, {"__name__": "docs"})


@pytest.mark.parametrize(("page", "code", "path"), FILES, ids=[f"{p}: {f}" for p, _, f in FILES])
def test_a_file_is_shown_word_for_word(page, code, path):
    assert code == (ROOT / path).read_text(encoding="utf-8"), f"{page} differs from {path}"


def test_files_are_shown():
    assert ("docs/own-loop.md", "examples/image_folder.py") in {(page, path) for page, _, path in FILES}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of every shell block, comments and continuations resolved."""
    found = []
    for page, text in TEXTS.items():
        for block in re.findall(r"```(?:sh|bash|shell)\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = words[: words.index(">")] if ">" in words else words
                for part in " ".join(shlex.quote(w) if w not in ("&&", "|", ";") else "\0" for w in words).split("\0"):
                    if part.strip():
                        found.append((page, part.strip()))
    return found


COMMANDS = commands()


def ours(command: str) -> list[str] | None:
    """The arguments of a `dlb-fast` command in whatever form it is started; None for other programs."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["dlb-fast"]:
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["dlb_fast"]:
        return words[words.index("-m") + 2 :]
    return None


class Parsed(Exception):
    """The arguments were understood; what they ask for is not done here."""


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c[:50]}" for p, c in COMMANDS])
def test_commands_parse(page, command, monkeypatch, tmp_path):
    words = shlex.split(command)
    if words[0] == "make" and shutil.which("make"):
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if words[0] in ("python", "python3") and words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
        module = importlib.import_module(words[2])
        monkeypatch.setattr(sys, "argv", words[2:])
        stop_after_parsing(monkeypatch)
        with pytest.raises(Parsed):
            module.main()
    arguments = ours(command)
    if arguments is None:
        return
    assert arguments[0] in cli.COMMANDS or arguments[0].startswith("-"), command
    monkeypatch.chdir(tmp_path)
    parse(arguments, monkeypatch)


def stop_after_parsing(monkeypatch):
    """Let a command read its arguments and raise `Parsed` then; wrong ones end it before."""
    original = argparse.ArgumentParser.parse_args

    def parsed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)


def parse(arguments, monkeypatch):
    """Let a command read its arguments and stop there; wrong ones raise."""
    name, rest = arguments[0], arguments[1:]
    if name == "train":
        from dlb_fast.presets import load_preset
        from dlb_fast.train.flags import TrainArgs, parse_flags

        preset = rest[rest.index("--preset") + 1] if "--preset" in rest else "digits"
        parse_flags(TrainArgs, TrainArgs(run=load_preset(preset)), own_modules_as_dlb(rest), "dlb-fast train")
        return
    if name in ("compare", "demo"):
        monkeypatch.setattr("dlb_fast.train.compare.run", raising)
        monkeypatch.setattr("dlb_fast.train.compare.run_protocol", raising)
        arguments = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in arguments]
    elif name == "bench":
        monkeypatch.setattr(subprocess, "run", raising)
    elif name != "presets":  # which is done for real
        stop_after_parsing(monkeypatch)
    monkeypatch.setenv("DLB_FAST_DEBUG", "1")
    try:
        assert cli.main(arguments) == 0
    except Parsed:
        pass
    except SystemExit as end:
        assert not end.code, arguments


def raising(*args, **kwargs):
    raise Parsed


def own_modules_as_dlb(arguments: list[str]) -> list[str]:
    """A teacher of the reader's own (`--method my_module:Mixer`) is not here to be imported."""
    return ["dlb" if re.fullmatch(r"my_\w+:\w+", word) else word for word in arguments]


def test_the_installation_is_the_same_on_both_first_pages():
    blocks = [
        re.search(r"```sh\n(python3 -m venv .*?)```", TEXTS[page], re.S) for page in ("README.md", "docs/index.md")
    ]
    assert blocks[0] and blocks[1] and blocks[0].group(1) == blocks[1].group(1)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_installs_no_tools_of_tests(tmp_path):
    done = subprocess.run(["make", "-n", "demo", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"^\.ci/run (\S+)$", done.stdout, re.M) == ["setup-train"], done.stdout
    assert "setup-train) setup train ;;" in (ROOT / ".ci" / "run").read_text()


def test_the_check_of_commands_has_teeth(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for wrong in (["train", "--no-such-flag", "1"], ["eval"], ["bench", "nonsense"], ["presets", "show", "nonsense"]):
        with pytest.raises((SystemExit, ValueError, AssertionError)), monkeypatch.context() as patch:
            parse(wrong, patch)


def test_the_table_of_the_kernels_states_is_made():
    table = re.search(r"<!-- state_table.*?-->\n(.*?)\n<!-- end -->", TEXTS["README.md"], re.S)
    assert table is not None
    assert table.group(1) == _backends.state_table()


@pytest.mark.parametrize("page", [name for name in TEXTS if "<!-- table:" in TEXTS[name]])
def test_tables_are_made_from_the_results(page):
    assert tables.fill(TEXTS[page]) == TEXTS[page], "stale: python -m benchmarks.tables"


def test_a_changed_number_is_found():
    (page,) = (name for name in TEXTS if name.endswith("imagenet.md"))
    assert tables.fill(TEXTS[page].replace("2,502", "2,503")) == TEXTS[page]
    with pytest.raises(ValueError, match="unknown table 'nonsense'"):
        tables.fill("<!-- table: nonsense -->\n<!-- end -->")


def files_of(nav) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    return set().union(*(files_of(part) for part in (nav.values() if isinstance(nav, dict) else nav)))


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert files_of(site["nav"]) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"\w+:", target):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_reference_names_what_exists():
    text = TEXTS["docs/api.md"]
    shown = set(re.findall(r"\w+", text))
    for name, options in re.findall(r"^::: ([\w.]+)\n(?:    options: \{members: \[(.*?)\]\})?", text, re.M):
        thing = resolve(name)
        for member in filter(None, options.split(", ")):
            assert getattr(thing, member).__doc__, f"{name}.{member}"
        assert thing.__doc__, name
        if isinstance(thing, types.ModuleType) and not options:
            shown.update(vars(thing))
    import dlb_fast.data

    assert {*dlb_fast.__all__} - {"__version__"} <= shown
    assert {*dlb_fast.data.__all__} <= shown


def resolve(name: str):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{name} does not exist")


def modules_with_examples() -> list[str]:
    files = [path for path in (ROOT / "dlb_fast").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return sorted(name for name in names if ".integrations" not in name)  # they need their frameworks


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_the_docstrings_run(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert done.failed == 0


def test_the_site_builds(tmp_path):
    """Strict: a dead link or anchor, a page outside the navigation, a reference to nothing end it."""
    pytest.importorskip("mkdocstrings", reason="needs the extra [docs]", exc_type=ImportError)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").exists()
