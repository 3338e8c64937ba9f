"""Transforms of one argument, `transform(image)`, as torchvision's and timm's are, in loaders that call with an rng."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from dlb_fast.data._args import check_callable
from dlb_fast.data.datasets.source import Again, SampleSource, as_image, is_torchvisions
from dlb_fast.data.decode.decode import is_pillow

__all__ = ["Single", "as_transform", "source_transform", "takes_rng"]


class Single:
    """`transform(image)` as `(image, rng)`: its random numbers are torch's and Python's global ones, not the view's.

    Args:
        transform: returns a (c, h, w) tensor, or an image that `as_image` converts to one.
        pillow: uint8 images (c, h, w) of 1 or 3 channels become PIL images, as torchvision's datasets give them; False
            leaves every image as it is.
    """

    def __init__(self, transform: Callable[[Any], Any], *, pillow: bool = True) -> None:
        self.transform = transform
        self.pillow = pillow

    def __call__(self, image: Any, rng: Any = None) -> torch.Tensor:
        given = _as_pillow(image) if self.pillow else image
        try:
            view = self.transform(given)
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"the transform {_name(self.transform)} of one argument, which gets a {_kind(given)} here, raised "
                f"{type(error).__name__}: {error}; write it for such an image, or as transform(image, rng), which gets "
                "a uint8 tensor (c, h, w)"
            ) from error
        if isinstance(view, torch.Tensor):
            return view if type(view) is torch.Tensor else view.as_subclass(torch.Tensor)  # v2 returns a subclass
        return as_image(view)

    def __repr__(self) -> str:
        return repr(self.transform)


def as_transform(operation: str, transform: Any, *, pillow: bool = True) -> Any:
    """`transform` as a callable `(image, rng)`, or None; TypeError if it is not callable."""
    check_callable(operation, transform=transform)
    return transform if transform is None or takes_rng(transform) else Single(transform, pillow=pillow)


def source_transform(operation: str, source: SampleSource, transform: Any) -> Any:
    """The transform of a loader's views, `(image, rng)` or None: that of the dataset, then the one of the loader."""
    own = as_transform(operation, source.own, pillow=False)
    given = as_transform(operation, transform, pillow=not source.items or own is not None)
    both = Both(own, given) if own is not None and given is not None else own or given
    source.keep = source.items and isinstance(own or given, Single)
    alone = transform is None and source.unknown  # without a transform anywhere both views would be one picture
    return Again(source, both) if source.augments or alone else both


class Both:
    """Two transforms after each other."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def __call__(self, image: Any, rng: Any) -> torch.Tensor:
        return self.second(self.first(image, rng), rng)


def takes_rng(transform: Any) -> bool:
    """Whether `transform` is called as `transform(image, rng)`: it needs two arguments, or has one named `rng`.

    Example:
        >>> takes_rng(lambda image: image), takes_rng(lambda image, rng: image), takes_rng(lambda image, size=3: image)
        (False, True, False)
    """
    if is_torchvisions(transform) or isinstance(transform, torch.jit.ScriptModule):
        return False
    try:
        signature = inspect.signature(transform.forward if isinstance(transform, torch.nn.Module) else transform)
    except (TypeError, ValueError):  # compiled functions
        return True
    if "rng" in signature.parameters:
        return True
    required = 0
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return True
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        required += positional and parameter.default is parameter.empty
    return required > 1


def _as_pillow(image: Any) -> Any:
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
        return image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return image
    from PIL import Image

    pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _kind(image: Any) -> str:
    if is_pillow(image):
        return f"PIL image ({image.mode})"
    shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
    return type(image).__name__ + shape


def _name(transform: Any) -> str:
    return getattr(transform, "__name__", None) or type(transform).__name__
