"""The `dlb-fast` command. A subcommand is one function `(argv) -> exit code` and one line in `COMMANDS`.

A subcommand imports what it needs when it runs, so that `dlb-fast --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dlb_fast.report import Run
    from dlb_fast.train.config import RunConfig

__all__ = ["COMMANDS", "main"]

# name -> ("module:function", one line of help)
COMMANDS = {
    "train": ("dlb_fast.cli:train", "train a network: --preset NAME, --data KIND[:PATH], --out FOLDER, --resume"),
    "eval": ("dlb_fast.cli:evaluate", "evaluate a run's weights: accuracy, likelihood, calibration"),
    "predict": ("dlb_fast.cli:predict", "class and probability of image files, by the network of a run"),
    "find-labels": ("dlb_fast.cli:find_labels", "the training labels that the network of a run doubts most, as CSV"),
    "compare": ("dlb_fast.cli:compare", "methods x seeds at equal images seen: table, curves, report"),
    "demo": ("dlb_fast.cli:demo", "the comparison on handwritten digits, in about two minutes"),
    "report": ("dlb_fast.cli:report", "a page per run; tables, curves and calibration over several"),
    "presets": ("dlb_fast.cli:presets", "list the recipes, or show one"),
    "verify-data": ("dlb_fast.data.datasets.verify:main", "find damaged and odd files of a data set"),
    "bench": ("dlb_fast.cli:bench", "measure on this machine: bench [last_batch | loader | methods | step] [options]"),
    "doctor": ("dlb_fast.doctor:main", "which implementations of the loss work here, and why the others do not"),
}
EXIT_CODES = """\
exit codes: 0    done, or stopped by a signal with everything saved
            1    the work failed, or damage was found
            2    wrong use: a command, an option, a config, data or a folder is not as expected
            130  Ctrl-C where nothing is saved
            128+N  stopped by signal N under torchrun, which takes 0 for the end of the work; everything is saved"""
COMPARED = "ce,ls,two_view,dlb"  # methods of `compare` and `demo` by default
ONE_PROCESS = ("compare", "demo", "eval", "find-labels", "predict")
TRAIN_EXTRA = ("tyro", "yaml", "safetensors", "tqdm", "matplotlib", "PIL", "simplejpeg", "sklearn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code, one of `EXIT_CODES`.

    What a user can mend is one sentence: wrong use (ValueError, a missing file) with 2; the package's own errors, the
    system's and a missing library with 1. Anything else is a fault of the code and keeps its traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] == "--version":
        from dlb_fast import __version__

        print(__version__)
        return 0
    if not args or args[0] in ("-h", "--help"):
        print("usage: dlb-fast COMMAND [options]        (COMMAND --help for its options)\n")
        print("\n".join(f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items()))
        print(f"\n{EXIT_CODES}")
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"dlb-fast: unknown command {name!r}; {hint}", file=sys.stderr)
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
        wrong_use = isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError))
        if not wrong_use and not _is_expected(error):
            traceback.print_exc()
            return 1
        rank = f" (rank {os.environ.get('RANK')})" if world_size != "1" else ""
        print(f"dlb-fast {name}{rank}: {_said(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_EXTRA:
            print('the trainer needs further libraries: pip install "dlb_fast[train]"', file=sys.stderr)
        if wrong_use:
            return 2
        print("(DLB_FAST_DEBUG=1 shows where it happened)", file=sys.stderr)
        return 1


def _said(error: Exception) -> str:
    """An error in words: its own sentence, the system's with the file, or with the type where that says more."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if hasattr(error, "remedy"):  # a `SampleError`, which names an option of the loaders
        error.remedy = "pass --on-error replace" if "on_error" in error.remedy else ""
    return str(error) or type(error).__name__


