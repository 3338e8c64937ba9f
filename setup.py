"""Builds the compiled parts of dlb_fast: the op library (C++ and, where nvcc is, CUDA) and the build-info module.

DLB_FAST_BUILD  auto     build what the tools here can build, and install without the rest (the default)
                require  fail when anything that could be built is not
                cpu      C++ only, required        cuda  C++ and CUDA, required        none  pure Python
DLB_FAST_CUDA_ARCHS  what to compile CUDA for: the GPUs visible here and PTX, otherwise 75,80,90,100+ptx,120

CUDA is built where nvcc is and torch can use it; beside a CPU build of torch only when asked for with "cuda".

The op library is loaded by torch and tied to neither a Python nor (through the stable ABI) a torch version newer than
2.10. It is compiled here directly, because torch's CUDAExtension refuses to work beside a CPU build of torch.
"""

import functools
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("DLB_FAST_BUILD", "auto")
MODES = ("auto", "require", "cpu", "cuda", "none")
X86 = platform.machine().lower() in ("x86_64", "amd64")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # libtorch 2.10
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    # What the row loops need to be vectorised; NaN and infinities keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
]
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512",
}
# The resize's weights are rounded as torch's are: a * b + c in two roundings, also where the machine has one for both.
EXACT = {"cpu/resized_crop_cpu.cpp": ["-ffp-contract=off"]}
CUDA_SOURCES = ("last_batch_cuda.cu", "kernels_f32.cu", "kernels_bf16.cu", "kernels_f16.cu", "prove.cpp")
# What libdlb_fast_kernels.so is linked of: these, and the CPU op that they are proven against.
KERNELS = (*(Path(source).stem for source in CUDA_SOURCES), "last_batch_cpu", "last_batch_rows", "isa")
CUDART = ("-lcudart_static", "-lpthread", "-ldl", "-lrt")
EVERY_ARCH = "75,80,90,100+ptx,120"  # Turing to Blackwell, and PTX for what has no machine code


def torch_home() -> tuple[Path, str]:
    """Where torch is, and its version; raises ImportError in a build environment without it."""
    import torch

    return Path(torch.__file__).parent, torch.__version__


def compiler() -> list[str]:
    """$CXX, or the first C++ compiler on PATH."""
    wished = os.environ.get("CXX")
    found = shlex.split(wished) if wished else [n for n in ("g++", "clang++", "c++") if shutil.which(n)][:1]
    if not found or not shutil.which(found[0]):
        raise FileNotFoundError(f"no C++ compiler found ({wished or 'g++, clang++, c++'})")
    return found


def nvcc() -> str | None:
    """$CUDA_HOME/bin/nvcc, or the one on PATH; None without it, or where nothing could run what it compiles."""
    import torch

    if MODE == "cpu" or (MODE != "cuda" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(str(Path(home) / "bin" / "nvcc")) or shutil.which("nvcc")
    if not found and MODE == "cuda":
        raise FileNotFoundError("DLB_FAST_BUILD=cuda, but nvcc is neither in $CUDA_HOME/bin nor on PATH")
    return found


@functools.cache
def cuda_archs() -> str:
    """The compute capabilities to compile for, as in "80,90+ptx": always with PTX, which newer GPUs compile."""
    import torch

    if wished := os.environ.get("DLB_FAST_CUDA_ARCHS"):
        return wished
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if seen and torch.version.hip is None:
        lowest, *others = sorted(major * 10 + minor for major, minor in seen)
        return ",".join([f"{lowest}+ptx", *map(str, others)])
    listed = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in EVERY_ARCH.split(",") if f"compute_{arch.removesuffix('+ptx')}\n" in listed]
    known = known or EVERY_ARCH.split(",")
    return ",".join(known if any("+ptx" in arch for arch in known) else [*known[:-1], f"{known[-1]}+ptx"])


def toolkit_warning(cuda: str) -> str:
    """What users of older drivers will meet: the runtime of nvcc's toolkit is linked in; "" where nothing is newer."""
    import torch

    told = subprocess.run([cuda, "--version"], capture_output=True, text=True).stdout
    ours = re.search(r"release (\d+)\.", told)
    theirs = [int(torch.version.cuda.split(".")[0])] if torch.version.cuda else []
    if torch.cuda.is_available() and torch.version.hip is None:
        theirs.append(torch._C._cuda_getDriverVersion() // 1000)
    if ours is None or not theirs or int(ours[1]) <= min(theirs):
        return ""
    return (
        f"dlb_fast: nvcc is of CUDA {ours[1]}, torch or the driver of CUDA {min(theirs)}. The CUDA kernels will start "
        f"only where the driver supports CUDA {ours[1]}; set CUDA_HOME to a toolkit of CUDA {min(theirs)} for the rest"
    )


def gencode() -> list[str]:
    """nvcc's flags: "80,90+ptx" is machine code for both and PTX of the last."""
    flags = []
    for arch in cuda_archs().lower().split(","):
        number, ptx = arch.removesuffix("+ptx"), arch.endswith("+ptx")
        if not number.isdigit():
            raise ValueError(f"DLB_FAST_CUDA_ARCHS must look like {EVERY_ARCH}, got {cuda_archs()!r}")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def run(command: list[str]) -> None:
    """Run one compiler, showing what it said when it failed; nothing to do when its output is newer than csrc/."""
    target = Path(command[command.index("-o") + 1])
    sources = [*(ROOT / "csrc").rglob("*.*"), ROOT / "dlb_fast" / "options.h", ROOT / "setup.py"]
    newest = max(path.stat().st_mtime for path in sources)
    if "-c" in command and target.exists() and target.stat().st_mtime > newest:
        return
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_commands(out: Path, torch_dir: Path) -> list[tuple[Path, list[str]]]:
    """(object, command) of every source of the libraries."""
    cxx, csrc = compiler(), ROOT / "csrc"
    define = ["-DDLB_FAST_X86"] if X86 else []
    commands = []
    for stem, (isa, flags) in itertools.product(("last_batch_rows", "resized_crop_rows"), ISA_FLAGS.items()):
        if X86 or isa == "portable":
            target = out / f"{stem}_{isa}.o"
            source = str(csrc / "cpu" / f"{stem}.cpp")
            extra = [f"-DDLB_FAST_ISA={isa}", *flags.split()]
            commands.append((target, [*cxx, *CXX_FLAGS, *extra, "-c", source, "-o", str(target)]))
    cuda = nvcc()
    bindings = ["last_batch.cpp", "resized_crops.cpp"]
    bindings += ["last_batch_on_cuda.cpp"] if cuda else []
    for source in ("cpu/last_batch_cpu.cpp", "cpu/resized_crop_cpu.cpp", "cpu/isa.cpp", *bindings):
        target = out / (Path(source).stem + ".o")
        include = [STABLE_ABI, f"-I{torch_dir / 'include'}"] if source in bindings else EXACT.get(source, [])
        commands.append((target, [*cxx, *CXX_FLAGS, *define, *include, "-c", str(csrc / source), "-o", str(target)]))
    for source in CUDA_SOURCES if cuda else ():
        target = out / f"{Path(source).stem}_sm{cuda_archs()}.o"
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", f'-DDLB_FAST_CUDA_ARCHS="{cuda_archs()}"']
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *host, *gencode()]
        commands.insert(0, (target, [str(cuda), *flags, "-c", str(csrc / "cuda" / source), "-o", str(target)]))
    return commands  # the slow ones first


