"""Pages: lists of sections, which `page.html.jinja` lays out as one HTML file that loads nothing.

A section is a heading and parts (kind, value), which the template knows and, over several runs, `_markdown`.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlb_fast.presets import PRESETS, load_preset, preset_file
from dlb_fast.train.checkpoint import write_atomically
from dlb_fast.train.config import METHOD_FIELDS, RunConfig, to_dict
from dlb_fast.train.methods import resolve

from .pictures import MOST_BANDS, PANELS, curves_figure, noise_figure, panel, reliability_figure, save_png, style, svg
from .runs import Confusion, Run, flat, groups_of, plain
from .tables import Table, compare_table, evaluations_table, noise_table, number, paired_table

__all__ = ["render", "write_noise_report", "write_page", "write_report"]

Part = tuple[str, Any]
Section = tuple[str, list[Part]]


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> Path:
    data = text.encode(errors="backslashreplace")  # a file name may hold bytes that are no text
    write_atomically(path, lambda file: file.write(data), "then make it with dlb-fast report")
    return path


def _markdown(title: str, sections: Sequence[Section]) -> str:
    """The sections as Markdown; a figure is a link to its picture."""
    known: dict[str, Callable[[Any], str]] = {
        "note": lambda text: text,
        "list": lambda lines: "\n".join(f"- {line}" for line in lines),
        "table": str,
        "commands": lambda commands: "\n\n".join(f"{what}: `{command}`" for what, command in commands),
        "picture": lambda picture: f"![{picture['alt']}]({picture['name']})",
    }
    blocks = [f"# {title}"]
    for heading, parts in sections:
        blocks += [f"## {heading}"] * bool(heading) + [known[kind](value) for kind, value in parts]
    return "\n\n".join(blocks) + "\n"


EXPLANATION = """\
Mean ± sample standard deviation over seeds. Last is the end of training; best picks the evaluation by the test set
itself and is therefore optimistic, as in the official code. Forwards of teachers (MrKD's copies) are not counted as
images; their time is. Seconds are the training time of one run, on a machine that may have run others beside it; peak
is the memory of the process (CPU) or of the device (GPU)."""
EQUAL = """\
All methods make the same number of optimiser steps on the same number of rows; DLB and its alpha=0 control start with
one half batch less."""
BANDS = (
    f"Curves are means over seeds. A band is one standard deviation; with more than {MOST_BANDS} methods there is none."
)


def _numbers(runs: Sequence[Run]) -> list[str]:
    """A line per method: the numbers of its loss."""
    lines = []
    for label, group in groups_of(runs).items():
        loss = to_dict(group[0].config)["loss"]
        lines.append(f"{label}: " + ", ".join(f"{k} {v}" for k, v in loss.items() if v is not None and k != "impl"))
    return lines


def _versions(run: Run) -> str:
    return "Versions: " + ", ".join(f"{k} {v}" for k, v in run.versions.items() if v is not None)


def _setting(runs: Sequence[Run]) -> list[str]:
    """What all runs have in common, a line for each fact."""

    def facts(run: Run) -> list[str]:
        data, train = run.config.data, run.config.train
        return [
            f"data {data.source}"
            + (f", {data.per_class} training images per class" if data.per_class else "")
            + (f", {_noise(run)}" if data.noisy else ""),
            f"{number(run.last('test_count'), ',.0f')} test images (never noisy)",
            f"model {run.config.model.model}",
            f"{data.batch_size} rows per step, forward {train.forward}",
        ]

    return [lines[0] for lines in zip(*map(facts, runs), strict=True) if len(set(lines)) == 1]


def _noise(run: Run) -> str:
    """The real share of wrong labels and where they are from."""
    data, wrong = run.config.data, run.versions.get("wrong_labels", run.config.data.label_noise)
    of = f"labels of {data.label_file}" if data.label_file else f"{data.noise_kind} noise {data.label_noise:g}"
    return f"{100 * wrong:.0f} % of the training labels wrong ({of})"


def _caveat(config: RunConfig) -> str:
    scarce = ["few images"] * bool(config.data.per_class) + ["wrong labels"] * config.data.noisy
    if not scarce:
        return "this says nothing about others."
    return f"{' and '.join(scarce)} favour every method that smooths targets; the gap is no promise for other settings."


def _differences(runs: Sequence[Run], against: str) -> list[Part]:
    paired = paired_table(runs, against)
    return [("table", paired)] if paired else []


def write_report(folder: Path, runs: Sequence[Run], *, title: str, command: str, against: str = "DLB") -> Path:
    """Write `curves.png`, `report.md` and, over several runs, `report.html` into a folder; returns the Markdown's path.

    Raises:
        ValueError: no run, or the folder of a run for a report over several: its page has the same name.
    """
    if not runs:
        raise ValueError("report: there is no run to report on")
    if len(runs) > 1 and (folder / "config.yaml").exists():
        raise ValueError(f"report: {folder} is the folder of a run; name another one for a report over several: --out")
    config, one_setting = runs[0].config, len({run.config.data.source for run in runs}) == 1
    equal = len(runs) > 1 and len({(run.last("step"), run.config.data.batch_size) for run in runs}) == 1
    sections: list[Section] = [
        ("", [("list", [*_setting(runs), *_numbers(runs)]), ("table", compare_table(runs)), ("note", EXPLANATION)]),
        ("", [("note", EQUAL)] * equal),
        ("", _differences(runs, against)),
        ("", [("note", f"One data set, one network: {_caveat(config)}")] * one_setting),
        ("Curves", [("picture", _curves(runs, folder)), ("note", BANDS)]),
        ("Made with", [("commands", [("Command", command)]), ("note", _versions(runs[0]))]),
    ]
    return _write_pages(folder, title, sections, page=len(runs) > 1)


def _write_pages(folder: Path, title: str, sections: Sequence[Section], page: bool = True) -> Path:
    if page:
        _write(folder / "report.html", _html(title, sections))
    return _write(folder / "report.md", _markdown(title, sections))


def _html(title: str, sections: Sequence[Section], about: str = "", cards: Sequence[tuple[str, str]] = ()) -> str:
    return _template().render(title=title, about=about, cards=cards, sections=sections)


@style()
def _curves(runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    figure = curves_figure(runs)
    save_png(figure, folder / "curves.png")
    return {"name": "curves.png", "alt": "curves", "svg": svg(figure, "Curves of the runs")}


@style()
def write_noise_report(root: Path, found: Mapping[float, Sequence[Run]], *, title: str, command: str) -> Path:
    """Write `noise.png`, `report.md` and `report.html` over comparisons at several shares of wrong labels.

    Returns the path of the Markdown.
    """
    figure = noise_figure(found)
    save_png(figure, root / "noise.png")
    picture = {"name": "noise.png", "alt": "accuracy over noise", "svg": svg(figure, "Accuracy over wrong labels")}
    sections: list[Section] = [("", [("table", noise_table(found)), ("picture", picture)])]
    for share, runs in found.items():
        parts = [("table", compare_table(runs)), *_differences(runs, "DLB")]
        sections.append((f"{100 * share:g} % wrong labels", parts))
    first = found[next(iter(found))]
    note = "One small data set and one small network: no promise for others. Test labels are never wrong."
    sections.append(("What ran", [("list", _numbers(first)), ("note", note)]))
    sections.append(("Made with", [("commands", [("Command", command)]), ("note", _versions(first[0]))]))
    return _write_pages(root, title, sections)


# The page of one run

MATRIX_CLASSES = 20  # a matrix of more classes is wider than a page
LISTED_CLASSES = 100  # of more classes, the worst are listed
WORST = 20


def write_page(run: Run, folder: Path | None = None) -> Path:
    """Write `report.html` into the run's folder or another: one file that loads nothing; returns its path."""
    return _write((folder or run.path) / "report.html", render(run))


@style()
def render(run: Run) -> str:
    """The page of a run as HTML; every text is escaped."""
    config = run.config
    title = f"{run.path.resolve().name}: {config.loss.method}, {config.model.model} on {config.data.source}"
    figures = [svg(figure, name) for name in PANELS if (figure := panel(run, name))]
    nothing = ("note", "There is nothing to draw yet.")
    sections: list[Section] = [
        ("Curves", [("figures", figures) if figures else nothing, *_not_finite(run)]),
        ("Classes", _classes(run.confusion)),
        ("Calibration", _calibration(run)),
        ("Evaluations", [("table", evaluations_table(run.rows)) if run.rows else ("note", "There is none yet.")]),
        ("Configuration", _configuration(config)),
        ("Made with", [("tables", [("", _pairs({k: v for k, v in run.versions.items() if v is not None}))])]),
        ("Go on", [("commands", _commands(run.path))]),
    ]
    return _html(title, sections, _about(run), _headline(run))


def _about(run: Run) -> str:
    if not run.rows:
        last = f"step {run.steps[-1]['step']:,.0f}" if run.steps else "its start"
        return f"Not finished: there is no evaluation yet; this is the run at {last}. Seed {run.seed}."
    step = number(run.last("step"), ",.0f")
    if run.result.get("step") != run.last("step"):  # it may have finished once and be training longer now
        return f"Not finished: this is the run at its evaluation at step {step}. Seed {run.seed}."
    seen = number(run.last("images_seen"), ",.0f")
    return f"Finished after {step} steps, {seen} images through the network. Seed {run.seed}."


def _headline(run: Run) -> list[tuple[str, str]]:
    cards: list[tuple[str, float, str]] = [
        ("test top-1", 100 * run.last("test_top1"), "{:.2f} %"),
        ("best, by the test set", 100 * run.best(), "{:.2f} %"),
        ("test top-5", 100 * run.last("test_top5"), "{:.2f} %"),
        ("test NLL", run.last("test_nll"), "{:.4f}"),
        ("calibration error", 100 * run.last("test_ece"), "{:.2f} %"),
        ("test images", run.last("test_count"), "{:,.0f}"),
        ("training seconds", run.last("seconds"), "{:,.1f}"),
        ("images per second", run.last("images_per_second"), "{:,.0f}"),
        ("waiting for data", 100 * run.last("data_wait"), "{:.1f} %"),
        ("peak memory", run.peak_mib, "{:,.0f} MiB"),
    ]
    return [(label, form.format(value)) for label, value, form in cards if not math.isnan(value)]


def _not_finite(run: Run) -> list[Part]:
    bad = [row["step"] for row in run.steps if row.get("loss", 0.0) is None]
    if not bad:
        return []
    return [("note", f"The loss was NaN or infinite at {len(bad)} of {len(run.steps)} steps logged, first {bad[0]:,}.")]


def _classes(confusion: Confusion | None) -> list[Part]:
    """Accuracy per class and the confusion matrix; of many classes, the worst and the pairs confused most."""
    if confusion is None:
        return [("note", "The run has recorded no counts per class at its last evaluation.")]
    names, images = confusion.classes, confusion.images
    mistakes = confusion.mistakes()
    shown = list(range(len(names)))
    if many := len(names) > LISTED_CLASSES:
        tested = [i for i in shown if images[i]]
        shown = sorted(tested, key=lambda i: (confusion.accuracy(i), i))[:WORST]
    first_mistake = {target: (predicted, count) for target, predicted, count in reversed(mistakes)}
    rows = []
    for i in shown:
        other, count = first_mistake.get(i, (None, 0))
        precision = confusion.pairs.get((i, i), 0) / confusion.predicted[i] if confusion.predicted[i] else math.nan
        figures = [number(confusion.accuracy(i), ".1f", 100), number(precision, ".1f", 100)]
        rows.append([names[i], f"{images[i]:,}", *figures, "" if other is None else names[other], f"{count:,}"])
    head = ["class", "images", "accuracy %", "precision %", "most often taken for", "times"]
    missing = [names[i] for i in range(len(names)) if not images[i]]
    note = f"{len(names):,} classes, {sum(images.values()):,} test images, last evaluation."
    if missing:
        note += f" Without a test image: {', '.join(missing[:WORST])}{', ...' * (len(missing) > WORST)}."
    note += f" The {len(shown)} of least accuracy:" * many
    parts: list[Part] = [("note", note), ("table", Table(head, rows, text=(0, 4)))]
    if len(names) <= MATRIX_CLASSES:
        return [*parts, ("matrix", _matrix(confusion))]
    pairs = [
        [names[target], names[predicted], f"{count:,}", f"{100 * count / images[target]:.1f}"]
        for target, predicted, count in mistakes[:WORST]
    ]
    return [
        *parts,
        ("note", f"The pairs confused most, {len(pairs)} of {len(mistakes):,}:"),
        ("table", Table(["class", "taken for", "images", "of the class %"], pairs, text=(0, 1))),
    ]


def _matrix(confusion: Confusion) -> dict[str, Any]:
    """Counts with a shade from 0 to 100: the share of the class's images, as a root, so that 1 % is visible."""
    rows = []
    for target, name in enumerate(confusion.classes):
        total = max(1, confusion.images[target])
        counts = [confusion.pairs.get((target, predicted), 0) for predicted in range(len(confusion.classes))]
        cells = [(f"{n:,}" if n else "", round(100 * math.sqrt(n / total)), i == target) for i, n in enumerate(counts)]
        rows.append((name, cells))
    return {"names": confusion.classes, "rows": rows}


def _calibration(run: Run) -> list[Part]:
    """The reliability diagram of the last evaluation, and its bins as a table."""
    bins = run.calibration
    if bins is None:
        return [("note", "The run has stored no reliability bins.")]
    width = 100 / len(bins["share"])
    rows = [
        [f"{i * width:.1f} - {(i + 1) * width:.1f}", *(f"{100 * value:.1f}" for value in values)]
        for i, values in enumerate(zip(bins["share"], bins["accuracy"], bins["confidence"], strict=True))
        if values[0]
    ]
    note = (
        "A bar is the accuracy of the images in a bin of confidence, darker where there are more; the cross is at "
        "their mean confidence. Below the dashed line the model is surer than it is right. The calibration error (ECE) "
        "is the mean distance to that line, weighted by the images in a bin."
    )
    table = Table(["confidence %", "images %", "accuracy %", "mean confidence %"], rows, text=())
    return [("figures", [svg(reliability_figure(bins), "Reliability diagram"), table]), ("note", note)]


def _configuration(config: RunConfig) -> list[Part]:
    """What differs from a recipe first; all settings folded."""
    name, base = _recipe(config)
    mine, theirs = flat(config), flat(base)
    rows = [[n, plain(mine[n]), plain(theirs[n])] for n in mine if mine[n] != theirs[n]]
    changed: Part = ("table", Table(["setting", "here", name], rows, text=(0, 1, 2)))
    if not rows:
        changed = ("note", f"Every setting is that of {name}.")
    groups = []
    for group, values in to_dict(config).items():
        kept = {k: v for k, v in values.items() if v is not None or k not in METHOD_FIELDS}  # not other methods' own
        groups.append((group, _pairs(kept)))
    return [changed, ("fold", ("All settings", [("tables", groups)]))]


def _recipe(config: RunConfig) -> tuple[str, RunConfig]:
    """The preset, or the trainer's defaults, from which the config differs in the fewest settings."""
    mine = flat(config)

    def apart(values: Mapping[str, Any]) -> int:
        return sum(plain(values.get(name)) != plain(value) for name, value in mine.items())

    name = min(PRESETS, key=lambda preset: apart(_preset_values(preset)))
    found = {f"the preset {name}": _resolved(name), "the trainer's defaults": _resolved(None)}
    return min(found.items(), key=lambda item: apart(flat(item[1])))


@functools.cache
def _resolved(preset: str | None) -> RunConfig:
    return resolve(RunConfig() if preset is None else load_preset(preset))


@functools.cache
def _preset_values(name: str) -> dict[str, Any]:
    """The settings of a preset as its file has them; to load all presets takes seconds."""
    import yaml

    groups = yaml.safe_load(preset_file(name).read_text(encoding="utf-8"))
    return flat(RunConfig()) | {name: value for values in groups.values() for name, value in values.items()}


def _pairs(values: Mapping[str, Any]) -> Table:
    return Table((), [[str(k), plain(v)] for k, v in values.items()], text=(0, 1))


def _commands(path: Path) -> list[tuple[str, str]]:
    run = shlex.quote(str(path))
    return [
        ("Go on, or train longer with --epochs N", f"dlb-fast train --resume --out {run}"),
        ("The scores again, or on other data with --data", f"dlb-fast eval {run} --weights best"),
        ("Side by side", f"dlb-fast report {run} OTHER_RUN --out FOLDER"),
    ]
