import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from scipy import stats

import figures
import reproduce
import small
from observations import load_observations
from reporting import drawing
from run_settings import NAMED
from saved_runs.results import Results, write_results
from t_test import compare_all

RESULTS = Path(__file__).parent.parent / "results"
CURVES = {  # test accuracies of three epochs, by setting and seed
    "baseline": {1: [50, 80, 90], 2: [55, 85, 92], 3: [60, 75, 91]},
    "proposed": {1: [40, 85, 93], 2: [45, 90, 91], 3: [50, 80, 94]},
    "bn_weight 0.5": {1: [50, 85, 95], 2: [50, 85, 97], 3: [50, 85, 96.5]},
}
VALUES = {"baseline": (1.0, 1.0, "dataset"), "proposed": (0.1, 100.0, "bn"), "bn_weight 0.5": (0.5, 100.0, "bn")}


def make_run(setting: str, seed: int) -> Results:
    """A run whose last epoch is the best one."""
    test = np.array(CURVES[setting][seed], dtype=float)
    columns = {"epoch": np.array([1, 2, 3]), "train_loss": 3 - test / 40, "val_loss": 3 - test / 50}
    columns |= {"val_accuracy": np.array([1.0, 2, 3]), "test_accuracy": test}
    settings = dict(zip(("bn_weight", "c", "input_norm"), VALUES[setting], strict=True))
    return Results({"name": f"{setting} {seed}", "seed": seed, "num_epochs": 3, **settings}, columns)


RUNS = {setting: {seed: make_run(setting, seed) for seed in seeds} for setting, seeds in CURVES.items()}


@pytest.fixture(autouse=True)
def no_window():
    yield
    assert pyplot.get_fignums() == []


def test_learning_curves():
    error, loss = figures.learning_curves(RUNS).axes
    for setting, line, band in zip(CURVES, error.lines, error.collections, strict=True):
        low, middle, high = np.sort(100 - np.array(list(CURVES[setting].values())), axis=0)  # of three seeds
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), middle)
        assert line.get_label() == f"{setting} (3 seeds)"
        heights = band.get_paths()[0].vertices[:, 1]
        quartiles = (low + middle) / 2, (middle + high) / 2
        assert (heights.min(), heights.max()) == pytest.approx((quartiles[0].min(), quartiles[1].max()))
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 3 - np.array([55, 80, 91]) / 40)
    assert (error.get_xlabel(), error.get_ylabel(), error.get_yscale()) == ("epoch", "test error (%), log scale", "log")
    assert not error.get_title()  # by default, these are runs on CIFAR-10, whose epochs have 352 steps
    digits = make_run("baseline", 1)
    digits.header |= {"dataset": "digits", "batch_size": 64}
    of_one_seed = figures.learning_curves({"baseline": {1: digits}})
    assert [legend.get_title().get_text() for legend in of_one_seed.legends] == [""]  # nothing of a half of the seeds
    note = of_one_seed.axes[0].get_title()
    assert note.startswith("An epoch has 21 steps. For about 88 steps, evaluation uses\nrunning statistics")
    with pytest.raises(ValueError, match="there are no runs"):
        figures.learning_curves({"baseline": {}})
    styles = {(str(line.get_linestyle()), line.get_marker()) for line in error.lines}
    assert len(styles) == 3  # what can be told apart in grey


@pytest.mark.parametrize("accuracies", [[0.0, 50, 100], [100, 100, 100], [0, 0, 0]])
def test_learning_curves_at_the_ends_of_the_scale(accuracies):
    """Neither a line nor a band goes beyond what can be, and no error of 0 keeps the figure from being drawn."""
    runs = {seed: make_run("baseline", seed) for seed in (1, 2, 3)}
    for run in runs.values():
        run.columns["test_accuracy"] = np.array(accuracies, dtype=float)
    runs[3].columns["test_accuracy"][1] = 100
    figure = figures.learning_curves({"baseline": runs})
    figure.draw_without_rendering()
    panel = figure.axes[0]
    low, high = panel.get_ylim()
    assert 0 < low < high <= 100
    heights = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() >= 0 and heights.max() <= 100


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([24.0, 29.0, 50.0], [25, 30, 35, 40, 45, 50, 55]),
        ([1.1, 1.4, 90.0], [1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70]),
        ([0.0, 1e-9, 1.0], [10.0**power for power in range(-9, 1)]),
    ],
)
def test_ticks_of_logarithmic_axes(values, ticks):
    panel = drawing.make_axes()
    drawing.make_logarithmic(panel, np.array(values))
    np.testing.assert_allclose(panel.get_yticks(), ticks)
    assert [label.get_text() for label in panel.get_yticklabels()] == [f"{tick:g}" for tick in ticks]
    assert not panel.yaxis.get_minor_ticks()


def test_a_setting_has_one_colour_in_all_figures():
    others = [f"γ {n}" for n in range(7)]
    styles = drawing.line_styles([*others, "proposed", "baseline"])
    assert len({styles[name]["color"] for name in (*NAMED, *others)}) == 14
    for name in NAMED:
        assert drawing.line_styles([name])[name] == drawing.line_styles(["γ 0.2", name])[name] == styles[name]


