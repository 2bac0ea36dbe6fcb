import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import t_test
from reporting.comparison import Comparison
from reporting.tables import table, table_rows, write_table
from run_settings import NAMED
from saved_runs.results import Results, write_results
from t_test import apply_holm_correction, compare, compare_all, evaluate, main

PROPOSED = [95.1, 94.8, 95.3, 95.0, 95.2]
BASELINE = [94.6, 94.7, 94.9, 95.1, 95.1]


def by_hand(d1, d2) -> float:
    """The test from its definition: t = mean / (s / √n), and the upper tail of Student's distribution."""
    differences = [float(a) - float(b) for a, b in zip(d1, d2, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return stats.t.sf(mean / math.sqrt(variance / n), df=n - 1)


@pytest.mark.parametrize(
    "convert",
    [
        np.ma.array,
        pd.Series,
        lambda d: torch.tensor(d, requires_grad=True, dtype=torch.float64),
        lambda d: [torch.tensor(number, requires_grad=True, dtype=torch.float64) for number in d],
    ],
)
def test_p_value(convert):
    p_value = evaluate(convert(PROPOSED), convert(BASELINE))
    assert type(p_value) is float
    assert p_value == pytest.approx(by_hand(PROPOSED, BASELINE))
    assert evaluate(convert(PROPOSED), BASELINE) == p_value


accuracies = st.floats(0, 100).map(lambda accuracy: round(accuracy, 2))


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=30))
def test_any_pairs_beside_scipy(pairs):
    d1, d2 = map(list, zip(*pairs, strict=True))
    differences = np.array(d1) - np.array(d2)
    assume(differences.std() > 1e-6 * max(1, abs(differences.mean())))
    expected = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    assert evaluate(d1, d2) == pytest.approx(expected, rel=1e-6)
    assert 0 <= evaluate(d1, d2) <= 1


def test_low_precision_tensors():
    d1, d2 = torch.tensor([80.0, 95, 70, 90, 85]).bfloat16(), torch.tensor(BASELINE[::-1]).bfloat16()
    assert evaluate(d1, d2) == pytest.approx(by_hand(d1, d2))
    assert evaluate(list(d1), list(d2)) == evaluate(d1, d2)


def test_other_labels_are_refused():
    ours, theirs = pd.Series(PROPOSED), pd.Series(BASELINE)
    for other in (theirs[::-1], theirs.set_axis([1, 2, 3, 4, 5])):
        with pytest.raises(ValueError, match="d1 and d2 have different labels"):
            evaluate(ours, other)
    assert evaluate(*ours.align(theirs[::-1], join="inner")) == evaluate(ours, theirs)  # as the message says
    assert evaluate(ours, BASELINE) == evaluate(PROPOSED, BASELINE)


ROUNDED = np.array(PROPOSED, dtype=np.float32)


@pytest.mark.parametrize(
    ("d1", "d2"),
    [
        (PROPOSED, PROPOSED),
        ([95.1 / 3, 94.3 / 3, 1.0], [95.1 / 3 + 0.1, 94.3 / 3 + 0.1, 1.1]),
        (PROPOSED, ROUNDED),
        (list(torch.tensor(ROUNDED)), np.array(PROPOSED) - 1),
        (torch.tensor(PROPOSED).bfloat16(), BASELINE),
        (np.array(PROPOSED) * 1e-180, np.array(PROPOSED) * 1e-180),
    ],
)
def test_a_spread_that_is_rounding_is_none(d1, d2):
    assert math.isnan(evaluate(d1, d2)) and math.isnan(evaluate(d2, d1))


@pytest.mark.parametrize("scale", [1e-300, 1e306])
def test_scale_does_not_matter(scale):
    p_value = evaluate(np.array(PROPOSED) * scale, np.array(BASELINE) * scale)
    assert p_value == pytest.approx(by_hand(PROPOSED, BASELINE))


@pytest.mark.parametrize(
    ("d1", "d2", "message"),
    [
        ([1, 2, 3], [1, 2], "as many values in d1 as in d2, not 3 and 2"),
        ([1], [2], "at least two pairs, not 1"),
        ([], [], "at least two pairs, not 0"),
        ([1, 2], torch.zeros(2, 1), "d2 must have one dimension, not 2"),
        (1.0, 2.0, "d1 must have one dimension, not 0"),
        ([1, 2], [1, float("nan")], "d2 holds a value that is not a finite number"),
        ([1, None], [1, 2], "d1 holds a value that is not a finite number"),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), [1, 2, 3], "d1 holds a masked value"),
        *[
            ([1, 2, 3], numbers, "d2 must be a list or an array of real numbers: ")
            for numbers in (
                ["1", "2", "4"],
                np.array([1, "2", 4], dtype=object),
                torch.tensor([1, 2, 4 + 1j]),
                np.array(["2026-01-01", "2026-01-02", "2026-01-04"], dtype="datetime64[D]"),
                torch.zeros(3, device="meta"),
                [1, 2, 10**400],
                {1: 2, 2: 3, 4: 5},
            )
        ],
    ],
)
def test_bad_input(d1, d2, message):
    with pytest.raises(ValueError, match=message):
        evaluate(d1, d2)


