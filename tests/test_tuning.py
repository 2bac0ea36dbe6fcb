import math

import pytest

import run_settings
from experiment.tuning import choose_learning_rates, mean_accuracy, note_divergence, read_divergence, tuning_table


def test_best_mean_wins_and_the_smaller_rate_on_a_tie():
    tuning = {
        "a": {0.3: {16: 70.0, 17: 60.0}, 0.1: {16: 66.0, 17: 65.0}},
        "b": {0.3: {16: 60.1, 17: 60.3}, 0.03: {16: 60.2, 17: 60.2}, 0.1: {16: 60.3, 17: 60.1}},
    }
    assert choose_learning_rates(tuning) == {"a": 0.1, "b": 0.03}
    rounding = {0.1: {1: 0.3}, 0.05: {1: 0.1 + 0.2}, 0.01: {1: 0.2}}  # 0.1 + 0.2 is above 0.3
    assert choose_learning_rates({"a": rounding}) == {"a": 0.05}
    assert choose_learning_rates({"a": {0.05: {1: 0.3}, 0.1: {1: 0.1 + 0.2}}}) == {"a": 0.05}


def test_diverged_run_counts_as_nothing():
    assert mean_accuracy({16: 70.0, 17: None}) == 35.0
    assert mean_accuracy({16: None}) == 0.0
    assert math.isnan(mean_accuracy({}))
    assert choose_learning_rates({"a": {0.1: {16: None, 17: None}, 0.3: {16: None, 17: 1.0}}}) == {"a": 0.3}


def test_table_of_tuning():
    tuning = {"baseline": {0.03: {16: 61.2, 17: 60.8}, 0.1: {16: 65.1, 17: None}, 0.3: {}}}
    header, _, *rows = tuning_table(tuning, {"baseline": 0.03}).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert cells == [
        ["setting", "learning rate", "tuning seeds", "val accuracy (%)", "remark"],
        ["baseline", "0.03", "2", "61.00", "chosen"],
        ["baseline", "0.1", "2", "32.55", "1 diverged"],
        ["baseline", "0.3", "0", "–", ""],
    ]
    assert "chosen" not in tuning_table(tuning, {})


def test_note_of_a_divergence(tmp_path):
    run = run_settings.parse(["--learning_rate", "0.3", "--name", "mine"])
    assert read_divergence(tmp_path, run) is None
    note_divergence(tmp_path, run, "FloatingPointError: the loss is nan")
    assert read_divergence(tmp_path, run) == "FloatingPointError: the loss is nan"
    other = run_settings.parse(["--learning_rate", "0.3", "--name", "mine", "--momentum", "0.5"])
    assert read_divergence(tmp_path, other) is None
    [file] = tmp_path.iterdir()
    older = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("# precision")]
    file.write_text("".join(older))  # what it lacks was at its default
    assert read_divergence(tmp_path, run) == "FloatingPointError: the loss is nan"


@pytest.mark.parametrize("content", [b"", b"\n", b"# bn_weight\n", b"\xff\xfe"])
def test_note_that_is_damaged(content, tmp_path):
    run = run_settings.parse(["--learning_rate", "0.3", "--name", "mine"])
    (tmp_path / "mine-diverged.txt").write_bytes(content)
    assert read_divergence(tmp_path, run) is None
