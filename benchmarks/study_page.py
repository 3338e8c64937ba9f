"""The page of a study, made from the summary lines of its runs; every statement follows from an interval.

    python -m benchmarks.study_page benchmarks/results/cifar10-cpu.jsonl --out docs/study.md

writes the page and its picture beside it. `python -m benchmarks.tables` writes the few lines that the README shows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlb_fast.presets import load_preset
from dlb_fast.report.pictures import COLORS, style
from dlb_fast.report.tables import spread
from dlb_fast.train.compare import read_results
from dlb_fast.train.protocol import load_protocol

from .plots import FILE
from .tables import ROOT, Record, table, wrapped

PROTOCOL = ROOT / "benchmarks" / "protocol-cifar10.yaml"
DATA = "CIFAR-10 (JPEG)"
OURS, CONTROL, BASE = "dlb", "two_view", "ce"
MARKERS = "os^DvPX*<>ph8"  # with as many colours as COLORS has, a look of its own for each of 91 methods


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t interval, infinite of one seed."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def interval(values: Sequence[float]) -> Interval:
    """`mean ± t(0.975, n - 1) * s / sqrt(n)`, with the sample standard deviation s."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, tuple(values))


def last(line: Record) -> float:
    """Test top-1 at the end in %."""
    return 100 * line["last"]["test_top1"]


def of(lines: Sequence[Record], **where: Any) -> list[Record]:
    """The finished runs with these entries, by seed."""
    found = [one for one in lines if all(one.get(k) == v for k, v in where.items()) and "diverged" not in one]
    return sorted(found, key=lambda line: line["seed"])


def difference(ours: Sequence[Record], theirs: Sequence[Record]) -> Interval | None:
    """Of the seeds that both have, last top-1 of ours minus theirs in points; None without such a seed."""
    other = {line["seed"]: last(line) for line in theirs}
    found = [last(line) - other[line["seed"]] for line in ours if line["seed"] in other]
    return interval(found) if found else None


def equal(found: Interval) -> bool:
    """Whether the values are equal, so that their spread, and with it an interval, is not known."""
    return max(found.values) - min(found.values) < 1e-6


def shown(found: Interval | None) -> str:
    """`+1.20 [0.30, 2.10]`, without an interval where it is not known."""
    if found is None:
        return "-"
    return f"{found.mean:+.2f}" + ("" if equal(found) else f" [{found.low:.2f}, {found.high:.2f}]")


def higher(found: Interval | None) -> bool:
    """Whether the interval is above 0."""
    return found is not None and not equal(found) and found.low > 0


def verdict(found: Interval) -> str:
    """What an interval of differences says, in words."""
    n, above = len(found.values), sum(value > 1e-6 for value in found.values)
    if n == 1:
        return f"{found.mean:+.2f} points on the one seed there is, which says nothing about others"
    if equal(found):
        return f"{found.mean:+.2f} points on each of {n} seeds: without a spread there is no interval"
    span = f"95 % interval {found.low:.2f} to {found.high:.2f}"
    told = f"{found.mean:+.2f} points ({span}), above 0 on {above} of {n} seeds"
    if found.low > 0:
        return f"{told}: higher, the interval excludes 0"
    if found.high < 0:
        return f"{told}: lower, the interval excludes 0"
    return f"{told}: the interval includes 0, so no difference is shown"


def named(lines: Sequence[Record], noise: str) -> str:
    """`symmetric-0.4 (40.0 % wrong)`: a noise with the real share of wrong labels."""
    shares = [100 * line["wrong_labels"] for line in of(lines, noise=noise)]
    if not shares:  # all diverged
        return noise
    return f"{noise} ({' to '.join(dict.fromkeys(f'{share:.1f}' for share in (min(shares), max(shares))))} % wrong)"


def diverged(lines: Sequence[Record], noise: str, method: str) -> list[int]:
    """The seeds with which a method diverged."""
    where = (noise, method)
    return sorted(line["seed"] for line in lines if "diverged" in line and (line["noise"], line["method"]) == where)


def once(lines: Sequence[Record], kind: str, key: str = "cell") -> list[Record]:
    """The lines of a kind, of equal keys the last one: files of several machines may have been joined."""
    return list({line[key]: line for line in lines if line["kind"] == kind}.values())


def runs_of(results: Path) -> list[Record]:
    """The runs of a summary file.

    Raises:
        ValueError: no run is in the file.
    """
    if not (found := once(read_results(results), "run")):
        raise ValueError(f"study_page: {results} holds no run")
    return found


