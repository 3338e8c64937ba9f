"""What an ImageNet run takes, computed from the recipe and from measured parts: steps, images, memory, hours.

    python -m benchmarks.imagenet_plan [--rate IMAGES_PER_SECOND]

Prints the tables of docs/imagenet.md (`python -m benchmarks.tables` writes them there). Step counts come from the
index plan and the config, bytes from the shapes of the recipe's own tensors (activations: what autograd saves in one
forward on the meta device), views per second from `results/`. No GPU figure is invented: hours are rows over a rate,
and the rate is yours to measure (`images/s` of the run's own log after the first hundred steps).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch

from dlb_fast.data import OverlapPlan
from dlb_fast.presets import load_preset
from dlb_fast.train.config import RunConfig
from dlb_fast.train.loop import total_steps
from dlb_fast.train.methods import sampled_rows
from dlb_fast.train.models import create_model

from .tables import newest, read, table, wrapped

IMAGES, VAL_IMAGES, CLASSES = 1_281_167, 50_000, 1000  # ILSVRC 2012
TRAIN_BYTES = 147_897_477_120  # ILSVRC2012_img_train.tar
RECIPES = ("imagenet-resnet50-dlb", "imagenet-resnet50-ce", "imagenet-resnet50-short-dlb", "imagenet-resnet50-short-ce")
RATES = (500, 1000, 2000, 4000, 8000)
SLOTS = 4  # device buffers of the loader: depth 2 + the two being filled (dlb_fast/data/loaders/ring.py)


def steps_of(config: RunConfig) -> tuple[int, int, int]:
    """(steps per epoch, steps in all, rows the network sees in all)."""
    per_epoch = OverlapPlan(IMAGES, sampled_rows(config)).steps_per_epoch
    steps = total_steps(range(per_epoch), config.train)
    first = config.data.batch_size - sampled_rows(config)  # the very first batch has no repeated rows
    return per_epoch, steps, steps * config.data.batch_size - first


@functools.cache
def saved_bytes_per_row(model: str, size: int) -> int:
    """Bytes autograd keeps per image for the backward, in bfloat16: storages of one forward on the meta device."""

    def count(rows: int) -> int:
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
            return tensor

        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            images = torch.empty(rows, 3, size, size, dtype=torch.bfloat16)
            network(images)
        return sum(storage.nbytes() for storage in seen.values())

    with torch.device("meta"):
        network = create_model(model, CLASSES).to(torch.bfloat16).train()
    return (count(6) - count(2)) // 4


def memory_of(config: RunConfig, ranks: int) -> dict[str, int]:
    """Bytes on one device, by what they are."""
    with torch.device("meta"):
        network = create_model(config.model.model, CLASSES)
    weights = 4 * sum(p.numel() for p in network.parameters())
    rows, size = config.data.batch_size // ranks, config.data.image_size
    copies = {"weights, gradients, momentum": 3}
    if config.train.ema is not None:
        copies["averaged weights"] = 1
    if ranks > 1:
        copies["DDP's buckets"] = 1
    held = {name: count * weights for name, count in copies.items()}
    held["bf16 copies of the weights"] = weights // 2
    held["activations"] = rows * saved_bytes_per_row(config.model.model, size)
    held["images (4 uint8 slots, one float32 batch)"] = rows * 3 * size * size * (SLOTS + 4)
    held["logit buffer"] = (rows - sampled_rows(config) // ranks) * CLASSES * 2
    return held


def steps_table() -> str:
    """Steps and images of the recipes."""
    rows = []
    for name in RECIPES:
        config = load_preset(name)
        per_epoch, steps, seen = steps_of(config)
        drawn = OverlapPlan(IMAGES, sampled_rows(config)).steps_per_epoch * sampled_rows(config) * config.train.epochs
        numbers = (config.train.epochs, config.data.batch_size, per_epoch, steps, seen, drawn)
        rows.append([f"`{name}`", *(f"{n:,}" for n in numbers)])
    head = ("preset", "epochs", "rows per step", "steps per epoch", "steps", "rows forwarded", "files decoded")
    return table(head, rows, right=True)


def memory_table() -> str:
    """Bytes per device of the two recipes, for 1 to 8 devices."""
    found = {}
    for name in ("imagenet-resnet50-dlb", "imagenet-resnet50-short-dlb"):
        config = load_preset(name)
        for ranks in (1, 2, 4, 8):
            found[name, ranks] = memory_of(config, ranks)
    parts = list(dict.fromkeys(part for held in found.values() for part in held))
    head = ("GiB per device", *(f"{n.removeprefix('imagenet-resnet50-')}, {ranks}" for n, ranks in found))
    rows = [[part, *(gib(held.get(part, 0)) for held in found.values())] for part in parts]
    return table(head, [*rows, ["**sum**", *(gib(sum(held.values())) for held in found.values())]], right=True)


def gib(count: int) -> str:
    """Bytes as GiB with three digits."""
    return f"{count / 2**30:.3g}" if count else "0"


def decodes_per_view(rows: list[dict[str, Any]]) -> float:
    """Files our loader reads per view it makes, counted in the run."""
    counted = [row["reads_per_view"] for row in rows if "reads_per_view" in row]
    ours = [row for row in rows if row["what"] == "traffic" and row["name"].startswith("ours")]
    return (counted or [row["decodes_per_view"] for row in ours])[0]


def loader_table(rates: Sequence[int] = RATES) -> str:
    """Cores that decoding takes at a rate of rows, from the measured views per CPU second."""
    rows = read(newest("loader-cpu-[0-9]*.jsonl"))
    (ours,) = [row for row in rows if row.get("name") == "ours 2 threads, uint8"]
    (machine,) = [row for row in rows if row["what"] == "machine"]
    (files,) = [row for row in rows if row["what"] == "files"]
    rate = ours["views_per_cpu_s"]
    per_file = TRAIN_BYTES / IMAGES
    reads = decodes_per_view(rows)
    told = (
        f"Measured: {rate['median']:.0f} views per CPU second (quartiles {rate['q25']:.0f} to {rate['q75']:.0f}, "
        f"{ours['rounds']} rounds; {machine['cpu']}, `{machine['decoder']}`, files of "
        f"{files['mean_bytes'] / 1000:.0f} kB, 224-pixel crops; commit {machine['commit'][:7]}), "
        f"{reads:.2f} files read per view. Assumed: one core as fast as that one; ImageNet's files have "
        f"{per_file / 1000:.0f} kB on average, so expect fewer views until you have measured your own "
        f"(`dlb-fast bench loader`)."
    )
    cores = [(f"{r:,}", f"{r / rate['median']:.1f}", f"{r * reads * per_file / 1e6:.0f}") for r in rates]
    return (
        wrapped(told)
        + "\n\n"
        + table(("rows per second", "cores that decode", "MB read per second"), cores, right=True)
    )


def hours_table(rates: Sequence[int] = RATES) -> str:
    """Hours by arithmetic: rows over the rate."""
    rows = []
    for name in RECIPES:
        config = load_preset(name)
        seen = steps_of(config)[2]
        evals = config.train.epochs * VAL_IMAGES
        rows.append([f"`{name}`", f"{seen + evals / 3:,.0f}", *(f"{(seen + evals / 3) / r / 3600:.0f}" for r in rates)])
    return table(("preset", "rows", *(f"{r:,}/s" for r in rates)), rows, right=True)


TABLES = {
    "imagenet steps": steps_table,
    "imagenet memory": memory_table,
    "imagenet loader": loader_table,
    "imagenet hours": hours_table,
}


def main(argv: list[str] | None = None) -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, help="your images per second: one more line")
    args = parser.parse_args(argv)
    for name, made in TABLES.items():
        print(f"\n### {name}\n\n{made()}")
    if args.rate:
        for name in RECIPES:
            print(
                f"{name}: {steps_of(load_preset(name))[2] / args.rate / 3600:.1f} hours at {args.rate:,} rows/s"
            )


if __name__ == "__main__":
    main()
