"""PTX text, decoded for ``machine.cpp``: one record per instruction, registers as rows of 32 lanes.

What is not in the tables below is an error that names the instruction: nothing is guessed.
"""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import dataclass, field, replace

RECORD = struct.Struct("<3i6i4i4xq")
NO_REGISTER = 2**31 - 1
SHARED_BASE = 1024
WIDTH = {"pred": 1, "b8": 2, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
WIDTH |= {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (32, 64)}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMPARE = {name: i for i, name in enumerate(COMPARISONS)}
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}
SPECIAL = {
    "%tid.x": 0, "%ntid.x": 1, "%ctaid.x": 2, "%nctaid.x": 3, "%laneid": 4, "%cluster_ctarank": 5,
    "%cluster_nctarank": 6, "%clusterid.x": 7, "%nclusterid.x": 8,
}  # fmt: skip


class UnknownPtx(Exception):
    """An instruction, operand or directive that the machine does not model."""


def _table() -> dict[str, tuple[str, tuple[int, ...], int]]:
    """PTX opcode -> the machine's operation, the operands' bytes (result first), a number that goes with it."""
    table: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def known(names: str, operation: str, *widths: int, number: int = 0) -> None:
        for name in names.split():
            assert name not in table, name
            table[name] = (operation, widths, number)

    for bits in (32, 64):
        f, w = f"f{bits}", bits // 8
        for name in ("add", "sub", "mul"):
            known(f"{name}.{f} {name}.rn.{f}", f"{name}_{f}", w, w, w)
        known(f"div.rn.{f}", f"div_{f}", w, w, w)
        known(f"fma.rn.{f}", f"fma_{f}", w, w, w, w)
        for name in ("min", "max"):
            known(f"{name}.{f}", f"{name}_{f}", w, w, w)
        for name in ("neg", "abs"):
            known(f"{name}.{f}", f"{name}_{f}", w, w)
        known(f"mov.{f}", f"mov_b{bits}", w, w)
        known(f"selp.{f}", f"selp_b{bits}", w, w, w, 1)
    known("fma.rn.ftz.f32", "fma_ftz_f32", 4, 4, 4, 4)
    known("abs.ftz.f32", "abs_ftz_f32", 4, 4)
    known("div.full.f32", "div_full_f32", 4, 4, 4)
    known("rcp.rn.f32", "rcp_f32", 4, 4)
    known("rcp.approx.f32 rcp.approx.ftz.f32", "rcp_approx_f32", 4, 4)
    known("ex2.approx.f32 ex2.approx.ftz.f32", "ex2_approx_f32", 4, 4)
    known("lg2.approx.f32 lg2.approx.ftz.f32", "lg2_approx_f32", 4, 4)
    known("rcp.approx.ftz.f64", "rcp_approx_f64", 8, 8)
    known("abs.bf16 abs.f16", "abs_b16", 2, 2)
    known("neg.bf16 neg.f16", "neg_b16", 2, 2)
    for bits in (16, 32, 64):
        w = bits // 8
        for name in ("add", "sub"):
            known(f"{name}.s{bits} {name}.u{bits}", f"{name}_b{bits}", w, w, w)
        for name in ("and", "or", "xor"):
            known(f"{name}.b{bits}", f"{name}_b{bits}", w, w, w)
        known(f"not.b{bits}", f"not_b{bits}", w, w)
        known(f"mov.b{bits} mov.u{bits} mov.s{bits}", f"mov_b{bits}", w, w)
        known(f"selp.b{bits} selp.u{bits} selp.s{bits}", f"selp_b{bits}", w, w, w, 1)
        known(f"shl.b{bits}", f"shl_b{bits}", w, w, 4)
        known(f"shr.u{bits} shr.b{bits}", f"shr_u{bits}", w, w, 4)
        known(f"shr.s{bits}", f"shr_s{bits}", w, w, 4)
        if bits == 16:
            continue
        known(f"mul.lo.s{bits} mul.lo.u{bits}", f"mul_b{bits}", w, w, w)
        known(f"mad.lo.s{bits} mad.lo.u{bits}", f"mad_b{bits}", w, w, w, w)
        known(f"bfi.b{bits}", f"bfi_b{bits}", w, w, w, 4, 4)
        known(f"neg.s{bits}", f"neg_s{bits}", w, w)
        for name, kind in itertools.product(("div", "rem", "min", "max"), "su"):
            known(f"{name}.{kind}{bits}", f"{name}_{kind}{bits}", w, w, w)
    for kind in "su":
        known(f"mul.wide.{kind}32", f"mul_wide_{kind}32", 8, 4, 4)
        known(f"mul.hi.{kind}32", f"mul_hi_{kind}32", 4, 4, 4)
        known(f"mul.hi.{kind}64", f"mul_hi_{kind}64", 8, 8, 8)
        known(f"mad.wide.{kind}32", f"mad_wide_{kind}32", 8, 4, 4, 8)
    known("abs.s32", "abs_s32", 4, 4)
    known("bfe.u32", "bfe_u32", 4, 4, 4, 4)
    for name in ("and", "or", "xor"):
        known(f"{name}.pred", f"{name}_pred", 1, 1, 1)
    known("not.pred", "not_pred", 1, 1)
    known("mov.pred", "mov_pred", 1, 1)
    for kind, bits in itertools.product("su", (16, 32, 64)):
        for name in ("eq", "ne", "lt", "le", "gt", "ge", *(("lo", "ls", "hi", "hs") if kind == "u" else ())):
            known(f"setp.{name}.{kind}{bits}", f"setp_{kind}{bits}", 1, bits // 8, bits // 8, number=COMPARE[name])
    for bits, name in itertools.product((16, 32, 64), ("eq", "ne")):
        known(f"setp.{name}.b{bits}", f"setp_u{bits}", 1, bits // 8, bits // 8, number=COMPARE[name])
    for kind, name in itertools.product(("f32", "f64", "bf16", "f16"), COMPARISONS):
        known(f"setp.{name}.{kind}", f"setp_{kind}", 1, WIDTH[kind], WIDTH[kind], number=COMPARE[name])
    plain = ("s64.s32", "u64.u32", "u64.u16", "s64.s16", "u32.u64", "u16.u64", "u32.u16", "s32.s16", "u16.u32")
    rounded = ("rzi.s32.f32", "rzi.s64.f32", "rzi.s32.f64", "rzi.s64.f64")
    for name in (*plain, *rounded, "f64.f32", "f32.f16", "f32.bf16"):
        to, of = name.split(".")[-2:]
        known(f"cvt.{name}", f"cvt_{name.replace('.', '_')}", WIDTH[to], WIDTH[of])
    known("cvt.s32.s64 cvt.s32.u64 cvt.u32.s64", "cvt_u32_u64", 4, 8)
    known("cvt.s16.s32 cvt.u16.s32 cvt.s16.u32", "cvt_u16_u32", 2, 4)
    for name in ["f32.s32", "f32.u32", "f32.s64", "f64.s32", "f64.u32", "f64.s64", "f32.f64", "bf16.f32", "f16.f32"]:
        to, of = name.split(".")
        known(f"cvt.rn.{name}", f"cvt_{name.replace('.', '_')}", WIDTH[to], WIDTH[of])
    known("cvt.rn.bf16x2.f32", "cvt_bf16x2_f32", 4, 4, 4)
    known("cvt.rn.f16x2.f32", "cvt_f16x2_f32", 4, 4, 4)
    known("max.bf16x2", "max_bf16x2", 4, 4, 4)
    known("max.f16x2", "max_f16x2", 4, 4, 4)
    known("mapa.shared::cluster.u32", "mapa", 4, 4, 4)
    # An address within global or shared memory and the generic one are the same number here.
    known("cvta.to.global.u64 cvta.global.u64", "mov_b64", 8, 8)
    return table


TABLE = _table()
MEMORY = re.compile(
    r"(ld|st)\.(param|global|shared|shared::cluster)((?:\.(?:nc|cg|L1::\w+|L2::cache_hint))*)"
    r"(?:\.v([24]))?\.([busf])(8|16|32|64)"
)
ATOMIC = re.compile(r"atom\.global(\.gpu\.relaxed|\.gpu\.acq_rel|)\.add\.u(32|64)")
COLLECTIVE = {"redux.sync.add.s32": "redux_add", "redux.sync.min.s32": "redux_min", "redux.sync.max.s32": "redux_max"}
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")


@dataclass
class Instruction:
    operation: str
    guard_kind: int = 0
    guard: int = 0
    r: list[int] = field(default_factory=lambda: [0] * 6)
    size: int = 0
    count: int = 0
    width: int = 0
    flags: int = 0
    imm: int = 0
    text: str = ""
    line: int = 0  # of the module's text


@dataclass
class Program:
    """One kernel. ``parameters``: offset and bytes of each, in order."""

    name: str
    code: list[Instruction]
    constants: list[tuple[int, int, int]]  # bits, bytes, row
    register_bytes: int
    constant_bytes: int
    shared_bytes: int
    dynamic_shared: bool
    parameters: list[tuple[int, int]]

    @property
    def parameter_bytes(self) -> int:
        return sum(self.parameters[-1]) if self.parameters else 0

    def with_constant(self, bits: int, width: int) -> tuple[Program, int]:
        """The program with a constant more, and the operand that reads it."""
        constants = [*self.constants, (bits & ((1 << 8 * width) - 1), width, self.constant_bytes)]
        room = self.constant_bytes + -(-32 * width // 64) * 64
        return replace(self, constants=constants, constant_bytes=room), ~self.constant_bytes


def entries(text: str) -> dict[str, str]:
    """The kernels of a module: name -> the text from its parameters to its closing brace."""
    starts = [(m.group(1), m.end()) for m in re.finditer(r"\.entry\s+(\S+?)\s*\(", text)]
    ends = [start for _, start in starts[1:]] + [len(text)]
    return {name: text[start:end] for (name, start), end in zip(starts, ends, strict=True)}


def _operands(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


class _Decoder:
    def __init__(self, name: str, module: str, text: str) -> None:
        self.name = name
        self.rows: list[dict[str, tuple[int, int]]] = [{}]  # scopes: register -> row, bytes
        self.register_bytes = self.constant_bytes = self.shared_bytes = 0
        self.constants: dict[tuple[int, int], int] = {}
        self.symbols: dict[str, tuple[str, int]] = {}
        self.dynamic = False
        self.parameters: list[tuple[int, int]] = []
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        head, _, body = text.partition(")")
        self.line = module[: module.index(text) + text.index("{", len(head))].count("\n") + 1
        self._parameters(head)
        for kind in re.finditer(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", module):
            self.symbols[kind.group(1)] = ("shared", 0)
            self.dynamic = True
        body = re.sub(r"//[^\n]*", "", body[body.index("{") + 1 :])
        body = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*$", "", body, flags=re.M)
        self._body(body)

    def _parameters(self, head: str) -> None:
        end = 0
        for declaration in filter(None, (part.strip() for part in head.split(","))):
            array = re.search(r"\.align (\d+) \.b8 (\S+)\[(\d+)\]", declaration)
            if array:
                align, name, size = int(array[1]), array[2], int(array[3])
            else:
                kind = re.match(r"\.param\s+\.(\w+)", declaration)
                assert kind, declaration
                name, size = declaration.split()[-1], {"b8": 1, "u8": 1}.get(kind[1]) or WIDTH[kind[1]]
                align = size
            end = -(-end // align) * align
            self.symbols[name] = ("param", end)
            self.parameters.append((end, size))
            end += size

    def _new_row(self, width: int) -> int:
        row = self.register_bytes
        self.register_bytes += -(-32 * width // 64) * 64
        return row

    def _register(self, name: str) -> tuple[int, int] | None:
        for scope in reversed(self.rows):
            if name in scope:
                return scope[name]
        return None

    def _constant(self, bits: int, width: int) -> int:
        key = (bits & ((1 << 8 * width) - 1), width)
        if key not in self.constants:
            self.constants[key] = self.constant_bytes
            self.constant_bytes += -(-32 * width // 64) * 64
        return ~self.constants[key]

    def _value(self, operand: str, width: int) -> int:
        """The row of a register of exactly these bytes, or of a constant."""
        if found := self._register(operand):
            if found[1] != width:
                raise UnknownPtx(f"{operand} has {found[1]} bytes, expected {width}")
            return found[0]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", operand):
            return self._constant(int(operand[2:], 16), width)
        if NUMBER.fullmatch(operand):
            return self._constant(int(operand.rstrip("U"), 0), width)
        if operand in self.symbols:
            space, offset = self.symbols[operand]
            return self._constant(offset + (SHARED_BASE if space == "shared" else 0), width)
        raise UnknownPtx(f"operand {operand}")

    def _address(self, operand: str) -> tuple[int, int, int, str]:
        """Row and bytes of the register, the number added to it, and the symbol it names, if any."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise UnknownPtx(f"address {operand}")
        base, offset = found[1], int(found[2] or 0)
        if register := self._register(base):
            return register[0], register[1], offset, ""
        if base in self.symbols:
            space, place = self.symbols[base]
            return NO_REGISTER, 8, place + offset + (SHARED_BASE if space == "shared" else 0), space
        raise UnknownPtx(f"address {operand}")

    def _declare(self, kind: str, names: str) -> None:
        width = WIDTH.get(kind)
        if width is None:
            raise UnknownPtx(f"registers of type {kind}")
        for name in (part.strip() for part in names.split(",")):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.rows[-1][one] = (self._new_row(width), width)

    def _body(self, body: str) -> None:
        for statement in body.split(";"):
            rest, first = statement.strip(), len(self.code)
            self.line += statement.count("\n")
            while rest:
                if rest[0] == "{":
                    self.rows.append({})
                    rest = rest[1:].strip()
                elif rest[0] == "}":
                    self.rows.pop()
                    if not self.rows:  # the kernel's end; what follows is another one's
                        self._link()
                        return
                    rest = rest[1:].strip()
                elif label := re.match(r"(\$[\w$]+):\s*", rest):
                    self.labels[label[1]] = len(self.code)
                    rest = rest[label.end() :]
                else:
                    break
            if not rest:
                continue
            if rest[0] == ".":
                self._directive(rest)
                continue
            try:
                self._instruction(" ".join(rest.split()))
                for made in self.code[first:]:
                    made.line = self.line
            except UnknownPtx as error:
                raise UnknownPtx(f"{self.name}: {' '.join(rest.split())}: {error}") from None
        raise UnknownPtx(f"{self.name}: no end")

    def _directive(self, text: str) -> None:
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            self._declare(found[1], found[2])
        elif found := re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\S+)\[(\d+)\]", text):
            align = int(found[1])
            self.shared_bytes = -(-self.shared_bytes // align) * align
            self.symbols[found[2]] = ("shared", self.shared_bytes)
            self.shared_bytes += int(found[3])
        elif not text.startswith(".pragma"):
            raise UnknownPtx(f"{self.name}: directive {text}")

    def _instruction(self, text: str) -> None:
        made = Instruction("", text=text)
        if guard := re.match(r"@(!?)(%?[\w.]+)\s+(.*)", text):
            made.guard_kind, made.guard = 2 if guard[1] else 1, self._value(guard[2], 1)
            text = guard[3]
        opcode, _, rest = text.partition(" ")
        operands = _operands(rest)
        if opcode in ("bra", "bra.uni"):
            made.operation = "bra"
            self.jumps.append((len(self.code), operands[0]))
        elif opcode in ("ret", "exit", "trap"):
            made.operation = "trap" if opcode == "trap" else "exit_"
        elif opcode.startswith("mov.b") and operands[-1].startswith("{"):
            width, parts = WIDTH[opcode[4:]], _operands(operands[1].strip("{} "))
            if len(parts) != 2:
                raise UnknownPtx("parts")
            made.operation = f"pack_{opcode[4:]}"
            made.r[:3] = [self._value(operands[0], width), *(self._value(part, width // 2) for part in parts)]
        elif opcode.startswith("mov.b") and operands[0].startswith("{"):
            self._unpack(made, opcode[4:], operands)
            return
        elif opcode == "mov.u32" and operands[1] in SPECIAL:
            made.operation, made.imm = "special", SPECIAL[operands[1]]
            made.r[0] = self._value(operands[0], 4)
        elif found := MEMORY.fullmatch(opcode):
            self._memory(made, found, operands)
        elif found := ATOMIC.fullmatch(opcode):
            made.operation = "atom_add_acq_rel" if found[1].endswith("acq_rel") else "atom_add_relaxed"
            made.size = made.width = int(found[2]) // 8
            made.r[0] = self._new_row(made.size) if operands[0] == "_" else self._value(operands[0], made.size)
            made.r[4], made.r[5], made.imm, _ = self._address(operands[1])
            made.r[1] = self._value(operands[2], made.size)
        elif opcode in ("membar.gl", "fence.acq_rel.gpu", "fence.sc.gpu"):
            made.operation, made.imm = "fence", int(opcode != "fence.acq_rel.gpu")  # membar is fence.sc
        elif opcode == "prefetch.global.L2":
            made.operation = "prefetch"
            made.r[4], made.r[5], made.imm, _ = self._address(operands[0])
            made.r[1], made.flags = self._constant(1, 4), 1
        elif opcode in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            # When dependents may begin is a matter of time: the machine takes them to have begun at once.
            made.operation = "launch_wait" if opcode.endswith("wait") else "nop"
        elif opcode.startswith("createpolicy.fractional.L2::evict_"):
            made.operation = "mov_b64"
            made.r[:2] = [self._value(operands[0], 8), self._constant(0, 8)]
        elif opcode == "cp.async.bulk.prefetch.L2.global":
            made.operation = "prefetch"
            made.r[4], made.r[5], made.imm, _ = self._address(operands[0])
            made.r[1] = self._value(operands[1], 4)
        elif opcode in TABLE:
            made.operation, widths, made.imm = TABLE[opcode]
            if len(operands) != len(widths):
                raise UnknownPtx(f"{len(operands)} operands, expected {len(widths)}")
            if opcode.startswith("cvt"):  # whose operand may be wider than it reads
                operands = [operands[0], *(self._narrowed(o, w) for o, w in zip(operands[1:], widths[1:], strict=True))]
            made.r[: len(widths)] = [self._value(o, w) for o, w in zip(operands, widths, strict=True)]
            made.width = widths[0]
        else:
            self._collective(made, opcode, operands)
        self.code.append(made)

    def _collective(self, made: Instruction, opcode: str, operands: list[str]) -> None:
        """Of whole warps, blocks and clusters: the only forms the compilers emit here, and never under a predicate."""
        # The machine checks at run time that all lanes are named, and that exchanges span the warp.
        if opcode in ("bar.sync", "barrier.sync") and operands == ["0"]:
            made.operation = "bar_sync"
        elif opcode == "bar.warp.sync":
            made.operation, made.r[4] = "bar_warp", self._value(operands[0], 4)
        elif found := re.fullmatch(r"barrier\.cluster\.arrive(\.release|\.relaxed)?(\.aligned)?", opcode):
            made.operation, made.imm = "cluster_arrive", int(found[1] == ".relaxed")
        elif re.fullmatch(r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?", opcode):
            made.operation = "cluster_wait"
        elif opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            result, _, second = operands[0].partition("|")
            made.operation, made.imm = f"shfl_{opcode.split('.')[2]}", NO_REGISTER
            if second:
                made.imm = self._value(second, 1)
            made.r[:5] = [self._value(operand, 4) for operand in (result, *operands[1:])]
        elif opcode == "vote.sync.any.pred":
            made.operation = "vote_any"
            made.r[0], made.r[1], made.r[4] = (self._value(o, w) for o, w in zip(operands, (1, 1, 4), strict=True))
        elif found := re.fullmatch(r"(st|ld)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", opcode):
            made.operation, made.count = f"{found[1]}_matrix", int(found[2])
            values, address = operands if found[1] == "ld" else operands[::-1]
            parts = _operands(values.strip("{} "))
            made.r[: made.count] = [self._value(part, 4) for part in parts]
            made.r[4], made.r[5], made.imm, _ = self._address(address)
        elif opcode in COLLECTIVE:
            made.operation = COLLECTIVE[opcode]
            made.r[0], made.r[1], made.r[4] = (self._value(o, 4) for o in operands)
        else:
            raise UnknownPtx(f"no such instruction in the machine: {opcode}")
        if made.guard_kind:
            raise UnknownPtx("a collective under a predicate")

    def _narrowed(self, operand: str, width: int) -> str:
        register = self._register(operand)
        if register is None or register[1] <= width:
            return operand
        name, row = f"{operand}:{width}", register[0]
        if name not in self.rows[-1]:
            self.rows[-1][name] = (self._new_row(width), width)
        if register[1] != 2 * width:
            raise UnknownPtx(f"{operand} has {register[1]} bytes, expected {width}")
        low = Instruction(f"low_b{8 * register[1]}", r=[self.rows[-1][name][0], row, 0, 0, 0, 0], text="low half")
        self.code.append(low)
        return name

    def _unpack(self, made: Instruction, kind: str, operands: list[str]) -> None:
        width, parts = WIDTH[kind], _operands(operands[0].strip("{} "))
        if len(parts) != 2:
            raise UnknownPtx("parts")
        source = self._value(operands[1], width)
        for half, part in zip(("low", "high"), parts, strict=True):
            if part != "_":
                r = [self._value(part, width // 2), source, 0, 0, 0, 0]
                self.code.append(replace(made, operation=f"{half}_{kind}", r=r))

    def _memory(self, made: Instruction, found: re.Match[str], operands: list[str]) -> None:
        verb, space, modifiers, count, kind, bits = found.groups()
        made.size, made.count = int(bits) // 8, int(count or 1)
        values, address = (operands[0], operands[1]) if verb == "ld" else (operands[1], operands[0])
        if len(operands) != 2 + ("L2::cache_hint" in modifiers):
            raise UnknownPtx("operands")
        names = _operands(values.strip("{} "))
        if len(names) != made.count:
            raise UnknownPtx("parts")
        widths = {register[1] for name in names if (register := self._register(name))} or {max(made.size, 2)}
        made.width = widths.pop()
        if widths or made.width < made.size:
            raise UnknownPtx("registers of another size")
        made.r[: made.count] = [self._value(name, made.width) for name in names]
        made.r[4], made.r[5], made.imm, symbol = self._address(address)
        if symbol and symbol != space:
            raise UnknownPtx(f"{symbol} memory accessed as {space}")
        made.flags = (1 if ".nc" in modifiers else 0) | (2 if kind == "s" else 0)
        made.operation = "st_cluster" if space == "shared::cluster" else f"{verb}_{space}"
        if made.operation == "st_param" or (space == "shared::cluster" and verb == "ld"):
            raise UnknownPtx("direction")

    def _link(self) -> None:
        for index, label in self.jumps:
            self.code[index].imm = self.labels[label]
        self.code.append(Instruction("exit_", text="end"))
        self._speculative_loads()

    def _speculative_loads(self) -> None:
        """Mark loads of shared memory whose only use is a selection that follows: they read where it takes them.

        nvcc turns `leader ? shared.total : 0` into a load by every thread; what the others load is nobody's.
        """
        seen: dict[int, int] = {}
        for i in self.code:
            for row in (*i.r, *((i.guard,) if i.guard_kind else ())):
                seen[row] = seen.get(row, 0) + 1
        targets = set(self.labels.values())
        for at, load in enumerate(self.code):
            if load.operation != "ld_shared" or load.count != 1 or load.guard_kind or seen[load.r[0]] != 2:
                continue
            written: set[int] = set()
            for later in range(at + 1, len(self.code)):
                i = self.code[later]
                if later in targets or i.operation in ("bra", "exit_", "bar_sync", "cluster_wait"):
                    break
                if i.operation.startswith("selp") and load.r[0] in i.r[1:3]:
                    if i.r[3] not in written and not i.guard_kind:
                        load.flags |= 4 if i.r[1] == load.r[0] else 8
                        load.r[3] = i.r[3]
                    break
                written.add(i.r[0])


def decode(module: str, name: str, text: str) -> Program:
    """One of the ``entries`` of ``module``."""
    d = _Decoder(name, module, text)
    constants = [(bits, width, row) for (bits, width), row in d.constants.items()]
    return Program(name, d.code, constants, d.register_bytes, d.constant_bytes, d.shared_bytes, d.dynamic, d.parameters)


def packed(code: list[Instruction], operations: dict[str, int]) -> bytes:
    """As the machine reads it."""
    return b"".join(
        RECORD.pack(operations[i.operation], i.guard_kind, i.guard, *i.r, i.size, i.count, i.width, i.flags, i.imm)
        for i in code
    )