def ordered(lines: Sequence[Record], name: str) -> list[str]:
    """The entries of one name in the order of the lines."""
    return list(dict.fromkeys(line[name] for line in lines))


# Tables


def results_table(lines: Sequence[Record]) -> str:
    """A row per noise and method of one network."""
    rows = []
    for noise in ordered(lines, "noise"):
        for method in ordered(lines, "method"):
            runs = of(lines, noise=noise, method=method)
            lost = len(diverged(lines, noise, method))
            label = _label(lines, method)
            n = f"{len(runs)}" + (f" ({lost} diverged)" if lost else "")
            if not runs:
                if lost:
                    rows.append([noise, label, n, *["-"] * 7])
                continue
            against = [
                "-" if method in (other, BASE) else shown(difference(runs, of(lines, noise=noise, method=other)))
                for other in (CONTROL, BASE)
            ]
            measured = [
                spread([last(r) for r in runs]),
                spread([r["best"]["test_top1"] for r in runs], 100),
                spread([r["last"]["test_nll"] for r in runs], form=".3f"),
                spread([r["last"]["test_ece"] for r in runs], 100, ".1f"),
                f"{statistics.median(r['seconds'] for r in runs):.0f}",
            ]
            rows.append([noise, label, n, *measured, *against])
    heads = ("noise", "method", "seeds", "last top-1 %", "best top-1 %", "NLL", "ECE %", "seconds")
    return table([*heads, f"minus {_label(lines, CONTROL)}", f"minus {_label(lines, BASE)}"], rows, right=True)


def _label(lines: Sequence[Record], method: str) -> str:
    return next((line["label"] for line in lines if line.get("method") == method and "label" in line), method)


def ablation_table(lines: Sequence[Record], runs: Sequence[Record]) -> str:
    """The variants of DLB, each with its difference to DLB of the same network, noise and seed."""
    rows = []
    for network, noise, method in dict.fromkeys(map(_key, lines)):
        here = [line for line in lines if line["network"] == network]
        found = of(here, noise=noise, method=method)
        lost = len(diverged(here, noise, method))
        n = f"{len(found)}" + (f" ({lost} diverged)" if lost else "")
        values = spread([last(line) for line in found]) if found else "-"
        reference = of(runs, network=network, noise=noise, method=OURS)
        rows.append((noise, _label(here, method), network, n, values, shown(difference(found, reference))))
    return table(
        ("noise", "variant", "network", "seeds", "last top-1 %", f"minus {_label(runs, OURS)}"), rows, right=True
    )


def tuning_table(lines: Sequence[Record], every: Sequence[Record]) -> str:
    """What was tried for every tuned method and what was chosen; `every` has the methods' labels."""
    rows = []
    for line in lines:
        for one in line["tried"]:
            values = ", ".join(
                f"{k} {v:g}" if isinstance(v, (int, float)) else f"{k} {v}"
                for part in one["setting"].values()
                for k, v in part.items()
            )
            score = "diverged" if one["held_out_top1"] is None else f"{100 * one['held_out_top1']:.2f}"
            rows.append(
                (_label(every, line["method"]), values, score, "chosen" if one["setting"] == line["setting"] else "-")
            )
    return table(("method", "setting", "held-out top-1 %", ""), rows, right=True)


# Words


def statements(lines: Sequence[Record]) -> list[str]:
    """A sentence per network, noise and reference: what the interval of DLB's differences says."""
    found = []
    for network in ordered(lines, "network"):
        here = [line for line in lines if line["network"] == network]
        for noise in ordered(here, "noise"):
            ours = of(here, noise=noise, method=OURS)
            for other in (CONTROL, BASE):
                gap = difference(ours, of(here, noise=noise, method=other))
                lost = {m: seeds for m in (OURS, other) if (seeds := diverged(here, noise, m))}
                tried = {line["method"] for line in here if line["noise"] == noise}
                if gap is None and not (lost and {OURS, other} <= tried):
                    continue
                told = f"is {verdict(gap)}" if gap is not None else "has no seed on which both finished"
                told += "".join(
                    f"; {_label(here, m)} diverged with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
                    for m, seeds in lost.items()
                )
                what = f"{_label(here, OURS)} minus {_label(here, other)}"
                found.append(f"{network}, {named(here, noise)}: {what} {told}.")
    return found


def bullets(sentences: Sequence[str]) -> str:
    """A list in lines of at most 120 columns."""
    return "\n".join(wrapped(f"* {one}").replace("\n", "\n  ") for one in sentences)


