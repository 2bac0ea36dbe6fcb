import math

import pytest

from reporting.comparison import Comparison
from reporting.tables import NARROW_TABLE_COLUMNS, certainty_table, markdown, table, table_rows, tables
from run_settings import COMPARED

BASELINE = Comparison("baseline", {1: 94.0, 2: 95.0, 3: 93.0}, {}, (math.nan, math.nan), math.nan, reference=None)
PROPOSED = Comparison("proposed", {1: 95.0, 2: 95.5, 3: 95.0}, {1: 1.0, 2: 0.5, 3: 2.0}, (-0.7, 3.1), 0.06, 0.12)
ONE_PAIR = Comparison("single", {1: 95.0}, {1: 1.0}, (math.nan, math.nan), math.nan, planned=3)
CONTRAST = Comparison("proposed vs single", {}, {1: 0.0}, (math.nan, math.nan), math.nan, planned=3, reference="single")
SETTINGS = {name: {"bn_weight": 0.1, "c": 1.0, "input_norm": "bn"} for name in ("baseline", "proposed", "single")}


def test_columns_are_aligned():
    text = markdown([{"a": "1", "long name": "x"}, {"a": "222"}], ["a", "long name"])
    assert text.splitlines() == [
        "| a   | long name |",
        "| --- | --------- |",
        "| 1   | x         |",
        "| 222 |           |",
    ]


def test_every_number_of_the_table():
    baseline, proposed = table([BASELINE, PROPOSED]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (baseline, proposed)]
    assert cells[0] == ["baseline", "3", "94.00 ± 1.00", *[""] * 5]
    numbers = ["proposed", "3", "95.17 ± 0.29", "+1.17 (-0.70 to +3.10)", "0.06", "0.12", "3 of 3"]
    assert cells[1] == [*numbers, "not significant"]
    narrow = table([PROPOSED], NARROW_TABLE_COLUMNS).splitlines()[2]
    assert [cell.strip() for cell in narrow.strip("|").split("|")] == [*numbers[:3], "+1.17", *numbers[4:6]]


def test_what_cannot_be_computed_is_a_dash():
    row = certainty_table([ONE_PAIR]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["single", "–", "–"]
    row = table([ONE_PAIR]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")][3:] == [
        "+1.00 –",
        "–",
        "–",
        "1 of 1",
        "interim: 1 of 3",
    ]


def test_tables_of_the_paper_are_at_most_120_columns_wide():
    """With the longest that there can be in each column, down to a p-value of 1e-100."""
    pairs = {seed: 10.0 + seed / 100 for seed in range(1, 16)}
    wide = [Comparison("bn_weight 0.25", dict(enumerate([100, 0] * 7)), pairs, (-10.25, 12.5), 1e-100, 1e-100, 15)]
    wide.append(Comparison("proposed vs logits+rates", {}, pairs, (-10.0, 12.5), 1e-100, 1e-100, 15, "logits+rates"))
    lines = "\n".join(tables(wide)).splitlines()
    assert len(lines) == 10 and max(map(len, lines)) <= 120


def test_contrasts_have_a_table_of_their_own():
    assert len(tables([BASELINE])) == 1
    assert tables([BASELINE, PROPOSED]) == [table([BASELINE, PROPOSED]), certainty_table([BASELINE, PROPOSED])]
    first, contrasts, certainty = tables([BASELINE, PROPOSED, CONTRAST])
    assert first == table([BASELINE, PROPOSED])
    assert contrasts.splitlines()[2].startswith("| proposed vs single | +0.00 ") and "accuracy" not in contrasts
    assert [line.split("|")[1].strip() for line in certainty.splitlines()[2:]] == ["proposed", "proposed vs single"]


def test_rows_with_all_digits():
    baseline, proposed, single, contrast = table_rows([BASELINE, PROPOSED, ONE_PAIR, CONTRAST], SETTINGS)
    assert list(baseline) == ["setting", *COMPARED, "seeds", "mean", "standard_deviation"]
    assert list(proposed)[: len(baseline) + 8] == [
        *baseline,
        *("pairs", "difference", "lower", "upper", "p_value", "corrected_p_value", "improved", "verdict"),
    ]
    assert proposed["difference"] == pytest.approx(3.5 / 3) and proposed["compared_with"] == "baseline"
    assert proposed.keys() == single.keys() == contrast.keys()
    empty = {name for name, value in single.items() if value is None}
    tests = {"p_value", "corrected_p_value", "lower", "upper", "sign_flip_p_value", "effect_size"}
    assert empty == {"standard_deviation", *tests}
    assert (contrast["seeds"], contrast["bn_weight"], contrast["mean"]) == (None, None, None)
    assert contrast["compared_with"] == "single"
