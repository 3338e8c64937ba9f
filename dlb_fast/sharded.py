"""The objective over logits whose classes are split over the ranks of a process group (vocab parallel, loss parallel).

Every rank holds all rows and a part of the classes, in the order of the ranks. In the notation of csrc/row_math.h,

    one MAX   m = max z and max t of every row, the sizes of the parts, and what the ranks must have alike
    one SUM   d1 = sum exp(x), d2 = sum exp(x / tau), dt, gap, the label's x, the sum of x for label smoothing

give every rank the loss. The backward needs no collective: the gradient of a class is a function of its own logits and
of these sums. It is made there, with the upstream gradient in its coefficients, so that it is rounded once. All passes
go over pieces of a few rows: nothing but the gradient has the size of the logits.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _args, ops, reference
from .functional import LossParts, Options, prepare
from .reference import RowTerms, Scalar

PIECE_BYTES, PIECE_BYTES_ON_CPU = 32 << 20, 1 << 20
"""Bytes of one temporary of a piece, about five of which live at once."""
_COEFFICIENTS = ("a", "even", "dense", "label", "label_b", "b", "k")  # of the gradient, per row


class _Call(NamedTuple):
    """One call on this rank; what has a dimension of classes is this rank's part."""

    options: Options
    target: Tensor | None
    teacher: Tensor | None
    kd_mask: Tensor | None
    target_b: Tensor | None
    lam: Scalar | None
    group: Any
    ranks: int  # 1: no collective
    place: int  # of this rank's part among the parts

    @property
    def dense(self) -> Tensor | None:
        return self.target if self.target is not None and self.target.dim() == 2 else None

    @property
    def labels(self) -> dict[str, Tensor]:
        """The label vectors by the suffix of what belongs to them."""
        given = {} if self.dense is not None else {"": self.target, "_b": self.target_b}
        return {suffix: labels for suffix, labels in given.items() if labels is not None}


class _Agreed(NamedTuple):
    """What every rank knows after the MAX."""

    m: Tensor  # (B,); NaN where the row is not finite, everywhere if the ranks disagree
    mt: Tensor | None  # (H,); not finite: no valid teacher
    classes: Tensor  # 0-d int64: of all parts
    columns: dict[str, Tensor]  # by suffix, (B,) int64: the label's column in this part
    here: dict[str, Tensor]  # by suffix, (B,) bool: the label has one here
    right_here: Tensor | None  # (B,) bool, with a dense target: the first of its largest shares lies in this part