def best_methods(lines: Sequence[Record]) -> list[str]:
    """Per network and noise: the method with the highest mean, and those that are not shown to be lower."""
    found = []
    for network in ordered(lines, "network"):
        here = [line for line in lines if line["network"] == network]
        for noise in ordered(here, "noise"):
            groups = {m: runs for m in ordered(here, "method") if (runs := of(here, noise=noise, method=m))}
            if len(groups) < 2:
                continue
            means = {m: statistics.fmean(map(last, runs)) for m, runs in groups.items()}
            top = max(means, key=means.__getitem__)  # of equals the first; the others are not shown to be lower
            gaps = {m: difference(groups[top], runs) for m, runs in groups.items() if m != top}
            close = [_label(here, m) for m, gap in gaps.items() if gap is not None and not higher(gap)]
            apart = [_label(here, m) for m, gap in gaps.items() if gap is None]
            told = [f"{_label(here, top)} has the highest mean"]
            told += [f"Not shown to be lower: {'; '.join(close)}"] if close else []  # a label may have a comma
            told += [f"Without a seed in common: {'; '.join(apart)}"] if apart else []
            told += [] if close or apart else ["Its intervals to all others that finished exclude 0"]
            found.append(f"{network}, {named(here, noise)}: {'. '.join(told)}.")
    return found


def missing_runs(lines: Sequence[Record], protocol: Path) -> list[str]:
    """The runs of the protocol that are not in the results, by network."""
    known = {line["cell"] for line in lines}
    study = load_protocol(protocol, load_preset)
    planned = [cell for cell in study.cells() if cell.tried is None]
    found = []
    for network in dict.fromkeys(cell.network for cell in planned):
        cells = [cell for cell in planned if cell.network == network]
        lost = [cell for cell in cells if cell.name not in known]
        methods = dict.fromkeys(cell.method for cell in lost)
        told = [f"{sum(cell.method == method for cell in lost)} of {study.methods[method].label}" for method in methods]
        if lost:
            found.append(f"{network}: " + (f"none of {len(cells)}" if lost == cells else "; ".join(told)))
    return found


def origin(lines: Sequence[Record]) -> str:
    """Where, when and with what the runs were made."""
    made = [line for line in lines if "torch" in line]
    facts = {f"{r['jobs']} at a time, threads each: {r['threads']}, {r['hardware']}, torch {r['torch']}" for r in made}
    commits = sorted({line["commit"] for line in lines if line.get("commit")})
    dates = sorted({line["date"] for line in lines if "date" in line})
    if not made:
        return "none finished."
    return f"{'; '.join(sorted(facts))}; commits {', '.join(commits)}; {dates[0]} to {dates[-1]}."


# Picture