# --- comparisons ----------------------------------------------------------------------------------------------------


def test_compare_pairs_by_seed():
    proposed, baseline = dict(enumerate(PROPOSED, 1)), {9: 0.0, **dict(enumerate(BASELINE[:4], 1))}
    comparison = compare("new", proposed, baseline)
    differences = np.subtract(PROPOSED[:4], BASELINE[:4])
    assert comparison.differences == pytest.approx(dict(enumerate(differences, 1)))
    assert (comparison.mean, comparison.difference) == pytest.approx((np.mean(PROPOSED), np.mean(differences)))
    assert comparison.deviation == pytest.approx(np.std(PROPOSED, ddof=1))
    assert comparison.p_value == pytest.approx(by_hand(PROPOSED[:4], BASELINE[:4]))
    half = stats.t.ppf(0.975, df=3) * np.std(differences, ddof=1) / math.sqrt(4)
    assert comparison.interval == pytest.approx((np.mean(differences) - half, np.mean(differences) + half))
    assert comparison.improved == 3
    backwards = pd.Series(dict(reversed(proposed.items())))
    assert compare("new", backwards, pd.Series(baseline)).differences == comparison.differences
    with pytest.raises(ValueError, match="not a finite number"):
        compare("new", {**proposed, 1: math.nan}, baseline)


@pytest.mark.parametrize(
    ("proposed", "baseline", "verdict"),
    [
        ({1: 95.0}, {1: 94.0, 2: 93.0}, "no test: under 2 pairs"),
        ({1: 95.1, 2: 94.3}, {1: 94.0, 2: 93.2}, "all differences are equal"),
        ({1: 95.1, 2: 94.0}, {1: 94.0, 2: 93.0}, "significant"),
        ({1: 94.1, 2: 93.9}, {1: 95.0, 2: 94.0}, "not significant"),
        ({1: 94.1, 2: 93.0}, {1: 95.0, 2: 94.0}, "worse"),
    ],
)
def test_verdict(proposed, baseline, verdict):
    comparison = compare("new", proposed, baseline)
    apply_holm_correction([comparison])
    assert comparison.verdict == verdict
    assert table([comparison]).rstrip("| ").endswith(f"| {verdict}")


def holm(p_values: list[float]) -> list[float]:
    """Holm's correction as it is defined: the largest (m - j) p_(j) of all p_(j) up to one's own, counted from 0."""
    ordered = sorted(p_values)
    m = len(ordered)
    return [
        min(1.0, max((m - j) * ordered[j] for j in range(m) if ordered[j] <= p))
        for p in p_values
    ]  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8, unique=True))
def test_holm_correction(p_values):
    comparisons = [Comparison(str(p), {}, {1: 1.0, 2: 1.0}, (0.0, 0.0), p) for p in p_values]
    baseline = Comparison("baseline", {}, {}, (math.nan, math.nan), math.nan, reference=None)
    apply_holm_correction([baseline, *comparisons])  # which is not compared
    assert [c.corrected_p_value for c in comparisons] == pytest.approx(holm(p_values))
    equal, too_few = compare("equal", {1: 1.0, 2: 2.0}, {1: 0.0, 2: 1.0}), compare("too few", {}, {})
    apply_holm_correction([equal, *comparisons, too_few])  # which are compared, though there is no p-value
    assert [c.corrected_p_value for c in comparisons] == pytest.approx(holm([*p_values, 1.0, 1.0])[:-2])
    assert math.isnan(too_few.corrected_p_value) and math.isnan(equal.corrected_p_value)


def test_correction_is_in_the_verdict():
    comparisons = [Comparison(str(p), {}, {1: 1.0, 2: 1.0}, (0.0, 0.0), p) for p in (0.026, 0.03)]
    apply_holm_correction(comparisons)
    assert [c.verdict for c in comparisons] == ["not significant"] * 2


