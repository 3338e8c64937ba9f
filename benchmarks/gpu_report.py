"""What `gpu_check` asks of pytest: each test's outcome written down as it comes, and an end in time.

    python -m pytest -p benchmarks.gpu_report      with DLB_FAST_TEST_REPORT=FILE and DLB_FAST_TEST_SECONDS=N

A run that is killed writes no JUnit file, so every outcome goes to FILE at once, a JSON line each; the last line says
whether the run came to its end. When the seconds are over the run stops after the test that is running. Tests marked
`alone`, which read what the whole device does, wait until the other workers of pytest-xdist run none.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import harness

FILE, SECONDS, LOCK = "DLB_FAST_TEST_REPORT", "DLB_FAST_TEST_SECONDS", "DLB_FAST_TEST_LOCK"


class Report:
    """Writes outcomes; stops the run when its time is over."""

    def __init__(self, path: Path, seconds: float, plugins: pytest.PytestPluginManager) -> None:
        self.path, self.end, self.over, self.plugins = path, time.monotonic() + seconds, False, plugins

    def write(self, record: dict[str, Any]) -> None:
        """To the file, or to the terminal where it cannot be written: what is printed here would be captured."""
        try:
            harness.append(self.path, [record])
        except OSError:
            if (terminal := self.plugins.get_plugin("terminalreporter")) is not None:
                terminal.write_line("\n" + json.dumps(record))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = {"text": report.longreprtext[-3000:]} if report.failed else {}
            self.write({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), **text})
        if time.monotonic() > self.end and not self.over:
            self.over = True
            pytest.exit("the time for the GPU tests is over; what has not run is not proven")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "outcome": "not collected", "text": report.longreprtext[-3000:]})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write({"finished": not self.over and int(exitstatus) in (0, 1), "exit": int(exitstatus)})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Under a lock that workers share, and that a test marked `alone` has for itself."""
    if LOCK not in os.environ:
        return (yield)
    with Path(os.environ[LOCK]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    if FILE in os.environ and not hasattr(config, "workerinput"):  # once, not in the workers of pytest-xdist
        seconds = float(os.environ.get(SECONDS, "1e9"))
        config.pluginmanager.register(Report(Path(os.environ[FILE]), seconds, config.pluginmanager))
