"""BAKE: the predictions of a batch, ensembled by the likeness of its samples, are the teacher.

    A = row-softmax(F F^T - 1e9 I),    Q = (1 - w) (I - w A)^-1 softmax(Z / T)    (no gradient)
    L = CE + alpha * T^2 * mean KL(Q_i || softmax(z_i / T))

``F`` are the L2-normalised features that go into the classifier, ``w`` is ``omega``. The batch should hold companions
of the same class (`ClassBatchSampler`). The linear system is solved instead of inverting the matrix. A row whose
features or logits are not finite is left out: it neither teaches nor is taught.

Source: **official** code yxgeee/BAKE, `knowledge_ensemble` and `small_scale/train.py` (Ge et al., arXiv 2104.13298).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._args import as_number, check_logits, check_temperature, check_tensor
from ..functional import LossParts, Teacher, distill
from ..losses import DistillationLoss, Inputs
from ..reference import Scalar, compute_dtype, teacher_kl
from ._common import autocast, gather_rows
from .registry import Method, Option, register

__all__ = ["BakeLoss", "FeatureHook", "bake_loss", "reference"]

ALPHA, TEMPERATURE = 1.0, 4.0  # official code
OMEGA = 0.5  # official code, CIFAR-100, CUB and ImageNet; 0.9 on TinyImageNet, Dogs and MIT67
COMPANIONS = 1  # official code, ImageNet, TinyImageNet, Dogs and MIT67; 3 on CIFAR-100 and CUB


@torch.no_grad()
def ensemble(
    features: Tensor, logits: Tensor, temperature: Scalar, omega: float = OMEGA, cross_rank: bool = False
) -> Tensor:
    """The teacher ``Q`` (B, C), in float32 also under autocast; NaN in rows that are not finite."""
    with autocast(logits, enabled=False):
        dtype = compute_dtype(logits.dtype)
        rows = logits.shape[0]
        features = F.normalize(features.detach().to(dtype).flatten(1), p=2, dim=1)
        softened = torch.softmax(logits.detach().to(dtype) / temperature, dim=1)
        start = 0
        if cross_rank:  # one collective for both
            joined, start = gather_rows(torch.cat([features, softened], 1))
            features, softened = joined.split([features.shape[1], softened.shape[1]], dim=1)
        finite = features.sum(1).isfinite() & softened.sum(1).isfinite()
        features = features.masked_fill(~finite[:, None], 0.0)
        known = softened.masked_fill(~finite[:, None], 0.0)
        likeness = (features @ features.T).masked_fill(~finite, -1e9).fill_diagonal_(-1e9)
        affinity = torch.softmax(likeness, dim=1)
        system = torch.eye(len(softened), dtype=dtype, device=logits.device) - omega * affinity
        # Diagonally dominant for omega < 1, so the solve cannot fail, and unchecked it does not wait for a GPU.
        solved, _ = torch.linalg.solve_ex(system, known)
        solved = solved.masked_fill(~finite[:, None], math.nan)
        return (1.0 - omega) * solved[start : start + rows]


def _check_omega(op: str, omega: float) -> float:
    """In [0, 1): at 1 the system is singular."""
    number = as_number(op, "omega", omega)
    if not 0 <= number < 1:
        raise ValueError(f"{op}: omega must be a number in [0, 1), got {omega!r}")
    return number


def _check_features(op: str, features: Tensor, logits: Tensor) -> None:
    check_tensor(op, "features", features)
    if features.dim() < 2 or features.shape[0] != logits.shape[0] or features.device != logits.device:
        raise ValueError(
            f"{op}: features must have shape ({logits.shape[0]}, D) on {logits.device}, one row per row of the logits, "
            f"got {tuple(features.shape)} on {features.device}"
        )


def bake_loss(
    logits: Tensor,
    features: Tensor,
    target: Tensor,
    *,
    alpha: Scalar = ALPHA,
    temperature: Scalar = TEMPERATURE,
    omega: float = OMEGA,
    cross_rank: bool = False,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    return_parts: bool = False,
) -> Any:
    """BAKE: ``CE + alpha T^2 KL(Q || softmax(z / T))``, ``Q = (1 - w) (I - w A)^-1 softmax(Z / T)``.

    Args:
        logits: ``(B, C)``.
        features: ``(B, D...)`` what goes into the classifier, any floating dtype; detached and flattened here.
        target: ``(B,)`` labels or ``(B, C)`` probabilities.
        alpha: weight of the KL.
        temperature: T > 0 of both distributions; a gradient of T is that of the student's part.
        omega: how far the predictions spread over the batch, in ``[0, 1)``.
        cross_rank: ensemble over all ranks' batches (of equal sizes); the loss is that of this rank's rows.

    The other options, the result and the errors are those of :func:`~dlb_fast.distillation_loss`.
    Source: **official** code yxgeee/BAKE.

    >>> z, f, y = torch.zeros(2, 4), torch.eye(2), torch.tensor([0, 1])
    >>> round(bake_loss(z, f, y).item(), 4) == round(1.386294, 4)
    True
    """
    op = "bake_loss"
    check_logits(op, logits, target)
    temperature, omega = check_temperature(op, temperature), _check_omega(op, omega)
    _check_features(op, features, logits)
    teacher = Teacher("probabilities", ensemble(features, logits, temperature, omega, cross_rank))
    loss, parts = distill(
        op, logits, target, teacher, alpha=alpha, temperature=temperature,
        label_smoothing=label_smoothing, weight=weight, ignore_index=ignore_index, kd_mask=kd_mask, target_b=target_b,
        lam=lam, reduction=reduction, impl=impl,
    )  # fmt: skip
    return (loss, LossParts.unpack(parts)) if return_parts else loss


class FeatureHook:
    """Keeps the input of a layer at every forward, so that no model has to be rewritten.

    Args:
        model: any module.
        layer: the layer or its name; None: the last ``nn.Linear``, whose input is the pooled feature of nearly every
            classifier.

    Raises:
        ValueError: there is no such layer.

    >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> hook = FeatureHook(model)
    >>> _ = model(torch.zeros(4, 3))
    >>> hook.take().shape
    torch.Size([4, 5])
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        found: nn.Module | None
        if isinstance(layer, str):
            found = dict(model.named_modules()).get(layer)
        elif layer is None:
            linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
            found = linear[-1] if linear else None
        else:
            found = layer
        if found is None:
            raise ValueError(
                f"FeatureHook: {type(model).__name__} has no {'nn.Linear' if layer is None else f'layer {layer!r}'}; "
                "pass the layer whose input is the feature, or its name (dict(model.named_modules()) lists them)"
            )
        self.latest: Tensor | None = None  # (B, D) of the last forward in any mode
        self._features: Tensor | None = None  # of the last training forward, until they are taken
        self._handle = found.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.latest = inputs[0].detach().flatten(1)
        if module.training:
            self._features = self.latest

    def take(self) -> Tensor:
        """The features (B, D) of the last training forward, detached; each forward can be taken once."""
        if self._features is None:
            raise RuntimeError(
                "FeatureHook: no forward in training mode reached the layer since the last take(); run the model "
                "first, or call setup(model) again where the layer was replaced"
            )
        features, self._features = self._features, None
        return features

    def clear(self) -> None:
        """Drop the features."""
        self.latest = self._features = None

    @property
    def is_taken(self) -> bool:
        """Whether there is nothing to take."""
        return self._features is None

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