def _pieces(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Slices of rows within the budget; a compiler makes no temporaries, so it has the whole."""
    if torch.compiler.is_compiling():
        return [slice(0, rows)]
    budget = PIECE_BYTES_ON_CPU if device.type == "cpu" else PIECE_BYTES
    step = max(1, budget // max(1, columns * dtype.itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _reduce(pieces: dict[str, Tensor], call: _Call, *, largest: bool) -> dict[str, Tensor]:
    """The pieces, each of one dimension, reduced over the ranks in one collective."""
    joined = torch.cat([*pieces.values()])
    if call.ranks > 1:
        dist.all_reduce(joined, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, call.group)
    return dict(zip(pieces, joined.split([piece.numel() for piece in pieces.values()]), strict=True))


def _row_maximum(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest entry of every row: -inf for a part without classes, +inf for NaN, which not every MAX keeps."""
    inf = float("inf")
    if values.shape[1] == 0:
        return torch.full((values.shape[0],), -inf, dtype=dtype, device=values.device)
    return values.amax(1).to(dtype).nan_to_num(nan=inf, posinf=inf, neginf=-inf)


def _fingerprint(call: _Call, device: torch.device) -> Tensor:
    """A hash below 2^24 (exact in float32) of what the ranks must have alike: labels, masks, shares and options."""
    given = (call.options.numbers, call.options.weight is None, None if isinstance(call.lam, Tensor) else call.lam)
    # A compiled program does not depend on the values of options that become its inputs.
    code = 0 if torch.compiler.is_compiling() else zlib.crc32(repr(given).encode())
    total = torch.full((), code, dtype=torch.int64, device=device)
    for values in (*call.labels.values(), call.kd_mask, call.lam):
        if isinstance(values, Tensor):
            bits = values.detach().float().view(torch.int32) if values.is_floating_point() else values
            bits = bits.long().reshape(-1)
            odd = torch.arange(1, 2 * bits.numel() + 1, 2, device=device)  # the order of the rows counts
            total = total * 0x5851F42D4C957F2D + (bits * odd).sum()
    return ((total * 0x1E3779B97F4A7C15) >> 40) & 0xFFFFFF


def _agree(logits: Tensor, call: _Call) -> _Agreed:
    """The MAX, and the checks of what the ranks know only together: they raise on all ranks or on none."""
    op, dtype, batch = call.options.op, reference.compute_dtype(logits.dtype), logits.shape[0]
    sizes = torch.full((call.ranks,), -float("inf"), dtype=dtype, device=logits.device)
    shares = sizes.expand(batch, -1).clone() if call.dense is not None else None
    sizes[call.place].fill_(logits.shape[1])
    mark = _fingerprint(call, logits.device).to(dtype)
    pieces = {"m": _row_maximum(logits, dtype), "sizes": sizes, "mark": torch.stack([mark, -mark])}
    if call.teacher is not None:
        pieces["mt"] = _row_maximum(call.teacher, dtype)
    if shares is not None:
        assert call.dense is not None
        shares[:, call.place] = _row_maximum(call.dense, dtype)
        pieces["shares"] = shares.view(-1)
    most = _reduce(pieces, call, largest=True)
    whole = most["sizes"].long()
    first, classes = whole[: call.place].sum(), whole.sum()
    alike = most["mark"][0] == -most["mark"][1]
    if _args.readable(alike):
        if not bool(alike):
            raise ValueError(
                f"{op}: labels, lam, kd_mask and options must be the same on all {call.ranks} ranks that share the "
                "classes, but they differ; give these ranks the same batch"
            )
        for name, labels in zip(("target", "target_b"), call.labels.values(), strict=False):
            _args.check_label_range(op, labels, int(classes), call.options.ignore_index, name)
    columns = {suffix: labels - first for suffix, labels in call.labels.items()}
    here = {suffix: (column >= 0) & (column < logits.shape[1]) for suffix, column in columns.items()}
    columns = {suffix: column.clamp(0, max(logits.shape[1] - 1, 0)) for suffix, column in columns.items()}
    m = torch.where(most["m"].isfinite() & alike, most["m"], float("nan"))
    right_here = None if shares is None else most["shares"].view(batch, -1).argmax(1) == call.place
    return _Agreed(m, most.get("mt"), classes, columns, here, right_here)


def _at(values: Tensor, column: Tensor, here: Tensor, dtype: torch.dtype) -> Tensor:
    """``values[i, column[i]]``, 0 for a row whose column another rank has."""
    if values.shape[1] == 0:
        return torch.zeros(values.shape[0], dtype=dtype, device=values.device)
    return torch.where(here, values.gather(1, column[:, None])[:, 0].to(dtype), 0.0)


def _sums(
    logits: Tensor, call: _Call, agreed: _Agreed, weight: Tensor | None, temperature: Scalar
) -> dict[str, Tensor]:
    """The SUM."""
    batch, columns = logits.shape
    dtype, teacher, dense, m = agreed.m.dtype, call.teacher, call.dense, agreed.m
    smoothed = call.target is not None and call.options.label_smoothing > 0.0
    names = ["d1"] * (call.target is not None) + ["even"] * smoothed + ["mass", "dot"] * (dense is not None)
    sums = {name: m.new_empty(batch) for name in names}
    if teacher is not None:
        sums |= {name: m.new_empty(teacher.shape[0]) for name in ("d2", "dt", "gap")}
    for rows in _pieces(batch, columns, dtype, logits.device):
        x = logits[rows].to(dtype) - m[rows, None]
        if "d1" in sums:
            sums["d1"][rows] = x.exp().sum(1)
        if "even" in sums:
            sums["even"][rows] = (x if weight is None else x * weight).sum(1)
        if dense is not None:
            share = dense[rows].to(dtype) if weight is None else dense[rows].to(dtype) * weight
            sums["mass"][rows] = share.sum(1)
            # 0 * -inf: a class without any target mass costs nothing even when its logit is -inf.
            sums["dot"][rows] = (share * x).masked_fill_(share == 0, 0.0).sum(1)
        if teacher is not None and rows.start < teacher.shape[0]:
            assert agreed.mt is not None
            y = teacher[rows].to(dtype) - agreed.mt[rows, None]
            x = x[: len(y)]
            sums["d2"][rows] = (x / temperature).exp_().sum(1)
            et = (y / temperature).exp_()
            sums["dt"][rows] = et.sum(1)
            sums["gap"][rows] = y.sub_(x).mul_(et).masked_fill_(et == 0, 0.0).sum(1) / temperature
    for suffix, column in agreed.columns.items():
        here = agreed.here[suffix]
        sums["x" + suffix] = torch.where(here, _at(logits, column, here, dtype) - m, 0.0)
        if weight is not None:
            sums["w" + suffix] = _at(weight.expand(batch, -1), column, here, dtype)
    if dense is not None:
        assert agreed.right_here is not None
        right = dense.argmax(1) if columns else m.new_zeros(batch, dtype=torch.int64)
        hit = agreed.right_here & (_at(logits, right, agreed.right_here, dtype) >= m)
        sums["hit"] = hit.to(dtype)
    if smoothed and weight is not None:
        sums["weight"] = weight.sum()[None]
    return _reduce(sums, call, largest=False)


def _share(terms: RowTerms, counts: Tensor, reduction: str) -> Tensor:
    """The gradient of the reduced term by its rows."""
    share = counts.to(terms.norm.dtype)
    return share / torch.where(terms.norm == 0, float("inf"), terms.norm) if reduction == "mean" else share


def _cross_entropy(
    call: _Call, agreed: _Agreed, sums: dict[str, Tensor], lam: Tensor | None
) -> tuple[RowTerms, Tensor, dict[str, Tensor]]:
    """The rows of the cross entropy, the top-1 count, and the rows' coefficients of the gradient."""
    options, dtype = call.options, agreed.m.dtype
    d1, zero, one, labels = sums["d1"], torch.zeros_like(agreed.m), torch.ones_like(agreed.m), call.labels
    factors: dict[str, Tensor] = {}
    if call.dense is not None:
        rows, mass = sums["mass"] * d1.log() - sums["dot"], sums["mass"]
        factors["dense"], counts, norm, correct = one, one > 0, one.sum(), sums["hit"].sum()
    else:
        counts = torch.stack([label != options.ignore_index for label in labels.values()]).all(0)
        rows = mass = zero
        known = {suffix: (label >= 0) & (label < agreed.classes) for suffix, label in labels.items()}
        for suffix in labels:
            factor = torch.where(known[suffix], sums.get("w" + suffix, one), float("nan"))
            of_label = factor * (d1.log() - sums["x" + suffix])
            if lam is not None:
                share = 1.0 - lam if suffix else lam
                # 0 * inf, as in a dense target: a label without any share costs nothing even when its logit is -inf.
                of_label = share * of_label.masked_fill((share == 0) & of_label.isinf(), 0.0)
                factor = share * factor
            rows, mass = rows + of_label, mass + factor
            factors["label" + suffix] = torch.where(agreed.here[suffix], factor, 0.0)
        norm = torch.where(counts, sums["w"] if "w" in sums and lam is None else one, 0.0).sum()
        hit = (sums["x"] >= 0.0) & known[""] & (labels[""] != options.ignore_index)
        correct = hit.sum().to(dtype)
    if options.label_smoothing > 0.0:
        hard, classes = 1.0 - options.label_smoothing, agreed.classes.to(dtype)
        total, even = sums.get("weight", classes), options.label_smoothing / classes
        rows, mass = hard * rows + even * (total * d1.log() - sums["even"]), hard * mass + even * total
        factors = {name: hard * factor for name, factor in factors.items()} | {"even": even * one}
    factors["a"] = mass / d1
    terms = RowTerms(torch.where(counts, rows, 0.0), norm)
    share = _share(terms, counts, options.reduction)
    kept = {name: torch.where(counts, share * factor, 0.0) for name, factor in factors.items()}
    return terms, correct, kept | {"counts": counts}


def _divergence(
    call: _Call, agreed: _Agreed, sums: dict[str, Tensor], alpha: Scalar, temperature: Scalar
) -> tuple[RowTerms, dict[str, Tensor]]:
    """The rows of tau^2 KL, and the rows' coefficients of the gradient."""
    assert agreed.mt is not None
    valid = agreed.mt.isfinite() if call.kd_mask is None else agreed.mt.isfinite() & call.kd_mask
    d2, dt = sums["d2"], sums["dt"]
    rows = (sums["gap"] / dt + (d2 / dt).log()) * (temperature * temperature)
    terms = RowTerms(torch.where(valid, rows, 0.0), valid.sum().to(dt.dtype))
    share = alpha * temperature * _share(terms, valid, call.options.reduction)
    return terms, {"b": torch.where(valid, share / d2, 0.0), "k": torch.where(valid, share / dt, 0.0), "valid": valid}


def _forward(logits: Tensor, call: _Call) -> tuple[Tensor, Tensor, dict[str, Tensor], Scalar]:
    """Loss, parts (4,), what the gradient needs, and tau."""
    options, dtype = call.options, reference.compute_dtype(logits.dtype)
    alpha, temperature = (
        value.detach().to(logits.device, dtype) if isinstance(value, Tensor) else value
        for value in (options.alpha, options.temperature)
    )
    weight = None if options.weight is None else options.weight.to(dtype)
    agreed = _agree(logits, call)
    sums = _sums(logits, call, agreed, weight, temperature)
    nothing = torch.zeros_like(agreed.m)
    ce = lb = RowTerms(nothing, nothing.new_zeros(()))
    kept, correct = {"counts": nothing > 0}, ce.norm
    if call.target is not None:
        lam = None if call.lam is None else _args.on_device(call.lam, dtype, logits.device)
        ce, correct, kept = _cross_entropy(call, agreed, sums, lam)
    loss = reference.reduce_rows(ce, options.reduction)
    if call.teacher is not None:
        lb, of_teacher = _divergence(call, agreed, sums, alpha, temperature)
        rest = slice(len(lb.rows), None)
        kept["counts"] = torch.cat([kept["counts"][: len(lb.rows)] | of_teacher["valid"], kept["counts"][rest]])
        lb = RowTerms(torch.cat([lb.rows, nothing[rest]]), lb.norm)
        loss = loss + alpha * reference.reduce_rows(lb, options.reduction)
        kept |= of_teacher
    shown = "sum" if options.reduction == "none" else options.reduction
    parts = [loss.sum(), reference.reduce_rows(ce, shown), reference.reduce_rows(lb, shown), correct]
    kept |= {"column" + suffix: column for suffix, column in agreed.columns.items()}
    given = {"logits": logits, "m": agreed.m, "mt": agreed.mt, "dense": call.dense, "t": call.teacher, "w": weight}
    kept |= {"given_" + name: value for name, value in given.items() if value is not None}
    return loss, torch.stack(parts), kept, temperature


def _gradient(kept: dict[str, Tensor], temperature: Scalar, upstream: Tensor) -> Tensor:
    """``upstream (a e1 + b e2 - k et - s w - [c = y] label)`` of this part, in the dtype of the logits."""
    logits, m, weight, teacher = kept["given_logits"], kept["given_m"], kept.get("given_w"), kept.get("given_t")
    gradient, dtype, none = torch.empty_like(logits), m.dtype, -float("inf")
    upstream = upstream.to(dtype).expand(len(m))
    names = [name for name in _COEFFICIENTS if name in kept]
    by = {name: (kept[name] * upstream[: len(kept[name])])[:, None] for name in names}
    for rows in _pieces(len(m), logits.shape[1], dtype, logits.device):
        # A row that no term counts may hold NaN, and 0 * NaN would reach the gradient.
        x = (logits[rows].to(dtype) - m[rows, None]).masked_fill_(~kept["counts"][rows, None], none)
        g = x.exp().mul_(by["a"][rows]) if "a" in by else torch.zeros_like(x)
        if "even" in by:
            g -= by["even"][rows] if weight is None else by["even"][rows] * weight
        if "dense" in by:
            share = kept["given_dense"][rows].to(dtype) * by["dense"][rows]
            g -= share if weight is None else share.mul_(weight)
        for suffix in ("", "_b"):
            if "label" + suffix in by and logits.shape[1] > 0:  # one entry per row: no order of additions
                g.scatter_add_(1, kept["column" + suffix][rows, None], -by["label" + suffix][rows])
        if teacher is not None and rows.start < len(teacher):
            y = (teacher[rows].to(dtype) - kept["given_mt"][rows, None]).masked_fill_(~kept["valid"][rows, None], none)
            e2 = x[: len(y)].div_(temperature).exp_()
            g[: len(y)] += e2.mul_(by["b"][rows])
            g[: len(y)] -= y.div_(temperature).exp_().mul_(by["k"][rows])
        gradient[rows] = g
    return gradient


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        loss, parts, kept, ctx.temperature = _forward(logits, call)
        ctx.names = tuple(kept)
        ctx.save_for_backward(*kept.values())
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _parts: None) -> tuple[Tensor | None, None]:
        if upstream is None:
            return None, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "sharded_lb_loss: it is differentiable once, and backward was called with create_graph=True; use "
                "fused_lb_loss with impl='torch' on the whole logits for second derivatives"
            )
        return _gradient(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.temperature, upstream), None


