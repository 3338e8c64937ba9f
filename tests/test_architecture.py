"""The rooms of the package: which may import which, and that the losses stand alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlb_fast"

# Room -> rooms of ours it may import. A room is a file or a folder at the top of the package.
LOSS_FACES = {
    "losses", "functional", "buffer", "methods", "__init__",
}  # fmt: skip
ALLOWED = {
    "_version": set(),
    "reference": set(),
    "_args": set(),
    "_options": set(),
    "_backends": {"_args"},
    "kernels": {"_args", "_options", "reference"},
    "ops": {"_backends", "_options", "kernels", "reference"},
    "buffer": {"_args"},
    "functional": {"_backends", "_args", "_options", "ops", "reference", "buffer"},
    "losses": {"_args", "functional", "reference", "buffer"},
    "methods": {"_args", "functional", "losses", "reference"},
    "data": {"_backends"},  # where the compiled library is: it has an op of this room
    "train": {*LOSS_FACES, "data", "_backends", "_version", "presets"},
    "presets": {"train"},
    "doctor": {*LOSS_FACES, "_backends", "_version", "reference"},
    "report": {"train", "_version", "presets"},
    "cli": {"train", "report", "doctor", "presets", "data", *LOSS_FACES, "_version"},
    "integrations": {*LOSS_FACES, "data"},
    "__init__": {*LOSS_FACES, "_version"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file names in an import anywhere, lazy imports included."""
    package = ["dlb_fast", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "dlb_fast" and len(parts) > 1:
                is_room = (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists()
                rooms.add(parts[1] if is_room else "__init__")
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is not a room of DESIGN section 4; add it there and here"
    wrong = imported_rooms(path) - ALLOWED[room] - {room}
    assert not wrong, f"{path.name}: {room} must not import {sorted(wrong)}"


def test_the_rule_has_teeth(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "losses.py").write_text("def f():\n    from .train import engine\n    import dlb_fast.train.state\n")
    assert imported_rooms(tmp_path / "losses.py") == {"train"}


def test_the_loss_library_stands_alone():
    """Importing the losses loads no trainer, no data, no Triton and none of the optional packages."""
    code = (
        "import sys, dlb_fast; "
        "bad = [m for m in sys.modules if m.startswith(('dlb_fast.train', 'dlb_fast.data', 'dlb_fast.cli'))]; "
        "bad += [m for m in ('triton', 'PIL', 'yaml', 'tyro', 'matplotlib', 'sklearn') if m in sys.modules]; "
        "print(bad)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_face_names_what_it_has():
    """The lazy table of `dlb_fast/__init__.py` and its imports for type checkers are one list, and all of it loads."""
    import dlb_fast

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    static = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert static == dlb_fast._MODULE_OF
    assert {*static, "__version__"} == set(dlb_fast.__all__)
    assert all(getattr(dlb_fast, name) is not None for name in dlb_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dlb_fast.nonsense


def test_doctor_and_help_survive_a_broken_torch(tmp_path):
    """A torch that raises while it is imported is a finding of the doctor, not its end."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('this torch is broken')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for command, said in (("--help", "train"), ("doctor", "this torch is broken")):
        done = subprocess.run(
            [sys.executable, "-m", "dlb_fast", command], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert said in done.stdout, done.stderr
        assert "Traceback" not in done.stderr
