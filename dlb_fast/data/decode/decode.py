"""Decode image bytes to uint8 RGB: by simplejpeg (strict), else torchvision, else Pillow.

The magic bytes and the colour space of a file choose the decoder, not its name: ImageNet has a PNG and two dozen CMYK
files named ``.JPEG``. The three decoders give bit-identical pixels for ordinary JPEGs, because all use libjpeg-turbo.
Only simplejpeg reports most damage inside the image data; Pillow and torchvision fill a damaged region silently. So
they get no file that simplejpeg reports as damaged, unless ``strict=False``.
"""

from __future__ import annotations

import functools
import io
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from dlb_fast.data.decode.jpeg import JpegHeader, parse_header, zero_run

__all__ = ["BACKENDS", "MAX_PIXELS", "DecodeError", "ImageDecoder", "available_backends", "is_pillow", "plain_pixels"]

BACKENDS = ("simplejpeg", "torchvision", "pillow")
# What Pillow may read. It chooses by the bytes, not by the name, and some of its other formats start a program (EPS:
# Ghostscript) or read further files.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
MAX_PIXELS = 178_956_970  # the limit above which Pillow raises: 512 MiB of RGB
_PILLOWS_LIMIT = threading.Lock()  # held while Pillow's limit is off
_DAMAGE = ("corrupt jpeg data", "premature end", "unsupported marker type")

Array = np.ndarray[Any, np.dtype[np.uint8]]


class DecodeError(ValueError):
    """The bytes are not a valid image; the message says why.

    Example:
        >>> str(DecodeError("empty file (0 bytes)"))
        'empty file (0 bytes)'
    """


def _simplejpeg() -> Callable[[bytes], Array]:
    from simplejpeg import decode_jpeg

    return lambda data: decode_jpeg(data, "RGB", strict=True)


def _torchvision() -> Callable[[bytes], Array]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Array:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        chw = decode_jpeg(raw, mode=ImageReadMode.RGB)
        return np.ascontiguousarray(chw.permute(1, 2, 0).numpy())

    return decode


def _open(data: bytes) -> Any:
    """The Pillow image of a file in one of `FORMATS`, its header read; the pixels are read on demand.

    Not `Image.open`, whose limit of pixels holds for the whole process and lies below `ImageDecoder`'s.

    Raises:
        DecodeError: none of these formats.
    """
    from PIL import Image

    Image.init()  # registers the formats, once
    file, unread = io.BytesIO(data), ""
    for kind in FORMATS:
        factory, accept = Image.OPEN.get(kind, (None, None))
        if factory is None:
            continue  # a Pillow without this format
        accepted = accept is None or accept(bytes(data[:16]))
        if isinstance(accepted, str):
            unread = f" ({accepted})"
        elif accepted:
            try:
                file.seek(0)
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # what Pillow takes for another format
                unread = f" ({kind}: {error})"
    raise DecodeError(
        f"not an image of a format that is read ({', '.join(FORMATS)}): the file begins with "
        f"{bytes(data[:16])!r}{unread}"
    )


def loaded(image: Any) -> Any:
    """A Pillow image with its pixels read; ValueError for an EPS file, which Pillow reads by starting a program."""
    if image.format == "EPS" and image.tile:  # not loaded yet
        raise ValueError(
            "an EPS file, which Pillow draws by the program Ghostscript; convert the file to PNG, or call image.load() "
            "yourself if you trust it"
        )
    image.load()
    return image


def _plain(image: Any) -> Any:
    """Convert a Pillow image of any mode to 8-bit grey or RGB."""
    from PIL import Image

    loaded(image)
    if image.mode == "P" and "transparency" in image.info:  # avoids a warning of Pillow
        image = image.convert("RGBA")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 16-bit grey: take the upper byte, as Pillow does for 16-bit colours; its own conversion clips at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = image.format or f"an image of mode {image.mode}"
        raise ValueError(f"{kind} with 32-bit pixels, whose range is not known; save 8 or 16 bits")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def is_pillow(value: Any) -> bool:
    """Whether `value` is a Pillow image; does not import Pillow."""
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)  # also None while another thread imports Pillow
    return kind is not None and isinstance(value, kind)


def plain_pixels(image: Any) -> Array:
    """uint8 pixels of a Pillow image: (height, width) for grey, (height, width, 3) otherwise.

    Raises:
        ValueError: 32-bit pixels, whose range is unknown.

    Example:
        >>> from PIL import Image
        >>> plain_pixels(Image.new("RGBA", (8, 6))).shape
        (6, 8, 3)
    """
    return np.array(_plain(image))


def _pillow() -> Callable[[bytes], Array]:
    import PIL.Image  # noqa: F401

    return lambda data: _rgb(_open(data))


def _rgb(image: Any) -> Array:
    """(height, width, 3) uint8 of a Pillow image; a copy, because `np.asarray` of one is read-only."""
    plain = _plain(image)
    return np.array(plain if plain.mode == "RGB" else plain.convert("RGB"))


_MAKERS = {"simplejpeg": _simplejpeg, "torchvision": _torchvision, "pillow": _pillow}


def available_backends() -> dict[str, str]:
    """Decoder name -> "" if it is available, else the reason.

    Any exception on import counts as unavailable; a torchvision that does not fit torch raises RuntimeError.

    Example:
        >>> available_backends()["pillow"]
        ''
    """
    reasons = {}
    for name, maker in _MAKERS.items():
        try:
            maker()
            reasons[name] = ""
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


