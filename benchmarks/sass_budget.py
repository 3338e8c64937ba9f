"""What the CUDA kernels will cost per logit by their machine code, without a GPU: a prediction, not a measurement.

    python -m benchmarks.sass_budget                 needs nvcc, and nvdisasm and cuobjdump (Triton's wheel has both)

For each C it takes the kernel that C gets, and counts twice what a warp issues for a pair of rows (one taught, one not)
with labels, buffer and gradient, per logit of the pair, beside what an H200 can issue in the time its memory takes.

executed: a batch runs through the kernel's PTX on the machine of tests/ptx, which counts how often each instruction is
issued; each machine instruction counts as often as the one of PTX that it comes from. Nothing is left out but the
blocks that collectives take when lanes are apart: roles, addresses, one row's coefficients, and what a block does once,
shared by the eight pairs that each group takes. It overstates what the assembler moved out of loops or made twice.

row work: the straight pieces of code that hold exponentials, reductions, conversions or 16-byte accesses, each once,
also those of both forms of the buffer's dtype and what a block does once; no pieces that move single elements at a
row's ends. It leaves out the rest, so it is too small; it needs no run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
# H200: multiprocessors, clock, copy bandwidth; a clock of one issues 4 warp instructions and 16 special functions.
PROCESSORS, CLOCK, BANDWIDTH, ISSUES, SPECIAL = 132, 1.75e9, 4.2e12, 4, 16
LATENCY = 700e-9  # of a read from memory under load
COLUMNS = {"lanes": 16, "warp": 32, "block": 32, "cluster": 32}  # a thread holds of one row
ROWS = {"lanes": 1024, "warp": 256, "block": 32, "cluster": 16}  # eight pairs for each group of one multiprocessor
GROUPS = {"lanes": "LaneGroupILi8E", "warp": "LaneGroupILi32E", "block": "BlockGroupILi512E", "cluster": "ClusterGroup"}
SIZES = {"f32": 4, "bf16": 2, "f16": 2}

Block = list[tuple[str, str]]


class Cost(NamedTuple):
    """Of one regime and dtype: warp instructions and exponentials per logit and lane, registers, bytes on their way."""

    issued: float
    special: float
    registers: int
    in_flight: float
    budget: float

    @property
    def issue_share(self) -> float:
        """Share of the instructions an H200 can issue while its memory moves the rows."""
        return self.issued / self.budget

    @property
    def special_share(self) -> float:
        """The same of the special function units."""
        return self.special / (self.budget * SPECIAL / (ISSUES * 32))


def tool(name: str) -> str | None:
    """A CUDA binary tool: on PATH, or the one in Triton's wheel."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except Exception:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


def code_of(cubin: Path) -> dict[str, list[Block]]:
    """Kernel -> its pieces of straight code, each a list of (opcode, operands)."""
    text = subprocess.run([str(tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Block]] = {}
    pieces: list[Block] = []
    for line in text.splitlines():
        if start := re.match(r"\.text\.(\S+):", line):
            pieces = found[start.group(1)] = [[]]
        elif re.match(r"\.L_x_\d+:", line):
            pieces.append([])
        elif each := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)", line):
            pieces[-1].append((each.group(1), each.group(2)))
            if each.group(1).startswith(("BRA", "EXIT", "RET", "BSYNC")):
                pieces.append([])
    return {name: [piece for piece in made if piece] for name, made in found.items()}


def is_row_work(piece: Block) -> bool:
    """Exponentials, a row's reductions, packed conversions or whole packets, and no single elements of a row."""
    names = Counter(name.split(".")[0] for name, _ in piece)
    wide = any(name.startswith(("LDG", "STG")) and ".128" in name for name, _ in piece)
    single = sum(name.startswith(("LDG", "STG")) and (".U16" in name or ".U8" in name) for name, _ in piece)
    special = sum(name.startswith("MUFU.EX2") for name, _ in piece)
    return single == 0 and (special > 3 or wide or names["F2FP"] > 1 or names["SHFL"] > 4)


