"""What a top-k teacher loses against the dense one: KL and gradient on the logits of a language model trained here.

    python -m benchmarks.top_k_fidelity --out benchmarks/results/top-k-fidelity-cpu.jsonl

The text is this repository's documentation and sources; the model predicts a word from the eight before it. The teacher
is what the trained model said of rows before one more step, the student what it says after it, each with its own
dropout, as with self-distillation from the last batch. All is computed in float64 by the definition in `reference.py`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlb_fast import TopK, reference

from . import harness

CONTEXT, EMBEDDED, HIDDEN = 8, 64, 192
BATCH, ROWS = 256, 256
KEPT, TEMPERATURES = (1, 4, 16, 64, 256), (1.0, 2.0, 4.0)


def words(classes: int) -> tuple[Tensor, int]:
    """The text as numbers of its most frequent words, and how many there are; the rarer ones share the number 0."""
    files = [
        *harness.ROOT.glob("*.md"), *harness.ROOT.glob("docs/**/*.md"), *harness.ROOT.glob("dlb_fast/**/*.py"),
        *harness.ROOT.glob("tests/*.py"), *harness.ROOT.glob("benchmarks/*.py"),
    ]  # fmt: skip
    found = re.findall(r"\w+|[^\w\s]|\n", "\n".join(path.read_text() for path in sorted(files)))
    known = {word: i + 1 for i, (word, _) in enumerate(Counter(found).most_common(classes - 1))}
    return torch.tensor([known.get(word, 0) for word in found]), len(known) + 1


def model(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(classes, EMBEDDED), nn.Flatten(), nn.Linear(CONTEXT * EMBEDDED, HIDDEN), nn.GELU(),
        nn.Dropout(0.1), nn.Linear(HIDDEN, classes),
    )  # fmt: skip


def last_batch_logits(classes: int, steps: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(teacher, student) logits in float64 and what they are of."""
    torch.manual_seed(0)
    text, classes = words(classes)
    lm = model(classes)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        start = torch.randint(0, len(text) - CONTEXT, (rows,))
        at = text[start[:, None] + torch.arange(CONTEXT + 1)]
        return at[:, :-1], at[:, -1]

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(lm(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    losses = [step(*batch(BATCH)) for _ in range(steps)]
    rows, targets = batch(ROWS)
    with torch.no_grad():
        teacher = lm(rows).double()
    step(rows, targets)
    with torch.no_grad():
        student = lm(rows).double()
    loss = torch.stack(losses[-50:]).mean().item()
    return teacher, student, {"classes": classes, "words": len(text), "steps": steps, "loss": loss, "rows": ROWS}


def value_and_gradient(student: Tensor, teacher: Tensor, temperature: float, kind: str) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss, _ = reference.last_batch_loss(leaf, None, teacher, temperature=temperature, teacher_kind=kind)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def compare(student: Tensor, teacher: Tensor) -> list[dict[str, Any]]:
    found = []
    for temperature in TEMPERATURES:
        dense, dense_gradient = value_and_gradient(student, teacher, temperature, "logits")
        for k in KEPT:
            top = TopK.of(teacher, k, temperature)
            kl, gradient = value_and_gradient(student, top.packed(), temperature, "top_k")
            mass = (top.values / temperature - top.logsumexp[:, None]).exp().sum(1).mean()
            cosine = nn.functional.cosine_similarity(gradient.flatten(), dense_gradient.flatten(), dim=0)
            found.append(
                {
                    "temperature": temperature, "k": k, "mass": mass.item(), "dense_kl": dense.item(),
                    "kl_error": (1 - kl / dense).item(),
                    "gradient_error": ((gradient - dense_gradient).norm() / dense_gradient.norm()).item(),
                    "cosine": cosine.item(),
                }
            )  # fmt: skip
    return found


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| tau | k | teacher's mass in k | KL too small by | gradient off by | cosine |"]
    lines.append("| --- " + "| ---: " * 5 + "|")
    for r in records:
        lines.append(
            f"| {r['temperature']:g} | {r['k']} | {r['mass']:.1%} | {r['kl_error']:.1%} | {r['gradient_error']:.1%} "
            f"| {r['cosine']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="top_k_fidelity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=4096, help="words of the vocabulary")
    parser.add_argument("--steps", type=int, default=600, help="steps of training")
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    args = parser.parse_args()
    teacher, student, about = last_batch_logits(args.classes, args.steps)
    records = compare(student, teacher)
    shared = {"bench": "top k fidelity", **about, **harness.environment("cpu")}
    harness.write(args.out, [{**shared, **record} for record in records])
    print("{words} words, {classes} classes, {rows} rows; cross entropy {loss:.2f} after {steps} steps".format(**about))
    print(table(records))


if __name__ == "__main__":
    main()
