"""The header of a JPEG file, and zeros inside its image data that no encoder writes (ITU-T T.81, annex B).

A decoder reports damage only when its Huffman codes stop making sense. A block of zero bytes inside the scan often
does not do that, because zero bits are a valid code word. They decode to the same symbol over and over, and the table
tells which: the first code word of a canonical Huffman table is all zeros. So a long run of zeros is honest only where
the tables spell "no change, end of block" with zero bits (a flat image with optimised tables).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["JpegHeader", "parse_header", "zero_run"]

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ZEROS = bytes(256)
_END = b"\xff\xd9"


@dataclass(frozen=True)
class JpegHeader:
    """Size, component count and scan start of a JPEG file.

    Attributes:
        width: pixels.
        height: pixels.
        components: 1 (grey), 3 or 4 (CMYK).
        precision: bits per sample.
        sof: the frame marker (0xC0, 0xC1 sequential, 0xC2 progressive, others rare).
        scan: byte offset of the first entropy-coded byte.
        scan_components: components in that first scan.
        flat_zero_code: zero bits may spell a flat block (see the module).

    Example:
        >>> JpegHeader(500, 375, 3, 8, 0xC0, 623, 3, False).sequential
        True
    """

    width: int
    height: int
    components: int
    precision: int
    sof: int
    scan: int
    scan_components: int
    flat_zero_code: bool

    @property
    def sequential(self) -> bool:
        return self.sof in (0xC0, 0xC1)


def _zeros_may_be_flat(scan_header: bytes | memoryview, first: dict[int, int]) -> bool:
    """Whether every table of the scan gives zero bits the meaning "no change" and "end of block".

    One luminance block stands in every unit of an interleaved scan, so one table that says otherwise is
    enough. `first` maps (class << 4 | id) to the symbol coded by zeros.
    """
    tables = [scan_header[2 + 2 * i] for i in range(scan_header[0])]
    return all(first.get(t >> 4) == 0 and first.get(0x10 | t & 15) == 0 for t in tables)


def parse_header(data: bytes | memoryview) -> JpegHeader | None:
    """Header of a JPEG byte string, or None when its markers cannot be followed up to the scan.

    Args:
        data: the whole file. Source: ITU-T T.81 B.2.

    Example:
        >>> parse_header(b"not a jpeg") is None
        True
    """
    size, position = len(data), 2
    frame: tuple[int, int, int, int, int] | None = None
    first: dict[int, int] = {}  # Huffman table -> the symbol that zero bits code
    if size < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return None
    while position + 4 <= size:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
            continue
        length = data[position + 2] << 8 | data[position + 3]
        body, end = position + 4, position + 2 + length
        if length < 2 or end > size:
            return None
        if marker in _SOF:
            if length < 8:
                return None
            height = data[body + 1] << 8 | data[body + 2]
            width = data[body + 3] << 8 | data[body + 4]
            frame = (width, height, data[body + 5], data[body], marker)
        elif marker == 0xC4:
            while body + 17 < end:
                counts = sum(data[body + 1 : body + 17])
                if counts:
                    first[data[body]] = data[body + 17]
                body += 17 + counts
        elif marker == 0xDA:
            if frame is None or length < 6 + 2 * data[body]:
                return None
            return JpegHeader(*frame, end, data[body], _zeros_may_be_flat(data[body:end], first))
        position = end
    return None


def zero_run(data: bytes | bytearray, header: JpegHeader) -> int:
    """Offset of 256 zero bytes inside the image data that no honest encoder writes, or -1.

    Only interleaved sequential files are judged (nearly all photographs). Whatever follows the image's end is not:
    padding, or further images (files of several views and gain maps hold more than one, with zeros between).

    Example:
        >>> zero_run(b"", JpegHeader(1, 1, 3, 8, 0xC0, 0, 3, False))
        -1
    """
    found = data.find(_ZEROS, header.scan)
    if found < 0:
        return -1
    interleaved = header.scan_components == header.components
    if not header.sequential or not interleaved or header.flat_zero_code:
        return -1
    return found if data.find(_END, header.scan, found) < 0 else -1  # one scan, so the first such marker ends it
