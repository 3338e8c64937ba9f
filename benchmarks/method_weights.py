"""Trains every method for some steps on the digits and prints a hash of its weights: the same before and after a change
that should not change the numbers.

    OMP_NUM_THREADS=1 python -m benchmarks.method_weights --out runs/weights

Hashes compare within one machine and one torch: other instruction sets round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

PLAIN = (
    "dlb", "two_view", "ce", "lsr_kd", "tf_kd_reg", "bake", "cs_kd", "ddgsd", "ps_kd", "zipf", "gce", "sce", "elr",
    "r_drop",
)  # fmt: skip
RUNS = {
    **{name: ["--method", name] for name in PLAIN},
    "mr_kd": ["--method", "mr_kd", "--copy-every", "15"],
    "mr_kd_ensemble": ["--method", "mr_kd", "--copy-every", "15", "--ensemble-lr", "0.01", "--correct-share", "0.9"],
    "teacher_correction": ["--method", "lsr_kd", "--correct-share", "0.9"],
}


def digest(weights: Path) -> str:
    """The SHA-256 of names and values, in the order of the names."""
    total = hashlib.sha256()
    for name, value in sorted(load_file(weights).items()):
        total.update(name.encode() + value.tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; must not hold earlier ones")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--methods", nargs="*", choices=RUNS, default=list(RUNS))
    given = parser.parse_args()
    for name in given.methods:
        run = given.out / name
        train = [sys.executable, "-m", "dlb_fast", "train", "--preset", "digits", "--quiet", "--out", str(run)]
        subprocess.run([*train, *RUNS[name], "--max-steps", str(given.steps)], check=True)
        print(f"{name:<20} {digest(run / 'checkpoints' / 'last.safetensors')}", flush=True)


if __name__ == "__main__":
    main()