def picture(lines: Sequence[Record], out: Path) -> Path:
    """A row per network: accuracy over the noises with 95 % intervals, and how many wrong labels are learned."""
    import matplotlib
    from matplotlib.figure import Figure

    networks, every = ordered(lines, "network"), ordered(lines, "method")
    looks = {m: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i, m in enumerate(every)}
    with style():
        figure = Figure(figsize=(10, 4.2 * len(networks)), layout="constrained", facecolor="white")
        axes = figure.subplots(len(networks), 2, squeeze=False)
        handles: dict[str, Any] = {}
        for (left, right), network in zip(axes, networks, strict=True):
            here = [line for line in lines if line["network"] == network]
            noises, methods = ordered(here, "noise"), ordered(here, "method")
            for number, method in enumerate(methods):
                groups = [[last(r) for r in of(here, noise=noise, method=method)] for noise in noises]
                found = [(i, interval(values)) for i, values in enumerate(groups) if values]
                x = [i + 0.6 * (number / max(1, len(methods) - 1) - 0.5) for i, _ in found]
                half = [one.high - one.mean if math.isfinite(one.high) else 0.0 for _, one in found]
                means, thin = [one.mean for _, one in found], {"linestyle": "", "elinewidth": 1, "capsize": 2}
                handles.setdefault(_label(lines, method), left.errorbar(x, means, half, **thin, **looks[method]))
            left.set_xticks(range(len(noises)), [named(here, noise).replace(" (", "\n(") for noise in noises])
            left.set(title=f"{network}: last top-1 %")
            wrong = [noise for noise in noises if any(r["wrong_labels"] for r in of(here, noise=noise))]
            for method in methods if wrong else ():
                curves = [
                    [point for point in r["curve"] if "train_wrong_top1" in point]
                    for r in of(here, noise=wrong[0], method=method)
                ]
                points = list(zip(*curves, strict=False))
                x = [point[0]["epoch"] for point in points]
                y = [100 * statistics.fmean(one["train_wrong_top1"] for one in point) for point in points]
                right.plot(x, y, linestyle="-", markevery=max(1, len(x) // 8), **looks[method])
            right.set_title(f"{network}, {wrong[0] if wrong else 'no noise'}: wrong labels learned, %")
            right.set_xlabel("images seen / training images")
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
        matplotlib.rcParams.update(FILE)
        figure.savefig(out, metadata={"Date": None, "Description": f"from {len(lines)} runs"})
    return out


# Pages

HOW = """\
All runs of a network make the same optimiser steps on the same number of rows; DLB and its control start with half a
batch less. DLB, alone and with mixup, its control, DDGSD and R-Drop show every image twice in a row (DDGSD and
R-Drop in one batch) and so make half as many passes over the images as the other methods, which alone changes how
many wrong labels are learned. So only of DLB is the difference to the control what its term of the loss does. A seed
draws the weights, the order, the augmentation and, where they are drawn, the training images and the wrong labels.
All methods start from the same weights and train on the same images and labels, so differences are paired by seed.
Test labels are never wrong. "Wrong labels learned" is, of the images with a wrong label among 2000 training images
without augmentation, the share for which the network predicts it."""
MIRRORED = """\
On {networks} images are mirrored at random and not shifted, so about half of the second views have the pixels of the
first."""
LAGS = """\
Variants of DLB, all with its chosen setting and its order of images. The teacher of a repeated image is what the
network said of it one step before (DLB, lag 1), two steps before (lag 2), or in the same step of another view of it
(lag 0: one direction of DDGSD, with DLB's setting). "The same view twice" repeats the pixels, too. The new halves
alone are the same steps with half the rows: no image twice in a row and no teacher."""
TUNED = """\
The program chose the setting with the highest last top-1 on a tenth of the training set, which was held out with its
wrong labels; a run per setting, with a seed that the study does not have. The setting is used on all networks and
noises. Methods without a row have none of their own."""
ROUGH = """\
The runs are of {network} with {noise}; for other noises and networks another setting may be better. {wrong:.0f} % of
the labels are wrong, so right answers would score about {right:.0f} %. {n} images give a score a standard error of
up to {points:.1f} points, and the seed adds to it, so near ones may change places."""
NOT = """\
It does not show what another network, data set, image size, learning rate or a longer training would give. The
learning rate, the weight decay and the schedule are one recipe for all methods of a network; no method's own was
looked for. {wide} "Best" picks the evaluation by the test set and is optimistic; "last" is what a user has. The
images are JPEG copies, whose pixels differ a little from those of the data set, so no figure compares with published
ones to a tenth of a point."""
WIDE = """\
With few seeds a 95 % interval is wide ({n} seeds: {t:.2f} standard errors to either side), so a difference that is
not shown may be there. It is over seeds alone: all runs have the same test images, and the same labels where people
gave them. Where there is no difference, one interval in twenty excludes 0 by chance, and the tables have {count}.
The method with the highest mean was picked because it is high, so its intervals exclude 0 by chance more often than
that."""
BARS = """\
Left: the bars are 95 % intervals of each method's mean. The sentences and tables have intervals of differences
paired by seed, so methods may be shown to differ though their bars overlap. Right: means over the seeds."""
ONE = "One seed gives no interval, so no difference is shown."
SHORT = """\
Generated from the runs. A difference is called higher or lower only where its 95 % interval excludes 0. The control,
"{control}", has the batches of {ours} without its term of the loss: {ours} minus the control is what the term does,
{ours} minus {base} also what it does to see images twice in a row in half as many passes."""
BEST = "The method with the highest mean of last top-1, and those that are not shown to be lower:"


def page(results: Path, protocol: Path, svg: str) -> str:
    """The page as Markdown.

    Raises:
        ValueError: no run is in the results.
    """
    every, lines = read_results(results), runs_of(results)
    from scipy.stats import t

    said, best = statements(lines), best_methods(lines)
    short = SHORT.format(
        **{name: _label(lines, m) for name, m in (("ours", OURS), ("control", CONTROL), ("base", BASE))}
    )
    n = max(len(of(lines, network=a, noise=b, method=c)) for a, b, c in {_key(line) for line in lines})
    blocks = [f"# A study on {DATA}", short if said or best else "", bullets(said)]
    blocks += [
        BEST if best else "",
        bullets(best),
        f"![Accuracy over the noises, and wrong labels learned]({svg})",
        BARS,
    ]
    for network in ordered(lines, "network"):
        blocks += [f"## {network}", results_table([line for line in lines if line["network"] == network])]
    blocks.append(
        "Mean ± sample standard deviation over seeds, on the test set: last top-1, NLL (mean negative log-likelihood) "
        "and ECE (expected calibration error) at the end of the training, best top-1 of all evaluations. Seconds are "
        "the median time of a run, in which pauses and other work on the machine count. The last columns are "
        "differences of last top-1 in points, paired by seed, with 95 % t intervals, except of one seed or equal "
        "values."
    )
    ablations = once(every, "ablation")
    if ablations:
        blocks += ["## The age of the teacher and the second visit", LAGS, ablation_table(ablations, lines)]
    if chosen := once(every, "chosen", "method"):
        finished = [line for line in once(every, "tuning") if "diverged" not in line]
        rough = dict.fromkeys(
            ROUGH.format(
                network=line["network"],
                noise=line["noise"],
                wrong=100 * line["wrong_labels"],
                right=100 - 100 * line["wrong_labels"],
                n=line["test_images"],
                points=50 / math.sqrt(line["test_images"]),
            )
            for line in finished
        )
        blocks += ["## Settings", " ".join([TUNED, *rough]), tuning_table(chosen, every)]
    still = ordered([line for line in lines if line.get("config", {}).get("padding") == 0], "network")
    mirrored = [MIRRORED.format(networks=" and ".join(still))] if still else []
    blocks += ["## How it was made", " ".join([HOW, *mirrored])]
    wide, count = ONE, sum(block.count(" [") for block in blocks if block.startswith("|"))
    if n > 1:
        wide = WIDE.format(n=n, t=t.ppf(0.975, n - 1), count=count)
    blocks += ["## What it does not show", NOT.format(wide=wide)]
    if lost := missing_runs(lines, protocol):
        blocks += ["Runs of the protocol that were not made:", bullets(lost)]
    where = protocol.relative_to(ROOT) if protocol.is_relative_to(ROOT) else protocol.name
    name = results.relative_to(ROOT) if results.is_relative_to(ROOT) else results.name
    first = next((line["cell"] for line in lines if line["method"] == OURS), lines[0]["cell"])
    command = f"dlb-fast compare --protocol {where} --data DATA --labels LABELS --out OUT"
    blocks += [
        "## Again",
        f"```bash\n{command}\n{command} --tuned {name} --only {first}   # one run\n"
        f"python -m benchmarks.study_page OUT/results.jsonl --out docs/study.md\n```",
        f"`{where}` says where the data and the labels come from. The runs: {origin([*lines, *ablations])}",
    ]
    made = [one if one.startswith(("|", "*", "```", "#", "!")) else wrapped(one) for one in blocks if one]
    return "\n\n".join(made) + "\n"


def _key(line: Record) -> tuple[str, str, str]:
    return line["network"], line["noise"], line["method"]


def short_form(results: Path) -> str:
    """The table of the README: DLB, its control, cross entropy and the best method, a row per network and noise."""
    lines, rows = runs_of(results), []
    for network in ordered(lines, "network"):
        here = [line for line in lines if line["network"] == network]
        for noise in ordered(here, "noise"):
            groups = {m: runs for m in ordered(here, "method") if (runs := of(here, noise=noise, method=m))}
            if OURS not in groups:
                continue
            gaps = [shown(difference(groups[OURS], groups.get(other, []))) for other in (CONTROL, BASE)]
            values = [spread(list(map(last, groups.get(m, [])))) if m in groups else "-" for m in (BASE, CONTROL, OURS)]
            top = max(groups, key=lambda m: statistics.fmean(map(last, groups[m])))
            best = f"{_label(here, top)} {statistics.fmean(map(last, groups[top])):.2f}, of {len(groups)}"
            rows.append([network, named(here, noise), *values, *gaps, best])
    names = [_label(lines, m) for m in (BASE, CONTROL, OURS)]
    minus = [f"{names[2]} minus {name}" for name in (names[1], names[0])]
    return table(["network", "wrong labels", *names, *minus, "highest mean"], rows, right=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(prog="study_page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="results.jsonl of dlb-fast compare --protocol")
    parser.add_argument("--protocol", type=Path, default=PROTOCOL, help="the protocol (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="page to write; its picture lies beside it")
    args = parser.parse_args(argv)
    try:
        svg = args.out.with_suffix(".svg")
        text = page(args.results.resolve(), args.protocol.resolve(), svg.name)
        picture(runs_of(args.results), svg)
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}\n{svg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
