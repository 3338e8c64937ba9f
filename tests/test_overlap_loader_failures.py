"""Bad files and failing transforms: each named, counted, replaced alike for both uses, none silent."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import Files, assert_no_threads, corner, jpeg, loader, make_files, threads

from dlb_fast.data import ResidentLoader, SampledLoader, SampleError, ViewPairSampler, synthetic
from dlb_fast.data.decode.decode import ImageDecoder
from dlb_fast.data.rng import ViewRng


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert_no_threads()


def spoil(path: Path, how: str) -> str:
    """Damage a file; returns words the error must hold."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return "truncated|premature"
    if how == "zeros inside":
        path.write_bytes(data[:3000] + bytes(3072) + data[6072:])
        return "zeros|corrupt|premature"
    if how == "text":
        path.write_text("I am not an image, whatever my name says\n" * 5)
        return "not an image"
    if how == "empty":
        path.write_bytes(b"")
        return "empty file"
    path.unlink()
    if how == "directory":
        path.mkdir()
        return "IsADirectoryError|PermissionError"
    if how == "bomb":
        at = data.find(b"\xff\xc0")
        path.write_bytes(data[: at + 5] + b"\xff\x00\xff\x00" + data[at + 9 :])
        return "decompression bomb: 65280 x 65280"
    assert how == "vanished"
    return "FileNotFoundError"


HOW = ["truncated", "zeros inside", "text", "empty", "directory", "bomb", "vanished"]


@pytest.mark.parametrize("how", HOW)
def test_bad_file_is_raised_by_name_in_its_batch(files: Files, how: str) -> None:
    with loader(files, num_threads=1) as source:
        expected = [b.ids.tolist() for b in source]
    bad = expected[3][-1]  # a new sample of batch 3
    words = spoil(files.paths[bad], how)
    with loader(files, num_threads=4) as source:
        got = []
        with pytest.raises(SampleError, match=words) as caught:
            for batch in source:
                got.append(batch.ids.tolist())
        assert got == expected[:3]  # the batches before it came whole
        error = caught.value
        assert (error.index, error.epoch, error.path) == (bad, 0, str(files.paths[bad]))
        assert str(files.paths[bad]) in str(error) and "verify-data" in str(error)
        assert threads() == []
        assert source.state_dict()["step"] == 3
        files.paths[bad].rmdir() if how == "directory" else None
        files.paths[bad].write_bytes(jpeg(bad))
        assert [b.ids.tolist() for b in source] == expected  # repaired: the loader goes on


