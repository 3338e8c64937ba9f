"""The memory of methods that keep a row for every sample, and the criterion around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._args import as_int, check_device
from ..losses import DistillationLoss, Inputs
from ..reference import compute_dtype, finite_rows
from ._common import chosen, format_bytes, gather_rows

__all__ = ["BankLoss", "SampleBank"]


class SampleBank:
    """A row for every sample of a set: ``(num_samples, C)`` by sample id.

    Args:
        num_samples: samples of the whole set; ids are in ``[0, num_samples)``.
        num_classes: ``C``.
        dtype: storage dtype.
        device: where to keep it; None: beside the logits when it takes at most a quarter of that device's free memory,
            else on the host (rows then travel every step).

    Raises:
        ValueError: sizes below 1, an unknown device. An id outside the bank is an IndexError on a CPU (a ValueError of
            the criterion) and an error of the device on a GPU.

    >>> bank = SampleBank(num_samples=4, num_classes=2)
    >>> bank.store(torch.tensor([2]), torch.tensor([[0.5, 0.5]]))
    >>> rows, seen = bank.rows(torch.tensor([2, 0]), "cpu")
    >>> rows[0].tolist(), seen.tolist()
    ([0.5, 0.5], [True, False])
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        op = type(self).__name__
        self.num_samples = as_int(num_samples, op, "num_samples", 1)
        self.num_classes = as_int(num_classes, op, "num_classes", 1)
        self.dtype = dtype
        self.device = check_device(op, "device", device)
        # Made with the first logits, which show the device. One row more than samples: ignored rows are written there.
        self._rows: Tensor | None = None
        self._seen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the bank."""
        return self.num_samples * (self.num_classes * self.dtype.itemsize + 1)

    def _place(self, near: torch.device) -> torch.device:
        if self.device is not None:
            return self.device
        if near.type == "cuda" and self.nbytes > torch.cuda.mem_get_info(near)[0] // 4:
            return torch.device("cpu")
        return near

    def _storage(self, near: torch.device | str) -> tuple[Tensor, Tensor]:
        if self._rows is None or self._seen is None:
            place, samples = self._place(torch.device(near)), self.num_samples + 1
            self._rows = torch.zeros(samples, self.num_classes, dtype=self.dtype, device=place)
            self._seen = torch.zeros(samples, dtype=torch.bool, device=place)
        return self._rows, self._seen

    def rows(self, ids: Tensor, near: torch.device | str) -> tuple[Tensor, Tensor]:
        """Stored rows (n, C) of these samples and which (n,) have any, on device ``near``."""
        index = ids.to(torch.int64)  # uint8 would select as a mask
        # A negative id, or that of the row for what is not stored, must be refused as any other outside the bank.
        index = torch.where((index < 0) | (index == self.num_samples), self.num_samples + 1, index)
        if self._rows is None or self._seen is None:  # asking allocates nothing
            nothing = torch.zeros((), dtype=torch.bool, device=near).expand(self.num_samples + 1)
            seen = nothing[index.to(near)]
            return torch.zeros(len(seen), self.num_classes, dtype=self.dtype, device=near), seen
        index = index.to(self._rows.device)
        return self._rows[index].to(near), self._seen[index].to(near)

    @torch.no_grad()
    def store(self, ids: Tensor, values: Tensor, keep: Tensor | None = None) -> None:
        """Replace the rows of these samples; of repeated ids the last one counts.

        A row that is not finite (NaN, infinite, or -inf for every class) leaves the bank as it is.

        Args:
            ids: ``(n,)`` integer sample ids.
            values: ``(n, C)``.
            keep: ``(n,)`` bool, False leaves the bank as it is; decided on the device, without a synchronisation.
        """
        rows, seen = self._storage(values.device)
        values = values.detach().to(compute_dtype(values.dtype))
        finite = finite_rows(values)
        index = torch.where(finite if keep is None else finite & keep, ids.to(torch.int64), self.num_samples)
        index = index.to(rows.device)
        rows.index_copy_(0, index, values.to(rows.device, self.dtype))
        seen.index_fill_(0, index, True)

    def reset(self) -> None:
        """Forget every row."""
        self._rows = self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """Rows and which are filled, on the CPU; empty before the first batch."""
        if self._rows is None or self._seen is None:
            return {}
        return {"rows": self._rows[:-1].cpu().clone(), "seen": self._seen[:-1].cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; ValueError when it belongs to another set or number of classes."""
        self.reset()
        if not state:
            return
        wanted, got = (self.num_samples, self.num_classes), tuple(state["rows"].shape)
        if got != wanted:
            raise ValueError(f"{type(self).__name__}: expected {wanted} (samples, classes), the saved bank holds {got}")
        rows, seen = self._storage(self.device or "cpu")
        rows[:-1], seen[:-1] = state["rows"], state["seen"] & finite_rows(state["rows"])


