"""What is done to images beyond crop and flip: its numbers, and the transforms and stages they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dlb_fast.data import Cutout, Mix, RandAugment, RandomErasing

__all__ = ["AugmentConfig"]


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to the training images after crop and flip; see docs/augmentation.md."""

    rand_augment: str | None = None
    """N,M: RandAugment with N operations of magnitude M (0 to 30); 2,9 is usual."""
    cutout: int = 0
    """Side of the square that Cutout blackens; 0 turns it off."""
    erase_prob: float = 0.0
    """Probability that a rectangle of a view is erased after the normalisation (random erasing); 0.25 is usual."""
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    """Range of the rectangle's share of the image."""
    erase_mode: Literal["const", "rand", "pixel"] = "const"
    """Zeros (the mean), noise per channel, or noise per pixel."""
    mixup_alpha: float = 0.0
    """Mixup with shares from Beta(alpha, alpha); 0 turns it off. Both uses of a sample are mixed alike."""
    cutmix_alpha: float = 0.0
    """CutMix, the same way."""
    mix_prob: float = 1.0
    """Probability that rows are mixed, where mixup or CutMix is on."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mix_mode: Literal["batch", "elem"] = "batch"
    """One share and box for each half of a batch, or one for every row."""

    def __post_init__(self) -> None:
        try:
            self.mix()
            self.erase()
            self.transforms()
        except (ValueError, TypeError) as error:
            raise ValueError(f"config: {error}") from None

    def mix(self) -> Mix | None:
        """Mixup and CutMix, or None."""
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            return None
        return Mix(self.mixup_alpha, self.cutmix_alpha, self.mix_prob, self.mix_switch_prob, self.mix_mode)

    def erase(self) -> RandomErasing | None:
        """Random erasing, or None."""
        if self.erase_prob == 0:
            return None
        return RandomErasing(self.erase_prob, area=self.erase_area, mode=self.erase_mode)

    def transforms(self) -> list[Any]:
        """What follows the crop and the flip, on uint8."""
        steps: list[Any] = []
        if self.rand_augment is not None:
            try:
                operations, magnitude = (int(part) for part in self.rand_augment.split(","))
            except ValueError:
                raise ValueError(
                    f"rand_augment must be N,M (operations and magnitude), such as 2,9, got {self.rand_augment!r}"
                ) from None
            steps.append(RandAugment(operations, magnitude))
        if self.cutout != 0:
            steps.append(Cutout(self.cutout))
        return steps
