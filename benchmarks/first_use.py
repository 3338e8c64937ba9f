"""What ``impl="auto"`` takes on this GPU, and how long the choice takes: with the proof, and in the process after it.

    python -m benchmarks.first_use --name first --out results.jsonl        with an empty DLB_FAST_CACHE
    python -m benchmarks.first_use --name next --out results.jsonl         and once more

Also writes the verdicts that are known, those of `dlb-fast doctor --prove` among them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from dlb_fast import _backends

from . import harness


def main() -> None:
    parser = argparse.ArgumentParser(prog="first_use", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to append to")
    parser.add_argument("--name", default="", help="of this process in the results")
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)  # a process that comes to its first loss has used the GPU
    torch.cuda.synchronize()
    start = time.perf_counter()
    choice = _backends.pick("auto", device)
    seconds = time.perf_counter() - start
    verdicts = {
        name: _backends.verdict(name, device.index, check=False)._asdict()
        for name, missing in (("cuda", _backends.cuda_missing(0)), ("triton", _backends.triton_missing("cuda")))
        if not missing
    }
    why = _backends.proven(device, check=False)[1]
    record = {"bench": "first use", "name": args.name, "auto": choice, "why": why, "seconds": seconds}
    harness.write(args.out, [{**record, "verdicts": verdicts, **harness.environment("cuda")}])
    print(f'impl="auto" runs {choice!r} after {seconds:.3f} s: {why}')
    for name, found in verdicts.items():
        print(f"{name}: {found['said']} ({found['seconds']:.2f} s)")


if __name__ == "__main__":
    main()
