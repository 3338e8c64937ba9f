"""Zeros inside the scans of a progressive JPEG file that no encoder writes for a picture (ITU-T T.81, B and G).

Zero bits are valid code words, so a decoder reads a block of zero bytes without a word wherever they happen to fit. In
a progressive file they may also be honest: flat blocks, ends of blocks, and bits that refine what earlier scans said.
So a run is judged by the scan it lies in: by what zero bits mean there, and, where they mean "nothing new", by how
many blocks they would have to cover. (Of a pattern that repeats itself every 8 pixels the one value may be all zero
bits; no photograph is one.) Only files that hold such a run are walked; ordinary ones pay for one search.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["scan_zeros"]

_RUN = 256  # zero bytes: shorter runs are not judged
_ZEROS = re.compile(b"\x00{%d,}" % _RUN)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # stuffed zeros, restarts and fill bytes belong to the scan
_SLACK = 64  # bits at the ends of a run that may belong to a code word with other bits


@dataclass(frozen=True)
class _Code:
    """The Huffman code word of zero bits: its length and the symbol it stands for."""

    bits: int
    symbol: int


def scan_zeros(data: bytes | bytearray, width: int, height: int) -> int:
    """Offset of a zero run inside a scan of a progressive file that cannot be honest, or -1.

    Args:
        data: the whole file, whose markers can be followed up to its first scan.
        width, height: of the frame.

    Example:
        >>> scan_zeros(b"", 8, 8)
        -1
    """
    size, position = len(data), 2
    codes: dict[int, _Code] = {}  # table class << 4 | id
    blocks = (width // 8 + 5) * (height // 8 + 5)  # of one component, with what pads it to whole units: at most
    while position + 4 <= size:
        if data[position] != 0xFF:  # zeros that reach over a scan's header leave nothing to follow
            return position if data[position] == 0 else -1
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
            continue
        if marker == 0xD9:
            return -1
        body, end = position + 4, position + 2 + (data[position + 2] << 8 | data[position + 3])
        if end > size:
            return -1
        if marker == 0xC4:
            _read_codes(data[body:end], codes)
        elif marker == 0xDA:
            scan = bytes(data[body:end])
            if not scan or not 1 <= scan[0] <= 4 or len(scan) < 4 + 2 * scan[0]:
                return -1  # the decoder's to report
            found = _END_OF_SCAN.search(data, end)
            stop = found.start() if found else size
            for run in _ZEROS.finditer(data, end, stop):
                if not _honest(8 * (run.end() - run.start()) - _SLACK, scan, codes, blocks):
                    return run.start()
            end = stop
        position = end
    return -1


def _read_codes(segment: bytes | bytearray, codes: dict[int, _Code]) -> None:
    at = 0
    while at + 17 < len(segment):
        counts = segment[at + 1 : at + 17]
        if any(counts):
            length = next(bits for bits, count in enumerate(counts, start=1) if count)
            codes[segment[at]] = _Code(length, segment[at + 17])
        at += 17 + sum(counts)


def _honest(bits: int, scan: bytes, codes: dict[int, _Code], blocks: int) -> bool:
    """Whether `bits` zero bits in a row may stand in this scan.

    Each of these blocks takes at least so many bits: one where a DC value is refined, a code word where DC values do
    not change. An end of 2**r blocks takes its code word, r bits and, where values are refined, at most one bit for
    each of them. More blocks than the scan has cannot be honest, nor can a value that repeats itself for ever.
    """
    count = scan[0]
    tables = [scan[2 + 2 * i] for i in range(count)]
    first, last, refines = scan[1 + 2 * count], scan[2 + 2 * count], scan[3 + 2 * count] >> 4 > 0
    if first == 0:
        if refines:
            return bits <= blocks * count
        words = [codes.get(table >> 4) for table in tables]
        flat = all(word is not None and word.symbol == 0 for word in words)
        return flat and bits // max(word.bits for word in words if word) <= blocks * count
    word = codes.get(0x10 | tables[0] & 15)
    run = word.symbol >> 4 if word else 15
    if word is None or word.symbol & 15 or run == 15:
        return False
    refined = (last - first + 1) << run if refines else 0
    return (bits // (word.bits + run + refined)) << run <= blocks
