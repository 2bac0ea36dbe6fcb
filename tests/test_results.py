import hashlib
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from command_line.files import DamagedFileError
from run_settings import DEFAULTS
from saved_runs.by_seed import note_unsettled, notes_on
from saved_runs.results import CHECKSUM, COLUMNS, Results, read_results, write_results


def make_results(**settings) -> Results:
    columns = {
        "epoch": np.array([1, 2, 3]),
        "train_loss": np.array([2.5, 1 / 3, 1e-300]),
        "val_loss": np.array([math.pi, 0.1 + 0.2, 1e22]),
        "val_accuracy": np.array([10.0, 90.25, 90.25]),
        "test_accuracy": np.array([11.0, 89.5, 99.0]),
    }
    return Results(settings, columns)


def assert_same(ours: Results, expected: Results) -> None:
    assert ours.header == expected.header
    assert {k: type(v) for k, v in ours.header.items()} == {k: type(v) for k, v in expected.header.items()}
    assert list(ours.columns) == list(expected.columns)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(ours.columns[name], column)
        assert ours.columns[name].dtype == column.dtype


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"dataset": "digits", "batch_size": 64}, 21),
        ({}, 352),  # the paper's
        ({"dataset": "flowers", "images": "1,234 training, 137 validation and 9 test images of 3 classes"}, 10),
        ({"dataset": "flowers"}, None),  # older files do not say it
    ],
)
def test_runs_too_short_for_running_statistics(settings, steps):
    results = make_results(**settings)
    assert results.steps_per_epoch == steps
    expected = [f"runs of {3 * steps} steps"] if steps and 3 * steps < 88 else []
    assert [line.split(":")[0] for line in note_unsettled([make_results(), results])] == expected


settings_of_any_kind = st.dictionaries(  # what is named as a flag may only have values as that flag has
    st.text().filter(lambda name: name.isidentifier() and name not in {*DEFAULTS, CHECKSUM}),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
)


losses = st.floats(0, allow_infinity=False)
accuracies = st.floats(0, 100)


HARD = {"seed": 1, "c": 100.0, "split_seed": "seed", "flag": True, "nothing": None, "text": "1", "yes": "true"}
HARD |= {"empty": "", "spaces": "  x ", "lines": "a\nb\r\u2028# c: 1", "colon": "a: b", "quoted": '"a"', "minus": -0.0}


@example(HARD, [])
@given(settings_of_any_kind, st.lists(st.tuples(losses, losses, accuracies, accuracies)))
def test_whatever_is_written_is_read(tmp_path_factory, settings, rows):
    numbers = np.array(rows, dtype=np.float64).reshape(-1, 4)
    columns = {"epoch": np.arange(1, len(rows) + 1), **dict(zip(COLUMNS[1:], numbers.T, strict=True))}
    file = tmp_path_factory.getbasetemp() / "any.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
        write_results(file, Results(settings, columns))
    assert_same(read_results(file), Results(settings, columns))


def test_format_of_the_file(tmp_path):
    file = tmp_path / "results.csv"
    write_results(file, make_results(dataset="cifar10", seed=1, c=100.0))
    header = "# dataset: cifar10\n# seed: 1\n# c: 100.0\n"
    numbers = (
        "epoch,train_loss,val_loss,val_accuracy,test_accuracy\n"
        "1,2.5,3.141592653589793,10.0,11.0\n"
        "2,0.3333333333333333,0.30000000000000004,90.25,89.5\n"
        "3,1e-300,1e+22,90.25,99.0\n"
    )
    checksum = hashlib.sha256((header + numbers).encode()).hexdigest()
    assert file.read_text() == f"{header}# sha256: {checksum}\n{numbers}"


def test_whatever_is_changed_in_a_file_is_noticed(tmp_path):
    """A digit of each line, and every line that is left out, twice there, or in another place."""
    file = tmp_path / "results.csv"
    results = make_results(dataset="digits", seed=1, c=100.0, bn_weight=0.1, num_epochs=3)
    write_results(file, results)
    lines = file.read_text().splitlines(keepends=True)
    for n, line in enumerate(lines):
        before, after = lines[:n], lines[n + 1 :]
        changed = [[*before, line[:-2] + chr(ord(line[-2]) ^ 1) + "\n", *after]]
        if not line.startswith("# sha256: "):  # without it, the file counts as an older one
            changed += [[*before, *after], [*before, line, line, *after]]
            changed += [[*before, after[0], line, *after[1:]]] if after and "sha256" not in after[0] else []
        for damaged in changed:
            file.write_text("".join(damaged))
            with pytest.raises(DamagedFileError, match=r"results\.csv was changed after it was written"):
                read_results(file)