# --- the command line -----------------------------------------------------------------------------------------------


def write_runs(folder, accuracies, **settings) -> list[str]:
    """Result files of two epochs, of which the first is the best; returns their names."""
    files = []
    for seed, accuracy in enumerate(accuracies, start=1):
        columns = {"epoch": [1, 2], "val_accuracy": [90.0, 89.0], "test_accuracy": [accuracy, 99.9]}
        columns |= {"train_loss": [1.0, 1.0], "val_loss": [1.0, 1.0]}
        every = {"dataset": "digits", "num_epochs": 2, "batch_size": 64, "seed": seed, "seconds": accuracy}
        files.append(folder / f"{len(list(folder.iterdir()))}.csv")
        given = {name: value for name, value in (every | settings).items() if value is not None}
        write_results(files[-1], Results(given, {k: np.array(v) for k, v in columns.items()}))
    return list(map(str, files))


@pytest.fixture
def fails(capsys):
    """A function that compares two groups of files that cannot be compared, and returns the message."""

    def compare_files(proposed, baseline) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["--proposed", *proposed, "--baseline", *baseline])
        captured = capsys.readouterr()
        assert (stop.value.code, captured.out, captured.err.count("\n")) == (1, "", 1)
        return captured.err.removeprefix("t_test.py: error: ")

    return compare_files


def test_files(tmp_path, capsys):
    proposed = write_runs(tmp_path, PROPOSED, bn_weight=0.1, c=100.0, input_norm="bn", device="cuda:1")
    settings = {"bn_weight": 1.0, "c": 1.0, "input_norm": "dataset", "device": "cuda:0", "torch": "2.11"}
    baseline = write_runs(tmp_path, BASELINE[:4], **settings)
    older = Path(proposed[0])
    older.write_text(re.sub("# sha256: .*\n", "", older.read_text()))
    main(["--proposed", *reversed(proposed), "--baseline", *baseline])
    lines = capsys.readouterr().out.splitlines()
    *_, line, short, checksums, versions, alone = lines
    assert max(len(line) for line in lines if line.startswith("|")) <= 120
    differences = np.subtract(PROPOSED[:4], BASELINE[:4])
    effect = differences.mean() / differences.std(ddof=1)
    flipped = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=4)]
    p_value = np.mean(np.array(flipped) >= differences.sum() - 1e-9)
    fields = [field.strip() for field in line.strip("|").split("|")]
    assert fields == ["proposed", f"{p_value:.2g}", f"{effect:.2f}"]
    fields = [field.strip() for field in lines[3].strip("|").split("|")]
    assert fields[:3] == ["proposed", "5", f"{np.mean(PROPOSED):.2f} ± {np.std(PROPOSED, ddof=1):.2f}"]
    assert fields[4] == f"{by_hand(PROPOSED[:4], BASELINE[:4]):.2g}"
    assert short.startswith("runs of 42 steps: batch norm's running statistics still hold what they started from")
    assert checksums == "1 of 9 result files have no checksum to compare their numbers with"
    assert versions == "not all runs have the same torch: 2.11; None"
    assert alone == "seeds without a partner, which count in the means alone: 5"


def test_runs_that_differ_in_more_are_refused(tmp_path, fails):
    one = write_runs(tmp_path, PROPOSED, bn_weight=0.1)
    other = write_runs(tmp_path, BASELINE, bn_weight=1.0, batch_size=32, dataset="cifar10", momentum=0.5)
    message = fails(one, other)
    assert (
        "differ in more than bn_weight, c, input_norm, equivalent: batch_size 64 and 32; dataset digits and cifar10;"
        in message
    )
    assert "momentum 0.9 and 0.5" in message
    third = write_runs(tmp_path, [95.0], bn_weight=0.2, seed=9)
    assert f"{third[0]} and the first file of --proposed differ: bn_weight 0.2 and 0.1" in fails(one + third, one)


def test_other_files_are_refused(tmp_path, fails):
    runs = write_runs(tmp_path, PROPOSED)
    assert "has seed 1, and so has another file of --baseline" in fails(runs, [*runs, runs[0]])
    unfinished = write_runs(tmp_path, [95.0], num_epochs=3)
    assert "is of an unfinished run: 2 of 3 epochs" in fails(unfinished, runs)
    for missing in ("seed", "num_epochs"):
        message = fails(runs, write_runs(tmp_path, [95.0], **{missing: None}))
        assert "does not say with which seed and num_epochs it was made" in message
    assert "No such file" in fails(runs, [str(tmp_path / "none.csv")])


