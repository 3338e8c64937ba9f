"""The `dlb-fast` command. A subcommand is one function `(argv) -> exit code` and one line in `COMMANDS`.

A subcommand imports what it needs when it runs, so that `dlb-fast --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlb_fast.report import Run
    from dlb_fast.train.config import RunConfig

__all__ = ["COMMANDS", "main"]

# name -> ("module:function", one line of help)
COMMANDS = {
    "train": ("dlb_fast.cli:train", "train a network: --preset NAME, --data KIND[:PATH], --out FOLDER, --resume"),
    "eval": ("dlb_fast.cli:evaluate", "evaluate a run's weights: accuracy, likelihood, calibration"),
    "compare": ("dlb_fast.cli:compare", "methods x seeds at equal images seen: table, curves, report"),
    "demo": ("dlb_fast.cli:demo", "the comparison on handwritten digits, in about two minutes"),
    "report": ("dlb_fast.cli:report", "a page per run; tables, curves and calibration over several"),
    "presets": ("dlb_fast.cli:presets", "list the recipes, or show one"),
    "verify-data": ("dlb_fast.data.datasets.verify:main", "find damaged and odd files of a data set"),
    "bench": ("dlb_fast.cli:bench", "measure on this machine: bench [last_batch | loader | methods | step] [options]"),
    "doctor": ("dlb_fast.doctor:main", "which implementations of the loss work here, and why the others do not"),
}
ONE_PROCESS = ("compare", "demo", "eval")
TRAIN_EXTRA = ("tyro", "yaml", "safetensors", "tqdm", "matplotlib", "PIL", "simplejpeg", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    0: done, or stopped by a signal with everything saved. 2: refused, because a flag, a config, data or a folder is not
    as expected (ValueError, a missing file). 1: anything else failed. 130: Ctrl-C where nothing is saved.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] == "--version":
        from dlb_fast import __version__

        print(__version__)
        return 0
    if not args or args[0] in ("-h", "--help"):
        print("usage: dlb-fast COMMAND [options]        (COMMAND --help for its options)\n")
        print("\n".join(f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()))
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"dlb-fast: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    world_size = os.environ.get("WORLD_SIZE", "1")  # set by torchrun
    if name in ONE_PROCESS and world_size != "1":
        print(f"dlb-fast {name}: expects one process, torchrun started {world_size}; start it without", file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")
    try:
        return int(getattr(importlib.import_module(module), function)(rest))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has closed it (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("DLB_FAST_DEBUG") == "1":
            raise
        rank = f" (rank {os.environ.get('RANK')})" if world_size != "1" else ""
        print(f"dlb-fast {name}{rank}: {_said(error)}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_EXTRA:
            print('the trainer needs further libraries: pip install "dlb_fast[train]"', file=sys.stderr)
        print("(DLB_FAST_DEBUG=1 shows where it happened)", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


def _said(error: Exception) -> str:
    """An error in words: its own sentence, the system's with the file, or with the type where that says more."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def train(argv: list[str]) -> int:
    """`dlb-fast train`: 0 when the run is finished, or was stopped by a signal with everything saved."""
    # These flags decide the defaults of all others, so they are read first.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    early.add_argument("--data")
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", action="store_true")
    first, _ = early.parse_known_args(argv)
    from dlb_fast.train.config import TrainArgs, parse_flags
    from dlb_fast.train.distributed import Ranks
    from dlb_fast.train.run import RunFolder, newest_run

    ranks = Ranks.join()

    def find() -> tuple[RunFolder | None, RunConfig | None]:
        folder = None if first.out is None else RunFolder(first.out)
        if first.resume:
            folder = folder or newest_run()
            if folder.exists():
                return folder, folder.read_config()
            if first.preset is None and first.config is None:
                raise ValueError(f"--resume: there is no run in {folder.path}; --preset or --config would start one")
        elif folder is not None and folder.has_work():
            raise ValueError(f"--out: {folder.path} already holds a run; --resume continues it, or choose another")
        return folder, None

    folder, begun = ranks.run_on_main(find)  # rank 0 looks at the folders, and all ranks do the same
    base, sources = (begun, "") if begun else _base_config(first.preset, first.config, first.data)
    args = parse_flags(TrainArgs, TrainArgs(run=base), argv, "dlb-fast train")
    changed = _changes(base, args.run)
    note = sources + (f"; then flags: {changed}" if changed else "")
    if begun:
        note = f"changed for the rest of the run: {changed}" if changed else ""
    if ranks.is_main and note and (begun if args.quiet else args.smoke):  # otherwise train_run prints it
        print(note, file=sys.stderr)
    if args.smoke:
        if args.resume:
            raise ValueError("--smoke starts a rehearsal of its own; leave --resume out")
        from dlb_fast.train.run import rehearse

        found = rehearse(args.run, first.out, real_data=first.data is not None, quiet=args.quiet, ranks=ranks)
        if ranks.is_main:
            print(f"smoke: training, evaluation, checkpoint and resume work ({found['seconds']} seconds)")
        ranks.leave()
        return 0
    label = f"{args.run.data.source.split(':')[0]}-{args.run.loss.method}"
    folder = folder or ranks.run_on_main(lambda: RunFolder.named(label))
    from dlb_fast.train.run import train_run

    train_run(args.run, folder, resume=args.resume, quiet=args.quiet, ranks=ranks, note=note)
    if ranks.is_main:
        _write_page(folder.path, args.quiet)
    ranks.leave()
    return 0


