"""Who may import whom, and that the losses work without the trainer and the optional packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from builders import environment, python

PACKAGE = Path(__file__).parent.parent / "dlb_fast"

# A module or folder imports only what stands before it in this list; so nothing imports `integrations`.
ORDER = ["_version", "_args", "_options", "reference", "_proof", "_backends", "kernels", "ops", "buffer", "functional"]
ORDER += ["linear", "sharded", "losses", "methods", "__init__", "data", "train", "presets", "doctor", "report", "cli"]
ORDER += ["__main__"]
ORDER += ["integrations"]
ONLY = {  # stricter than the order: the definition stands alone, and the data knows no losses
    "reference": set(),
    "data": {"_version", "_args", "_backends"},
    "integrations": {*ORDER[: ORDER.index("data") + 1]},
}


def imported(path: Path) -> set[str]:
    """The units that a file imports anywhere, also inside functions."""
    package = ["dlb_fast", *path.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("dlb_fast.")]
    exists = {path.stem for path in PACKAGE.iterdir()}
    return {part[1] if part[1] in exists else "__init__" for part in parts}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ONLY.get(unit, {*ORDER[: ORDER.index(unit)]})
    assert imported(path) <= allowed | {unit}


def test_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "losses.py").write_text("def f():\n    from .train import loop\n    import dlb_fast.train.run\n")
    assert imported(tmp_path / "losses.py") == {"train"}


def test_imports_are_light():
    """The losses load nothing of the rest, the data no decoder, the integrations no framework, --help no trainer."""
    optional = {"triton", "PIL", "yaml", "tyro", "matplotlib", "sklearn", "torchvision", "torch._dynamo"}
    steps = {
        "import dlb_fast": {*optional, "dlb_fast.data", "dlb_fast.train", "dlb_fast.cli"},
        "import dlb_fast.data": {*optional, "dlb_fast.train"},
        "import dlb_fast.integrations.state": {*optional, "lightning", "accelerate", "transformers", "timm"},
        "from dlb_fast import cli; cli.main(['--help'])": optional,
    }
    code = "\n".join(["import sys", *(f"{step}; print('loaded', *sys.modules)" for step in steps)])
    lines = [line.split() for line in python("-c", code).stdout.splitlines() if line.startswith("loaded")]
    for (step, unwanted), loaded in zip(steps.items(), lines, strict=True):
        assert not unwanted & set(loaded), step


def test_the_lazy_exports_are_those_that_type_checkers_see():
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


@pytest.mark.parametrize(("command", "said"), [("--help", "train"), ("doctor", "this torch is broken")])
def test_help_and_doctor_survive_a_broken_torch(command, said, tmp_path):
    """A torch that raises while it is imported is a finding of the doctor, not its end."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('this torch is broken')\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    done = python("-m", "dlb_fast", command, check=False, cwd=tmp_path, PYTHONPATH=path)
    assert said in done.stdout and "Traceback" not in done.stderr
