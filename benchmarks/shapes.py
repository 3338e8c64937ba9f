"""The shapes that are measured, each with the reason it is here."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """``rows`` of the batch (half of them repeated) and ``classes``."""

    rows: int
    classes: int
    why: str


CPU = (
    Shape(256, 100, "CIFAR-100 at the usual batch: host cost counts"),
    Shape(256, 1000, "ImageNet-1k, one worker's batch"),
    Shape(256, 21843, "ImageNet-21k: the row leaves the second-level cache"),
)
GPU_BANDWIDTH = (
    Shape(32768, 1000, "ImageNet-1k with enough rows to fill the card: a warp per row"),
    Shape(32768, 8192, "one block per pair"),
    Shape(8192, 21841, "ImageNet-21k, odd: unaligned rows"),
    Shape(8192, 32000, "first language-model vocabulary above 16k: clusters"),
    Shape(8192, 128256, "the largest vocabulary in common use"),
)
GPU_LAUNCH = (
    Shape(256, 100, "CIFAR-100 batch: launches and host time decide"),
    Shape(512, 1000, "ImageNet batch: one microsecond of traffic"),
)
EMULATED = Shape(8, 1000, "small enough for Triton's interpreter")
