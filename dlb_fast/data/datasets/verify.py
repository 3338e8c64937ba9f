"""`dlb-fast verify-data PATH`: read and decode every image under a folder and report the damaged ones."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dlb_fast._args import cores
from dlb_fast.data.datasets.folder import IMAGE_EXTENSIONS, check_extensions, is_image, read_file, tree
from dlb_fast.data.decode.decode import MAX_PIXELS, ImageDecoder

__all__ = ["BadFile", "VerifyReport", "main", "verify_data"]

_SHOWN = 50


@dataclass(frozen=True)
class BadFile:
    """A damaged file: its path, and the message of the decoder or the system."""

    path: str
    reason: str


@dataclass
class VerifyReport:
    """The result of `verify_data`.

    Attributes:
        root: the folder or file.
        decoder: name of the JPEG decoder.
        files: number of images read, including bad ones.
        bytes: total size of these files.
        bad: files that a loader would refuse, sorted by path.
        skipped: number of files with another extension or a name that begins with a dot.
        oddities: reason -> number of good files that Pillow decoded (PNG named .jpg, CMYK, ...).
        smallest: smallest (width, height) by area; (0, 0) without images.
        largest: largest (width, height) by area; (0, 0) without images.
        seconds: wall time.
    """

    root: str
    decoder: str
    files: int = 0
    bytes: int = 0
    bad: list[BadFile] = field(default_factory=list)
    skipped: int = 0
    oddities: dict[str, int] = field(default_factory=dict)
    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether there are images and none is bad."""
        return self.files > 0 and not self.bad

    def __str__(self) -> str:
        lines = [
            f"{self.root}: {self.files} images, {len(self.bad)} bad, {self.skipped} other files skipped "
            f"({self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s with {self.decoder})"
        ]
        if self.files > len(self.bad):
            lines.append("sizes from {} x {} to {} x {}".format(*self.smallest, *self.largest))
        lines += [f"  {count} read by Pillow: {reason}" for reason, count in sorted(self.oddities.items())]
        lines += [f"  BAD {bad.path}: {bad.reason}" for bad in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            lines.append(f"  ... and {len(self.bad) - _SHOWN} more (--json FILE lists all)")
        return "\n".join(lines)


def verify_data(
    path: str | os.PathLike[str],
    num_threads: int | None = None,
    *,
    decoder: ImageDecoder | None = None,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Decode every image under `path` with the decoder the loader uses, in threads.

    Args:
        path: a folder or one file. Links are followed, and every folder is read once; names that begin with a dot
            are ignored.
        num_threads: number of threads; None means the cores of this process, at most 8.
        decoder: None means `ImageDecoder()`.
        extensions: file extensions of images, in any case.
        progress: called from the threads with the number of files done, every hundred files.

    Returns:
        A `VerifyReport`; bad files never raise.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a thread count below 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jpg").write_text("no image")
        ...     report = verify_data(folder)
        >>> report.files, report.bad[0].reason[:12]
        (1, 'not an image')
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"verify_data: path: {root} does not exist.")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"verify_data: num_threads: expected at least 1, got {num_threads}.")
    check = _Check(root, decoder or ImageDecoder(), check_extensions("verify_data", extensions), progress)
    threads = [
        threading.Thread(target=check.work, name=f"dlb-verify-{i}", daemon=True)
        for i in range(num_threads or min(cores(), 8))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        check.stopped = True  # ends the threads after Ctrl-C
    return check.finished()


class _Check:
    """One walk through the folder, shared by the threads."""

    def __init__(
        self,
        root: Path,
        decoder: ImageDecoder,
        extensions: tuple[str, ...],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._decoder, self._extensions, self._progress = decoder, extensions, progress
        self._before = Counter(decoder.fallbacks)
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self.report = VerifyReport(str(root), decoder.name)
        self._paths = self._walk(root)
        self._failure: BaseException | None = None
        self.stopped = False

    def _walk(self, root: Path) -> Iterator[str]:
        if not root.is_dir():
            yield str(root)
            return

        def unreadable(folder: str, error: OSError) -> None:
            self._bad(folder, f"{type(error).__name__}: {error}")

        for inside, is_folder, _ in tree(str(root), "", unreadable):
            path = os.path.join(root, inside)
            if not is_folder and is_image(inside, self._extensions):
                yield path
            elif is_folder and is_image(inside, self._extensions):
                self._bad(path, "a directory with an image's name")
            elif not is_folder:
                self.report.skipped += 1

    def work(self) -> None:
        try:
            while not self.stopped:
                with self._lock:
                    path = next(self._paths, None)
                if path is None:
                    return
                self._one(path)
        except BaseException as error:  # not an error of a file; `finished` raises it
            self._failure, self.stopped = error, True

    def _one(self, path: str) -> None:
        size, shape, reason = 0, (0, 0), ""
        try:
            data = read_file(path)
            size = len(data)
            height, width = self._decoder(data).shape[:2]
            shape = (int(width), int(height))
        except ValueError as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        with self._lock:
            report = self.report
            report.files += 1
            report.bytes += size
            if reason:
                self._bad(path, reason, counted=True)
            else:
                known = report.smallest != (0, 0)
                report.smallest = min(report.smallest, shape, key=_area) if known else shape
                report.largest = max(report.largest, shape, key=_area)
            done = report.files
        if self._progress is not None and done % 100 == 0:
            self._progress(done)

    def _bad(self, path: str, reason: str, counted: bool = False) -> None:
        """Add a bad file to the report; the caller holds the lock."""
        self.report.files += not counted
        self.report.bad.append(BadFile(path, reason))

    def finished(self) -> VerifyReport:
        if self._failure is not None:
            raise self._failure
        self.report.bad.sort(key=lambda bad: bad.path)
        self.report.oddities = dict(self._decoder.fallbacks - self._before)
        self.report.seconds = time.monotonic() - self._started
        return self.report


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def main(argv: Sequence[str] | None = None) -> int:
    """`dlb-fast verify-data PATH [OPTIONS]`: returns 0 all good, 1 bad files, 2 misuse.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     main([folder])  # doctest: +ELLIPSIS
        /...: 0 images, 0 bad, 0 other files skipped (...)
        no images found
        1
    """
    parser = argparse.ArgumentParser("dlb-fast verify-data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="folder of images (any depth), or one image")
    parser.add_argument("--threads", type=int, default=None, help="worker threads (default: the cores, at most 8)")
    parser.add_argument("--lenient", action="store_true", help="accept damaged files that Pillow can read")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="refuse larger images (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the whole report to FILE")
    options = parser.parse_args(argv)
    if options.max_pixels < 1:
        parser.error(f"--max-pixels: expected at least 1, got {options.max_pixels}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if not os.path.exists(options.path):
        parser.error(f"path: {options.path} does not exist")

    def show(done: int) -> None:
        print(f"\r{done} files", end="", file=sys.stderr, flush=True)

    decoder = ImageDecoder(strict=not options.lenient, max_pixels=options.max_pixels)
    report = verify_data(
        options.path, options.threads, decoder=decoder, progress=show if sys.stderr.isatty() else None
    )
    failure = None
    if options.json:  # before printing, so that a closed terminal does not lose the report
        try:
            Path(options.json).write_text(json.dumps(asdict(report), indent=1) + "\n")
        except OSError as error:
            failure = f"verify-data: --json: cannot write {options.json} ({error.strerror}); pass a writable path"
    _print(str(report))
    if report.files == 0:
        print("no images found")
    if failure:
        print(failure, file=sys.stderr)
        return 2
    return 0 if report.ok else 1


def _print(text: str) -> None:
    """Print, escaping characters that stdout cannot encode: file names may be any bytes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