BY_SEED = "accuracy,note,seed\r\n" + "".join(f"{a},x y,{9 - n}\r\n" for n, a in enumerate(PROPOSED))


def plain(file: Path, text: str) -> list[str]:
    file.write_text(text)
    return [str(file)]


def test_plain_files_by_seed(tmp_path, capsys):
    baseline = '\ufeff"seed","accuracy"\n4,1.5\n' + "".join(f"{9 - n},{a}\n" for n, a in enumerate(BASELINE[:4]))
    main(["--proposed", *plain(tmp_path / "a", BY_SEED), "--baseline", *plain(tmp_path / "b", baseline)])
    lines = capsys.readouterr().out.splitlines()
    fields = [field.strip() for field in lines[3].strip("|").split("|")]
    assert fields[:3] == ["proposed", "5", f"{np.mean(PROPOSED):.2f} ± {np.std(PROPOSED, ddof=1):.2f}"]
    assert fields[4:6] == [f"{by_hand(PROPOSED[:4], BASELINE[:4]):.2g}"] * 2
    assert [line.split("|")[1].strip() for line in lines[:4:3]] == ["setting", "proposed"]
    assert lines[2].split("|")[4].strip() == ""  # nothing to compare the baseline with
    assert lines[-1] == "seeds without a partner, which count in the means alone: 4, 5"


