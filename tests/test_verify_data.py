"""`verify_data`: every kind of bad file is named, nothing good is accused, nothing hangs."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from builders import write_images
from PIL import Image

from dlb_fast.data import ImageFolder
from dlb_fast.data.datasets.verify import main, verify_data
from dlb_fast.data.decode.decode import ImageDecoder


def image(seed: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for c in ("cat", "dog"):
        (tmp_path / c / "deep").mkdir(parents=True)
        for i in range(10):
            (tmp_path / c / "deep" / f"{i}.JPEG").write_bytes(image(i, size=(80 + i, 60)))
    (tmp_path / "cat" / "png.JPEG").write_bytes(image(1, "PNG"))
    (tmp_path / "cat" / "cmyk.jpg").write_bytes(image(2, mode="CMYK"))
    (tmp_path / "dog" / "labels.txt").write_text("not looked at")
    return tmp_path


def damage(folder: Path) -> dict[str, str]:
    """Bad files of every kind: relative path -> words its reason must hold."""
    good = image(3)
    at = good.find(b"\xff\xc0")
    spoiled = {
        "cat/half.jpg": (good[: len(good) // 2], "truncated"),
        "cat/zeros.jpg": (good[:2000] + bytes(1024) + good[3024:], "zeros"),
        "cat/text.jpg": (b"I am text", "not an image"),
        "dog/empty.jpg": (b"", "empty file"),
        "dog/bomb.jpg": (good[: at + 5] + b"\xff\x00\xff\x00" + good[at + 9 :], "bomb"),
    }
    for name, (data, _) in spoiled.items():
        (folder / name).write_bytes(data)
    words = {name: word for name, (_, word) in spoiled.items()}
    (folder / "dog" / "folder.jpg").mkdir()
    (folder / "dog" / "gone.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "dog" / "pipe.jpg")
    words |= {"dog/folder.jpg": "directory", "dog/gone.jpg": "FileNotFoundError", "dog/pipe.jpg": "regular file"}
    return words


@pytest.mark.parametrize("threads", [1, 4])
def test_good_files_are_good_and_odd_ones_counted(folder: Path, threads: int) -> None:
    report = verify_data(folder, threads)
    assert report.ok and report.files == 22 and report.bad == [] and report.skipped == 1
    if report.decoder != "pillow":
        assert report.oddities == {"PNG file": 1, "CMYK JPEG": 1}
    assert report.smallest == (80, 60) and report.largest == (89, 60)
    assert report.bytes == sum(p.stat().st_size for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))


@pytest.mark.parametrize("threads", [1, 4])
def test_every_bad_file_is_named(folder: Path, threads: int) -> None:
    words = damage(folder)
    report = verify_data(folder, threads)
    assert not report.ok and report.files == 22 + len(words)
    found = {os.path.relpath(bad.path, folder): bad.reason for bad in report.bad}
    assert sorted(found) == sorted(words) and [b.path for b in report.bad] == sorted(b.path for b in report.bad)
    for name, word in words.items():
        assert word in found[name], (name, found[name])
        assert name in str(report)


def test_permission_error_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the refusal is made here."""
    import builtins

    opener = builtins.open

    def refuse(path: object, *args: object, **options: object) -> object:
        if str(path).endswith("3.JPEG"):
            raise PermissionError(13, "Permission denied", str(path))
        return opener(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", refuse)
    report = verify_data(folder, 2)
    assert len(report.bad) == 2 and all("PermissionError" in bad.reason for bad in report.bad)


def test_a_link_back_does_not_walk_for_ever(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder, target_is_directory=True)
    assert verify_data(folder, 2).files == 22


def test_lenient_accepts_what_pillow_reads(folder: Path) -> None:
    damage(folder)
    report = verify_data(folder, 2, decoder=ImageDecoder(strict=False))
    assert "zeros.jpg" not in str([b.path for b in report.bad]) and "half.jpg" in str(report.bad)


def test_what_the_loaders_skip_is_not_accused(folder: Path) -> None:
    (folder / "cat" / "._a.jpg").write_bytes(b"\0\5\x16\7")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "x.jpg").write_bytes(b"x")
    report = verify_data(folder, 2)
    assert report.ok and report.files == 22 == len(ImageFolder(folder)) and report.skipped == 2
    with pytest.raises(TypeError, match="verify_data: extensions: expected a sequence"):
        verify_data(folder, extensions="jpg")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_of_any_bytes_is_reported(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    with open(os.fsencode(tmp_path / "set") + b"/caf\xe9.jpg", "wb") as file:
        file.write(b"bad")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding, errors="strict", write_through=True))
    assert main([str(tmp_path / "set"), "--json", str(tmp_path / "report.json")]) == 1
    assert rb"caf\udce9.jpg: not an image" in shown.getvalue()
    assert os.fsencode(json.loads((tmp_path / "report.json").read_text())["bad"][0]["path"]).endswith(b"/caf\xe9.jpg")


def test_a_report_that_cannot_be_written_is_still_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--json", str(folder / "nowhere" / "r.json")]) == 2
    shown = capsys.readouterr()
    assert "22 images, 0 bad" in shown.out and "r.json (No such file or directory); pass" in shown.err


def test_one_file_and_no_file(folder: Path) -> None:
    assert verify_data(folder / "cat" / "png.JPEG").files == 1
    assert not verify_data(folder / "cat" / "deep", extensions=(".webp",)).ok
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verify_data(folder / "nowhere")
    with pytest.raises(ValueError, match="num_threads"):
        verify_data(folder, 0)


def test_a_failure_of_the_walk_itself_is_raised(folder: Path) -> None:
    def broken(_: int) -> None:
        raise ZeroDivisionError

    for i in range(100):
        (folder / "cat" / f"more{i}.jpg").write_bytes(image(i, size=(8, 8)))
    with pytest.raises(ZeroDivisionError):
        verify_data(folder, 2, progress=broken)


def test_main(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--threads", "2"]) == 0
    assert "22 images, 0 bad" in capsys.readouterr().out
    words = damage(folder)
    listing = tmp_path / "report.json"
    assert main([str(folder), "--json", str(listing)]) == 1
    out = capsys.readouterr().out
    assert all(name in out for name in words)
    assert len(json.loads(listing.read_text())["bad"]) == len(words)
    for bad in (["--threads", "0", str(folder)], [str(folder / "nowhere")]):
        with pytest.raises(SystemExit) as caught:
            main(bad)
        assert caught.value.code == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("dlb-verify")]


def test_max_pixels_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, ["a.png", "b.png"])  # 30 pixels each
    assert main([str(tmp_path), "--max-pixels", "30"]) == 0
    assert main([str(tmp_path), "--max-pixels", "29"]) == 1
    assert "6 x 5 pixels, more than max_pixels=29" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--max-pixels", "0"])
    assert "--max-pixels: expected at least 1, got 0" in capsys.readouterr().err
