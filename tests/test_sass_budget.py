"""The kernels' machine code against what an H200 can issue: a bound that a slower rewrite breaks."""

from __future__ import annotations

import itertools

import pytest
from ptx import compilers

from benchmarks import sass_budget

pytestmark = [
    pytest.mark.skipif(compilers.nvcc() is None, reason="no nvcc: on PATH, in $CUDA_HOME, or by `.ci/run nvcc`"),
    pytest.mark.skipif(
        not (sass_budget.tool("nvdisasm") and sass_budget.tool("cuobjdump")), reason="no nvdisasm and cuobjdump"
    ),
    pytest.mark.slow,
]


def test_every_regime_stays_below_what_memory_leaves_time_for():
    """By the row's work alone. Bounds: the code of today and a tenth."""
    found = sass_budget.costs(compilers.cubin("kernels_bf16", 90), "bf16")
    assert set(found) == set(itertools.product(sass_budget.GROUPS, (False, True)))
    needed = sass_budget.BANDWIDTH / 2 * sass_budget.LATENCY / sass_budget.PROCESSORS
    for (regime, whole), cost in found.items():
        # The subtraction of a large maximum counts, which few batches execute: most beside a short row's work.
        assert cost.issue_share < (0.80 if not whole else 0.75 if regime == "lanes" else 0.60), (regime, cost)
        assert cost.special_share < 0.63, (regime, cost)  # three exponentials per logit, a taught one has five
        if regime != "lanes":  # a row's packets are on their way together; short rows have few, and many groups
            assert cost.in_flight > needed, (regime, cost)


def test_loads_that_wait_for_each_other_are_told_from_loads_together():
    load, use = ("LDG.E.128", " R{}, desc[UR4][R2.64]"), ("IMAD.U32", " R40, R{}, 0x10000, RZ")
    together = [(load[0], load[1].format(r)) for r in (4, 8, 12, 16)] + [(use[0], use[1].format(4))]
    apart = [item for r in (4, 8, 12, 16) for item in ((load[0], load[1].format(r)), (use[0], use[1].format(r)))]
    assert sass_budget.loads_together([together]) == 64
    assert sass_budget.loads_together([apart]) == 16
