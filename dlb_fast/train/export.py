"""The trained model alone, for use elsewhere: safetensors, ONNX or torch.export. The loss is never part of it.

An export is compared with the model it came from before it gets its name, and carries what its user needs to know
(classes, normalisation, input size), inside the file and as JSON beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlb_fast._version import __version__

from .config import RunConfig
from .models import create_model
from .run_folder import RunFolder
from .sets import Sets, open_sets
from .state import CheckpointError, load_weights, save_weights, write_atomically

__all__ = ["FORMATS", "describe", "export_run", "main"]

TOLERANCE = 1e-4  # of the largest logit: other kernels add in another order
INPUT, OUTPUT = "images", "logits"


def describe(config: RunConfig, sets: Sets) -> dict[str, str]:
    """What a run's weights say about themselves, as text: enough to build the model and feed it without the data."""
    side = config.data.eval_size or config.data.image_size
    size = list(sets.train.images.shape[2:]) if sets.resident else [side, side]
    return {
        "model": config.model.model,
        "num_classes": str(sets.num_classes),
        "channels": str(sets.channels),
        "size": json.dumps(size),
        "mean": json.dumps(list(sets.mean)),
        "std": json.dumps(list(sets.std)),
        "classes": json.dumps([str(name) for name in sets.train.classes]),
    }


def _safetensors(model: nn.Module, example: Tensor, path: Path, about: dict[str, Any], opset: int | None) -> None:
    save_weights(path, model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})


def _run_safetensors(path: Path, model: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    fresh = model()
    load_weights(path, fresh)
    return fresh.eval()


def _torch_export(model: nn.Module, example: Tensor, path: Path, about: dict[str, Any], opset: int | None) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"dlb_fast.json": json.dumps(about)})


def _run_torch_export(path: Path, model: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _onnx(model: nn.Module, example: Tensor, path: Path, about: dict[str, Any], opset: int | None) -> None:
    try:
        import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
        import onnxscript  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: F401
    except Exception as error:
        raise RuntimeError(
            f"export: the format onnx needs onnx and onnxscript ({type(error).__name__}: {error}); "
            f"pip install 'dlb_fast[export]'"
        ) from error
    # It tells of every operator of torchvision that it leaves out.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model, (example,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=opset,
    )  # fmt: skip
    assert program is not None  # it is one with dynamo=True
    about["opset"] = program.model.opset_imports[""]
    program.model.metadata_props["dlb_fast"] = json.dumps(about)
    program.save(str(path), external_data=False)


def _run_onnx(path: Path, model: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except Exception:  # slower, but part of onnx
        from onnx.reference import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
            ReferenceEvaluator,
        )

        session: Any = ReferenceEvaluator(str(path))
    else:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


# format -> (suffix, write, load as a function of images)
FORMATS: dict[str, tuple[str, Callable[..., None], Callable[..., Callable[[Tensor], Tensor]]]] = {
    "safetensors": (".safetensors", _safetensors, _run_safetensors),
    "onnx": (".onnx", _onnx, _run_onnx),
    "torch_export": (".pt2", _torch_export, _run_torch_export),
}


