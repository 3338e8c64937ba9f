"""The Python calls of ours in one steady training step: how far one has to read to follow it.

    python -m benchmarks.step_calls            # counts
    python -m benchmarks.step_calls --trace    # and every call, in order

The step is that of `dlb-fast train --preset digits`, between two log points, in the main thread.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import dlb_fast
from dlb_fast.presets import load_preset
from dlb_fast.train.config import override
from dlb_fast.train.log import RunLog
from dlb_fast.train.run import build_trainer

PACKAGE = f"{Path(dlb_fast.__file__).parent}/"
STEP = 5  # the first ones allocate, and the very first has half a batch


class StepCalls(NamedTuple):
    """(file, function) of every call, and what is counted of them."""

    trace: list[tuple[str, str]]

    @property
    def calls(self) -> int:
        """How many there are."""
        return len(self.trace)

    @property
    def files(self) -> int:
        """How many files they are in."""
        return len({file for file, _ in self.trace})

    @property
    def switches(self) -> int:
        """How often a call is in another file than the call before it."""
        return sum(a[0] != b[0] for a, b in pairwise(self.trace))


def step_calls() -> StepCalls:
    """Train a few steps of the preset `digits` and return the calls of one of them."""
    config = override(load_preset("digits"), max_steps=STEP + 3, eval_every=1000, log_every=1000)
    trainer = build_trainer(config, log=RunLog(quiet=True))
    trace: list[tuple[str, str]] = []
    ends: list[int] = []  # length of the trace after every step
    step = trainer.optimizer_step

    def optimizer_step() -> None:
        step()
        ends.append(len(trace))

    trainer.optimizer_step = optimizer_step  # type: ignore[method-assign]

    def record(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.10 has no co_qualname
            trace.append((file.removeprefix(PACKAGE), name))

    sys.setprofile(record)
    try:
        trainer.fit()
    finally:
        sys.setprofile(None)
    return StepCalls(trace[ends[STEP - 2] : ends[STEP - 1]])


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--trace", action="store_true", help="print every call, in order")
    found = step_calls()
    if parser.parse_args().trace:
        print("\n".join(f"{file}: {function}" for file, function in found.trace))
    print(f"{found.calls} calls in {found.files} files, {found.switches} switches between files")


if __name__ == "__main__":
    main()