def _place(op: str, group: Any) -> tuple[int, int]:
    """Size of the group and this rank's place in it; without torch.distributed this process is the one rank."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    if group is not None and not isinstance(group, dist.ProcessGroup):
        hint = "; pass mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"{op}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}{hint}"
        )
    place = dist.get_rank(group)
    if place < 0:
        raise ValueError(f"{op}: this process is not in group; call it on the ranks that hold a part of the classes")
    return dist.get_world_size(group), place


def _is_dtensor(value: object) -> bool:
    return any(kind.__name__ == "DTensor" for kind in type(value).__mro__)


def _from_mesh(op: str, logits: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """The local parts of DTensors, and the group that shares the classes."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = logits.device_mesh, tuple(logits.placements)
    if logits.dim() != 2 or placements.count(Shard(1)) != 1 or {*placements} - {Shard(1), Replicate()}:
        remedy = "use logits.redistribute"
        if Shard(0) in placements:
            remedy = (
                "where rows are split over a mesh dimension, pass to_local() of every argument and "
                "group=mesh.get_group of the dimension that splits the classes: as in data parallelism, every rank "
                "then has the loss of its own rows"
            )
        raise ValueError(
            f"{op}: logits as a DTensor must be (B, C) with Shard(1) on one mesh dimension and Replicate() on the "
            f"others, got {tuple(logits.shape)} with {placements}; {remedy}"
        )
    dim, local = placements.index(Shard(1)), {}
    for name, value in given.items():
        with_classes = name in ("last_logits", "weight") or (isinstance(value, Tensor) and value.dim() == 2)
        last = Shard(value.dim() - 1) if with_classes and isinstance(value, Tensor) else Replicate()
        wanted = tuple(last if placement == Shard(1) else placement for placement in placements)
        if _is_dtensor(value):
            if value.device_mesh != mesh or tuple(value.placements) != wanted:
                raise ValueError(
                    f"{op}: {name} as a DTensor must lie on the mesh of the logits with {wanted}, got "
                    f"{value.placements} on {value.device_mesh}; use {name}.redistribute"
                )
            value = value.to_local()
        elif isinstance(value, Tensor) and with_classes:
            raise TypeError(
                f"{op}: {name} must be a DTensor like the logits, with {wanted}, got a plain tensor; use "
                "torch.distributed.tensor.distribute_tensor for the whole, DTensor.from_local for a part"
            )
        local[name] = value
    # The parts follow the ranks of the group, as where torch gathers them.
    return logits.to_local(grad_placements=placements), local, mesh.get_group(dim)


