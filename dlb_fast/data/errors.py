"""What the threaded loader raises, always naming the sample."""

from __future__ import annotations

__all__ = ["DecodeError", "LoaderTimeout", "SampleError"]


class DecodeError(ValueError):
    """The bytes are not an image that can be trusted; the message says what is wrong with them.

    Example:
        >>> str(DecodeError("empty file (0 bytes)"))
        'empty file (0 bytes)'
    """


class SampleError(RuntimeError):
    """One sample could not be read or decoded.

    Attributes:
        path: the file (or ``"sample 17"`` where the dataset has no paths).
        index: the sample id in the dataset.
        epoch: the epoch in which the sample was drawn.
        reason: the message of the reader or the decoder.
        remedy: what else than repairing the file the loader that raises it can do, or "".

    Example:
        >>> error = SampleError("a/b.jpg", 17, 3, "empty file (0 bytes)")
        >>> error.index, error.epoch
        (17, 3)
    """

    def __init__(self, path: str, index: int, epoch: int, reason: str, remedy: str = "") -> None:
        super().__init__(path, index, epoch, reason, remedy)
        self.path = path
        self.index = index
        self.epoch = epoch
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        # a dataset without paths has no file that could be repaired
        remedy = (
            "Look at what the dataset or `load` gives for it"
            if self.path == f"sample {self.index}"
            else "Repair or remove the file (`dlb-fast verify-data` lists all of them)"
        )
        return (
            f"sample {self.index} of epoch {self.epoch} could not be loaded: {self.path}: "
            f"{self.reason}. {remedy}{self.remedy and ' or '}{self.remedy}."
        )


class LoaderTimeout(TimeoutError):
    """``next()`` waited longer than ``timeout``; the message says what every thread is doing.

    Example:
        >>> isinstance(LoaderTimeout("waited 5 s"), TimeoutError)
        True
    """