def _is_expected(error: Exception) -> bool:
    """Whether an error's words suffice: it is of this package, or of the system, a library or the memory."""
    if isinstance(error, (OSError, ImportError, MemoryError)) or type(error).__module__.startswith("dlb_fast"):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if type(error).__name__ == "OutOfMemoryError":  # torch's, named without importing torch
        return True
    raised = traceback.extract_tb(error.__traceback__)[-1].filename  # an error of torch comes from torch's files or C++
    return Path(raised).is_relative_to(Path(__file__).parent) and "torch" not in type(error).__module__


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, which names the option that was probably meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message with the nearest option; exit with 2."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        near = (
            difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1) if unknown else []
        )
        self.exit(2, f"{self.prog}: {message}{f'; did you mean {near[0]}?' if near else ''} (--help lists all)\n")


def train(argv: list[str]) -> int:
    """`dlb-fast train`: 0 when the run is finished, or was stopped by a signal with everything saved."""
    # These flags decide the defaults of all others, so they are read first.
    early = Parser(prog="dlb-fast train", add_help=False)
    early.add_argument("--preset")
    early.add_argument("--config", type=Path)
    early.add_argument("--data")
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", action="store_true")
    first, _ = early.parse_known_args(argv)
    from dlb_fast.train.config import RunConfig
    from dlb_fast.train.flags import TrainArgs, parse_flags

    if {"-h", "--help"} & set(argv):
        recipe = first.preset or first.config
        base = _base_config(first.preset, first.config, first.data)[0] if recipe else RunConfig()
        parse_flags(TrainArgs, TrainArgs(run=base), argv, "dlb-fast train")
    from dlb_fast.train.distributed import Ranks
    from dlb_fast.train.run import RunFolder, newest_run, rehearse, train_run

    ranks = Ranks.join()
    resume = first.resume
    if ranks.may_restart and "--smoke" not in argv:
        if first.out is None:
            raise ValueError("--out: torchrun --max-restarts starts this command again; name its run folder with --out")
        resume = True

    def find() -> tuple[RunFolder | None, RunConfig | None]:
        folder = None if first.out is None else RunFolder(first.out)
        if resume:
            folder = folder or newest_run()
            if folder.exists():
                return folder, folder.read_config()
            if first.resume and first.preset is None and first.config is None and first.data is None:
                raise ValueError(
                    f"--resume: there is no run in {folder.path}; --preset, --config or --data would start one"
                )
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
        found = rehearse(args.run, real_data=first.data is not None, quiet=args.quiet, ranks=ranks)
        if ranks.is_main:
            print(
                f"smoke: training, evaluation, checkpoint, resume and export work: {found['about']}, in "
                f"{found['seconds']} seconds; nothing is kept"
            )
        ranks.leave()
        return 0
    label = f"{args.run.data.source.split(':')[0]}-{args.run.loss.method}"
    folder = folder or ranks.run_on_main(lambda: RunFolder.named(label))
    result = train_run(args.run, folder, resume=resume, quiet=args.quiet, ranks=ranks, note=note)
    if ranks.is_main:
        _write_page(folder.path, args.quiet)
    ranks.leave()
    return 0 if result["finished"] else ranks.exit_status(result["stopped_by"])


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
    from dlb_fast.train.config import override, to_dict
    from dlb_fast.train.optim import resolve_optimizer

    def numbers(config: RunConfig) -> dict[str, Any]:
        try:
            return to_dict(override(config, optim=resolve_optimizer(config.optim)))  # its defaults, not None
        except ValueError:  # refused later, with the rest of the config
            return to_dict(config)

    before, after = numbers(old), numbers(new)
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


