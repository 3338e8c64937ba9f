"""Reports from run folders: tables and curves over several runs, and one self-contained page per run."""

from .comparison import compare_table, draw_curves, noise_table, paired_table, write_noise_report, write_report
from .page import write_page
from .runs import Run, read_run

__all__ = [
    "Run", "compare_table", "draw_curves", "noise_table", "paired_table", "read_run", "write_noise_report",
    "write_page", "write_report",
]  # fmt: skip