class BankLoss(DistillationLoss):
    """Base of the criteria with a :class:`SampleBank`: what a batch meets, what it leaves, and what is saved.

    Args:
        bank: the memory.
        cross_rank: store the rows of all ranks on every rank.

    The other options are those of :class:`~dlb_fast.DistillationLoss`.
    """

    needs = frozenset({"ids"})
    _kept_as: ClassVar[Mapping[str, str]] = {
        "num_samples": "bank.num_samples",
        "num_classes": "bank.num_classes",
        "memory_dtype": "bank.dtype",
        "memory_device": "bank.device",
    }

    def __init__(self, bank: SampleBank, cross_rank: bool, **options: Any) -> None:
        super().__init__(**options)
        self.bank, self.cross_rank = bank, cross_rank
        # What this batch met, and what the batch recorded last had met: its rows (B, C), and which were seen (B,).
        self._met: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def meet(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The rows (B, C) that this batch met the first time it was evaluated, and which were seen (B,)."""
        op = type(self).__name__
        if inputs.logits.shape[1] != self.bank.num_classes:
            raise ValueError(
                f"{op}: logits must have C = {self.bank.num_classes} classes, num_classes of the criterion, got "
                f"{inputs.logits.shape[1]}"
            )
        assert inputs.ids is not None
        try:
            rows, seen = self.bank.rows(inputs.ids, inputs.logits.device)
        except IndexError:
            raise ValueError(
                f"{op}: ids must be in [0, {self.bank.num_samples}), num_samples of the criterion, got "
                f"{int(inputs.ids.min())} to {int(inputs.ids.max())}; num_samples counts the whole training set"
            ) from None
        if inputs.again is not False:  # the bank has this batch's own rows by now
            assert self._last is not None
            rows, seen = (chosen(inputs.again, *pair) for pair in zip(self._last, (rows, seen), strict=True))
        self._met = (rows, seen) if torch.is_grad_enabled() else None
        return rows, seen

    def leave(self, inputs: Inputs, values: Tensor) -> None:
        """Store the rows (B, C) of a batch; those of ignored labels are left as they were."""
        assert inputs.ids is not None and inputs.target is not None
        ids, values = inputs.ids.long(), values.detach()
        keep = inputs.target != inputs.ignore_index
        if self.cross_rank:
            columns, _ = gather_rows(torch.stack([ids, keep.long()], 1))
            ids, keep, values = columns[:, 0], columns[:, 1] > 0, gather_rows(values)[0]
        self.bank.store(ids, values, keep)
        met, self._met = self._met, None
        assert met is not None
        if self._last is None or self._last[0].shape != met[0].shape or self._last[0].device != met[0].device:
            self._last = met
        else:  # at the same address, for a captured graph
            for last, now in zip(self._last, met, strict=True):
                last.copy_(now)

    def reset(self) -> None:
        super().reset()
        self.bank.reset()
        self._met = self._last = None

    def cost(self) -> str:
        bank = self.bank
        dtype = str(bank.dtype).removeprefix("torch.")
        return f"a bank of {bank.num_samples} x {bank.num_classes} {dtype} rows, {format_bytes(bank.nbytes)}"

    def get_extra_state(self) -> Tensor:
        """The bank (num_samples, C) for ``state_dict()``; +inf for samples never seen."""
        bank, saved = self.bank, self.bank.state_dict()
        if not saved:
            return torch.full((bank.num_samples, bank.num_classes), torch.inf, dtype=bank.dtype, device="cpu")
        return saved["rows"].masked_fill_(~saved["seen"][:, None], torch.inf)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a saved bank."""
        bank = self.bank
        wanted = (bank.num_samples, bank.num_classes)
        if not isinstance(state, Tensor) or state.shape != wanted or not state.is_floating_point():
            got = f"{state.dtype} {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            op = type(self).__name__
            raise ValueError(f"{op}: expected a saved bank of shape {wanted} (samples, classes), got {got}")
        self.reset()
        seen = state[:, 0] < torch.inf
        if seen.any():
            bank.load_state_dict({"rows": state, "seen": seen})