def test_plain_files_by_line(tmp_path, capsys):
    proposed, baseline = ("\n".join(map(str, accuracies)) for accuracies in (PROPOSED, BASELINE))
    files = plain(tmp_path / "a", f"{proposed}\n\n"), plain(tmp_path / "b", f"accuracy\n{baseline}")
    main(["--proposed", *files[0], "--baseline", *files[1]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split("|")[5].strip() == f"{by_hand(PROPOSED, BASELINE):.2g}" and lines[-1] == "paired by line"


@pytest.mark.parametrize(
    ("proposed", "baseline", "message"),
    [
        (BY_SEED, "95\n94\n93\n92\n91\n", "need a column seed in both, or as many lines, to be paired"),
        ("95\n94\n", "95\n", "need a column seed in both, or as many lines, to be paired"),
        (BY_SEED, "seed,accuracy\n1,95\n1,96\n", "b: there must be one finite number for each seed"),
        (BY_SEED, "seed,accuracy\n1.5,95\n2,96\n", "b: there must be one finite number for each seed"),
        (BY_SEED, "seed,accuracy\n1,95\n2,nan\n", "b: there must be one finite number for each seed"),
        (BY_SEED, "seed,accuracy\n1,95\n2,good\n", "b: could not convert string 'good' to float64\n"),
        (BY_SEED, "seed,accuracy\na,1,95\nb,2,94\n", "b: not all lines have as many columns\n"),
        (BY_SEED, "seed,acc\n1,95\n", "b is not of accuracies, as the other file is: CSV with the columns seed and "),
        (BY_SEED, "seed,accuracy\n\n", "b is not of accuracies, as the other file is: CSV with the columns seed and "),
        (BY_SEED, "seed,accuracy\n1,0.95\n2,1\n", "b must have percent, with one above 1 and none above 100"),
        (BY_SEED, "seed,accuracy\n1,95\n2,100.1\n", "b must have percent, with one above 1 and none above 100"),
        (BY_SEED, "", "b is not of accuracies, as the other file is: CSV with the columns seed and "),
    ],
)
def test_plain_files_that_cannot_be_paired(tmp_path, fails, proposed, baseline, message):
    assert message in fails(plain(tmp_path / "a", proposed), plain(tmp_path / "b", baseline))


def test_damaged_result_files_are_no_plain_files(tmp_path, fails):
    """Wherever their beginning is lost, up to within the last line."""
    content = Path(*write_runs(tmp_path, [95.0])).read_text()
    for start in range(1, content.rindex(","), 3):
        damaged = plain(tmp_path / "damaged", content[start:])
        fails(damaged, damaged)
    assert "does not fit its checksum" in fails(*[plain(tmp_path / "damaged", content.replace("95.0", "95.5"))] * 2)


def test_tables_of_experiments_are_left_out(tmp_path, fails, capsys):
    runs = write_runs(tmp_path, PROPOSED)
    rows = table_rows([replace(compare("baseline", {1: 95.0}, {}), reference=None)], {"baseline": NAMED["baseline"]})
    write_table(tmp_path / "digits", {"dataset": "digits"}, rows, "")
    the_table = str(tmp_path / "digits.csv")
    main(["--proposed", *runs, "--baseline", the_table, *runs])
    out, _ = capsys.readouterr()
    assert "| proposed | 5 " in out and out.endswith(f"{the_table} is the table of an experiment, and left out\n")
    assert f"{the_table} is the table of an experiment: give the result files of its runs" in fails([the_table], runs)


def test_runs_of_other_code_or_images_are_named(tmp_path, capsys):
    """Where their headers say so; what older files do not say is no difference."""
    proposed = write_runs(tmp_path, PROPOSED[:4], network_code="a", name="old")
    proposed += write_runs(tmp_path, [95.0], network_code="b", name="edited", seed=5)
    baseline = write_runs(tmp_path, BASELINE[:4], name="unknown")
    baseline += write_runs(tmp_path, [94.0], image_hash="c", name="images", seed=5)
    main(["--proposed", *proposed, "--baseline", *baseline])
    out = capsys.readouterr().out
    assert "\nnot of the same network's code as the other runs: edited\n" in out and "same images" not in out
    other = write_runs(tmp_path, BASELINE[:4], image_hash="d", name="others")
    main(["--proposed", *proposed, "--baseline", *other, baseline[-1]])
    assert "\nnot of the same images as the other runs: images\n" in capsys.readouterr().out


def test_what_files_lack_is_at_its_default(tmp_path, capsys):
    """Older files lack flags that came later, and have some that are no flags any more."""
    old = write_runs(tmp_path, PROPOSED, allow_tf32=True)
    new = write_runs(tmp_path, BASELINE, momentum=0.9, stem="auto", precision="float32")
    main(["--proposed", *old, "--baseline", *new])
    assert f"{by_hand(PROPOSED, BASELINE):.2g}" in capsys.readouterr().out


def test_test_accuracy_of_the_last_epoch(tmp_path, capsys):
    proposed, baseline = write_runs(tmp_path, PROPOSED, bn_weight=0.1), write_runs(tmp_path, BASELINE)
    main(["--proposed", *proposed, "--baseline", *baseline, "--select", "last"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:4]] == ["99.90 ± 0.00"] * 2
    assert lines[3].endswith("| all differences are equal, unsettled |")
    assert lines[-1] == "The test accuracies are those of the last epoch."


def runs(accuracies: list[float]) -> dict[int, Results]:
    """Runs of one epoch, with seeds from 1 on."""
    columns = [{"epoch": [1], "val_accuracy": np.array([90.0]), "test_accuracy": [accuracy]} for accuracy in accuracies]
    return {seed: Results({}, of_run) for seed, of_run in enumerate(columns, start=1)}


def test_contrasts_are_compared_and_corrected_with_the_others():
    settings = {"baseline": runs(BASELINE), "proposed": runs(PROPOSED), "init": runs(BASELINE[::-1]), "none": {}}
    contrasts = [("proposed", "init"), ("init", "none")]
    comparisons = compare_all(settings, planned=5, contrasts=contrasts)
    assert [(c.method, c.reference) for c in comparisons[-2:]] == [
        ("proposed vs init", "init"),
        ("init vs none", "none"),
    ]
    ours, nothing = comparisons[-2:]
    pairs = [(PROPOSED, BASELINE), (BASELINE[::-1], BASELINE), (PROPOSED, BASELINE[::-1])]
    p_values = [by_hand(*pair) for pair in pairs]
    assert [c.p_value for c in (*comparisons[1:3], ours)] == pytest.approx(p_values)
    corrected = holm([*p_values, 1.0, 1.0])[:3]  # for "none" and "init vs none", too
    assert [c.corrected_p_value for c in (*comparisons[1:3], ours)] == pytest.approx(corrected)
    differences = np.subtract(PROPOSED, BASELINE[::-1])
    assert ours.interval == pytest.approx(stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences)))
    assert nothing.verdict == "interim: 0 of 5"
    nothing.planned = 0
    assert nothing.verdict == "no test: under 2 pairs"


def test_without_a_baseline_contrasts_alone_are_compared():
    methods = {"proposed": runs(PROPOSED), "init": runs(BASELINE)}
    proposed, init, contrast = compare_all(methods, 5, [("proposed", "init")])
    assert (proposed.reference, init.reference) == (None, None) and proposed.accuracies == dict(enumerate(PROPOSED, 1))
    assert contrast.corrected_p_value == contrast.p_value == pytest.approx(by_hand(PROPOSED, BASELINE))


def test_imports_neither_torch_nor_matplotlib():
    check = "import sys, t_test; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], cwd=Path(t_test.__file__).parent, check=True)
