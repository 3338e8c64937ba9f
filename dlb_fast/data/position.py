"""The position in a stream of batches. The samplers and all loaders follow these rules, which are torchdata's:

- A position is `(epoch, step)`: step batches of the epoch were delivered. It is absolute, independent of how often the
  run was resumed.
- A state saved after an epoch's last batch, before the iteration has ended, is `(epoch, steps_per_epoch)`: the
  iteration that continues it has no batch left, and the one after it is the next epoch. Once the iteration has ended
  the state is `(epoch + 1, 0)`.
- One iteration delivers the rest of one epoch. After an iteration that was left early, the next one starts where that
  one began; the second time in a row it warns. `state_dict` still counts the delivered batches.
- An iteration is not active after its batch raised an error, so a state can be loaded in the handler.
- A newer iteration, `set_epoch` to another epoch and a loaded state make older iterations stale: they raise.
- After a loaded state, `set_epoch` to an earlier epoch raises until the first batch: it would undo the resume.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from dlb_fast._args import as_int
from dlb_fast.data.plan import OverlapPlan

STATE_VERSION = 1


class StreamPosition:
    """The position of one sampler or loader in the endless stream of batches of a plan.

    Args:
        plan: index plan.
        owner: name of the sampler or loader, for messages.
    """

    def __init__(self, plan: OverlapPlan, owner: str) -> None:
        self.plan = plan
        self._owner = owner
        self._next = (0, 0)  # the next batch to deliver; (epoch, steps_per_epoch) between the last batch and the end
        self._begin = (0, 0)  # where the current iteration began
        self._restarts = 0  # iterations that began there again
        self._current: weakref.ref[Iteration] | None = None
        self._loaded = False  # a state was loaded and no batch was requested since

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current": None}  # a copy keeps the position, not the iteration

    @property
    def epoch(self) -> int:
        """Epoch of the position."""
        return self._next[0]

    @property
    def step(self) -> int:
        """Batches of that epoch that were delivered."""
        return self._next[1]

    @property
    def _at_end(self) -> bool:
        return self._next[1] == self.plan.steps_per_epoch

    @property
    def _coming(self) -> tuple[int, int]:
        """(epoch, step) of the next batch to deliver."""
        return (self._next[0] + 1, 0) if self._at_end else self._next

    def iterate(self) -> Iteration:
        """A new iteration; it becomes the current one at its first batch.

        Right after a state of an epoch's end was loaded it is the rest of that epoch, hence empty.
        """
        empty = self._loaded and self._at_end
        if empty:
            self._next = self._begin = self._coming
        return Iteration(self, empty=empty)

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its first batch; the current epoch is not restarted."""
        epoch = as_int(epoch, f"{self._owner}.set_epoch", "epoch", 0)
        current = (self._next if self._loaded else self._coming)[0]  # a state of an epoch's end continues that epoch
        if self._loaded and epoch < current:
            raise ValueError(
                f"{self._owner}.set_epoch: epoch {epoch} would undo the state that was just loaded (epoch "
                f"{current}, step {self.step}); pass an epoch from {current} on, and do not give this loader to "
                "Accelerate's prepare, which counts epochs from 0 in every process: see docs/integrations.md"
            )
        if epoch != current:
            self._move_to(epoch, 0)

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """The position after the delivered batches, or after `delivered` batches of the latest iteration."""
        epoch, step = self._next if delivered is None else self._after_delivered(delivered)
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "step": step,
            **self._identity(),
            "half": self.plan.rows,
            "world_size": self.plan.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raises, and changes nothing, during an iteration or on a mismatch."""
        current = self._current() if self._current is not None else None
        if current is not None and current.active:
            raise RuntimeError(
                f"{self._owner}.load_state_dict: an iteration is active at epoch {self.epoch}, step {self.step}, and "
                "would continue from the old position; load before iterating, or exhaust or drop the iterator first"
            )
        self._move_to(*self._read_state(state))
        self._loaded = True

    def _identity(self) -> dict[str, Any]:
        return {name: getattr(self.plan, name) for name in ("seed", "length", "shuffle", "drop_last", "overlap")}

    def _read_state(self, state: Mapping[str, Any]) -> tuple[int, int]:
        name = f"{self._owner}.load_state_dict"
        if not isinstance(state, Mapping):
            raise TypeError(f"{name}: expected the dict state_dict() returned, got {type(state).__name__}")
        needed = {"version", "epoch", "step", "half", "world_size", *self._identity()}
        missing = sorted(needed - set(state))
        if missing:
            raise ValueError(f"{name}: the state lacks {missing}; was it saved by another kind of loader?")
        if state["version"] != STATE_VERSION:
            raise ValueError(
                f"{name}: version {state['version']!r} was saved, this release reads version {STATE_VERSION}"
            )
        for key, here in self._identity().items():
            if state[key] != here:
                raise ValueError(
                    f"{name}: {key} was {state[key]!r} when the state was saved and is {here!r} here; "
                    "continue with the same data and options, or start a new run"
                )
        saved_rows = as_int(state["half"], name, "half", 1) * as_int(state["world_size"], name, "world_size", 1)
        if saved_rows != self.plan.global_rows:
            raise ValueError(
                f"{name}: half * world_size was {state['half']} * {state['world_size']} = {saved_rows} when the state "
                f"was saved and is {self.plan.rows} * {self.plan.world_size} = {self.plan.global_rows} here; these are "
                "the new rows of a step: keep the batch size of all ranks together, or start a new run"
            )
        epoch, step = as_int(state["epoch"], name, "epoch", 0), as_int(state["step"], name, "step", 0)
        if step > self.plan.steps_per_epoch:
            raise ValueError(f"{name}: step {step} is beyond the {self.plan.steps_per_epoch} steps of an epoch")
        return epoch, step

    def _after_delivered(self, delivered: int) -> tuple[int, int]:
        delivered = as_int(delivered, f"{self._owner}.state_dict", "delivered", 0)
        (epoch, first), steps = self._begin, self.plan.steps_per_epoch
        reached = (self._next[0] - epoch) * steps + self._next[1] - first
        if delivered > reached:
            raise ValueError(
                f"{self._owner}.state_dict: delivered must be at most {reached}, the batches sampled since the "
                f"iteration began at epoch {epoch}, step {first}, got {delivered}"
            )
        reached_step = first + delivered
        if reached_step == steps and self._next != (epoch, steps):  # the iteration has ended
            return epoch + 1, 0
        return epoch, reached_step

    def _move_to(self, epoch: int, step: int) -> None:
        self._next = self._begin = (epoch, step)
        self._restarts = 0
        self._current = None
        self._loaded = False

    def _start(self, iteration: Iteration) -> tuple[int, int]:
        """Make `iteration` the current one and return its start."""
        if self._coming[0] == self._begin[0]:  # the iteration before was left early, so repeat it
            left, self._next = self._next, self._begin
            self._restarts += left != self._begin
            if self._restarts == 2 and left != self._begin:
                warnings.warn(
                    f"{self._owner}: epoch {left[0]} starts over at step {self._begin[1]} for the second time, because "
                    f"the loop was left after step {left[1]} of {self.plan.steps_per_epoch}: every pass shows the same "
                    "batches. Call set_epoch(epoch) before each pass to go on to the next epoch",
                    stacklevel=5,
                )
        else:
            self._begin = self._next = self._coming
            self._restarts = 0
        self._loaded = False
        self._current = weakref.ref(iteration)
        return self._begin

    def _end(self, iteration: Iteration) -> None:
        """Note that the current iteration has ended: the next batch is the first of the next epoch."""
        if self._current is not None and self._current() is iteration and self._at_end:
            self._next = self._coming


class Iteration:
    """One pass over the rest of an epoch: `peek` returns the next position, `advance` counts its batch as delivered.

    The iteration reads its start from the stream at the first `peek`.
    """

    __slots__ = ("__weakref__", "_epoch", "_next", "_pending", "_steps", "_stream")

    def __init__(self, stream: StreamPosition, *, empty: bool = False) -> None:
        self._stream = stream
        self._steps = stream.plan.steps_per_epoch
        self._epoch, self._next = -1, self._steps if empty else -1
        self._pending = False  # a batch was requested and not delivered

    def peek(self) -> tuple[int, int] | None:
        """(epoch, step) of the next batch, or None at the epoch's end; RuntimeError when the iteration is stale."""
        if self._next < 0:
            self._epoch, self._next = self._stream._start(self)
        if self._next == self._steps:
            self._stream._end(self)
            return None
        current = self._stream._current
        if current is None or current() is not self:
            raise RuntimeError(
                f"{self._stream._owner}: this iterator is stale: a newer one was started, or set_epoch or "
                "load_state_dict was called; use the newest iterator only"
            )
        self._pending = True
        return self._epoch, self._next

    def advance(self) -> None:
        """Count the batch at the position of the last `peek` as delivered."""
        self._pending = False
        self._next += 1
        self._stream._next = (self._epoch, self._next)

    @property
    def left_early(self) -> bool:
        """Whether it started and has batches left."""
        return 0 <= self._next < self._steps

    @property
    def active(self) -> bool:
        """Whether it started, has batches left, and its last request did not fail."""
        return self.left_early and not self._pending
