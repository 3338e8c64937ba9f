"""The page of a study against numbers computed by hand; the summaries are made up here."""

import json
import math

import pytest

from benchmarks import study_page
from benchmarks.tables import ROOT, newest

# three seeds of last top-1 in %; the differences DLB - control are 1, 2, 3
TOP1 = {"ce": (70, 71, 72), "two_view": (71, 72, 73), "dlb": (72, 74, 76)}


def line(method, seed, top1, noise="sym", **more):
    curve = [
        {"epoch": 1.0, "step": 5, "test_top1": top1 / 100 + 0.02, "test_nll": 1.2, "test_ece": 0.1},
        {"epoch": 2.0, "step": 10, "test_top1": top1 / 100, "test_nll": 1.5, "test_ece": 0.2},
    ]
    for point, learned in zip(curve, (0.1, 0.3), strict=True):
        point["train_wrong_top1"] = learned
    return {
        "kind": "run", "cell": f"net/{method}/{noise}/seed{seed}", "network": "net", "noise": noise, "method": method,
        "label": method.upper(), "seed": seed, "wrong_labels": 0.4, "last": curve[1], "best": curve[0], "curve": curve,
        "seconds": 60.0, "hardware": "a machine", "threads": 1, "jobs": 2, "torch": "2", "commit": "abc",
        "date": "2026-12-01", **more,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    lines = [line(m, seed, v) for m, values in TOP1.items() for seed, v in enumerate(values)]
    lines.append({**line("late", 0, 1), "diverged": "the loss became NaN or infinite by step 5"})
    lines.append(
        {"kind": "chosen", "method": "dlb", "setting": {"loss": {"alpha": 3.0}},
         "tried": [{"setting": {"loss": {"alpha": 1.0}}, "held_out_top1": 0.5},
                   {"setting": {"loss": {"alpha": 3.0}}, "held_out_top1": 0.625}]}
    )  # fmt: skip
    lines.append({**line("dlb", 100, 50), "kind": "tuning", "cell": "tuning/dlb/0", "test_images": 100})
    lines += [{**line("lag0", s, v), "kind": "ablation", "cell": f"x{s}"} for s, v in enumerate((71, 73, 75))]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "p.yaml").write_text(
        "seeds: [0, 1, 2, 3]\nnetworks: {net: , large: }\nnoises: {sym: {data: {label_noise: 0.4}}}\n"
        "methods: {ce: {loss: {method: ce}}, dlb: {loss: {method: dlb}}}\n"
        "tables: [{network: net, methods: [ce, dlb], noises: [sym]}, {network: large, methods: [ce], noises: [sym]}]\n"
    )
    return tmp_path / "results.jsonl"


def test_the_interval_by_hand():
    """Of 1, 2, 3: mean 2, standard deviation 1, and 4.303 of Student's table for two degrees of freedom."""
    found = study_page.interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found.mean == 2 and found.low == pytest.approx(2 - half, abs=1e-5)
    assert found.high == pytest.approx(2 + half, abs=1e-5)
    assert study_page.interval([5.0])[:3] == (5.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1, 2, 3), "+2.00 points (95 % interval -0.48 to 4.48), above 0 on 3 of 3 seeds: the interval includes 0"),
        ((1, 1.1, 1.2), "above 0 on 3 of 3 seeds: higher, the interval excludes 0"),
        ((-1, -1.1, -1.2), "above 0 on 0 of 3 seeds: lower, the interval excludes 0"),
        ((-2, 0, 2), "+0.00 points (95 % interval -4.97 to 4.97), above 0 on 1 of 3 seeds: the interval includes 0"),
        ((0.5, 0.5, 0.5), "+0.50 points on each of 3 seeds: without a spread there is no interval"),
        ((0, 0), "+0.00 points on each of 2 seeds: without a spread there is no interval"),
        ((1, 1.2), "+1.10 points (95 % interval -0.17 to 2.37), above 0 on 2 of 2 seeds: the interval includes 0"),
        ((1.5,), "+1.50 points on the one seed there is, which says nothing about others"),
    ],
)
def test_a_sentence_says_what_its_interval_says(values, words):
    assert words in study_page.verdict(study_page.interval(values))


def test_pairs_are_of_one_seed():
    ours, theirs = ([line("a", s, v) for s, v in pairs] for pairs in (((0, 10), (1, 30)), ((1, 20), (2, 90))))
    assert study_page.difference(ours, theirs).values == pytest.approx((10,))
    assert study_page.difference(ours[:1], theirs) is None


def test_the_page(results, tmp_path):
    text = study_page.page(results, tmp_path / "p.yaml", "study.svg")
    rows = {
        r[1]: r for x in text.splitlines() if x.startswith("| sym") for r in [[c.strip() for c in x.split("|")[1:-1]]]
    }
    assert rows["DLB"] == [
        "sym", "DLB", "3", "74.00 ± 2.00", "76.00 ± 2.00", "1.500 ± 0.000", "20.0 ± 0.0", "60",
        "+2.00 [-0.48, 4.48]", "+3.00 [0.52, 5.48]",
    ]  # fmt: skip
    assert rows["LATE"][2] == "0 (1 diverged)"
    assert rows["LAG0"][1:] == ["LAG0", "net", "3", "73.00 ± 2.00", "-1.00"]
    flat = " ".join(text.split())
    assert (
        "DLB minus TWO_VIEW is +2.00 points (95 % interval -0.48 to 4.48), above 0 on 3 of 3 seeds: the interval in"
        in flat
    )
    assert "DLB minus CE is +3.00 points (95 % interval 0.52 to 5.48), above 0 on 3 of 3 seeds: higher" in flat
    assert "DLB has the highest mean. Not shown to be lower: TWO_VIEW." in flat
    assert "| DLB | alpha 3 | 62.50 | chosen |" in text and "| DLB | alpha 1 | 50.00 | - |" in text
    assert "40 % of the labels are wrong, so right answers would score about 60 %. 100 images give" in flat
    assert "Runs of the protocol that were not made: * net: 1 of ce; 1 of dlb * large: none of 4" in flat
    assert "2 at a time, threads each: 1, a machine, torch 2; commits abc; 2026-12-01 to 2026-12-01" in flat
    assert max(map(len, (x for x in text.splitlines() if not x.startswith(("|", "dlb-fast", "python"))))) <= 120


