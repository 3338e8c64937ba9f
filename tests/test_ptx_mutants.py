"""The machine is worth what it catches: PTX broken on purpose must not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ptx import compilers, fuzz, harness, mutants
from ptx.machine import Fault, Kernel
from ptx.oracle import Stream, batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(harness.missing()), reason=f"PTX: {harness.missing()}"),
    pytest.mark.usefixtures("one_thread"),
]

# name: classes, the device's largest cluster, options that lead to the kernel.
KERNELS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "lanes": (101, 8, {}),
    "warp": (1001, 8, {}),
    "block": (1501, 8, {}),
    "cluster": (17001, 8, {}),
    "lanes, whole": (104, 8, {}),
    "warp, whole": (1000, 8, {}),
    "block, whole": (1504, 8, {}),
    "cluster, whole": (17008, 8, {}),
    "two passes": (17001, 0, {}),
    "two passes of a warp, general": (101, 8, {"dense": True}),
    "two passes of a block, general": (1501, 8, {"dense": True}),
}
# A row that begins on no packet needs room for up to seven columns more. One that is shifted otherwise than its
# gradient or its teacher, or whose teacher has another dtype, takes two passes.
ANY = fuzz.ANYTHING
EDGES = replace(
    ANY, kinds=("none", "logits", "roll"), forms=("labels",), clusters=(8,),
    strides=((0, 0), (8, 0)), stored=(),
)  # fmt: skip
TWO = replace(ANY, rows=(2, 5, 13, 40))
# Rows: more pairs than a device of one multiprocessor takes at a time, and 16: a row and its slot are shifted alike.
RICH = {
    "lanes": replace(EDGES, classes=(3, 10, 33, 100, 101, 121), rows=(2, 5, 16, 48, 144)),
    "warp": replace(EDGES, classes=(127, 129, 500, 700, 999, 1001, 1017), rows=(2, 5, 16, 48)),
    "block": replace(EDGES, classes=(1018, 1500, 1999, 3999, 16001), rows=(1, 2, 5, 16, 32)),
    "cluster": replace(EDGES, classes=(16378, 32001), rows=(1, 2, 5, 8)),
    "lanes, whole": replace(EDGES, classes=(8, 16, 40, 96, 120, 128), rows=(2, 5, 16, 48, 144)),
    "warp, whole": replace(EDGES, classes=(136, 256, 504, 704, 1000, 1024), rows=(2, 5, 16, 48)),
    "block, whole": replace(EDGES, classes=(1032, 1504, 2000, 4096, 16000), rows=(1, 2, 5, 16, 32)),
    "cluster, whole": replace(EDGES, classes=(16392, 32000), rows=(1, 2, 5, 8)),
    "two passes": replace(TWO, classes=(1500, 4097, 16390), rows=(), kinds=("logits", "roll"), forms=("labels",)),
    "two passes of a warp, general": replace(TWO, classes=(3, 10, 33, 100, 101, 127, 128, 1000)),
    "two passes of a block, general": replace(TWO, classes=(1025, 1500, 4097, 16001), rows=()),
}
CALLS, CALLS_WITH_LONG_ROWS, SAMPLE = 60, 30, 8
# Which rows the batches are of a stream of threes, and `again`: the next batch, the same once more, a short one.
STEPS = [(range(6), 0), (range(3, 9), -1), (range(3, 9), -1), (range(6, 11), -1)]


def name_of(name: str, dtype: torch.dtype) -> tuple[str, str]:
    """File and mangled name of a kernel of ``KERNELS``."""
    regime, general = name.removesuffix(", whole"), "general" in name
    if regime.startswith("two passes"):
        regime = "two_pass_warp" if "warp" in name else "two_pass_block"
    return harness.kernel_name({"regime": regime, "general": general, "whole": "whole" in name}, dtype)


def cases(name: str, dtype: torch.dtype) -> Callable[[Kernel], None]:
    """Calls of one kernel, held against the reference."""
    classes, clusters, options = KERNELS[name]
    wanted = name_of(name, dtype)

    def run(kernel: Kernel) -> None:
        def chosen(unit: str, mangled: str) -> Kernel:
            return kernel if (unit, mangled) == wanted else harness.kernel(unit, mangled)

        torch.manual_seed(0)  # the weights
        device = harness.Emulator(largest_cluster=clusters, seed=classes, kernel=chosen)
        many = 4 if classes < 1000 else 1  # several pairs for a warp: more of them for several blocks
        stream = Stream(device, classes, 3 * many, dtype)
        for index, (numbers, again) in enumerate(STEPS):
            ids = [number * many + i for number in numbers for i in range(many)]
            logits, target, _ = batch(len(ids), classes, dtype, seed=index)
            target[::3], target[-1] = logits[::3].argmax(1), -100
            given: dict[str, Any] = {"weight": torch.rand(classes) + 0.5}
            if index == 1 and "general" not in name:
                given = {"label_smoothing": 0.1}  # both would go to a general kernel
            if options.get("dense"):
                target = torch.softmax(torch.randn(len(ids), classes), 1)
                given["label_smoothing"] = 0.1
            device.multiprocessors = 1 if index == 2 else 4
            stream.step(logits, target, torch.tensor(ids), again=again, **given)

    return run


def rich(name: str, dtype: torch.dtype) -> list[mutants.Case]:
    """More calls of the same kernel, at random: values, strides, ids, masks, corrupt rows, many labels."""
    wanted = name_of(name, dtype)

    def one(seed: int) -> mutants.Case:
        def run(kernel: Kernel) -> None:
            def chosen(unit: str, mangled: str) -> Kernel:
                return kernel if (unit, mangled) == wanted else harness.kernel(unit, mangled)

            fuzz.one_case(seed, replace(RICH[name], dtypes=(dtype,)), chosen)

        return run

    return [one(seed) for seed in range(6 * CALLS)]


def idle_barriers(name: str, dtype: torch.dtype) -> int:
    """Barriers of code that the kernels share and no plan leads this one to.

    Weights with smoothing go to a general kernel; float16 asks the weights for the largest.
    """
    return 0 if "general" in name or dtype == torch.float16 else 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_barrier_and_fence_is_missed(name: str, dtype: torch.dtype) -> None:
    """Taken away one at a time: of the block, of the cluster, around the ticket. None is redundant."""
    found = mutants.Study(harness.kernel(*name_of(name, dtype)), [cases(name, dtype)])
    # These batches are counted by no launch before: the wait for it has a test of its own.
    every = [one for one in mutants.without_barriers(found.kernel.program) if one.kind != "launch_wait"]
    reached = found.reached(iter(every))
    assert len(every) - len(reached) == idle_barriers(name, dtype)
    verdicts = [found.judge(mutant) for mutant in reached]
    # That the blocks of a cluster have begun orders no access, so its arrival need not release any.
    left = [one for one in verdicts if one.why != "noticed"]
    assert not [str(one) for one in left if one.mutant.kind != "release"]
    assert len(left) <= name.startswith("cluster")


def test_the_wait_for_the_launch_that_counts_is_missed() -> None:
    """Where a kernel may begin before that one has ended."""
    wanted = name_of("lanes", torch.bfloat16)
    whole = harness.kernel(*wanted)
    logits, target, _ = batch(4099, 5, torch.bfloat16)
    for mutant in mutants.without_barriers(whole.program):
        if mutant.kind == "launch_wait":
            changed = whole.changed(mutant.changes)
            device = harness.Emulator(kernel=lambda *key, new=changed: new if key == wanted else harness.kernel(*key))
            with pytest.raises(Fault, match="the launch before may still write"):
                device.last_batch(logits, target)


@pytest.mark.parametrize("name", KERNELS)
def test_every_wrong_index_and_lost_predicate_is_noticed_or_explained(name: str) -> None:
    """A seeded sample of what is executed: addresses, constants, predicates, comparisons, selections."""
    random, dtype = rich(name, torch.bfloat16), torch.bfloat16
    count = CALLS_WITH_LONG_ROWS if name.startswith("cluster") else CALLS
    found = mutants.Study(harness.kernel(*name_of(name, dtype)), [cases(name, dtype), *random[:count]], random[count:])
    assert len(found.cases) > 0.65 * count, "too few of the calls lead to this kernel"
    verdicts = [found.judge(mutant) for mutant in found.sampled(SAMPLE)]
    assert len(verdicts) == 2 * SAMPLE
    assert not [str(one) for one in verdicts if not one.why]


def test_the_kernels_of_a_file_are_all_here() -> None:
    for dtype, unit in harness.UNITS.items():
        assert {name_of(name, dtype)[1] for name in KERNELS} == set(compilers.kernels(unit))