def _add_run(parser: Parser) -> None:
    """What `eval`, `predict` and `find-labels` have in common: the run, which of its weights, and where."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--weights", default="best", choices=("best", "last"), help="which weights (default: best)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")


def evaluate(argv: list[str]) -> int:
    """`dlb-fast eval RUN [--weights best|last] [--data KIND[:PATH]] [--json]`."""
    parser = Parser(prog="dlb-fast eval", description="Evaluate a run's weights on its test set.")
    _add_run(parser)
    parser.add_argument("--data", help="KIND[:PATH] of another set with the same classes")
    parser.add_argument(
        "--on-error", choices=("raise", "replace"), help="replace: leave out what cannot be read (default: the run's)"
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    from dlb_fast.train.run import evaluate_run

    given = {name: getattr(args, name) for name in ("on_error", "max_pixels") if getattr(args, name) is not None}
    scores = evaluate_run(args.run, weights=args.weights, source=args.data, device=args.device, **given)
    if args.json:
        import json

        print(json.dumps(scores))
    else:
        print(
            f"top-1 {100 * scores['top1']:.2f} %  top-5 {100 * scores['top5']:.2f} %  nll {scores['nll']:.4f}  "
            f"ece {scores['ece']:.4f}  over {scores['count']} images"
        )
    return 0


def predict(argv: list[str]) -> int:
    """`dlb-fast predict RUN PATH... [--top K] [--out FILE.csv|FILE.json]`: 1 when files were skipped."""
    parser = Parser(
        prog="dlb-fast predict",
        description="Print file, class and probability, separated by tabs. A file that cannot be read is named and "
        "skipped, and the exit code is 1.",
    )
    _add_run(parser)
    parser.add_argument(
        "paths", nargs="+", help="image files, folders of images, or lists of files (list:FILE, or .txt, .tsv, .lst)"
    )
    parser.add_argument("--top", type=int, default=1, help="number of classes per file (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write FILE.csv or FILE.json")
    args = parser.parse_args(argv)
    from dlb_fast.train import predict as images

    if args.top < 1:
        raise ValueError(f"predict: --top must be at least 1, got {args.top}")
    if args.out is not None and (args.out.suffix.lower() not in images.ENDINGS or not args.out.parent.is_dir()):
        raise ValueError(f"predict: --out must be a .csv or .json file in a folder that exists, got {args.out}")
    if note := images.stored_images_note(args.run, args.weights):
        print(note, file=sys.stderr)
    paths = images.find_images(args.paths)
    rows, skipped = [], 0
    for path, found in images.predict(args.run, paths, weights=args.weights, top=args.top, device=args.device):
        name = images.printable(path)
        if isinstance(found, str):
            skipped += 1
            print(f"skipped {images.one_field(name)}: {found}", file=sys.stderr)
            continue
        rows.append((name, [(images.printable(label), probability) for label, probability in found]))
        for label, probability in rows[-1][1]:
            print(f"{images.one_field(name)}\t{images.one_field(label)}\t{probability:.4f}")
    if args.out is not None:
        images.write_predictions(args.out, rows)
    if skipped:
        print(f"{skipped} of {len(paths)} files were skipped", file=sys.stderr)
    return 1 if skipped else 0


def find_labels(argv: list[str]) -> int:
    """`dlb-fast find-labels RUN [--data KIND:PATH] [--out FILE.csv]`: 1 when images were left out."""
    parser = Parser(
        prog="dlb-fast find-labels",
        description="Sort the training images of a run by how much its network doubts their labels and write them as "
        "CSV. Where the wrong labels are known, print precision and recall.",
    )
    _add_run(parser)
    parser.add_argument("--data", help="KIND:PATH of the run's own data in another place")
    parser.add_argument("--out", type=Path, help="the CSV (default: RUN/find-labels.csv)")
    args = parser.parse_args(argv)
    from dlb_fast.train import find_labels as labels

    out = args.out or args.run / "find-labels.csv"
    if out.suffix.lower() != ".csv" or not out.parent.is_dir():
        raise ValueError(f"find-labels: --out must be a .csv file in a folder that exists, got {out}")
    doubts = labels.find_labels(args.run, weights=args.weights, source=args.data, device=args.device)
    labels.write_doubts(out, doubts)
    print(f"{doubts.summary()}\nwrote {out}")
    if doubts.unread:
        print(f"{doubts.unread} images could not be read and are left out", file=sys.stderr)
    return 1 if doubts.unread else 0


def presets(argv: list[str]) -> int:
    """`dlb-fast presets [list] | show NAME`."""
    parser = Parser(prog="dlb-fast presets")
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
    parser = Parser(
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
    """`dlb-fast compare --preset NAME --methods ce,ls,two_view,dlb --seeds 5 --out FOLDER --jobs N [config flags]`.

    With `--protocol FILE --data DIR --out DIR` the file names networks, noises, methods and seeds.
    """
    from dlb_fast import report as pages
    from dlb_fast.train import compare as comparison
    from dlb_fast.train.config import RunConfig, check_effects, override, without_effect
    from dlb_fast.train.flags import parse_flags
    from dlb_fast.train.run import RunFolder

    parser = Parser(
        prog=f"dlb-fast {prog}",
        description="Train methods x seeds at equal optimiser steps and rows per step; the same command continues a "
        "comparison that was interrupted. Further flags are those of `dlb-fast train` (--data, --epochs, --lr, ...).",
    )
    parser.set_defaults(preset=preset, config=None, protocol=None, list=False, only=None, labels=None, tuned=None)
    if preset is None:
        study = parser.add_argument_group("a study from a file")
        study.add_argument("--protocol", type=Path, help="YAML file of networks, noises, methods, seeds; needs --out")
        study.add_argument("--list", action="store_true", help="say what is done and what is missing; train nothing")
        study.add_argument(
            "--only", action="append", metavar="GLOB", help="runs with such names, as --list has them; may be repeated"
        )
        study.add_argument("--labels", type=Path, help="folder of noise_kind file:NAME (default: that of --data)")
        study.add_argument(
            "--tuned", type=Path, help="results.jsonl whose chosen settings are taken (default: they are tuned first)"
        )
        parser.add_argument("--preset", help="recipe by name (default: digits, or the defaults with --data)")
        parser.add_argument("--config", type=Path, help="YAML config, on top of the preset if both are given")
    names = f"comma-separated, or 'all' (default: {COMPARED}); known: {', '.join(comparison.VARIANTS)}"
    parser.add_argument("--methods", help=names)
    parser.add_argument("--seeds", type=int, help="seeds 0 .. SEEDS-1 (default: 5)")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time (default: one per core, one on a GPU)")
    parser.add_argument("--out", type=Path, help="folder of the comparison (default: a new one under runs/)")
    parser.add_argument(
        "--noises", help="shares of wrong labels, such as 0,0.2,0.4: a comparison for each, and a table over all"
    )
    args, rest = parser.parse_known_args(argv)
    data = Parser(add_help=False)
    data.add_argument("--data")
    place, others = data.parse_known_args(rest)
    own = {name: "" for name in ("methods", "seeds", "jobs", "out", "noises", "preset", "config")}
    own |= {"resume": "the same command continues a comparison", "smoke": "use dlb-fast train --smoke"}
    if args.protocol is not None:
        return _study(args, place.data, others, own, f"dlb-fast compare {shlex.join(argv)}")
    if given := [name for name in ("list", "only", "labels", "tuned") if getattr(args, name)]:
        raise ValueError(f"compare: --{given[0]} belongs to --protocol FILE")
    args.methods, args.seeds = args.methods or COMPARED, 5 if args.seeds is None else args.seeds
    base, _ = _base_config(args.preset, args.config, place.data)
    own |= {"seed": "the seeds are 0 .. SEEDS-1; use --seeds", "method": "use --methods"}
    config = parse_flags(RunConfig, base, rest, f"dlb-fast {prog}", also=own)
    if preset is not None and config.data.source != base.data.source:
        raise ValueError(f"{prog} is a recipe for {preset}; compare other data with: dlb-fast compare --data KIND:PATH")
    command = f"dlb-fast {prog} {shlex.join(argv)}".strip()
    methods = list(comparison.VARIANTS) if args.methods == "all" else args.methods.split(",")
    if set(methods) <= comparison.VARIANTS.keys():  # otherwise `run` says which are known
        comparison.check_used(config, base, methods)
    title = "DLB on handwritten digits" if preset else f"Comparison on {config.data.source}"

    def one(config: RunConfig, folder: Path | None) -> tuple[Path, list[Run]]:
        folder = comparison.run(
            config, methods=methods, seeds=args.seeds, jobs=args.jobs, folder=folder, label=prog, command=command
        )
        runs = [pages.read_run(path, label) for path, label in comparison.read_comparison(folder)]
        pages.write_report(folder, runs, title=title, command=command)
        return folder, runs

    if args.noises is not None:
        try:
            shares = [float(share) for share in args.noises.split(",")]
        except ValueError:
            raise ValueError(f"{prog}: --noises must be shares such as 0,0.2,0.4, got {args.noises!r}") from None
        if config.data.label_file is not None:
            raise ValueError(f"{prog}: --noises draws labels; leave it or --noise-kind {config.data.noise_kind} out")
        check_effects(override(config, label_noise=max(shares)))
        each = {s: override(config, label_noise=s) for s in shares}
        each = {s: override(c, **without_effect(c)) for s, c in each.items()}  # the kind of noise, where there is none
        root = args.out or RunFolder.named(prog).path
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


def _study(args: argparse.Namespace, data: str | None, rest: list[str], own: dict[str, str], command: str) -> int:
    """`compare --protocol`: train what is missing, or list it."""
    from dlb_fast.presets import load_preset
    from dlb_fast.train import compare as comparison
    from dlb_fast.train.config import RunConfig
    from dlb_fast.train.flags import parse_flags
    from dlb_fast.train.protocol import load_protocol

    in_file = ("methods", "seeds", "noises", "preset", "config")
    if given := [name for name in in_file if getattr(args, name) is not None]:
        raise ValueError(f"compare: --{given[0]} has no effect with --protocol, which names it; --only chooses runs")
    if args.out is None:
        raise ValueError("compare: --protocol needs --out, the folder whose study is continued")
    protocol = load_protocol(args.protocol, load_preset)
    own |= dict.fromkeys(("seed", "method"), "the protocol names it; --only chooses runs")
    protocol = protocol.with_flags(parse_flags(RunConfig, protocol.common, rest, "dlb-fast compare", also=own))
    if not args.list and hasattr(os, "nice"):
        os.nice(10)  # a study takes hours, and whoever else uses the machine goes first
    state = comparison.run_protocol(
        protocol, args.out, data=data, labels=args.labels, only=args.only or (), tuned=args.tuned, jobs=args.jobs,
        command=command, dry=args.list,
    )  # fmt: skip
    asked = state.asked(args.only or ())
    missing = [cell for cell in asked if cell.name not in state.done]
    here = [cell for cell in missing if comparison.runs_here(protocol.base(cell.network).train.device)]
    for cell in asked if args.list else ():
        print(f"{cell.name:<48} {_said_of(state.done.get(cell.name), cell in here)}")
    seconds = comparison.remaining_seconds(state, here)
    time_left = "" if not here or seconds is None else f", about {seconds / 3600:.1f} hours of training one by one"
    done = len(asked) - len(missing)
    print(f"{done} of {len(asked)} runs are done, {len(here)} are missing{time_left}; {args.out / comparison.RESULTS}")
    if len(here) < len(missing):
        print(f"{len(missing) - len(here)} more need a GPU")
    return 0


def _said_of(line: dict[str, Any] | None, here: bool) -> str:
    """A run in the list of a study."""
    if line is None:
        return "missing" if here else "missing, needs a GPU"
    if "diverged" in line:
        return f"diverged: {line['diverged']}"
    return f"last top-1 {100 * line['last']['test_top1']:.2f} %, {line['seconds']:.0f} s"


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
    places = (Path(__file__).resolve().parent.parent, Path.cwd())
    checkout = next((place for place in places if (place / "benchmarks" / "harness.py").exists()), None)
    if checkout is None:
        from dlb_fast import __version__

        raise ValueError(
            "bench: the benchmarks are part of the source, not of an installed package; run this command in a checkout "
            f"of version {__version__}, where it measures the installed package"
        )
    # --out is relative to the caller's folder, so that folder stays and the checkout is made importable.
    script = [str(checkout / part) if part.endswith(".py") else part for part in scripts[name]]
    # The package that runs now comes first: in a foreign checkout it is the installed one.
    path = os.pathsep.join([str(places[0]), str(checkout), os.environ.get("PYTHONPATH", "")])
    code = subprocess.run([sys.executable, *script, *rest], env={**os.environ, "PYTHONPATH": path}).returncode
    return code if code in (0, 2, 130) else 1  # a benchmark that dies of a signal has a negative one


if __name__ == "__main__":
    sys.exit(main())