def test_the_short_form(results):
    row = study_page.short_form(results).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "net", "sym (40.0 % wrong)", "71.00 ± 1.00", "72.00 ± 1.00", "74.00 ± 2.00", "+2.00 [-0.48, 4.48]",
        "+3.00 [0.52, 5.48]", "DLB 74.00, of 3",
    ]  # fmt: skip


def test_the_committed_page_is_that_of_the_committed_runs():
    page = study_page.page(newest("cifar10-*.jsonl"), study_page.PROTOCOL, "study.svg")
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == page, "stale: python -m benchmarks.study_page"


def write(tmp_path, lines):
    (tmp_path / "p.yaml").write_text(
        "seeds: [0]\nnetworks: {net: }\nnoises: {sym: }\nmethods: {ce: {loss: {method: ce}}}\n"
        "tables: [{network: net, methods: [ce], noises: [sym]}]\n"
    )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return " ".join(study_page.page(tmp_path / "r.jsonl", tmp_path / "p.yaml", "x.svg").split())


def lost(method, seed):
    return {
        k: v
        for k, v in line(method, seed, 1).items()
        if k in ("kind", "cell", "network", "noise", "method", "label", "seed")
    } | {"diverged": "the loss became NaN or infinite by step 5"}


def test_partial_results(tmp_path):
    """What is missing, diverged, equal or of one seed gives no false sentence."""
    many = {"two_view": (50, 52, 54), "dlb": (51, 53, 57)}
    runs = [line(m, s, v) for m, values in many.items() for s, v in enumerate(values)]
    text = write(tmp_path, [*runs[:5], lost("dlb", 2)])
    assert (
        "DLB minus TWO_VIEW is +1.00 points on each of 2 seeds: without a spread there is no interval; DLB diverged "
        "with seed 2." in text
    )
    text = write(tmp_path, [*runs[:3], *(lost("dlb", s) for s in range(3))])
    assert "DLB minus TWO_VIEW has no seed on which both finished; DLB diverged with seeds 0, 1, 2." in text
    text = write(tmp_path, [lost("dlb", 0)])  # nothing finished
    assert "| sym | DLB | 0 (1 diverged) |" in text and "The runs: none finished." in text and "Generated" not in text
    text = write(tmp_path, [line("ce", 0, 60), line("dlb", 1, 70)])  # no seed in common
    assert "DLB has the highest mean. Without a seed in common: CE." in text and "DLB minus CE is" not in text
    assert "One seed gives no interval, so no difference is shown." in text and "inf" not in text
    text = write(tmp_path, [line(m, s, 60 + s) for m in ("ce", "dlb") for s in range(2)])
    assert "CE has the highest mean. Not shown to be lower: DLB." in text
    # the highest mean is of other seeds than what it is compared on
    text = write(tmp_path, [*(line("ce", s, v) for s, v in enumerate((50, 50.2, 90))),
                            *(line("dlb", s, v) for s, v in enumerate((60, 60)))])  # fmt: skip
    assert "CE has the highest mean. Not shown to be lower: DLB." in text
    assert study_page.named([line("ce", s, 60, wrong_labels=w) for s, w in enumerate((0.101, 0.099, 0.1))], "sym") == (
        "sym (9.9 to 10.1 % wrong)"
    )


def test_joined_files_count_a_run_once(tmp_path):
    run = line("dlb", 0, 70)
    assert "| sym | DLB | 1 | 71.00 |" in write(tmp_path, [run, {**run, **line("dlb", 0, 71)}])
    other = {**line("lag0", 0, 60), "kind": "ablation"}
    chosen = {"kind": "chosen", "method": "dlb", "setting": {"loss": {"impl": "cpu"}},
              "tried": [{"setting": {"loss": {"impl": "cpu"}}, "held_out_top1": None}]}  # fmt: skip
    text = write(tmp_path, [run, *[other] * 2, *[chosen] * 2, {**lost("lag2", 0), "kind": "ablation", "cell": "x"}])
    assert "| sym | LAG2 | net | 0 (1 diverged) | - | - |" in text
    assert "| sym | LAG0 | net | 1 | 60.00 | -10.00 |" in text
    assert text.count("| DLB | impl cpu | diverged | chosen |") == 1
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl holds no run"):
        study_page.short_form(tmp_path / "none.jsonl")


@pytest.mark.slow
def test_the_same_results_give_the_same_picture(results, tmp_path):
    out = tmp_path / "study.md"
    pictures = set()
    for _ in range(2):
        assert study_page.main([str(results), "--protocol", str(tmp_path / "p.yaml"), "--out", str(out)]) == 0
        assert "](study.svg)" in out.read_text()
        pictures.add((tmp_path / "study.svg").read_bytes())
    assert len(pictures) == 1
    results.write_text(json.dumps(lost("dlb", 0)) + "\n")  # nothing finished
    assert study_page.main([str(results), "--protocol", str(tmp_path / "p.yaml"), "--out", str(out)]) == 0