def sharded_lb_loss(
    logits: Tensor,
    target: Tensor | None,
    last_logits: Tensor | None = None,
    *,
    group: Any = None,
    alpha: Scalar = 1.0,
    temperature: Scalar = 3.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    kd_mask: Tensor | None = None,
    target_b: Tensor | None = None,
    lam: Scalar | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Any:
    """:func:`fused_lb_loss` of logits whose classes are split over the ranks of a process group (vocab parallel).

    ``L = CE(z, y) + alpha * tau^2 * mean_{i < H} KL(softmax(t_i / tau) || softmax(z_i / tau))``

    with ``z = [z of rank 0 | z of rank 1 | ...]``. Every rank holds all ``B`` rows and a part of the classes; the
    parts follow the order of the ranks in the group and may differ in size. What has a dimension of classes is
    given by its part, everything else is the same on all ranks: labels are those of the whole. Every rank returns
    the same loss, and the gradient of its own part.

    A call runs two collectives of ``O(B)`` numbers, a MAX and a SUM (with a dense target ``O(B)`` per rank); the
    backward runs none. The upstream gradient must be the same on all ranks, as it is where each calls
    ``loss.backward()``: do not divide the loss by the number of ranks. It is plain PyTorch on every device, and the
    host does not wait for it. Nothing but the gradient has the size of the logits; about five temporaries of 1 MiB
    (CPU) or 32 MiB live beside it. The gradient is made in the backward, from ``logits`` and ``last_logits``:
    overwrite neither before.

    Args:
        logits: ``(B, C_local)`` float32, bfloat16, float16 or float64, or a DTensor ``(B, C)`` with ``Shard(1)`` on one
            dimension of its mesh (the head is a ``ColwiseParallel`` with ``use_local_output=False``). The group is then
            taken from the mesh, and the gradient is a DTensor with the same placements.
        target: ``(B,)`` integer labels in ``[0, C)``, ``(B, C_local)`` class probabilities, or None.
        last_logits: ``(H, C_local)`` with ``H <= B``, or a DTensor like the logits. Detached.
        group: process group that shares the classes; None is the default group, or this process alone where
            torch.distributed is not initialised.
        alpha: weight of the KL term, as in :func:`fused_lb_loss`.
        temperature: tau, as in :func:`fused_lb_loss`.
        label_smoothing: of the CE, over the classes of all ranks.
        weight: ``(C_local,)`` class weights of the CE, or a DTensor ``(C,)`` with ``Shard(0)``.
        ignore_index: rows with this label leave the CE.
        kd_mask: ``(H,)`` bool, False takes a row out of the KL.
        target_b: ``(B,)`` labels of the other images of mixed pairs, with ``lam``.
        lam: share of ``target`` in mixed images, a number, ``()`` or ``(B,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``(B,)``).
        return_parts: also return :class:`LossParts`.

    Returns:
        The loss in float32 (float64 for float64 logits), 0-d or ``(B,)``, no DTensor, or ``(loss, LossParts)``.
        Differentiable once, by the logits.

    Raises:
        ValueError, TypeError: on this rank alone, before the first collective, what does not fit this rank's logits; on
            all ranks together, after it, labels outside ``[0, C)`` and labels, masks, shares or options that differ
            between the ranks (on a GPU, whose values are not read, the loss is NaN instead). Ranks that differ in
            ``B``, in ``H``, in the dtype or in whether they give a teacher or a dense target would need a further
            collective to find out: the first one fails or hangs; on a GPU the second does where only some give
            ``weight``, ``target_b`` or ``label_smoothing``. RuntimeError: a gradient that this loss does not have.

    Source: the objective as :func:`fused_lb_loss`; cross entropy over a split vocabulary: Shoeybi et al.,
        "Megatron-LM", 2019.

    >>> import torch
    >>> from dlb_fast import fused_lb_loss, sharded_lb_loss
    >>> z, y = torch.randn(4, 10, requires_grad=True), torch.tensor([1, 9, 0, 3])    # one process: a group of one
    >>> loss = sharded_lb_loss(z, y, last_logits=torch.zeros(2, 10))
    >>> loss.backward()
    >>> torch.allclose(loss, fused_lb_loss(z, y, last_logits=torch.zeros(2, 10)))
    True
    """
    op = "sharded_lb_loss"
    if _is_dtensor(logits):
        if group is not None:
            raise ValueError(f"{op}: group must be None with a DTensor, whose mesh names it; got a group")
        given = {"target": target, "last_logits": last_logits, "weight": weight, "kd_mask": kd_mask}
        logits, given, group = _from_mesh(op, logits, given | {"target_b": target_b, "lam": lam})
        target, last_logits, weight, kd_mask, target_b, lam = given.values()
    ranks, place = _place(op, group)
    empty = ranks > 1 and isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] == 0
    _args.check_logits(op, logits.new_empty(len(logits), 1) if empty else logits, target)
    most = _args.FLOAT32_INTEGERS  # the sizes of the parts travel in float32
    if logits.shape[1] > most:
        raise ValueError(f"{op}: logits must have at most {most} classes on a rank, got {logits.shape[1]}")
    if target_b is not None or lam is not None:
        lam = _args.check_pair(op, logits, target, target_b, lam)
    elif target is not None:
        target = _args.check_target(op, logits, target)
    if last_logits is not None:
        _args.check_teacher(op, logits, last_logits)
    if kd_mask is not None:
        if last_logits is None:
            raise ValueError(f"{op}: kd_mask was given without last_logits; there is no KL term to mask")
        _args.check_kd_mask(op, logits, kd_mask, len(last_logits))
    if target is None and last_logits is None:
        raise ValueError(f"{op}: target and last_logits are both None; nothing is left to compute")
    if weight is not None:
        _args.check_weight(op, logits, weight)
    options = prepare(
        op, alpha=alpha, temperature=temperature, label_smoothing=label_smoothing, weight=weight,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    _args.check_temperature(op, temperature, logits.dtype)
    refusal = ops.unsupported(logits, target=target, weight=weight, lam=lam, alpha=alpha, temperature=temperature)
    if refusal:
        raise RuntimeError(f"{op}: it {refusal} use fused_lb_loss with impl='torch' on the whole logits")
    if target is not None and target.dim() == 1:
        target = target.long()
    call = _Call(
        options, target, None if last_logits is None else last_logits.detach(), kd_mask,
        None if target_b is None else target_b.long(), lam, group, ranks, place,
    )  # fmt: skip
    loss, parts = _ShardedLoss.apply(logits, call)
    return (loss, LossParts.unpack(parts)) if return_parts else loss