def test_forest_plot():
    comparisons = compare_all(RUNS, contrasts=[("proposed", "bn_weight 0.5")])
    panel = figures.forest_plot(comparisons).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        *("proposed vs baseline", "bn_weight 0.5 vs baseline", "proposed vs bn_weight 0.5")
    ]
    expected = [[3, -1, 3], [5, 5, 5.5], [-2, -6, -2.5]]
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    means = [line for line in panel.lines if line.get_marker() == "D"]
    for row, (values, of_seeds, mean, line) in enumerate(zip(expected, dots, means, panel.collections, strict=True)):
        np.testing.assert_allclose(of_seeds.get_xdata(), values)
        assert len(np.unique(of_seeds.get_xydata(), axis=0)) == 3  # equal ones do not hide each other
        assert (mean.get_xdata()[0], mean.get_ydata()[0]) == (pytest.approx(np.mean(values)), row)
        interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        np.testing.assert_allclose(line.get_segments()[0], [[interval[0], row], [interval[1], row]])
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first at the top
    assert all(text.get_text().endswith("\n3 pairs") for text in panel.texts)
    zero = [line for line in panel.lines if line.get_marker() == "None"]
    assert [list(line.get_xdata()) for line in zero] == [[0, 0]]
    with pytest.raises(ValueError, match="no comparison with a pair of runs"):
        figures.forest_plot(compare_all({"baseline": RUNS["baseline"], "proposed": {}}))


def test_forest_plot_of_one_seed_has_no_interval():
    one = {setting: {1: seeds[1]} for setting, seeds in RUNS.items()}
    panel = figures.forest_plot(compare_all(one)).axes[0]
    assert not panel.collections
    assert [text.get_text() for text in panel.texts] == ["+3.00\none pair", "+5.00\none pair"]


def test_accuracy_by_bn_weight():
    two = {setting: dict(seeds) for setting, seeds in RUNS.items()}
    with pytest.raises(ValueError, match="fewer than three bn_weights"):
        figures.accuracy_by_bn_weight(two)
    VALUES["γ = 1"], CURVES["γ = 1"] = (1.0, 100.0, "bn"), CURVES["baseline"]
    three = two | {"γ = 1": {seed: make_run("γ = 1", seed) for seed in (1, 2, 3)}}
    del VALUES["γ = 1"], CURVES["γ = 1"]
    panel = figures.accuracy_by_bn_weight(three).axes[0]
    points = np.asarray(panel.lines[0].get_xydata(), dtype=float)
    np.testing.assert_allclose(points, [[0.1, np.mean([93, 91, 94])], [0.5, np.mean([95, 97, 96.5])], [1, 91]])
    assert panel.get_xscale() == "log" and not panel.get_legend()
    assert [text.xy[0] for text in panel.texts] == [0.5]  # p is 0.0005 there, and 0.18 at 0.1
    comparisons = compare_all(three)
    comparisons[2].corrected_p_value = 0.06
    assert not figures.accuracy_by_bn_weight(three, comparisons).axes[0].texts  # the star is the corrected verdict
    again = two | {"again": {1: RUNS["proposed"][1]}}  # a third setting, not a third γ
    with pytest.raises(ValueError, match="fewer than three bn_weights"):
        figures.accuracy_by_bn_weight(again)


def test_files(small_network, tmp_path):
    (tmp_path / "networks").mkdir()
    for setting in ("baseline", "proposed"):
        for run in (make_run(setting, 1), make_run(setting, 2)):
            run.header["dataset"] = "digits"
            write_results(tmp_path / "results" / f"{run.header['name']}.csv", run)
        weights = small.construct_small_network("", 10, "digits", VALUES[setting][0]).state_dict()
        weights["0.bias"] += 0.1
        torch.save(weights, tmp_path / "networks" / f"{setting} 1-best.pt")
    files = list(map(str, (tmp_path / "results").glob("*.csv")))
    figures.main([*files, "--output", str(tmp_path / "figures")])
    made = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    names = {"learning-curves", "forest", "scales-and-shifts", "normalized-values"}
    assert made == {f"figure-{name}" for name in names}
    for name in made:
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert image.convert("L").getextrema() == (0, 255)

    # the small file, from which the first of the latter two is drawn without the weights
    runs = {setting: make_run(setting, 1) for setting in ("baseline", "proposed")}
    kept = load_observations(tmp_path / "figures" / "figure-scales-and-shifts.npz", runs)
    assert (kept.weights["proposed"]["0.bias"] == np.float32(0.1)).all() and len(kept.normalized_values) == 2
    shutil.rmtree(tmp_path / "networks")
    archive = tmp_path / "results" / "figure-scales-and-shifts.npz"
    shutil.move(tmp_path / "figures" / archive.name, archive)
    figures.main([*files, "--output", str(tmp_path / "again")])
    assert {file.stem for file in (tmp_path / "again").glob("*.png")} == made