def registers_of(cubin: Path) -> dict[str, int]:
    """Kernel -> registers of a thread."""
    command = [str(tool("cuobjdump")), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


def loads_together(pieces: list[Block]) -> int:
    """Bytes of a thread on their way: of the 16-byte loads between two uses of what was loaded, the fewest."""
    waiting: set[str] = set()
    groups = []
    for name, operands in (line for piece in pieces for line in piece):
        used = re.findall(r"\bR(\d+)\b", operands)
        if name.startswith("LDG") and ".128" in name:
            waiting.update(str(int(used[0]) + i) for i in range(4))
        elif waiting.intersection(used):
            groups.append(len(waiting) * 4)
            waiting.clear()
    return min(groups, default=len(waiting) * 4)


def cost(pieces: list[Block], registers: int, regime: str, size: int) -> Cost:
    """What a kernel costs per logit of a pair."""
    logits = 2 * COLUMNS[regime]
    row = [piece for piece in pieces if is_row_work(piece)]
    issued = sum(map(len, row))
    special = sum(name.startswith("MUFU") for piece in row for name, _ in piece)
    threads = min(2048, 65536 // ((registers + 7) // 8 * 8))
    # 3 units of traffic per logit; per clock and multiprocessor so many logits, each with so many lane instructions.
    logits_per_clock = BANDWIDTH / (3 * size) / PROCESSORS / CLOCK
    budget = ISSUES * 32 / logits_per_clock
    return Cost(issued / logits, special / logits, registers, threads // 128 * 128 * loads_together(pieces), budget)


def compile_kernels(dtype: str, folder: Path) -> Path:
    """nvcc's machine code for sm_90."""
    out = folder / f"{dtype}.cubin"
    command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-arch=sm_90", str(CUDA / f"kernels_{dtype}.cu"), "-o", str(out)]
    subprocess.run(command, check=True)
    return out


def costs(cubin: Path, dtype: str) -> dict[tuple[str, bool], Cost]:
    """Regime, and whether its rows are whole packets -> the cost of its kernel by row work."""
    registers = registers_of(cubin)
    found = {}
    for name, pieces in code_of(cubin).items():
        for regime, group in GROUPS.items():
            if "resident_kernel" in name and group in name:
                found[regime, "ELb1E" in name] = cost(pieces, registers[name], regime, SIZES[dtype])
    return found


def origins(cubin: Path, name: str) -> list[int]:
    """For each instruction of a kernel the line of the PTX it comes from, without those of lanes that are apart."""
    command = [str(tool("nvdisasm")), "-c", "--print-line-info-ptx", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, inside, line = [], False, 0
    for each in text.splitlines():
        if start := re.match(r"\.text\.(\S+):", each):
            inside = start.group(1) == name
        elif "WARPSYNC.COLLECTIVE" in each:  # they stand at the end
            inside = False
        elif place := re.search(r'nv_debug_ptx_txt", line (\d+)', each):
            line = int(place.group(1))
        elif inside and re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", each):
            found.append(line)
    return found


def executed(dtype: str, classes: int, folder: Path) -> tuple[str, str, float]:
    """Regime and name of the kernel that ``classes`` gets, and the instructions that it issues per logit and lane."""
    sys.path.append(str(CUDA.parent.parent / "tests"))
    import torch
    from ptx import compilers, harness
    from ptx.oracle import Stream, batch

    used = []

    def noted(unit: str, name: str) -> harness.Kernel:
        used.append((unit, name))
        return harness.kernel(unit, name)

    kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    device = harness.Emulator(multiprocessors=1, kernel=noted)
    small = batch(2, classes, kind)
    regime = device.last_batch(*small[:2], plan_only=True).plan["regime"]
    rows = ROWS[regime]
    stream = Stream(device, classes, rows // 2, kind)
    stream.step(*batch(rows // 2, classes, kind)[:2], num_old=0, again=0, losses=False)
    unit, name = used[-1]
    kernel = harness.kernel(unit, name)
    before = list(kernel.issued)
    stream.step(*batch(rows, classes, kind)[:2], num_old=rows // 2, again=0, losses=False)
    assert used[-1] == (unit, name), "both batches get the same kernel"
    issued: Counter[int] = Counter()
    for one, now, then in zip(kernel.program.code, kernel.issued, before, strict=True):
        issued[one.line] = max(issued[one.line], now - then)
    source, cubin = compilers.module(unit), folder / f"{dtype}_lines.cubin"
    if not cubin.exists():
        command = [str(compilers.nvcc()), "-O3", "-cubin", "-arch=sm_90", "-lineinfo", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True)
    total = sum(issued[line] for line in origins(cubin, name))
    return regime, name, total * 32 / (rows * classes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="sass_budget", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(SIZES), default=["bf16", "f32"])
    parser.add_argument("--classes", nargs="+", type=int, default=[100, 104, 1000, 1001, 8192, 21841, 32000])
    args = parser.parse_args()
    needed = BANDWIDTH / 2 * LATENCY / PROCESSORS
    print("PREDICTION from machine code (sm_90), not a measurement; per logit of a pair of rows, one of them taught")
    print(f"{needed / 1024:.0f} KB on their way per multiprocessor keep the reading half of the traffic going\n")
    heads = ("executed", "of issue", "row work", "of issue", "special", "of special", "registers", "KB on way")
    print(f"{'':<24}" + "".join(f"{head:>12}" for head in heads))
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            by_kernel = costs(compile_kernels(dtype, Path(folder)), dtype)
            for classes in args.classes:
                regime, name, issued = executed(dtype, classes, Path(folder))
                whole = "ELb1E" in name
                c = by_kernel[regime, whole]
                shown = [f"{issued:.1f}", f"{issued / c.budget:.0%}", f"{c.issued:.1f}", f"{c.issue_share:.0%}"]
                shown += [f"{c.special:.2f}", f"{c.special_share:.0%}", str(c.registers), f"{c.in_flight / 1024:.0f}"]
                label = f"{dtype} {classes} {regime}{' whole' if whole else ''}"
                print(f"{label:<24}" + "".join(f"{value:>12}" for value in shown))


if __name__ == "__main__":
    main()
