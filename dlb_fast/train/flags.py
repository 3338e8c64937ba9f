"""The flags of the command line: their names, their help, and what a wrong one may have meant."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from .config import METHOD_FIELDS, RunConfig, override, parse
from .methods import METHODS, find, resolve

__all__ = ["TrainArgs", "parse_flags"]


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train a network. Flags override --config, which overrides --preset; without both it is the recipe digits, or with
    --data the trainer's defaults. The run folder gets the resolved config, metrics, versions and checkpoints."""

    preset: str | None = None
    """Recipe by name; `dlb-fast presets` lists them."""
    config: Path | None = None
    """YAML config, on top of the preset if both are given."""
    out: Path | None = None
    """Run folder. None: a new one under runs/."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out, or without it the newest run under runs/."""
    smoke: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Try the config in seconds: four small steps, evaluation, checkpoint and resume, on synthetic images, or with
    --data on a few images of these. Keeps nothing."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """No progress on the console; warnings remain."""
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


def parse_flags(
    form: type[Any], default: Any, flags: Sequence[str], prog: str, *, also: Mapping[str, str] | None = None
) -> Any:
    """A dataclass from `--field value` flags on top of `default`; `--help` lists them by group.

    `also`: further options of the command, which may be meant by a wrong one -> why one has no effect there, or "".

    Raises:
        SystemExit: with 2 after one sentence on stderr for a wrong flag, with 0 after `--help`.
    """
    flags = _as_written(flags)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--optimizer", nargs="?")
    chosen = early.parse_known_args(flags)[0].optimizer
    if chosen is not None:  # it decides what the other numbers of the optimiser are
        if isinstance(default, RunConfig):
            default = override(default, optimizer=chosen)
        else:
            default = dataclasses.replace(default, run=override(default.run, optimizer=chosen))
    asked = [flag for flag in flags if flag not in ("-h", "--help")]
    try:
        _check_names(asked, form, also or {})
        made = parse(form, default, asked, prog, "OmitArgPrefixes")
        if len(asked) == len(flags):
            return made
        print(_help_page(made, prog))
        raise SystemExit(0)
    except ValueError as error:
        print(f"{prog}: {error} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2) from None


class Flag(NamedTuple):
    """A field of a config as a flag."""

    field: str
    kind: Any
    text: str  # what it is
    has_no: bool  # whether there is --no-NAME too

    @property
    def name(self) -> str:
        """The flag without its dashes."""
        return "data" if self.field == "source" else self.field.replace("_", "-")


def _flags_of(form: type[Any]) -> list[Flag]:
    """The flags of one dataclass."""
    kinds, texts, found = typing.get_type_hints(form), _field_texts(form), []
    for field in dataclasses.fields(form):
        kind = kinds[field.name]
        has_no = kind in (bool, bool | None) and form is not TrainArgs
        found.append(Flag(field.name, kind, texts.get(field.name, ""), has_no))
    return [flag for flag in found if flag.field != "run"]


def _groups() -> dict[str, type[Any]]:
    """Name of a group of a config -> its class."""
    kinds = typing.get_type_hints(RunConfig)
    return {field.name: kinds[field.name] for field in dataclasses.fields(RunConfig)}


def _known(form: type[Any]) -> dict[str, Flag]:
    """The flags of a command by name."""
    forms: list[type[Any]] = [] if form is RunConfig else [TrainArgs]
    return {flag.name: flag for one in [*forms, *_groups().values()] for flag in _flags_of(one)}


def _as_written(flags: Sequence[str]) -> list[str]:
    """`--swap` and `--no-swap` as `--swap=True` and `--swap=False`, where tyro expects a value."""
    optional = {name for name, flag in _known(RunConfig).items() if flag.kind == bool | None}
    found = []
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        name = flag[2:].replace("_", "-") if flag.startswith("--") else ""
        if name.removeprefix("no-") in optional and name.startswith("no-"):
            flag = f"--{name[3:]}=False"
        elif name in optional and following not in ("True", "False", "None"):
            flag = f"--{name}=True"
        found.append(flag)
    return found


def _check_names(flags: Sequence[str], form: type[Any], also: Mapping[str, str]) -> None:
    """Refuse an unknown flag, with the nearest known one or the one whose text has its words."""
    known = _known(form)
    names = [*known, *(f"no-{name}" for name, flag in known.items() if flag.has_no)]
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("_", "-")
        if not flag.startswith("--") or not name:
            continue
        if also.get(name):
            raise ValueError(f"{flag.partition('=')[0]} has no effect here: {also[name]}")
        if name not in names:
            words = re.compile(rf"\b{re.escape(name.replace('-', ' '))}\b")
            near = difflib.get_close_matches(name, [*names, *also], n=1)
            near = near or [other for other, of in known.items() if words.search(of.text.lower())][:1]
            raise ValueError(f"unknown option {flag.partition('=')[0]}{f'; did you mean --{near[0]}?' if near else ''}")


def _help_page(made: Any, prog: str) -> str:
    """The options of `TrainArgs` or `RunConfig` by group; in brackets the values that a config has, resolved."""
    config = made if isinstance(made, RunConfig) else made.run
    with contextlib.suppress(ValueError):
        config = resolve(config)
    width = min(100, shutil.get_terminal_size().columns)
    page = [f"usage: {prog} [--preset NAME] [--data KIND[:PATH]] [--out FOLDER] [options]"]
    if config is not made:
        page += textwrap.wrap(" ".join((type(made).__doc__ or "").split()), width)
    page += ["", "In brackets: the value that this command line would use (--preset NAME --help: that recipe's)."]
    if config is not made:
        page += ["", "run", *_lines_of(made, width)]
    own = find(config.loss.method).options
    others = [name for name in METHOD_FIELDS if name not in own]
    for name in _groups():
        part = getattr(config, name)
        about = " ".join((type(part).__doc__ or "").split())
        page += ["", *textwrap.wrap(f"{name}: {about}", width)]
        page += _lines_of(part, width, others)
        if name == "loss":
            theirs = {m.name: [n for n in m.options if n in others] for m in METHODS.values()}
            dashed = {m: ", ".join(f"--{n.replace('_', '-')}" for n in names) for m, names in theirs.items() if names}
            listed = "; ".join(f"{m}: {flags}" for m, flags in dashed.items())
            text = f"Options of other methods (--method NAME --help explains them): {listed}."
            page += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(page)


def _lines_of(part: Any, width: int, leave_out: Sequence[str] = ()) -> list[str]:
    """One entry per field: the flag with what it takes, what it is, and its value."""
    lines: list[str] = []
    for one in _flags_of(type(part)):
        if one.field in leave_out:
            continue
        text = one.text or find(part.method).options[one.field].help
        flag = f"--{one.name}, --no-{one.name}" if one.has_no else f"--{one.name}"
        shown = "" if one.kind is bool and not one.has_no else f" [{_shown(getattr(part, one.field))}]"
        head = f"  {flag} {_taken(one.kind)}".rstrip()
        body = textwrap.wrap(text + shown, width - 28, break_on_hyphens=False)
        if len(head) > 26:
            lines.append(head)
            head = ""
        lines += [f"{start:<28}{line}" for start, line in zip([head] + [""] * len(body), body, strict=False)]
        if one.field == "method":
            lines += [f"{'':<28}  {m.name:<10} {m.about}" for m in METHODS.values()]
            lines.append(f"{'':<28}  MODULE:CLASS a DistillationLoss of your own")
    return lines


def _taken(kind: Any) -> str:
    """What a flag takes, such as INT, {a,b} or FLOAT ..."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if typing.get_origin(kind) is tuple:
        return f"{_taken(arguments[0])} ..." if arguments[-1] is Ellipsis else " ".join(map(_taken, arguments))
    if arguments:  # a union with None
        return _taken(next(a for a in arguments if a is not type(None)))
    return {bool: "", int: "INT", float: "FLOAT", str: "TEXT"}.get(kind, "PATH")


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _field_texts(form: type[Any]) -> dict[str, str]:
    """Field -> the string below it in the source of a dataclass or its bases."""
    found: dict[str, str] = {}
    for one in reversed(form.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):  # made at run time: no source
            body = ast.parse(inspect.getsource(one)).body[0].body  # type: ignore[attr-defined]
            for entry, following in zip(body, [*body[1:], None], strict=True):
                if isinstance(entry, ast.AnnAssign) and isinstance(following, ast.Expr):
                    found[ast.unparse(entry.target)] = " ".join(ast.literal_eval(following.value).split())
    return found