class ImageDecoder:
    """Callable from the bytes of one image file to a uint8 RGB array (height, width, 3).

    Args:
        backend: ``"auto"`` (the first of ``BACKENDS`` that imports) or one of them, which must then be installed.
        strict: True raises for a damaged JPEG. False passes it to Pillow, which fills the damaged region (but
            refuses truncated files), and counts it in ``fallbacks``.
        max_pixels: refuse larger images before decoding (decompression bombs). Pillow's own limit,
            `Image.MAX_IMAGE_PIXELS`, does not count.

    Attributes:
        name: name of the JPEG decoder.
        fallbacks: Counter of the reasons why Pillow decoded a file.

    Reads JPEG, PNG, BMP, GIF (the first image), PPM and PGM, WebP and TIFF, whatever the file is called, and nothing
    else. EXIF orientation is ignored, as in torchvision's ImageFolder.

    Raises:
        DecodeError: the bytes are not a valid image.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (8, 6), (10, 20, 30)).save(file, "PNG")
        >>> ImageDecoder()(file.getvalue()).shape
        (6, 8, 3)
    """

    def __init__(self, backend: str = "auto", *, strict: bool = True, max_pixels: int = MAX_PIXELS) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(
                f"ImageDecoder: backend: expected one of {('auto', *BACKENDS)}, got {backend!r}."
            )
        if max_pixels < 1:
            raise ValueError(f"ImageDecoder: max_pixels: expected a positive int, got {max_pixels}.")
        self.strict = strict
        self.max_pixels = max_pixels
        self.fallbacks: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.name, self._jpeg = self._choose(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        # the lock and the decoder function cannot be pickled, so a copy creates its own
        return functools.partial(ImageDecoder, strict=self.strict, max_pixels=self.max_pixels), (self.name,)

    @staticmethod
    def _choose(backend: str) -> tuple[str, Callable[[bytes], Array]]:
        for name in BACKENDS if backend == "auto" else (backend,):
            try:
                return name, _MAKERS[name]()
            except Exception as error:
                if backend != "auto":
                    raise ImportError(
                        f"ImageDecoder: backend {backend!r} cannot be imported "
                        f"({type(error).__name__}: {error}). Install it or use backend='auto'."
                    ) from error
        raise ImportError("ImageDecoder: neither simplejpeg, torchvision nor Pillow can be imported.")

    def __call__(self, data: bytes) -> Array:
        if not data:
            raise DecodeError("empty file (0 bytes)")
        if data[:3] == b"\xff\xd8\xff":
            return self._decode_jpeg(data)
        return self._with_pillow(data, None)

    def _count(self, reason: str) -> None:
        with self._lock:
            self.fallbacks[reason] += 1

    def _decode_jpeg(self, data: bytes) -> Array:
        header = parse_header(data)
        if header is None:
            reason = "JPEG header that cannot be followed to its image data (truncated, or stray bytes in between)"
            if self.strict:
                raise DecodeError(reason)
            return self._with_pillow(data, reason)
        self._check_size(header.width, header.height)
        if self.strict:
            if data.rfind(b"\xff\xd9", header.scan) < 0:
                raise DecodeError("truncated JPEG: premature end, no end-of-image marker")
            zeros = zero_run(data, header)
            if zeros >= 0:
                raise DecodeError(f"corrupt JPEG data: zeros inside the image data at byte {zeros}")
        odd = _why_odd(header)
        if odd or self.name == "pillow":
            return self._with_pillow(data, odd)
        try:
            return self._jpeg(data)
        except Exception as error:
            message = f"{self.name}: {error}"
            if self.strict and any(sign in message.lower() for sign in _DAMAGE):
                raise DecodeError(message) from error
            # the message does not report damage (but, say, an odd JFIF revision), or strict is False
            return self._with_pillow(data, message)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise DecodeError(
                f"decompression bomb: {width} x {height} pixels, more than max_pixels={self.max_pixels}; raise "
                "max_pixels if the image is meant"
            )
        if width * height == 0:
            raise DecodeError(f"image of {width} x {height} pixels")

    def _with_pillow(self, data: bytes, reason: str | None) -> Array:
        from PIL import Image

        try:
            try:
                pixels, kind = self._read(data)
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # of TIFF and WebP: a second limit
                with _PILLOWS_LIMIT:
                    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                    try:
                        pixels, kind = self._read(data)
                    finally:
                        Image.MAX_IMAGE_PIXELS = limit
            reason = reason or f"{kind} file"
        except DecodeError:
            raise
        except Exception as error:
            before = f"{reason}; then " if reason else ""
            raise DecodeError(f"{before}Pillow: {type(error).__name__}: {error}") from error
        if self.name != "pillow":
            self._count(reason)
        return pixels


    def _read(self, data: bytes) -> tuple[Array, str]:
        """(pixels, format) of a file by Pillow; DecodeError for more than `max_pixels`."""
        with _open(data) as image:
            self._check_size(*image.size)
            return _rgb(image), image.format


def _why_odd(header: JpegHeader) -> str | None:
    """Why only Pillow can decode this JPEG, or None."""
    if header.components == 4:
        return "CMYK JPEG"  # Pillow handles Adobe's inverted channels
    if header.components not in (1, 3) or header.precision != 8 or header.sof > 0xC2:
        return f"JPEG of {header.components} components, {header.precision} bits, frame {header.sof:#x}"
    return None