def test_what_is_missing_does_not_keep_the_others_from_being_drawn(tmp_path, monkeypatch, capsys):
    """Nor does a missing display, where windows are asked for."""
    monkeypatch.setitem(matplotlib.rcParams, "backend", "TkAgg")
    for module in ("tkinter", "matplotlib.backends.backend_tkagg"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = tmp_path / "results"
    for run in RUNS["baseline"].values():
        write_results(folder / f"{run.header['seed']}.csv", run)
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "baseline 1-best.pt").write_bytes(b"damaged")
    figures.main([*map(str, folder.iterdir()), "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    made = [tmp_path / "out" / f"figure-learning-curves.{kind}" for kind in ("png", "pdf")]
    assert out.splitlines() == list(map(str, made)) and all(file.exists() for file in made)
    assert err.startswith("figures.py: no figures of trained networks: ") and "baseline 1-best.pt is damaged" in err
    assert err.count("\n") == 1


def test_weights_of_own_networks_are_drawn_where_their_module_is_given(small_network, tmp_path, capsys):
    """That which a result file names is not imported without, as it may be anybody's."""
    run = make_run("baseline", 1)
    run.header |= {"dataset": "digits", "network": "module_of_somebody:net"}
    write_results(tmp_path / "results" / "x.csv", run)
    (tmp_path / "networks").mkdir()
    weights = small.construct_small_network("", 10, "digits").state_dict()
    torch.save(weights, tmp_path / "networks" / "baseline 1-best.pt")
    flags = [str(tmp_path / "results" / "x.csv"), "--output", str(tmp_path / "out")]
    figures.main(flags)
    out, err = capsys.readouterr()
    assert "scales" not in out and "module_of_somebody:net is imported only where it is given as --network" in err
    figures.main([*flags, "--network", "module_of_somebody:net"])  # for the fixture builds it in any case
    assert "figure-scales-and-shifts.png" in capsys.readouterr().out


def test_folder_of_an_experiment(tmp_path, monkeypatch):
    """What is drawn is what `reproduce.py --report` draws, with the learning rates that were chosen."""
    drawn = []
    monkeypatch.setattr(figures, "save_figures", lambda *given: ([], drawn.append(repr(given[:5])) or []))
    folder = shutil.copytree(RESULTS / "digits-fair-rates", tmp_path / "results")
    figures.main([str(folder)])
    reproduce.main(["--report", str(folder)])
    assert drawn[0] == drawn[1] and str(folder) in drawn[0] and "learning_rate': 0.02" in drawn[0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", "has 0 experiments: give result files"),
        ("two", "has 2 experiments: reproduce.py --report {1} lists the commands that draw them"),
        ("unfinished", "has no finished runs to compare"),
        ("damaged", "{0}-weight1-c1-dataset-seed1.csv was changed after it was written"),
    ],
)
def test_folder_that_is_not_of_one_experiment(what, message, tmp_path, capsys):
    stem = "digits-resnet18-batch_size=64-num_epochs=5-learning_rate=0.05"
    if what in ("two", "damaged"):
        source = RESULTS / ("digits-modes" if what == "two" else "digits")
        shutil.copytree(source, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.p[dn]*"))
    if what == "damaged":
        file = tmp_path / f"{stem}-weight1-c1-dataset-seed1.csv"
        file.write_text(f"{file.read_text()}6,1,1,1,1\n")
    if what == "unfinished":
        (tmp_path / "x-command.txt").write_text("python reproduce.py --dataset digits --num_epochs 3 --seeds 1")
    with pytest.raises(SystemExit, match="1"):
        figures.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message.format(stem, tmp_path) in err
    assert not list(tmp_path.glob("*.pdf"))


def test_read_runs(tmp_path):
    for setting, seeds in RUNS.items():
        for seed, run in seeds.items():
            write_results(tmp_path / f"{setting}-{seed}.csv", run)
    runs = figures.read_runs(sorted(tmp_path.iterdir(), reverse=True))
    assert {name: set(seeds) for name, seeds in runs.items()} == {
        "baseline": {1, 2, 3},
        "proposed": {1, 2, 3},
        "γ 0.5, c 100, bn": {1, 2, 3},
    }
    assert next(iter(runs)) == "baseline"
    other = make_run("proposed", 1)
    other.header["momentum"] = 0.5
    write_results(tmp_path / "other.csv", other)
    with pytest.raises(
        ValueError, match=r"the runs differ in more than bn_weight, c, input_norm, equivalent: momentum 0\.9 and 0\.5"
    ):
        figures.read_runs([tmp_path / "baseline-1.csv", tmp_path / "other.csv"])


def test_titles_say_what_is_shown():
    runs = [make_run("baseline", 1), make_run("proposed", 2)]
    assert figures.describe(runs) == "resnet18 on cifar10, 3 epochs, learning rate 0.1"
    runs[1].header |= {"learning_rate": 0.03}
    for run in runs:
        run.header |= {"num_epochs": 1, "stem": "own", "dataset": "digits"}
    assert (
        figures.describe(runs)
        == "resnet18 with its own first layers on digits, 1 epoch, each setting at its own learning rate"
    )
    for run in runs:
        run.header["split_seed"] = "seed"
    assert figures.describe(runs).endswith("learning rate, a split for each seed")