def export_run(
    run: Path | str,
    *,
    format: str = "safetensors",
    weights: str = "best",
    out: Path | str | None = None,
    opset: int | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Write a run's model, in float32 and eval mode, with a free batch size.

    Args:
        run: run folder.
        format: one of `FORMATS`.
        weights: `best` or `last`.
        out: the file; None: `<run>/export/<weights><suffix>`. What was there is replaced.
        opset: of ONNX; None is torch's choice.
        check: compare with the eager model on random batches of 1 and of 5 images.

    Returns:
        What the file says about itself, with `path` and, where it was checked, `max_error` (largest difference of a
        logit) and `max_logit` (the largest logit seen).
    Raises:
        ValueError: unknown format, no run, or an opset for another format. CheckpointError: weights missing or damaged.
        RuntimeError: onnx is not installed, or the exported model computes something else; nothing is left behind.

    Example: `export_run("runs/a", format="onnx")["max_error"]`
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if opset is not None and format != "onnx":
        raise ValueError(f"export: opset belongs to the format onnx, got format {format!r}; leave it out")
    folder = RunFolder(run)
    config = folder.read_config()
    file = folder.checkpoints / f"{weights}.safetensors"
    note = _read_note(file, config)
    channels, (height, width) = int(note["channels"]), json.loads(note["size"])

    def make() -> nn.Module:
        return create_model(note["model"], int(note["num_classes"]), channels)

    model = make()
    load_weights(file, model)
    model.eval()
    suffix, write, load = FORMATS[format]
    path = folder.path / "export" / f"{weights}{suffix}" if out is None else Path(out)
    about: dict[str, Any] = {
        "format": format,
        "model": note["model"],
        "classes": json.loads(note["classes"]),
        "mean": json.loads(note["mean"]),
        "std": json.loads(note["std"]),
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", channels, height, width]},
        "preprocessing": "(pixel / 255 - mean) / std per channel",
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", int(note["num_classes"])]},
        "run": folder.path.resolve().name,
        "weights": weights,
        "step": int(note["step"]),
        "dlb_fast": __version__,
        "torch": torch.__version__,
    }
    generator = torch.Generator().manual_seed(0)

    def images(rows: int) -> Tensor:
        return torch.randn(rows, channels, height, width, generator=generator)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter about torch
            write(model, images(2), temporary, about, opset)
        error, largest = _difference(load(temporary, make), model, images) if check else (None, None)
        os.replace(temporary, path)
    except OSError as problem:
        raise CheckpointError(f"export: cannot write {path}: {problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    beside = json.dumps(about, indent=1).encode()
    write_atomically(path.with_name(f"{path.name}.json"), lambda handle: handle.write(beside))
    return {**about, "path": path, "max_error": error, "max_logit": largest}


@torch.no_grad()
def _difference(
    exported: Callable[[Tensor], Tensor], model: nn.Module, images: Callable[[int], Tensor]
) -> tuple[float, float]:
    """The largest difference of a logit over batches of 1 and of 5 random images, and the largest logit."""
    worst = largest = 0.0
    for rows in (1, 5):
        batch = images(rows)
        want, got = model(batch), exported(batch)
        if got.shape != want.shape:
            raise RuntimeError(f"export: the exported model gives {tuple(got.shape)} logits, not {tuple(want.shape)}")
        error = (got - want).abs().max().item()
        largest = max(largest, want.abs().max().item())
        if not error <= TOLERANCE * max(1.0, largest):
            raise RuntimeError(
                f"export: the exported model differs from the model by {error:.3g} in a logit (the largest is "
                f"{largest:.3g}); nothing was written. --no-check writes it all the same"
            )
        worst = max(worst, error)
    return worst, largest


def _read_note(file: Path, config: RunConfig) -> Mapping[str, str]:
    """What the weights say about themselves; what they do not say is read from the run's data."""
    from safetensors import safe_open

    if not file.exists():
        raise CheckpointError(f"export: {file} is missing; has the run finished an evaluation?")
    try:
        with safe_open(file, "pt") as handle:
            note = json.loads((handle.metadata() or {}).get("dlb_fast", "{}"))
    except Exception as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    if {"size", "mean", "classes", "step"} <= note.keys():
        return note
    return {"step": "-1", **describe(config, open_sets(config.data)), **note}


def main(argv: list[str]) -> int:
    """`dlb-fast export RUN [--format F] [--weights best|last] [--out FILE] [--opset N] [--no-check]`."""
    parser = argparse.ArgumentParser(prog="dlb-fast export", description="Write a run's model alone, without the loss.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--format", default="safetensors", choices=tuple(FORMATS), help="default: %(default)s")
    parser.add_argument("--weights", default="best", choices=("best", "last"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file (default: RUN/export/WEIGHTS with the format's suffix)")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: torch's choice)")
    parser.add_argument(
        "--check", default=True, action=argparse.BooleanOptionalAction,
        help="compare the exported model with the run's on random batches (default)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    done = export_run(
        args.run, format=args.format, weights=args.weights, out=args.out, opset=args.opset, check=args.check
    )
    shape = ", ".join(map(str, done["input"]["shape"]))
    print(f"wrote {done['path']} and {done['path'].name}.json: {INPUT} ({shape}) -> {len(done['classes'])} logits")
    if args.check:
        print(f"largest difference to the model: {done['max_error']:.3g} (largest logit: {done['max_logit']:.3g})")
    else:
        print("not compared with the model")
    return 0