def _base_config(preset: str | None, file: Path | None, data: str | None) -> tuple[RunConfig, str]:
    """The config that the flags change, and its sources in words: a preset, a file, or a file on top of a preset.

    Without both it is the digits recipe, or with `--data` the trainer's defaults: a recipe belongs to its data.
    """
    from dlb_fast.presets import load_preset
    from dlb_fast.train.config import RunConfig, load_config

    if preset is None and file is None and data in (None, "digits"):
        preset = "digits"
    base = RunConfig() if preset is None else load_preset(preset)
    sources = "config from " + ("defaults" if preset is None else f"preset {preset}")
    if file is None:
        return base, sources
    config = load_config(file, base)
    return config, f"{sources}; then {file}: {_changes(base, config) or 'no change'}"


def _changes(old: RunConfig, new: RunConfig) -> str:
    """The fields in which two configs differ: `lr 0.05 -> 0.1, epochs 30 -> 2`."""
    from dlb_fast.train.config import to_dict

    before, after = to_dict(old), to_dict(new)
    names = [(g, n) for g in after for n in after[g] if before[g][n] != after[g][n]]
    return ", ".join(f"{n} {before[g][n]} -> {after[g][n]}" for g, n in names)


def _write_page(folder: Path, quiet: bool) -> None:
    """Write the page of a run; the run is saved already, so a failure is printed and not raised."""
    from dlb_fast import report as pages

    try:
        page = pages.write_page(pages.read_run(folder))
    except Exception as error:
        print(f"the run is saved, but its page could not be written: {error}", file=sys.stderr)
        return
    if not quiet:
        print(f"page: {page}", file=sys.stderr)


def evaluate(argv: list[str]) -> int:
    """`dlb-fast eval RUN [--weights best|last] [--data KIND[:PATH]] [--json]`."""
    parser = argparse.ArgumentParser(prog="dlb-fast eval", description="Evaluate a run's weights on its test set.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--weights", default="best", choices=("best", "last"), help="which weights (default: best)")
    parser.add_argument("--data", help="KIND[:PATH] of another set with the same classes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from dlb_fast.train.run import evaluate_run

    scores = evaluate_run(args.run, weights=args.weights, source=args.data, device=args.device)
    if args.json:
        import json

        print(json.dumps(scores))
    else:
        print(
            f"top-1 {100 * scores['top1']:.2f} %  top-5 {100 * scores['top5']:.2f} %  nll {scores['nll']:.4f}  "
            f"ece {scores['ece']:.4f}  over {scores['count']} images"
        )
    return 0


def presets(argv: list[str]) -> int:
    """`dlb-fast presets [list] | show NAME`."""
    parser = argparse.ArgumentParser(prog="dlb-fast presets")
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("list", help="names and what they are")
    show = verbs.add_parser("show", help="print a recipe, a config file whose comments name the sources of its numbers")
    show.add_argument("name")
    args = parser.parse_args(argv)
    from dlb_fast.presets import PRESETS, describe_preset, preset_file

    if args.verb == "show":
        print(preset_file(args.name).read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, PRESETS))
    print("\n".join(f"{name:<{width}}  {describe_preset(name)}" for name in PRESETS))
    print("\n`presets show NAME > FILE` makes a file for `train --config FILE`", file=sys.stderr)
    return 0


