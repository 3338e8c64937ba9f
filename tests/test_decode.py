"""Decoding: every damaged or odd file is named, none passes in silence, all decoders agree."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import write_images
from PIL import Image, ImageFile

from dlb_fast.data import (
    DecodeError,
    EvalLoader,
    ImageFolder,
    MapDataset,
    OverlapLoader,
    SampleError,
    load_into_memory,
)
from dlb_fast.data.datasets.verify import verify_data
from dlb_fast.data.decode import decode as decode_module
from dlb_fast.data.decode.decode import ImageDecoder, available_backends
from dlb_fast.data.decode.jpeg import parse_header, zero_run

HAVE_SIMPLEJPEG = available_backends()["simplejpeg"] == ""
BACKENDS = ["pillow"] + (["simplejpeg"] if HAVE_SIMPLEJPEG else [])


def photo(height: int = 150, width: int = 200) -> Image.Image:
    """A busy image: smooth structure and noise, so that its scan is some 10 kB long."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([128 + 90 * np.sin(x / 17 + c) * np.cos(y / 23) for c in range(3)], -1)
    noisy = base + rng.normal(0, 12, base.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEG = encoded(photo(), quality=90)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "444", "optimised", "restart"])
def test_equals_pillow(backend: str, kind: str) -> None:
    image = photo().convert("L") if kind == "grey" else photo()
    options: dict[str, dict[str, object]] = {
        "progressive": {"progressive": True},
        "444": {"subsampling": 0},
        "optimised": {"optimize": True},
        "restart": {"restart_marker_rows": 1},
    }
    data = encoded(image, quality=85, **options.get(kind, {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    got = ImageDecoder(backend)(data)
    assert got.dtype == np.uint8 and got.flags.writeable
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_png_under_any_name(backend: str, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    else:
        image = photo(20, 30).convert(mode)
    data = encoded(image, "PNG", **({"transparency": 3} if mode == "P" else {}))
    decoder = ImageDecoder(backend)
    assert decoder(data).shape == (20, 30, 3)
    if backend != "pillow":
        assert decoder.fallbacks == {"PNG file": 1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_keep_their_range(backend: str, kind: str) -> None:
    grey = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    pixels = ImageDecoder(backend)(encoded(Image.fromarray(grey), kind))
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(DecodeError, match="TIFF with 32-bit pixels.*save 8 or 16 bits"):
        ImageDecoder("pillow")(encoded(photo().convert("L").convert(mode), "TIFF"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cmyk_has_pillows_colours(backend: str) -> None:
    data = encoded(photo(16, 16).convert("CMYK"), quality=95)
    decoder = ImageDecoder(backend)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decoder(data), expected)
    if backend != "pillow":
        assert decoder.fallbacks == {"CMYK JPEG": 1}


DAMAGED = {
    "empty": (b"", "empty file"),
    "text": (b"hello, I am a text file\n" * 9, "not an image"),
    "html": (b"<html>404</html>", "not an image"),
    "half": (JPEG[: len(JPEG) // 2], "premature end|truncated"),
    "header only": (JPEG[:100], "truncated"),
    "no end marker": (JPEG[:-2], "premature end|truncated"),
    "png half": (encoded(photo(), "PNG")[:20000], "Pillow: "),
    "magic only": (b"\xff\xd8\xff", "truncated"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(DAMAGED))
def test_damage_is_named(backend: str, name: str) -> None:
    data, words = DAMAGED[name]
    with pytest.raises(DecodeError, match=words):
        ImageDecoder(backend)(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_inside_are_never_silent(backend: str) -> None:
    """3 KB of zeros: at many offsets simplejpeg itself says nothing (so the scan is looked at)."""
    start = parse_header(JPEG).scan
    silent_in_libjpeg = 0
    for offset in range(start, len(JPEG) - 3100, 97):
        data = bytearray(JPEG)
        data[offset : offset + 3072] = bytes(3072)
        with pytest.raises(DecodeError, match=r"zeros|corrupt|premature"):
            ImageDecoder(backend)(bytes(data))
        if backend == "simplejpeg":
            try:
                decode_module._simplejpeg()(bytes(data))
                silent_in_libjpeg += 1
            except ValueError:
                pass
    assert backend != "simplejpeg" or silent_in_libjpeg > 0  # else the scan check proves nothing


@pytest.mark.parametrize("progressive", [False, True])
def test_zeros_between_the_images_of_one_file_are_not_accused(progressive: bool) -> None:
    """Views and gain maps follow the image as whole JPEGs, whose metadata are padded with zeros."""
    options = {"quality": 90, "progressive": progressive}
    first = encoded(photo(), **options)
    second = encoded(photo(60, 80), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + bytes(400), **options)
    expected = ImageDecoder()(first)
    views = encoded(photo(), "MPO", save_all=True, append_images=[photo()], **options)
    for file in (first + second, first + bytes(300) + second, views):
        assert np.array_equal(ImageDecoder()(file), expected)
    start = parse_header(first).scan + 3000
    with pytest.raises(DecodeError, match="zeros|[Cc]orrupt|premature"):
        ImageDecoder()(first[:start] + bytes(1024) + first[start + 1024 :] + second)


def test_stray_bytes_between_segments() -> None:
    data = JPEG[:20] + b"\x12\x34\x56" + JPEG[20:]
    assert JPEG[20:21] == b"\xff"
    with pytest.raises(DecodeError, match=r"header that cannot be followed .*\(truncated, or stray bytes in between\)"):
        ImageDecoder()(data)
    decoder = ImageDecoder(strict=False)
    assert np.array_equal(decoder(data), ImageDecoder("pillow")(JPEG))
    if decoder.name != "pillow":
        assert [reason[:40] for reason in decoder.fallbacks] == ["JPEG header that cannot be followed to i"]
    with pytest.raises(DecodeError, match="truncated"):
        decoder(JPEG[:100])


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
def test_flat_images_and_padding_are_not_accused(options: dict[str, bool]) -> None:
    """A flat image with optimised tables is almost only zero bits; zeros behind the file are padding."""
    flat = encoded(Image.new("RGB", (1200, 1200), (0, 0, 0)), **options)
    assert ImageDecoder()(flat).shape == (1200, 1200, 3)
    half_flat = photo(600, 800)
    half_flat.paste((128, 128, 128), (0, 300, 800, 600))
    ImageDecoder()(encoded(half_flat, **options))
    chequered = Image.fromarray(np.tile(np.eye(8, dtype=np.uint8) * 255, (150, 150)))
    assert ImageDecoder()(encoded(chequered, quality=95, **options)).shape == (1200, 1200, 3)
    ImageDecoder()(JPEG + bytes(4096))


def test_flat_optimised_scan_really_holds_a_zero_run() -> None:
    data = encoded(Image.new("RGB", (2000, 2000), (128, 128, 128)), optimize=True)
    header = parse_header(data)
    assert data.find(bytes(256), header.scan) > 0 and header.flat_zero_code
    assert zero_run(data, header) == -1


@pytest.mark.skipif(not HAVE_SIMPLEJPEG, reason="simplejpeg reports this damage")
def test_lenient_reads_damage_and_counts_it() -> None:
    start = parse_header(JPEG).scan
    data = bytearray(JPEG)
    data[start + 2000 : start + 3000] = bytes(1000)
    decoder = ImageDecoder("simplejpeg", strict=False)
    assert decoder(bytes(data)).shape == (150, 200, 3)
    assert sum(decoder.fallbacks.values()) == 1 and "simplejpeg" in next(iter(decoder.fallbacks))
    with pytest.raises(DecodeError, match="truncated"):
        decoder(JPEG[: len(JPEG) // 2])


@pytest.mark.skipif(not HAVE_SIMPLEJPEG, reason="a warning of simplejpeg")
def test_harmless_oddity_falls_back_and_is_counted() -> None:
    """An unknown JFIF revision is a warning to libjpeg, hence an error in strict mode, and harmless."""
    data = bytearray(JPEG)
    assert data[6:11] == b"JFIF\0"
    data[11] = 9
    decoder = ImageDecoder("simplejpeg")
    np.testing.assert_array_equal(decoder(bytes(data)), ImageDecoder("simplejpeg")(JPEG))
    assert len(decoder.fallbacks) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_bomb_is_refused_before_decoding(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(JPEG)
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\x00\xff\x00"
    decoder = ImageDecoder(backend)
    monkeypatch.setattr(decoder, "_jpeg", lambda _: pytest.fail("decoded a bomb"))
    with pytest.raises(DecodeError, match="bomb: 65280 x 65280"):
        decoder(bytes(data))
    with pytest.raises(DecodeError, match="bomb: 30 x 20"):
        ImageDecoder(backend, max_pixels=599)(encoded(photo(20, 30), "PNG"))
    ImageDecoder(backend, max_pixels=600)(encoded(photo(20, 30), "PNG"))


def test_global_leniency_of_pillow_does_not_hide_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DecodeError, match="truncated"):
        ImageDecoder("pillow")(JPEG[: len(JPEG) // 2])


def test_pillow_when_nothing_else_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert ImageDecoder().name == "pillow"
    with pytest.raises(ImportError, match="simplejpeg"):
        ImageDecoder("simplejpeg")


def test_broken_torchvision_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(decode_module._MAKERS, "torchvision", broken)
    assert ImageDecoder().name == "pillow"
    assert "nms" in available_backends()["torchvision"]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"backend.*got 'turbo'"):
        ImageDecoder("turbo")
    with pytest.raises(ValueError, match="max_pixels"):
        ImageDecoder(max_pixels=0)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 6
%%EndComments
showpage
%%EOF
"""


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A `gs` on the PATH that writes a file when it is started; the file's path."""
    from PIL import EpsImagePlugin

    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >> {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError, match="."):  # Pillow itself starts it, and finds no picture
        Image.open(io.BytesIO(EPS)).load()
    assert started.exists()
    started.unlink()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


def test_a_file_of_a_dataset_starts_no_program(ghostscript: Path, tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", ["a/0.png", "b/0.png"])
    (root / "a" / "1.jpg").write_bytes(EPS)
    (root / "b" / "1.tiff").write_bytes(
        b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + bytes(24) + EPS
    )  # with a preview
    for backend in BACKENDS:
        for strict in (True, False):
            with pytest.raises(DecodeError, match=r"not an image of a format that is read \(JPEG, PNG, .*begins with"):
                ImageDecoder(backend, strict=strict)(EPS)
    dataset = ImageFolder(root)
    for load in (
        lambda: dataset[1],
        lambda: list(OverlapLoader(dataset, 4, num_threads=1, timeout=20)),
        lambda: list(EvalLoader(dataset, 4)),
        lambda: load_into_memory(dataset),
    ):
        with pytest.raises((DecodeError, SampleError), match="not an image of a format that is read"):
            load()
    assert [Path(bad.path).name for bad in verify_data(root).bad] == ["1.jpg", "1.tiff"]
    opened = MapDataset([0], lambda data, i: (Image.open(io.BytesIO(EPS)), 0))  # the user's own Image.open
    with pytest.raises(ValueError, match="an EPS file, which Pillow draws by the program Ghostscript; convert"):
        opened[0]
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "SGI", "DDS", "ICNS"])
def test_other_formats_of_pillow_are_not_opened(kind: str) -> None:
    data = encoded(Image.new("RGB", (32, 32), (10, 20, 30)), kind)
    with pytest.raises(DecodeError, match="not an image of a format that is read"):
        ImageDecoder()(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
def test_the_limit_of_pixels_is_the_decoders_and_not_pillows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(20, 30), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # a warning, hence an error here, from 401 to 800 pixels
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    assert np.array_equal(ImageDecoder("pillow")(data), expected) and Image.MAX_IMAGE_PIXELS == 400
    with pytest.raises(DecodeError, match="30 x 20 pixels, more than max_pixels=599; raise max_pixels"):
        ImageDecoder("pillow", max_pixels=599)(data)
