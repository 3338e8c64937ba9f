"""What is installed: the wheel's and the sdist's content, a library that knows no Python and no newer torch, extras."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from dlb_fast import _backends, doctor

ROOT = Path(__file__).parent.parent


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
    environment = {**os.environ, "DLB_FAST_BUILD": mode}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return out / re.findall(r"^made (.*)$", done.stdout, re.M)[-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_of_the_sources(tmp_path_factory.mktemp("sources"))


def python_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in (root / "dlb_fast").rglob("*.py")}


def compiled_here() -> bool:
    if _backends.LIBRARY.exists():
        return True
    assert os.environ.get("DLB_FAST_BUILD") not in ("require", "cpu", "cuda"), "the library should have been built"
    return False


def test_a_wheel_without_compiler_is_the_package_and_nothing_else(sources, tmp_path):
    wheel = build("build_wheel", sources, tmp_path, "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == python_files(sources) | {"dlb_fast/py.typed"}
    metadata = next(n for n in names if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Requires-Python: >=3.10" in text and "Requires-Dist: torch>=2.10" in text
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "dlb-fast = dlb_fast.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


@pytest.mark.slow
def test_one_wheel_serves_every_python(tmp_path):
    """The objects of the checkout's own build are reused: linking and packing are what is tested here."""
    if not compiled_here():
        pytest.skip("nothing compiled here")
    source = copy_of_the_sources(tmp_path / "copy")
    for scratch in (ROOT / "build").glob("ops-*"):
        shutil.copytree(scratch, source / "build" / scratch.name)
    for made in (source / "build").rglob("*.o"):
        os.utime(made)
    wheel = build("build_wheel", source, tmp_path, os.environ.get("DLB_FAST_BUILD", "auto"))
    assert re.fullmatch(r"dlb_fast-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compiled = {name for name in inside if name.endswith(".so")}
    assert inside - compiled == python_files(source) | {"dlb_fast/py.typed"}
    assert {re.sub(r"\.cpython.*", "", name) for name in compiled} == {
        "dlb_fast/lib/libdlb_fast_ops.so",
        f"dlb_fast/lib/libdlb_fast_node-{torch_version()}.so",  # its version in its name: other torches pass it by
        f"dlb_fast/lib/libdlb_fast_call-{torch_version()}-{python_tag()}.so",  # and other Pythons this one
        "dlb_fast/_build",
    }
    # Installed where the checkout is out of reach, as for another Python: without the build-info module.
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "dlb_fast"
    for module in (*package.glob("_build.*"), *package.glob("lib/libdlb_fast_call-*")):
        module.unlink()
    code = "import dlb_fast, sys; from dlb_fast.doctor import main; print(dlb_fast.__file__); main(['--self-test'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert str(tmp_path / "installed") in done.stdout and "self-test cpu: passed" in done.stdout, done.stdout


def test_the_sdist_holds_all_sources_and_no_tests(sources, tmp_path):
    sdist = build("build_sdist", sources, tmp_path, "none")
    with tarfile.open(sdist) as archive:
        files = {
            member.name.split("/", 1)[1] for member in archive if member.isfile() and ".egg-info/" not in member.name
        }
    kept = {"setup.py", "pyproject.toml", "setup.cfg", "MANIFEST.in", "CMakeLists.txt", "README.md", "CHANGELOG.md"}
    kept |= {"LICENSE", "PKG-INFO", "dlb_fast/py.typed"}
    csrc = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*") if path.is_file()}
    assert csrc and files == kept | python_files(sources) | csrc


def python_tag() -> str:
    return str(sysconfig.get_config_var("SOABI")).split("-")[1]


def torch_version() -> str:
    import torch

    return torch.__version__


def undefined_symbols(library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs binutils and g++")
def test_the_library_asks_torch_only_for_what_its_oldest_torch_has(tmp_path):
    """Of libtorch it uses the C functions that the headers declare for 2.10; of Python nothing.

    A symbol of C++ (at::, c10::, torch::) or one added later would make the file refuse to load somewhere.
    """
    if not compiled_here():
        pytest.skip("nothing compiled here")
    import torch

    wanted = {name for name in undefined_symbols(_backends.LIBRARY) if "@" not in name}
    of_torch = {name for name in wanted if re.match(r"(aoti_)?torch_", name)}
    include = Path(torch.__file__).parent / "include"
    probe = tmp_path / "probe.h"
    probe.write_text("#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n")
    setup = (ROOT / "setup.py").read_text()
    (target,) = re.findall(r"TORCH_TARGET_VERSION=(0x\w+)", setup)
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert int(target, 16) == int(oldest[1]) << 56 | int(oldest[2]) << 48
    command = ["g++", "-E", "-P", "-std=c++17", f"-DTORCH_TARGET_VERSION={target}", f"-I{include}", str(probe)]
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", subprocess.check_output(command, text=True)))
    assert len(of_torch) > 20 and of_torch <= declared, sorted(of_torch - declared)
    assert "torch_from_blob" not in declared  # added in 2.11: the headers do tell versions apart
    foreign = {name for name in wanted - of_torch if re.match(r"_?Py|_ZNK?(2at|3c10|5torch|8pybind11)", name)}
    assert not foreign


def test_the_doctor_tells_how_it_was_built_and_does_without(monkeypatch, capsys):
    assert doctor.main([]) == 0
    assert ("compiled by" in capsys.readouterr().out) == bool(list((ROOT / "dlb_fast").glob("_build.*")))
    monkeypatch.setitem(sys.modules, "dlb_fast._build", None)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "compiled by" not in out and "implementations of the loss" in out


@pytest.mark.skipif(not shutil.which("nm") or bool(_backends.load_library()), reason="needs nm and the library")
def test_the_library_asks_nothing_of_a_python():
    """One file for every Python: symbols come and go between their versions."""
    done = subprocess.run(["nm", "-D", "-u", str(_backends.LIBRARY)], capture_output=True, text=True, check=True)
    assert not re.findall(r"\b_?Py[A-Z_]\w*", done.stdout)


def test_the_sources_use_no_macro_that_older_headers_lack():
    """torch renamed the stable ABI's macros from version to version; these two are in 2.10 and in all since."""
    text = "".join(p.read_text() for p in (ROOT / "csrc").glob("*.*"))
    used = set(re.findall(r"\b(?:STABLE_)?TORCH_\w*(?:LIBRARY|CHECK|CODE)\w*", text))
    assert used <= {"STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL"}, used


def test_a_command_without_its_extra_names_it():
    code = "import sys; sys.modules['tyro'] = None; from dlb_fast.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and 'pip install "dlb_fast[train]"' in done.stderr


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_the_dockerfile_copies_what_exists_and_a_build_needs():
    """No image is built here; what can be told without Docker is."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied, stages = set(), []
    for keyword, rest in instructions():
        if keyword == "FROM":
            stages.append(rest)
        if keyword == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for name in sources:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in ignored, f".dockerignore hides {name}"
            copied |= set(sources)
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    # What the sdist says a build needs.
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = set(re.findall(r"^graft (\S+)", manifest, re.M)) | set(
        " ".join(re.findall(r"^include (.+)", manifest, re.M)).split()
    )
    assert named | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "dlb_fast", "MANIFEST.in"} <= copied
    assert len(stages) == 2 and stages[0].endswith("-devel AS build") and stages[1].endswith("-runtime")
    before_start = [keyword for keyword, _ in instructions()]
    assert before_start.index("USER") < before_start.index("ENTRYPOINT")  # nothing runs as root


def test_the_dockerfiles_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / "Dockerfile").read_text()
    targets = [rest.split()[1] for keyword, rest in instructions() if keyword == "RUN" and rest.startswith("make")]
    assert targets == ["wheel"]
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "-w dist" in makefile and "/src/dist/*.whl" in text
    from dlb_fast.presets import get_preset

    for preset in re.findall(r"--preset ([\w-]+)", text):
        get_preset(preset)
    modes = re.findall(r"DLB_FAST_BUILD=(\w+)", text)
    assert modes == ["cuda"]  # a failing kernel fails the image


def test_every_extra_is_there_with_least_versions():
    """`pip install "dlb_fast[X]"` for each X that README, docs and messages name, every requirement with a floor."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = {name: re.findall(r'"([^"]+)"', rest) for name, rest in re.findall(r"^(\w+) = \[(.*)\]", section, re.M)}
    assert {"train", "triton", "bench", "lightning", "hf", "timm", "export", "docs", "test", "dev"} <= set(extras)
    for name, requirements in extras.items():
        for requirement in requirements:
            assert re.match(r"dlb_fast\[|[\w.-]+(\[\w+\])?[>=]=\d", requirement), f"{name}: {requirement}"
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "dlb_fast").rglob("*.py")]
    named = {
        n
        for page in pages
        for found in re.findall(r"(?:dlb_fast|\.)\[([a-z,]+)\]\"", page.read_text())
        for n in found.split(",")
    }
    assert named <= set(extras)