def test_permission_error_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the refusal is made by the reader."""

    def refuse(index: int) -> bytes:
        if index == 5:
            raise PermissionError(13, "Permission denied", str(files.paths[5]))
        return files.paths[index].read_bytes()

    monkeypatch.setattr(files, "read", refuse)
    with loader(files) as source, pytest.raises(SampleError, match=r"PermissionError.*denied") as caught:
        list(source)
    assert caught.value.index == 5


def test_the_first_bad_row_of_a_batch_is_raised_whatever_the_threads(files: Files) -> None:
    with loader(files) as source:
        ids = [b.ids[b.num_old :].tolist() for b in source]
    for row in (1, 3):
        files.paths[ids[2][row]].write_bytes(b"")
    for _ in range(5):
        with loader(files, num_threads=4) as source, pytest.raises(SampleError) as caught:
            list(source)
        assert caught.value.index == ids[2][1]


@pytest.mark.parametrize("how", HOW)
def test_replacement_serves_both_uses_alike_and_is_counted(
    files: Files, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {3, 11}
    words = {i: spoil(files.paths[i], how) for i in bad}
    streams = []
    for count in (1, 4):
        caplog.clear()
        with loader(files, num_threads=count, on_error="replace", max_failures=2) as source:
            with caplog.at_level(logging.WARNING, "dlb_fast.data"):
                batches = [b for _ in range(3) for b in source]
            stats = source.stats()
        assert stats.failed == 2 and {e.index for e in stats.failures} == bad
        assert stats.replaced >= 6  # two samples, three epochs
        assert sum("replaced sample" in r.message for r in caplog.records) == 2  # once per file
        assert all(re.search(words[e.index], e.reason) for e in stats.failures)
        streams.append([(b.ids.tolist(), b.targets.tolist(), b.images.contiguous().numpy().tobytes()) for b in batches])
        for before, batch in itertools.pairwise(batches):
            assert batch.ids[: batch.num_old].tolist() == before.ids[before.num_old :].tolist()
        for batch in batches:
            assert len(batch) == (8 if batch.has_old else 4)
            assert not bad & set(batch.ids.tolist())
            assert batch.targets.tolist() == [files.targets[i] for i in batch.ids.tolist()]
            for row, i in enumerate(batch.ids.tolist()):
                use = int(row < batch.num_old)
                drawn = batch.epoch - (use == 1 and batch.step == 0)
                whole = torch.from_numpy(ImageDecoder()(files.paths[i].read_bytes())).permute(2, 0, 1)
                assert torch.equal(batch.images[row], corner(whole, ViewRng(0, drawn, i, use)))
    assert streams[0] == streams[1]


def test_replacement_is_the_same_after_a_resume(files: Files) -> None:
    files.paths[7].write_bytes(b"")
    options = {"on_error": "replace", "max_failures": 1}
    with loader(files, **options) as source:
        expected = [(b.ids.tolist(), b.images.contiguous().numpy().tobytes()) for _ in range(2) for b in source]
    for stop in range(1, 12):
        with loader(files, **options) as source:
            taken = 0
            while taken < stop:
                for _ in source:
                    taken += 1
                    if taken == stop:
                        break
            state = source.state_dict()
        with loader(files, **options) as again:
            again.load_state_dict(state)
            batch = next(itertools.chain(again, again))
            assert (batch.ids.tolist(), batch.images.contiguous().numpy().tobytes()) == expected[stop]


@pytest.mark.parametrize("bound,fails", [(0, True), (1, True), (2, False), (0.05, True), (0.09, False)])
def test_replacements_are_bounded(files: Files, bound: float, fails: bool) -> None:
    for i in (2, 9):
        files.paths[i].write_bytes(b"")
    with loader(files, on_error="replace", max_failures=bound) as source:
        if fails:
            with pytest.raises(SampleError, match="more than max_failures"):
                list(source)
        else:
            assert len(list(source)) == 6


def test_an_all_bad_set_ends_with_an_error(files: Files) -> None:
    for path in files.paths:
        path.write_bytes(b"")
    with loader(files, on_error="replace", max_failures=0.5) as source, pytest.raises(SampleError, match="= 12"):
        list(source)


def test_error_of_a_carried_half_after_a_resume(files: Files) -> None:
    with loader(files) as source:
        batches = itertools.islice(source, 3)
        bad = list(batches)[-1].ids[-1].item()
        state = source.state_dict()
    files.paths[bad].unlink()
    with loader(files) as again:
        again.load_state_dict(state)
        with pytest.raises(SampleError, match="FileNotFoundError") as caught:
            next(iter(again))
        assert caught.value.index == bad


def test_exception_in_the_transform_surfaces_with_the_sample(files: Files) -> None:
    def transform(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        raise KeyError("my bug")

    with loader(files, transform=transform, on_error="replace") as source:
        with pytest.raises(RuntimeError, match=r"transform failed on view 0 of sample \d+.*\.jpg.*my bug") as caught:
            next(iter(source))
        assert isinstance(caught.value.__cause__, KeyError)
    for bad, kind in [(lambda i, r: i.numpy(), TypeError), (lambda i, r: i[0], TypeError)]:
        with loader(files, transform=bad) as source, pytest.raises(kind, match="expected a \\(c, h, w\\) tensor"):
            next(iter(source))


def test_views_of_different_size_are_named(files: Files) -> None:
    files.paths[4].write_bytes(jpeg(4, 70, 70))
    words = r"views of one size.*sample .*\.jpg"
    with loader(files, transform=None) as source, pytest.raises(ValueError, match=words):
        list(source)


def test_memory_error_is_not_a_bad_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(index: int) -> bytes:
        raise MemoryError("no memory left")

    monkeypatch.setattr(files, "read", exhausted)
    with loader(files, on_error="replace") as source, pytest.raises(MemoryError):
        next(iter(source))


def test_exceptions_that_are_not_exceptions_surface(files: Files) -> None:
    def transform(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
        raise SystemExit("a thread must not vanish")

    with loader(files, transform=transform) as source, pytest.raises(SystemExit):
        next(iter(source))


def test_failure_outside_any_sample_surfaces(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    with loader(files) as source:
        plan = source.plan
        half = plan.half

        def broken(epoch: int, index: int, rank: int = 0) -> Any:
            if index == 3:
                raise MemoryError("no room for the plan")
            return half(epoch, index, rank)

        monkeypatch.setattr(plan, "half", broken)
        with pytest.raises(MemoryError, match="no room"):
            list(source)


def test_a_state_can_be_loaded_where_the_error_is_caught(files: Files) -> None:
    with loader(files) as source:
        expected = [b.ids.tolist() for b in source]
    bad = expected[2][-1]
    good = files.paths[bad].read_bytes()
    files.paths[bad].write_bytes(b"")
    with loader(files) as source:
        got, state = [], source.state_dict()
        try:
            for batch in source:
                got.append(batch.ids.tolist())
                state = source.state_dict()
        except SampleError as error:
            assert error.index == bad
            files.paths[bad].write_bytes(good)
            source.load_state_dict(state)
            got += [batch.ids.tolist() for batch in source]
        assert got == expected


def refuses(image: torch.Tensor, rng: ViewRng) -> torch.Tensor:
    raise ArithmeticError("no view")


@pytest.mark.parametrize("kind", ["overlap", "resident", "sampled", "sampled files"])
def test_a_failed_transform_leaves_the_loader_ready_for_a_state(files: Files, kind: str) -> None:
    pictures = synthetic(length=24, num_classes=2, size=8)
    source: Any = {
        "overlap": lambda: loader(pictures, transform=refuses),
        "resident": lambda: ResidentLoader(pictures, 8, transform=refuses),
        "sampled": lambda: SampledLoader(pictures, ViewPairSampler(24, 8), transform=refuses),
        "sampled files": lambda: SampledLoader(files, ViewPairSampler(24, 8), transform=refuses),
    }[kind]()
    with source, pytest.raises((RuntimeError, ArithmeticError), match="no view") as caught:
        next(iter(source))
    source.load_state_dict(source.state_dict())  # `caught` still holds the frames
    del caught


def test_a_raised_error_is_not_kept_by_its_batch(files: Files) -> None:
    files.paths[12].write_bytes(b"")
    with loader(files, shuffle=False) as source:
        iterator = iter(source)
        next(iterator)
        assert source._pipeline is not None
        slots = source._pipeline._ring.slots
        with pytest.raises(SampleError):
            list(iterator)
        assert [slot.error for slot in slots if slot.step == 3] == [None]
