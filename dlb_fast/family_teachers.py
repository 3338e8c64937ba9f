"""The teachers of the family that look at more than the labels: copies, banks, partners, mirrors, the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lessons import average_copies, check_features, check_omega, ensemble_batch, gathered, mirrored, ps_lesson, ranked
from .memories import FeatureTap, LogitBank, ModelCopies, shown_size
from .teachers import Lesson, Scene, Teacher, check_share

__all__ = ["BankTeacher", "BatchTeacher", "CopiesTeacher", "MirrorTeacher", "PartnerTeacher", "RankTeacher"]


class BatchTeacher(Teacher):
    """BAKE: the batch's own predictions, ensembled by the likeness of the features (:func:`~dlb_fast.bake_loss`).

    Args:
        omega: in [0, 1). cross_rank: ensemble over all ranks.
        layer: whose input is the feature (a module or its name); None: the last ``nn.Linear``.

    The features come from a hook, so the model's forward must be one call per batch (``joint``).
    """

    def __init__(self, omega: float = 0.5, cross_rank: bool = False, layer: nn.Module | str | None = None) -> None:
        check_omega("BatchTeacher", omega)
        self.omega, self.cross_rank, self.layer = omega, cross_rank, layer
        self.tap: FeatureTap | None = None
        self.features: Tensor | None = None  # given by hand for the next batch

    def attach(self, model: nn.Module) -> None:
        if self.tap is not None:
            self.tap.remove()
        self.tap = FeatureTap(model, self.layer)

    def teach(self, scene: Scene) -> Lesson:
        if self.features is None and self.tap is None:
            raise RuntimeError("BAKE needs features: call criterion.attach(model) once, or pass features=")
        features = self.features
        if features is None and self.tap is not None:
            features = self.tap.take()
        self.features = None
        assert features is not None
        check_features("BAKE", features, scene.logits)
        return Lesson(
            "probabilities", ensemble_batch(features, scene.logits, scene.temperature, self.omega, self.cross_rank)
        )

    def cost(self) -> str:
        return "no state; a B x B solve per step, and a sampler that brings companions of the same class"


class CopiesTeacher(Teacher):
    """MrKD: the averaged predictions of copies of the model along its training (:func:`~dlb_fast.mr_kd_loss`).

    Args:
        copies, interval, dtype, device: of :class:`ModelCopies`.
        correct_share: teacher correction. swap: knowledge adjustment.
        ensemble: replace the average by a fully connected layer over the copies' logits (2021), which starts as their
            average and learns by cross entropy, one SGD step with this rate per batch; None: the average.

    Until the first copy is due the loss is plain cross entropy; the ensemble waits until the ring is full.
    A **reconstruction**: the papers' numbers, and what their network looks like, were not available.
    """

    needs = frozenset({"images"})

    def __init__(
        self,
        copies: int = 2,
        interval: int = 100,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        correct_share: float | None = None,
        swap: bool = False,
        ensemble: float | None = None,
    ) -> None:
        check_share("CopiesTeacher", correct_share)
        if ensemble is not None and not ensemble > 0:
            raise ValueError(f"CopiesTeacher: ensemble is a learning rate > 0 or None, got {ensemble!r}")
        self.ring = ModelCopies(copies, interval, dtype, device)
        self.correct_share, self.swap, self.ensemble = correct_share, swap, ensemble
        self._layer: tuple[Tensor, Tensor] | None = None  # weight (C, K * C), bias (C,)
        self._heard: Tensor | None = None  # the copies' logits of this batch

    def attach(self, model: nn.Module) -> None:
        self.ring.attach(model)

    def teach(self, scene: Scene) -> Lesson:
        if not len(self.ring):
            return Lesson("none")
        assert scene.images is not None
        half = scene.logits.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(scene.logits.device.type, dtype=scene.logits.dtype if half else None, enabled=half):
            copies = self.ring.logits(scene.images)
        if self.ensemble is not None and len(self.ring) == self.ring.copies:
            self._heard = copies.float()
            copies = self._ensembled(self._heard)[None]
        teacher = average_copies(copies, scene.target, scene.temperature, self.correct_share, self.swap)
        return Lesson("probabilities", teacher)

    def _ensembled(self, copies: Tensor) -> Tensor:
        count, _, classes = copies.shape
        if self._layer is None:
            weight = torch.eye(classes, device=copies.device).repeat(1, count) / count
            self._layer = (weight, torch.zeros(classes, device=copies.device))
        weight, bias = (t.to(copies.device) for t in self._layer)
        self._layer = (weight, bias)
        return copies.transpose(0, 1).flatten(1) @ weight.T + bias

    @torch.no_grad()
    def observe(self, scene: Scene) -> None:
        heard, self._heard = self._heard, None
        if heard is None or self._layer is None or scene.target is None or scene.target.dim() != 1:
            return
        weight, bias = self._layer
        known = (scene.target >= 0) & (scene.target < bias.shape[0])
        at = scene.target.clamp(0, bias.shape[0] - 1)[:, None]
        error = torch.softmax(self._ensembled(heard), 1).scatter_add(1, at, -torch.ones_like(at, dtype=bias.dtype))
        error = error * known[:, None] / known.sum().clamp(min=1)  # d CE / d logits
        assert self.ensemble is not None
        self._layer = (
            weight - self.ensemble * (error.T @ heard.transpose(0, 1).flatten(1)),
            bias - self.ensemble * error.sum(0),
        )

    def update(self) -> None:
        self.ring.update()

    def reset(self) -> None:
        self.ring.reset()
        self._layer = self._heard = None

    def state_dict(self) -> dict[str, Any]:
        layer = [] if self._layer is None else [tensor.cpu().clone() for tensor in self._layer]
        return {**self.ring.state_dict(), "ensemble": layer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ring.load_state_dict(state)
        layer = state["ensemble"]
        self._layer = (layer[0], layer[1]) if layer else None

    def cost(self) -> str:
        ring = self.ring
        where = f" on {ring.device}" if ring.device is not None else ""
        return (
            f"{ring.copies} copies of the model, {shown_size(ring.nbytes)}{where}, one every {ring.interval} steps; "
            f"{ring.copies} forwards without gradient per step more"
        )


class PartnerTeacher(Teacher):
    """CS-KD: the second half of the rows, of the same classes and without gradient, teaches the first half."""

    def teach(self, scene: Scene) -> Lesson:
        rows = scene.logits.shape[0]
        if rows % 2:
            raise ValueError(f"CS-KD: rows must be [anchors | partners], an even number, got {rows}")
        return Lesson("logits", scene.logits[rows // 2 :].detach(), rows=rows // 2)

    def cost(self) -> str:
        return "no state; half of the rows are partners, forwarded without gradient"


class MirrorTeacher(Teacher):
    """DDGSD: the two views of each sample in a batch teach each other (lag 0)."""

    def teach(self, scene: Scene) -> Lesson:
        return mirrored("DDGSD", scene.logits)


class BankTeacher(Teacher):
    """PS-KD: what the model said when it saw the sample last (:func:`~dlb_fast.ps_kd_loss`).

    Samples not seen yet teach their label. The weight is ``alpha (epoch + 1) / epochs``, as in the official code.

    Args:
        bank: where the predictions are kept. epochs: of the whole run; None keeps the weight at ``alpha``.
        cross_rank: store all ranks' rows on every rank (equal batch sizes), as the official code does.
    """

    def __init__(self, bank: LogitBank, epochs: int | None = None, cross_rank: bool = False) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"BankTeacher: epochs must be at least 1 or None, got {epochs}")
        self.bank, self.epochs, self.cross_rank = bank, epochs, cross_rank
        self.needs = frozenset({"ids"} if epochs is None else {"ids", "epoch"})

    def teach(self, scene: Scene) -> Lesson:
        target, ids = scene.target, scene.ids
        if target is None or target.dim() != 1:
            raise ValueError("PS-KD: needs labels (B,); mixed or dense targets belong to no single sample")
        assert ids is not None
        if scene.logits.shape[1] != self.bank.num_classes:
            raise ValueError(
                f"PS-KD: logits must have C = {self.bank.num_classes} classes, the num_classes of the bank, got "
                f"{scene.logits.shape[1]}"
            )
        rows, seen = self.bank.rows(ids, scene.logits.device)
        past = torch.softmax(rows.float(), 1)  # float16 rows sum to 1 only nearly
        label = torch.zeros_like(past).scatter(1, target.long().clamp(0, past.shape[1] - 1)[:, None], 1.0)
        schedule = 1.0
        if self.epochs is not None:
            assert scene.epoch is not None
            schedule = min((scene.epoch + 1) / self.epochs, 1.0)
        lesson = ps_lesson(torch.where(seen[:, None], past, label), schedule)
        return lesson._replace(mask=target != scene.ignore_index)

    def observe(self, scene: Scene) -> None:
        assert scene.ids is not None
        ids, logits = scene.ids, scene.logits.detach()
        if self.cross_rank:
            ids, logits = gathered(ids[:, None])[0][:, 0], gathered(logits)[0]
        self.bank.store(ids, logits)

    def reset(self) -> None:
        self.bank.reset()

    def state_dict(self) -> dict[str, Any]:
        return self.bank.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bank.load_state_dict(state)

    def cost(self) -> str:
        bank = self.bank
        dtype = str(bank.dtype).removeprefix("torch.")
        return f"a bank of {bank.num_samples} x {bank.num_classes} {dtype} rows, {shown_size(bank.nbytes)}"


class RankTeacher(Teacher):
    """Zipf's label smoothing: the ranks of the logits themselves (:func:`~dlb_fast.zipf_loss`)."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def teach(self, scene: Scene) -> Lesson:
        if scene.target is None:
            raise ValueError("zipf: needs labels (B,)")
        return ranked(scene.logits, scene.target, self.power, scene.ignore_index)

    def cost(self) -> str:
        return "no state; a sort of every row and a second pass of the kernel per step"
