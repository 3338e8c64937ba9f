"""What a build produces: the content of wheel and sdist, extras, a library that knows no Python and no newer torch."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from builders import ROOT, python

from dlb_fast import _backends

pytestmark = pytest.mark.slow  # guards builds


def copy_of_the_sources(folder: Path) -> Path:
    """What git knows or would add, without what was built; builds then leave the checkout alone."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(hook: str, source: Path, out: Path, mode: str) -> Path:
    """Run a hook of the build backend as pip and `make sdist` do; the file it made."""
    code = f"import sys; from setuptools.build_meta import {hook}; print('made', {hook}(sys.argv[1]))"
    done = python("-c", code, out, cwd=source, DLB_FAST_BUILD=mode)
    return out / re.findall(r"^made (.*)$", done.stdout, re.M)[-1]


def package_files(root: Path) -> set[str]:
    """Every file of the package in a copy of the sources."""
    files = [path for path in (root / "dlb_fast").rglob("*.*") if path.suffix not in (".so", ".pyc")]
    return {str(path.relative_to(root)) for path in files}


def compiled_here() -> bool:
    if _backends.LIBRARY.exists():
        return True
    assert os.environ.get("DLB_FAST_BUILD") not in ("require", "cpu", "cuda"), "the library should have been built"
    return False


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_of_the_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def plain_wheel(sources, tmp_path_factory):
    """The wheel of a machine without a compiler."""
    return build("build_wheel", sources, tmp_path_factory.mktemp("wheel"), "none")


def test_a_wheel_without_compiler_is_the_package_and_nothing_else(sources, plain_wheel):
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(plain_wheel) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "dlb-fast = dlb_fast.cli:main" in wheel.read(entry).decode()
    assert inside == package_files(sources)
    told = metadata(plain_wheel)
    assert told["Requires-Python"] == ">=3.10" and "torch>=2.10" in told.get_all("Requires-Dist")


def metadata(path: Path) -> email.message.Message:
    with zipfile.ZipFile(path) as wheel:
        return email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))))


def test_every_extra_that_is_named_exists(plain_wheel):
    """README, docs and error messages say `pip install "dlb_fast[X]"`."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "dlb_fast").rglob("*.py")]
    found = [names for page in pages for names in re.findall(r"(?:dlb_fast|\.)\[([a-z,]+)\]\"", page.read_text())]
    assert found and {name for names in found for name in names.split(",")} <= {
        *metadata(plain_wheel).get_all("Provides-Extra")
    }


def test_one_wheel_serves_every_python_and_torch(tmp_path):
    """The objects of the checkout's own build are reused: linking and packing are what is tested here."""
    if not compiled_here():
        pytest.skip("nothing compiled here")
    source = copy_of_the_sources(tmp_path / "copy")
    for scratch in (ROOT / "build").glob("ops-*"):
        shutil.copytree(scratch, source / "build" / scratch.name)
    for made in (source / "build").rglob("*.o"):
        os.utime(made)
    path = build("build_wheel", source, tmp_path, os.environ.get("DLB_FAST_BUILD", "auto"))
    assert re.fullmatch(r"dlb_fast-[\d.]+-py3-none-linux_\w+\.whl", path.name)
    with zipfile.ZipFile(path) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(tmp_path / "installed")
    compiled = {name for name in inside if name.endswith(".so")}
    assert inside - compiled == package_files(source)
    assert {re.sub(r"\.cpython.*", "", name) for name in compiled} == {
        "dlb_fast/lib/libdlb_fast_ops.so",
        "dlb_fast/_build",
    }
    # Installed where the checkout is out of reach, as for another Python: without the build-info module.
    for module in (tmp_path / "installed" / "dlb_fast").glob("_build.*"):
        module.unlink()
    code = "import dlb_fast, sys; from dlb_fast.doctor import main; print(dlb_fast.__file__); main(['--self-test'])"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in done.stdout and "self-test cpu: passed" in done.stdout, done.stdout


def test_the_sdist_holds_all_sources_and_no_tests(sources, tmp_path):
    sdist = build("build_sdist", sources, tmp_path, "none")
    with tarfile.open(sdist) as archive:
        names = [member.name.split("/", 1)[1] for member in archive if member.isfile()]
    kept = {"setup.py", "pyproject.toml", "setup.cfg", "MANIFEST.in", "CMakeLists.txt", "README.md", "CHANGELOG.md"}
    kept |= {"LICENSE", "PKG-INFO"}
    csrc = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*") if path.is_file()}
    assert csrc and {n for n in names if ".egg-info/" not in n} == kept | package_files(sources) | csrc


needs_nm = pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs nm and g++")


@needs_nm
def test_the_library_asks_torch_only_for_what_its_oldest_torch_has(tmp_path):
    """Of libtorch it uses the C functions that the headers declare for 2.10; of Python nothing.

    A symbol of C++ (at::, c10::, torch::) or one added later would make the file refuse to load somewhere.
    """
    if not compiled_here():
        pytest.skip("nothing compiled here")
    import torch

    listed = ["nm", "-D", "--undefined-only", str(_backends.LIBRARY)]
    symbols = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = {line.split()[-1] for line in symbols if "@" not in line}
    of_torch = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
    probe = tmp_path / "probe.h"
    probe.write_text("#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n")
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10
    command = ["g++", "-E", "-P", "-std=c++17", target, f"-I{Path(torch.__file__).parent / 'include'}", str(probe)]
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", subprocess.check_output(command, text=True)))
    assert len(of_torch) > 20 and of_torch <= declared, sorted(of_torch - declared)
    assert "torch_from_blob" not in declared  # added in 2.11: the headers do tell versions apart
    assert not {name for name in wanted - of_torch if re.match(r"_?Py|_ZNK?(2at|3c10|5torch|8pybind11)", name)}


def test_a_command_without_its_extra_names_it(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(\"No module named 'tyro'\", name='tyro')")
    done = python("-m", "dlb_fast", "demo", check=False, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1 and 'pip install "dlb_fast[train]"' in done.stderr
