"""What the CUDA kernels will cost per logit by their machine code, without a GPU: a prediction, not a measurement.

    python -m benchmarks.sass_budget                 needs nvcc, and nvdisasm and cuobjdump (Triton's wheel has both)

For each regime that holds its rows it counts the instructions that a warp issues for one pair of rows (one taught, one
not) with labels, buffer and gradient, per logit of the pair, and compares with what an H200 can issue in the time its
memory takes. Counted are the straight pieces of code that hold exponentials, reductions, conversions or 16-byte
accesses, each once: both forms of the loads (in place or not) and of the buffer's dtype are in there, and pieces that
move single elements at a row's ends are not. What is neither (roles, addresses, one row's coefficients) comes on top,
once a row and thread: `other` bounds it from above by all the code there is between.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"
# H200: multiprocessors, clock, copy bandwidth; a clock of one issues 4 warp instructions and 16 special functions.
PROCESSORS, CLOCK, BANDWIDTH, ISSUES, SPECIAL = 132, 1.75e9, 4.2e12, 4, 16
LATENCY = 700e-9  # of a read from memory under load
COLUMNS = {"lanes": 16, "warp": 32, "block": 32, "cluster": 32}  # a thread holds of one row
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


def costs(cubin: Path, dtype: str) -> dict[str, Cost]:
    """Regime -> its cost, for the kernels taught by logits."""
    registers = registers_of(cubin)
    found = {}
    for name, pieces in code_of(cubin).items():
        for regime, group in GROUPS.items():
            if "resident_kernel" in name and "TeachE1" in name and group in name:
                found[regime] = cost(pieces, registers[name], regime, SIZES[dtype])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="sass_budget", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(SIZES), default=["bf16", "f32"])
    needed = BANDWIDTH / 2 * LATENCY / PROCESSORS
    print("PREDICTION from machine code (sm_90), not a measurement; per logit of a pair of rows, one of them taught")
    print(f"{needed / 1024:.0f} KB on their way per multiprocessor keep the reading half of the traffic going\n")
    heads = ("instructions", "of issue", "special", "of special", "registers", "KB on way")
    print(f"{'':<14}" + "".join(f"{head:>14}" for head in heads))
    for dtype in parser.parse_args().dtypes:
        with tempfile.TemporaryDirectory() as folder:
            for regime, c in costs(compile_kernels(dtype, Path(folder)), dtype).items():
                shown = [f"{c.issued:.1f}", f"{c.issue_share:.0%}", f"{c.special:.2f}", f"{c.special_share:.0%}"]
                shown += [str(c.registers), f"{c.in_flight / 1024:.0f}"]
                print(f"{dtype} {regime:<9}" + "".join(f"{value:>14}" for value in shown))


if __name__ == "__main__":
    main()