class BakeLoss(DistillationLoss):
    """BAKE as a criterion: the loss of :func:`bake_loss`.

    ``setup(model)`` hooks the layer whose input is the feature; without a model pass ``features=`` with every batch.
    The model's forward must be one call per batch. The teacher, features and temperature in it, has no gradient.

    Args:
        alpha: weight of the KL.
        temperature: of both distributions.
        omega: how far the predictions spread over the batch, in [0, 1).
        cross_rank: ensemble over all ranks' batches, of equal sizes.
        layer: layer whose input is the feature, by name (in Python also the module); None: the last nn.Linear.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> criterion = BakeLoss()
    >>> criterion.setup(model)
    >>> criterion(model(torch.randn(6, 3)), torch.arange(6) % 4).shape
    torch.Size([])
    """

    mixes = True

    def __init__(
        self,
        *,
        alpha: Scalar = ALPHA,
        temperature: Scalar = TEMPERATURE,
        omega: float = OMEGA,
        cross_rank: bool = False,
        layer: nn.Module | str | None = None,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        omega = _check_omega("BakeLoss", omega)
        super().__init__(
            alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
            ignore_index=ignore_index, reduction=reduction, impl=impl,
        )  # fmt: skip
        self.omega, self.cross_rank = omega, cross_rank
        self._layer = (layer,)  # in a tuple: a layer of the model is no submodule of the criterion
        self.hook: FeatureHook | None = None
        self._features: Tensor | None = None  # passed with this batch
        self._taken: tuple[Tensor, Tensor | None] | None = None  # features and ids of the last batch, to be met again

    @property
    def layer(self) -> nn.Module | str | None:
        """The layer whose input is the feature, as it was given."""
        return self._layer[0]

    def setup(self, model: nn.Module) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = FeatureHook(model, *self._layer)

    def teacher(self, inputs: Inputs) -> Teacher:
        features, self._features = self._features, None
        if features is None:
            features = self._hooked(inputs.ids)
        _check_features("BakeLoss", features, inputs.logits)
        return Teacher(
            "probabilities", ensemble(features, inputs.logits, inputs.temperature, self.omega, self.cross_rank)
        )

    def _hooked(self, ids: Tensor | None) -> Tensor:
        """The features of the model's last forward, or of the last batch where it is evaluated again without one."""
        hook = self.hook
        if hook is None:
            raise RuntimeError("BakeLoss: needs features: call criterion.setup(model) once, or pass features=")
        if not torch.is_grad_enabled() and hook.latest is not None:
            return hook.latest  # no training: the features stay for the training call, if there is one
        if hook.is_taken and self._taken is not None:
            features, last_ids = self._taken
            again = self._again(ids)
            # Otherwise an error, so that the ids may be read here.
            if again == 1 or (again == -1 and ids is not None and last_ids is not None and torch.equal(ids, last_ids)):
                return features
        features = hook.take()
        self._taken = features, None if ids is None else ids.clone()
        return features

    def forward(
        self,
        logits: Tensor,
        target: Tensor | None,
        ids: Tensor | None = None,
        *,
        features: Tensor | None = None,
        images: Tensor | None = None,
        epoch: int | None = None,
        target_b: Tensor | None = None,
        lam: Scalar | None = None,
        kd_mask: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`DistillationLoss.forward`, with ``features`` (B, D) in place of the hook's."""
        self._features = features if self.training else None
        return super().forward(
            logits, target, ids, images=images, epoch=epoch, target_b=target_b, lam=lam, kd_mask=kd_mask
        )

    def step(self) -> None:
        super().step()
        self._taken = None

    def reset(self) -> None:
        super().reset()
        self._features = self._taken = None
        if self.hook is not None:
            self.hook.clear()

    def cost(self) -> str:
        return "no state; a B x B solve per step, and a sampler that brings companions of the same class"


def reference_teacher(features: Tensor, logits: Tensor, *, temperature: float, omega: float) -> Tensor:
    """The teacher's definition: `knowledge_ensemble` of the official code, with its inverse."""
    eye = torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device)
    features = F.normalize(features, p=2, dim=1)
    affinity = torch.softmax(features @ features.T - eye * 1e9, dim=1)
    propagated = (1.0 - omega) * torch.inverse(eye - omega * affinity)
    return propagated @ torch.softmax(logits / temperature, dim=1)


def reference(
    logits: Tensor,
    features: Tensor,
    target: Tensor,
    *,
    alpha: float = ALPHA,
    temperature: float = TEMPERATURE,
    omega: float = OMEGA,
) -> Tensor:
    """The definition, in the order of the official code."""
    teacher = reference_teacher(features.detach(), logits.detach(), temperature=temperature, omega=omega)
    return F.cross_entropy(logits, target) + alpha * teacher_kl(teacher, logits, temperature)


register(
    Method(
        "bake",
        BakeLoss,
        "BAKE: the batch's knowledge, ensembled over companions of the class",
        card="bake",
        batches="same_class",
        batch_options={
            "companions": Option(
                COMPANIONS, int, "samples of the same class per anchor; a step samples batch_size / (companions + 1)"
            )
        },
        variants={"bake0": ("class batches, alpha=0", {"alpha": 0.0}), "bake": ("BAKE", {})},
    )
)
