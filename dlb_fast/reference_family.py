"""The definition of every sibling of DLB, in plain PyTorch: the oracle of the tests. It imports torch and nothing else.

Each function is written from its source as directly as possible, in the order of that source, and shares no line with
the fused road. **official** names the code a formula was read from; **reconstruction** marks what follows an abstract
only (LsrKD, teacher correction, MrKD: the papers' text and any code of theirs were not available).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bake", "bake_teacher", "cs_kd", "ddgsd", "lsr_kd", "mr_kd", "mr_kd_teacher", "ps_kd", "tf_kd_reg", "zipf"]


def _kl(teacher: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``tau^2 * sum p_t (log p_t - log p_s) / B``: the KDLoss of the BAKE and CS-KD repositories."""
    student = torch.log_softmax(logits / temperature, dim=1)
    return F.kl_div(student, teacher.detach(), reduction="sum") * temperature**2 / logits.shape[0]


def lsr_kd(
    logits: Tensor, target: Tensor, *, alpha: float = 0.1, temperature: float = 1.0, correct_share: float | None = None
) -> Tensor:
    """``(1 - alpha) CE + alpha tau^2 KL(u || softmax(z / tau))``, u uniform or corrected. **reconstruction**."""
    classes = logits.shape[1]
    if correct_share is None:
        teacher = torch.full_like(logits, 1.0 / classes)
    else:
        hot = F.one_hot(target, classes).to(logits.dtype)
        teacher = correct_share * hot + (1.0 - correct_share) / max(classes - 1, 1) * (1.0 - hot)
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * _kl(teacher, logits, temperature)


def tf_kd_reg(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 20.0,
    multiplier: float = 100.0,
    share: float = 0.99,
) -> Tensor:
    """Tf-KD's regularisation. **official** code: yuanli2333/Teacher-free-Knowledge-Distillation.

    With its three surprises: the virtual probabilities are softmaxed once more, the student is not tempered, and
    ``KLDivLoss()`` divides by B * C.
    """
    classes = logits.shape[1]
    hot = F.one_hot(target, classes).to(logits.dtype)
    virtual = share * hot + (1.0 - share) / (classes - 1) * (1.0 - hot)
    soft = F.kl_div(torch.log_softmax(logits, 1), torch.softmax(virtual / temperature, 1), reduction="none").mean()
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * soft * multiplier


def mr_kd_teacher(
    copies_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    correct_share: float | None = None,
    swap: bool = False,
) -> Tensor:
    """The copies' averaged distribution (B, C). **reconstruction** in every part.

    ``swap`` exchanges, in each copy, the logits of the right and of the largest class (knowledge adjustment).
    ``correct_share`` then sets the right class and scales the others to what is left (teacher correction).
    """
    rows = []
    for logits in copies_logits:
        if swap:
            logits = logits.clone()
            for i, y in enumerate(target.tolist()):
                top = int(logits[i].argmax())
                logits[i, y], logits[i, top] = logits[i, top].clone(), logits[i, y].clone()
        rows.append(torch.softmax(logits / temperature, 1))
    mean = torch.stack(rows).mean(0)
    if correct_share is not None:
        hot = F.one_hot(target, mean.shape[1]).to(mean.dtype)
        rest = mean * (1.0 - hot)
        mean = correct_share * hot + (1.0 - correct_share) * rest / rest.sum(1, keepdim=True)
    return mean


def mr_kd(
    logits: Tensor,
    target: Tensor,
    copies_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 3.0,
    correct_share: float | None = None,
    swap: bool = False,
) -> Tensor:
    """``(1 - alpha) CE + alpha tau^2 KL(mean of the copies || z)``. **reconstruction**."""
    teacher = mr_kd_teacher(
        copies_logits, target, temperature=temperature, correct_share=correct_share, swap=swap
    )
    return (1.0 - alpha) * F.cross_entropy(logits, target) + alpha * _kl(teacher, logits, temperature)


def bake_teacher(features: Tensor, logits: Tensor, *, temperature: float, omega: float) -> Tensor:
    """``Q = (1 - w) (I - w A)^-1 P``. **official**: ``knowledge_ensemble`` of yxgeee/BAKE, with its inverse."""
    eye = torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device)
    features = F.normalize(features, p=2, dim=1)
    affinity = torch.softmax(features @ features.T - eye * 1e9, dim=1)
    spread = (1.0 - omega) * torch.inverse(eye - omega * affinity)
    return spread @ torch.softmax(logits / temperature, dim=1)


def bake(
    logits: Tensor,
    features: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    temperature: float = 4.0,
    omega: float = 0.5,
) -> Tensor:
    """``CE + alpha T^2 KL(Q || softmax(z / T))``. **official**: ``small_scale/train.py`` of yxgeee/BAKE."""
    teacher = bake_teacher(features.detach(), logits.detach(), temperature=temperature, omega=omega)
    return F.cross_entropy(logits, target) + alpha * _kl(teacher, logits, temperature)


def cs_kd(
    logits: Tensor, target: Tensor, partner_logits: Tensor, *, alpha: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """``CE(anchors) + alpha T^2 KL(partner || anchor)``. **official**: ``train.py`` of alinlab/cs-kd."""
    teacher = torch.softmax(partner_logits.detach() / temperature, dim=1)
    return F.cross_entropy(logits, target) + alpha * _kl(teacher, logits, temperature)


def ddgsd(
    logits: Tensor, target: Tensor, *, alpha: float = 1.0, temperature: float = 4.0, ce_weight: float = 1.0
) -> Tensor:
    """``ce_weight CE + alpha T^2 [KL(p2 || p1) + KL(p1 || p2)]``, views in the two halves of the rows.

    Third-party code (winycg/Self-KD-Lib) has ``ce_weight=0.5``, T=4 and a feature term, which is left out here; no
    official code was found.
    """
    one, two = logits.chunk(2)
    first = _kl(torch.softmax(two / temperature, 1), one, temperature)
    second = _kl(torch.softmax(one / temperature, 1), two, temperature)
    return ce_weight * F.cross_entropy(logits, target) + alpha * (first + second)


def ps_kd(logits: Tensor, target: Tensor, past: Tensor, *, alpha: float) -> Tensor:
    """``CE(z, (1 - alpha) y + alpha p_past)``. **official**: ``loss/pskd_loss.py`` of lgcnsai/PS-KD-Pytorch."""
    soft = (1.0 - alpha) * F.one_hot(target, logits.shape[1]).to(logits.dtype) + alpha * past
    return (-soft * torch.log_softmax(logits, 1)).mean(0).sum()


def zipf(logits: Tensor, target: Tensor, *, alpha: float = 0.1, power: float = 1.0) -> Tensor:
    """``CE + alpha KL(q || softmax of the non-target logits)``, ``q_k ~ rank_k^-power``.

    **official**: ``losses.py`` of megvii-research/zipfls with ``dense=False``: ranks over all classes (the right one
    takes part), ties share the smallest rank, the right class is then left out.
    """
    rows = []
    for z, y in zip(logits, target.tolist(), strict=True):
        others = torch.arange(len(z), device=z.device) != y
        rank = (z.detach()[None, :] > z.detach()[:, None]).sum(1) + 1
        q = (1.0 / rank[others].to(z.dtype)) ** power
        rows.append(F.kl_div(torch.log_softmax(z[others], 0), q / q.sum(), reduction="sum"))
    return F.cross_entropy(logits, target) + alpha * torch.stack(rows).mean()