def build_library(destination: Path, scratch: Path) -> None:
    """Compile csrc/ and link libdlb_fast_ops.so into ``destination``."""
    torch_dir, version = torch_home()
    scratch.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    objects = compile_commands(scratch, torch_dir)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(run, [command for _, command in objects]))
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "libdlb_fast_kernels.so").unlink(missing_ok=True)  # of a build with nvcc
    # libtorch has to stay in NEEDED: torch.ops.load_library resolves symbols through it.
    link = ["-Wl,--no-as-needed", f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    cuda, built = nvcc(), [target for target, _ in objects]
    if cuda:
        # The kernels are a library of their own, which loads without torch: the prover runs the very code that the ops
        # run. The CUDA runtime is static: it then loads on machines without CUDA, and beside any CUDA torch.
        home = Path(cuda).resolve().parent.parent
        where = [f"-L{home / part}" for part in ("lib64", "targets/x86_64-linux/lib", "lib")]
        ours = [target for target in built if target.stem.startswith(KERNELS)]
        kernels = link_library(destination / "libdlb_fast_kernels.so", ours, [*where, *CUDART])
        built = [target for target in built if "_sm" not in target.stem]
        link = [str(kernels), "-Wl,-rpath,$ORIGIN", *link]
    library = link_library(destination / "libdlb_fast_ops.so", built, link)
    parts = f"C++ and CUDA {cuda_archs()}" if cuda else "C++"
    print(f"dlb_fast: built {library.name} ({parts}) against torch {version} in {time.perf_counter() - start:.0f} s")
    if cuda and (warning := toolkit_warning(cuda)):
        print(warning)


def link_library(library: Path, objects: list[Path], link: list[str]) -> Path:
    """Link aside and move into place: a process that has the old file mapped keeps it."""
    fresh = library.with_suffix(".new")
    run([*compiler(), "-shared", f"-Wl,-soname,{library.name}", "-o", str(fresh), *map(str, objects), *link])
    os.replace(fresh, library)
    return library


class BuildOps(build_ext):
    """build_ext that also builds the op library, and in auto mode lets the package install without either."""

    def run(self) -> None:
        if MODE not in MODES:
            raise ValueError(f"DLB_FAST_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
        if MODE == "none":
            print("dlb_fast: DLB_FAST_BUILD=none, nothing is compiled; the losses run in plain PyTorch")
            self.extensions = []
            return
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "dlb_fast" if in_place else Path(self.build_lib) / "dlb_fast"
        try:
            build_library(package / "lib", ROOT / "build" / f"ops-{platform.machine()}")
            super().run()
        except Exception as error:
            if MODE != "auto":
                raise
            self.extensions = []
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            print(f"dlb_fast: the compiled parts were not built ({reason}); the losses run in plain PyTorch")

    def build_extension(self, ext: Extension) -> None:
        torch_dir, version = torch_home()
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
        except ImportError:  # torch brings the same headers along
            ext.include_dirs.append(str(torch_dir / "include"))
        ext.define_macros.append(("DLB_FAST_TORCH_VERSION", f'"{version}"'))
        ext.define_macros.append(("DLB_FAST_CUDA_ARCHS", f'"{cuda_archs()}"' if nvcc() else '""'))
        self.force = True  # its sources are the same whatever it tells
        super().build_extension(ext)


class AnyPythonWheel(bdist_wheel):
    """One wheel per platform for every Python: the op library is tied to none, and a Python other than the one that
    built the wheel does without the build information."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


build_info = Extension(
    "dlb_fast._build",
    ["csrc/module.cpp", "csrc/cpu/isa.cpp"],
    language="c++",
    extra_compile_args=["-std=c++17", "-O1", "-g0", "-fvisibility=hidden"],
    define_macros=[("DLB_FAST_X86", "1")] if X86 else [],
)

if __name__ == "__main__":
    setup(
        ext_modules=[] if MODE == "none" else [build_info],
        cmdclass={"build_ext": BuildOps, "bdist_wheel": AnyPythonWheel},
    )
