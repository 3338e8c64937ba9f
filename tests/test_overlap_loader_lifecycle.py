"""Timeouts, closing, early breaks, garbage collection, forks: nothing hangs and nothing is left behind."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import PATIENCE, wait_for
from loader_files import Files, assert_no_threads, corner, loader, make_files, threads

from dlb_fast.data import LoaderTimeout
from dlb_fast.data.loaders import pipeline
from dlb_fast.data.loaders.ring import WorkerPool
from dlb_fast.data.rng import ViewRng


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert_no_threads()


def test_timeout_says_what_each_thread_does_and_loses_nothing(files: Files) -> None:
    gate = threading.Event()
    slow = 13
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]

    class Slow(Files):
        def read(self, index: int) -> str:
            if index == slow:
                gate.wait(PATIENCE)
            return super().read(index)

    with loader(Slow(files.paths), timeout=0.4) as source:
        got, text = [], ""
        iterator = iter(source)
        while f"loading sample {slow} ({files.paths[slow]})" not in text or "waiting for step" not in text:
            try:  # a busy machine may time out before the threads are where they end up
                got.append(next(iterator).ids.tolist())
            except LoaderTimeout as error:
                text = str(error)
        assert "dlb-loader-0" in text and "dlb-loader-1" in text and f"waiting for step {len(got)}" in text
        assert "3/4 rows" in text or "7/8 rows" in text
        gate.set()
        got += [batch.ids.tolist() for batch in iterator]
        assert got == expected


def test_closing_while_a_thread_is_stuck_reports_it(
    files: Files, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_JOIN", 0.2)
    gate = threading.Event()
    stuck: list[int] = []

    class Stuck(Files):
        def read(self, index: int) -> str:
            stuck.append(index)
            gate.wait(PATIENCE)
            return super().read(index)

    source = loader(Stuck(files.paths), timeout=0.2)
    with pytest.raises(LoaderTimeout):
        next(iter(source))
    wait_for(lambda: len(stuck) == 2, "both threads in their file")
    with caplog.at_level(logging.WARNING, "dlb_fast.data"):
        source.close()
    assert "2 loader threads did not end" in caplog.text and "loading sample" in caplog.text
    gate.set()


def waits(thread: threading.Thread) -> bool:
    """Whether a thread waits for a condition or an event at this moment."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "wait" and frame.f_code.co_filename == threading.__file__


def test_close_wakes_a_waiting_consumer(files: Files) -> None:
    gate = threading.Event()

    class Stuck(Files):
        def read(self, index: int) -> str:
            gate.wait(PATIENCE)
            return super().read(index)

    source, caught = loader(Stuck(files.paths)), []

    def consume() -> None:
        try:
            next(iter(source))
        except RuntimeError as error:
            caught.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    wait_for(lambda: waits(consumer), "a consumer that waits for its batch")
    closer = threading.Thread(target=source.close)
    closer.start()
    consumer.join(PATIENCE)
    gate.set()
    closer.join(PATIENCE)
    assert caught and "closed while a batch was awaited" in caught[0]


@pytest.mark.parametrize("how", ["break", "close", "collect", "exception", "iterator", "cycle"])
def test_threads_end(files: Files, how: str) -> None:
    source = loader(files)
    reference = weakref.ref(source)
    if how == "break":
        for _ in source:
            assert len(threads()) == 2
            break
        assert threads() == []
    elif how == "close":
        iterator = iter(source)
        next(iterator)
        source.close()
        assert threads() == []
        source.close()
    elif how == "collect":
        list(source)
        assert len(threads()) == 2  # they wait for the next epoch
        del source
        assert reference() is None and threads() == []
    elif how == "exception":
        with pytest.raises(ZeroDivisionError):
            for _ in source:
                1 / 0  # noqa: B018
        gc.collect()
        assert threads() == []
    elif how == "iterator":
        iterator = iter(source)
        next(iterator)
        del source
        next(iterator)  # the iterator keeps the loader
        assert len(threads()) == 2
        del iterator
        assert reference() is None and threads() == []
    else:
        source.me = source  # type: ignore[attr-defined]
        next(iter(source))
        list(source)
        del source
        gc.collect()
        assert reference() is None and threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_while_the_threads_start_leaves_nothing_to_wait_for(
    files: Files, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]
    start = WorkerPool.start

    def interrupted(pool: WorkerPool) -> None:
        monkeypatch.setattr(WorkerPool, "start", start)
        raise error

    with loader(files) as source:
        monkeypatch.setattr(WorkerPool, "start", interrupted)
        with pytest.raises(error):
            next(iter(source))
        assert [b.ids.tolist() for b in source] == expected


def test_no_growth_over_200_epochs_with_early_breaks(files: Files) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    marks = []
    with loader(files, batch_size=4) as source:
        for epoch in range(200):
            for step, _ in enumerate(source):
                if epoch % 2 and step == epoch % 7:
                    break
            source.set_epoch(epoch + 1)
            if epoch in (60, 199):
                gc.collect()
                marks.append((len(threads()) <= 2, descriptors(), resident()))
        assert threads() in ([], ["dlb-loader-0", "dlb-loader-1"])
    assert marks[0][0] and marks[1][0]
    assert marks[1][1] <= marks[0][1]
    assert marks[1][2] - marks[0][2] < 8 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads(files: Files) -> None:
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]
    with loader(files) as source:
        iterator = iter(source)
        next(iterator)
        child = os.fork()
        if child == 0:
            os._exit(0 if next(iterator).ids.tolist() == expected[1] else 1)
        deadline = time.monotonic() + PATIENCE
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        if done == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done == (child, 0)
        assert next(iterator).ids.tolist() == expected[1]


def test_torch_threads_of_others_are_left_alone(files: Files) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    inside: list[int] = []

    def transform(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        inside.append(torch.get_num_threads())
        return corner(image, rng)

    with loader(files, transform=transform) as source:
        next(iter(source))
        born_later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        born_later.start()
        born_later.join()
    assert torch.get_num_threads() == before and seen == [before]
    assert set(inside[-8:]) == {1}


def test_closing_an_old_iteration_leaves_the_threads_of_the_new_one(files: Files) -> None:
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]
    with loader(files) as source:
        old = iter(source)
        next(old)
        new = iter(source)
        got = [next(new).ids.tolist()]
        pipeline_of_new = source._pipeline
        old.close()
        del old
        gc.collect()
        assert source._pipeline is pipeline_of_new and len(threads()) == 2
        got += [b.ids.tolist() for b in new]
        assert got == expected


@pytest.mark.parametrize("when", ["before the threads start", "after the threads started"])
def test_an_old_iteration_that_is_freed_while_the_new_one_starts_ends_nothing(
    files: Files, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the garbage collector may do: an iteration lives as long as the traceback of an error in its loop."""
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]
    start = WorkerPool.start

    def freeing(pool: WorkerPool) -> None:
        if when.startswith("before"):
            held.clear()
        start(pool)
        held.clear()

    with loader(files) as source:
        held = [iter(source)]
        next(held[0])
        monkeypatch.setattr(WorkerPool, "start", freeing)
        assert [b.ids.tolist() for b in source] == expected and held == []