def test_older_file_has_no_checksum(tmp_path):
    file = tmp_path / "results.csv"
    write_results(file, make_results(name="x"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "sha256" not in line))
    assert_same(read_results(file), make_results(name="x"))
    read = [read_results(file), make_results(name="x"), read_results(file)]
    assert notes_on(read) == ["2 of 3 result files have no checksum to compare their numbers with"]
    write_results(file, read_results(file))
    assert notes_on([read_results(file)]) == []


def test_same_results_are_the_same_file(tmp_path):
    file = tmp_path / "results.csv"
    write_results(file, make_results(name="x"))
    before = file.read_bytes()
    written = file.stat().st_mtime_ns
    write_results(file, read_results(file))
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, written)


def test_pandas_reads_it_as_it_is(tmp_path):
    results = make_results(name="a # b", text="1,2,3", lines="a\nb")
    write_results(tmp_path / "results.csv", results)
    table = pandas.read_csv(tmp_path / "results.csv", comment="#")
    assert list(table) == list(results.columns)
    for name, column in results.columns.items():
        np.testing.assert_array_equal(table[name], column)


def test_headline_number_is_at_the_best_validation_accuracy():
    results = make_results()
    assert (results.best_epoch, results.val_accuracy, results.test_accuracy) == (2, 90.25, 89.5)
    last = replace(results, select="last")
    assert (last.best_epoch, last.val_accuracy, last.test_accuracy) == (2, 90.25, results.columns["test_accuracy"][-1])
    assert last.test_accuracy != results.test_accuracy


HEADER = "epoch,train_loss,val_loss,val_accuracy,test_accuracy\n"
WRONG_SETTINGS = ["seed: [1]", "seed: 1.5", "c: many", "compile: 1", "dataset: 5", "split_seed: seeds"]
WRONG_ROWS = ["1,2,3,4", "1,2,3,4,5,6", "1,x,3,4,5", "2,2,3,4,5", "9" * 23 + ",2,3,4,5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no line 'epoch,train_loss"),
        ("epoch,loss\n1,2\n", "at line 1"),
        (f"# seed 1\n{HEADER}", "at line 1"),
        (f"# a b: 1\n{HEADER}", "at line 1"),
        (f"{HEADER}1,2,3,4,97.2", "cut short"),
        ("ÿ\n", "at line 1"),
        *((f"{HEADER}{row}\n", "at line 2") for row in WRONG_ROWS),
        (f"{HEADER}1,2,3,4,5\n1,2,3,4,5\n", "at line 3"),
        *((f"# name: x\n# {line}\n{HEADER}1,2,3,4,5\n", "at line 2") for line in WRONG_SETTINGS),
    ],
)
def test_damaged_file(tmp_path, content, message):
    file = tmp_path / "results.csv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedFileError, match=message) as error:
        read_results(file)
    assert str(file) in str(error.value)


def test_line_ends_of_windows(tmp_path):
    file = tmp_path / "results.csv"
    write_results(file, make_results(name="x"))
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert_same(read_results(file), make_results(name="x"))


WRONG_HEADERS = [{"sha256": "x"}, {"a b": 1}, {"a": [1]}, {"num_epochs": "two"}]


@pytest.mark.parametrize("header", WRONG_HEADERS)
def test_header_that_cannot_be_written(tmp_path, header):
    """What `read_results` would refuse."""
    with pytest.raises(ValueError, match="setting"):
        write_results(tmp_path / "results.csv", make_results(**header))
    assert not list(tmp_path.iterdir())


def test_columns_of_unequal_length(tmp_path):
    results = make_results()
    results.columns["val_loss"] = results.columns["val_loss"][:2]
    with pytest.raises(ValueError, match="shorter"):
        write_results(tmp_path / "results.csv", results)


def test_every_committed_file_fits_its_checksum():
    folder = Path(__file__).parent.parent / "results"
    files = [file for file in folder.glob("*/*.csv") if re.search(r"-seed\d+$", file.stem)]
    assert len(files) >= 500 and all(read_results(file).checked for file in files)
