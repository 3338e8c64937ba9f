"""The shapes that are measured, each with the reason it is here."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """``rows`` of the batch (half of them repeated) and ``classes``."""

    rows: int
    classes: int
    why: str


class LinearShape(NamedTuple):
    """Hidden states ``(rows, features)`` and the weight ``(classes, features)`` of a last layer."""

    rows: int
    features: int
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
LINEAR = {
    "cpu": (LinearShape(1024, 256, 50257, "GPT-2's vocabulary, a model that a CPU can train"),),
    "cuda": (LinearShape(8192, 4096, 128256, "Llama 3's vocabulary and width: 2 GB of logits in bfloat16"),),
}
SWEEPS = {
    "classes": tuple(
        Shape(
            256,
            classes,
            "from ten classes to ImageNet-21k at the usual batch, odd numbers among them",
        )
        for classes in (10, 33, 100, 333, 1000, 3333, 10000, 21843)
    ),
    "batch": tuple(
        Shape(rows, 1000, "ImageNet-1k from a batch that is all host time to one that is all traffic")
        for rows in (8, 32, 128, 512, 2048, 8192)
    ),
}
GPU_SWEEP_ROWS = 16384  # enough to fill a card at every number of classes


def of(device: str, sweep: str | None) -> tuple[Shape, ...]:
    """The shapes of a run: the published ones of a device, or a sweep."""
    if sweep is None:
        return (*GPU_LAUNCH, *GPU_BANDWIDTH) if device == "cuda" else CPU
    if sweep == "classes" and device == "cuda":
        return tuple(shape._replace(rows=GPU_SWEEP_ROWS) for shape in SWEEPS[sweep])
    return SWEEPS[sweep]
