"""Reports from run folders: a page per run; tables, curves and a page over several runs.

Every figure is read from the files of the runs; nothing is computed again. `runs` reads, `tables` and `pictures` show,
`pages` writes.
"""

from .pages import render, write_noise_report, write_page, write_report
from .pictures import PANELS, draw_curves, pooled_reliability
from .runs import Run, find_runs, read_run
from .tables import Table, compare_table, evaluations_table, noise_table, paired_table

__all__ = [
    "PANELS", "Run", "Table", "compare_table", "draw_curves", "evaluations_table", "find_runs", "noise_table",
    "paired_table", "pooled_reliability", "read_run", "render", "write_noise_report", "write_page", "write_report",
]  # fmt: skip
