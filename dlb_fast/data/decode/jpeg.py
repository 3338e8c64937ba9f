"""Parse the header of a JPEG file and find runs of zeros that no encoder writes (ITU-T T.81, annex B).

A decoder reports damage only when it meets an invalid Huffman code. A block of zero bytes is often valid, because the
first code word of a canonical Huffman table is all zeros: the block decodes to one symbol repeated. An encoder writes
such a run only if the zero code means "no change, end of block" (a flat image with optimised tables). In any other file
a long run of zeros is damage.
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
        flat_zero_code: whether zero bits may encode a flat block (see the module).

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
    """Whether zero bits mean "no change" and "end of block" in every table of the scan.

    Every unit of an interleaved scan has a block of each component, so one table with another meaning excludes a flat
    run. `first` maps (class << 4 | id) to the symbol of the zero code.
    """
    tables = [scan_header[2 + 2 * i] for i in range(scan_header[0])]
    return all(first.get(t >> 4) == 0 and first.get(0x10 | t & 15) == 0 for t in tables)


def parse_header(data: bytes | memoryview) -> JpegHeader | None:
    """Header of a JPEG file, or None if its markers are not valid up to the scan.

    Args:
        data: the whole file.

    Source: ITU-T T.81 B.2.

    Example:
        >>> parse_header(b"not a jpeg") is None
        True
    """
    size, position = len(data), 2
    frame: tuple[int, int, int, int, int] | None = None
    first: dict[int, int] = {}  # Huffman table -> symbol of the zero code
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
    """Offset of 256 zero bytes inside the image data that no encoder writes, or -1.

    Checks interleaved sequential files only (nearly all photographs), and only up to the end of the image: padding or
    further images (multi-picture files, gain maps) may follow it.

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
    return found if data.find(_END, header.scan, found) < 0 else -1  # one scan, so its first end marker ends the image