def report(argv: list[str]) -> int:
    """`dlb-fast report RUN... [--out FOLDER]`."""
    parser = argparse.ArgumentParser(
        prog="dlb-fast report",
        description="Write report.html into every run's folder: one page that needs nothing else. Over all runs named: "
        "a table and curves with calibration (report.html, report.md, curves.png).",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, comparisons, or folders of these")
    parser.add_argument(
        "--out", type=Path, help="where to write what is over all runs (default: the folder named, or that of all runs)"
    )
    args = parser.parse_args(argv)
    from dlb_fast import report as pages

    found = {path.resolve(): (path, label) for folder in args.runs for path, label in pages.find_runs(folder)}
    read: list[Run] = []
    for path, label in found.values():
        try:
            read.append(pages.read_run(path, label))
        except ValueError as error:
            if path in args.runs:
                raise
            print(f"left out: {error}", file=sys.stderr)
    homes = {path.resolve().parent for path in args.runs} if len(args.runs) > 1 else set(args.runs)
    if args.out is None and len(homes) > 1:
        raise ValueError("report: the runs are in several folders; name one for the report over all of them with --out")
    folder = args.out or homes.pop()
    command = "dlb-fast report " + shlex.join(argv)
    page = pages.write_report(folder, read, title="Report", command=command)
    alone = folder if len(read) == 1 else None  # the page of one run goes where --out says
    written = [page, folder / "curves.png", *(pages.write_page(run, alone) for run in read)]
    written += [folder / "report.html"] * (len(read) > 1)
    print("\n".join([f"{pages.compare_table(read)}\n", "wrote", *(f"  {path}" for path in written)]))
    return 0


def compare(argv: list[str], *, prog: str = "compare", preset: str | None = None) -> int:
    """`dlb-fast compare --preset NAME --methods ce,ls,two_view,dlb --seeds 5 --out FOLDER --jobs N [config flags]`."""
    from dlb_fast import report as pages
    from dlb_fast.train import compare as comparison
    from dlb_fast.train.config import RunConfig, check_effects, override, parse_flags, without_effect
    from dlb_fast.train.run import RunFolder

    parser = argparse.ArgumentParser(
        prog=f"dlb-fast {prog}",
        allow_abbrev=False,
        description="Train methods x seeds at equal optimiser steps and rows per step; the same command continues a "
        "comparison that was interrupted. Further flags are those of `dlb-fast train` (--data, --epochs, --lr, ...).",
    )
    parser.set_defaults(preset=preset, config=None)
    if preset is None:
        parser.add_argument("--preset", help="recipe by name (default: digits, or the defaults with --data)")
        parser.add_argument("--config", type=Path, help="YAML config, on top of the preset if both are given")
    names = f"comma-separated, or 'all' (default: %(default)s); known: {', '.join(comparison.VARIANTS)}"
    parser.add_argument("--methods", default="ce,ls,two_view,dlb", help=names)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. SEEDS-1 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: one per core, one on a GPU)")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default: a new one under runs/)")
    parser.add_argument(
        "--noises", help="shares of wrong labels, such as 0,0.2,0.4: a comparison for each, and a table over all"
    )
    args, rest = parser.parse_known_args(argv)
    data = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    data.add_argument("--data")
    base, _ = _base_config(args.preset, args.config, data.parse_known_args(rest)[0].data)
    config = parse_flags(RunConfig, base, rest, f"dlb-fast {prog}")
    if preset is not None and config.data.source != base.data.source:
        raise ValueError(f"{prog} is a recipe for {preset}; compare other data with: dlb-fast compare --data KIND:PATH")
    command = f"dlb-fast {prog} {shlex.join(argv)}".strip()
    methods = list(comparison.VARIANTS) if args.methods == "all" else args.methods.split(",")
    title = "DLB on handwritten digits" if preset else f"Comparison on {config.data.source}"

    def one(config: RunConfig, folder: Path | None) -> tuple[Path, list[Run]]:
        folder = comparison.run(
            config, methods=methods, seeds=args.seeds, jobs=args.jobs, folder=folder, label=prog, command=command
        )
        runs = [pages.read_run(path, label) for path, label in comparison.read_comparison(folder)]
        pages.write_report(folder, runs, title=title, command=command)
        return folder, runs

    if args.noises is not None:
        root = args.out or RunFolder.named(prog).path
        shares = [float(share) for share in args.noises.split(",")]
        check_effects(override(config, label_noise=max(shares)))
        each = {s: override(config, label_noise=s) for s in shares}
        each = {s: override(c, **without_effect(c)) for s, c in each.items()}  # the kind of noise, where there is none
        found = {s: one(c, root / f"noise-{s:g}")[1] for s, c in each.items()}
        pages.write_noise_report(root, found, title=title, command=command)
        print(f"\n{pages.noise_table(found)}\n\nwrote {root / 'report.html'}, report.md and noise.png")
        return 0
    folder, runs = one(config, args.out)
    print(f"\n{pages.compare_table(runs)}\n")
    if paired := pages.paired_table(runs, "DLB"):
        print(f"{paired}\n")
    used = ", ".join(sorted({str(r.versions.get("implementation")) for r in runs}))
    print(f"loss implementation that ran: {used}\nwrote {folder / 'report.html'}, report.md and curves.png")
    print(f"`dlb-fast report {shlex.quote(str(folder))}` writes a page per run")
    return 0


def demo(argv: list[str]) -> int:
    """`dlb-fast demo`: `compare` on digits with few and partly wrong labels."""
    return compare(argv, prog="demo", preset="digits")


def bench(argv: list[str]) -> int:
    """`dlb-fast bench [NAME] [options]`: run a benchmark of the checkout in a process of its own."""
    scripts = {"last_batch": ["-m", "benchmarks.bench_last_batch"], "loader": ["benchmarks/bench_loader.py"]}
    scripts |= {name: ["-m", f"benchmarks.bench_{name}"] for name in ("methods", "step")}
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("last_batch", argv)
    if name not in scripts:
        raise ValueError(f"bench: expected one of {', '.join(scripts)}, got {name!r}")
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "harness.py").exists():
        raise ValueError("bench: the benchmarks come with the source checkout, not with an installed package; clone it")
    # --out is relative to the caller's folder, so that folder stays and the checkout is made importable.
    script = [str(checkout / part) if part.endswith(".py") else part for part in scripts[name]]
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *script, *rest], env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
