"""The tables of an experiment: one setting beside another, seed by seed, as text and as rows of numbers."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

from command_line.files import read_file, write_atomically
from reporting.comparison import Comparison, is_contrast
from reporting.power import POWER
from run_settings import COMPARED, DEFAULTS, Value, compared
from saved_runs.results import header_lines, read_header

CONTRAST_COLUMNS = ("setting", "difference (95 % CI)", "p", "p (Holm)", "improved", "verdict")
TABLE_COLUMNS = ("setting", "seeds", "accuracy (%)", *CONTRAST_COLUMNS[1:])
NARROW_TABLE_COLUMNS = ("setting", "seeds", "accuracy (%)", "difference", "p", "p (Holm)")


def tables(comparisons: Sequence[Comparison]) -> list[str]:
    """All that there is to say of the comparisons, as one to three Markdown tables."""
    contrasts = [c for c in comparisons if is_contrast(c)]
    texts = [table([c for c in comparisons if not is_contrast(c)])]
    texts += [table(contrasts, CONTRAST_COLUMNS)] if contrasts else []
    return texts + ([certainty_table(comparisons)] if any(c.reference is not None for c in comparisons) else [])


def table(comparisons: Sequence[Comparison], columns: Sequence[str] = TABLE_COLUMNS) -> str:
    """The comparisons as a Markdown table with aligned columns."""
    rows = []
    for c in comparisons:
        row = {"setting": c.setting, "seeds": f"{len(c.accuracies)}"}
        row["accuracy (%)"] = f"{c.mean:.2f} ± {c.deviation:.2f}".replace("nan", "–")
        if c.reference is not None:
            numbers = {"difference": f"{c.difference:+.2f}", "interval": "({:+.2f} to {:+.2f})".format(*c.interval)}
            numbers |= {"p": f"{c.p_value:.2g}", "p (Holm)": f"{c.corrected_p_value:.2g}"}
            row |= {name: "–" if "nan" in number else number for name, number in numbers.items()}
            row["difference (95 % CI)"] = " ".join((row["difference"], row["interval"]))
            row |= {"improved": f"{c.improved} of {len(c.differences)}", "verdict": c.verdict}
        rows.append(row)
    return markdown(rows, columns)


def certainty_table(comparisons: Sequence[Comparison]) -> str:
    """What `power` says of the comparisons, as a Markdown table."""
    rows = []
    for c in comparisons:
        if c.reference is not None:
            row = {"setting": c.setting, "p (sign flips)": f"{c.sign_flip_p_value:.2g}", "d_z": f"{c.effect_size:.2f}"}
            row[f"seeds for a power of {POWER}"] = f"{c.seeds_needed or nan}"
            pairs = c.planned or len(c.differences)
            row[f"difference with a power of {POWER}"] = f"{c.detectable_difference:.2f} ({pairs} seeds)"
            rows.append({name: "–" if "nan" in text and name != "setting" else text for name, text in row.items()})
    return markdown(rows, list(rows[0]))


def markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Rows of text by column as a Markdown table with aligned columns."""
    rows = [dict(zip(columns, columns, strict=True)), *rows]
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in columns}
    rows.insert(1, {name: "-" * width for name, width in widths.items()})
    return "\n".join(f"| {' | '.join(row.get(name, '').ljust(widths[name]) for name in columns)} |" for row in rows)


def selection_note(select: str) -> list[str]:
    """The line that says which epoch's test accuracy counts, where it is not that of the best validation accuracy."""
    return [] if select == "best" else ["The test accuracies are those of the last epoch."]


def table_rows(
    comparisons: Sequence[Comparison], settings: Mapping[str, Mapping[str, Value]]
) -> list[dict[str, Value]]:
    """The rows of the table with all digits; what there is none of, such as the p-value of a single pair, is empty.

    Args:
        comparisons: a row each.
        settings: the values of every setting, which belong into its row.
    """
    rows = []
    for c in comparisons:
        row = {"setting": c.setting, **dict.fromkeys(COMPARED), "seeds": None, "mean": nan, "standard_deviation": nan}
        if not is_contrast(c):
            row |= {**compared(settings[c.setting]), "seeds": len(c.accuracies), "mean": c.mean}
            row |= {"standard_deviation": c.deviation}
        if c.reference is not None:
            row |= {"pairs": len(c.differences), "difference": c.difference, "lower": c.interval[0]}
            row |= {"upper": c.interval[1], "p_value": c.p_value, "corrected_p_value": c.corrected_p_value}
            row |= {"improved": c.improved, "verdict": c.verdict, "sign_flip_p_value": c.sign_flip_p_value}
            row |= {"effect_size": c.effect_size, "seeds_needed": c.seeds_needed}
            row |= {"detectable_difference": c.detectable_difference, "compared_with": c.reference}
        rows.append({name: None if value != value else value for name, value in row.items()})  # NaN is not itself
    return rows


def write_table(
    stem: Path, settings: Mapping[str, Value], rows: Sequence[Mapping[str, Value]], text: str
) -> list[Path]:
    """Write the table of an experiment as STEM.csv, below the settings that its runs share, and `text` as STEM.md.

    Returns both files.

    Args:
        stem: the path of both files without their ending.
        settings: what all runs of the table share.
        rows: for each setting its numbers by name; `seeds` is how many runs have been finished. There may be further
            rows, without `seeds`.
        text: the table as it is shown.

    Raises:
        OSError: a file cannot be written.
    """
    content = io.StringIO()
    content.writelines(f"{line}\n" for line in header_lines(settings))
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    writer = csv.DictWriter(content, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents = {stem.with_name(f"{stem.name}.csv"): content.getvalue(), stem.with_name(f"{stem.name}.md"): f"{text}\n"}
    for file, lines in contents.items():
        write_atomically(file, lines.encode())
    return list(contents)


def read_table_seeds(stem: Path, settings: Mapping[str, Value]) -> dict[tuple[str, ...], tuple[str, int]]:
    """What the table STEM.csv has, whose runs share these settings; empty without a table.

    Returns:
        By `values_of` a setting, its name and how many finished runs it has.

    Raises:
        ValueError: the file is of other settings, or not a table.
    """
    file = stem.with_name(f"{stem.name}.csv")
    if not file.exists():
        return {}
    lines = read_file(file).decode(errors="replace").splitlines()
    if not is_table(file):
        raise ValueError(f"{file} is not the table of an experiment: move it away, or give another --name")
    before, now = DEFAULTS | read_header(lines), DEFAULTS | settings
    unlike = [name for name in before | now if before.get(name) != now.get(name)]
    if unlike:
        listed = "; ".join(f"{name} {before.get(name)}, here {now.get(name)}" for name in unlike)
        raise ValueError(f"{file} is of other settings: {listed}. Move it away, or give another --name")
    try:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        return {values_of(row): (row["setting"], int(row["seeds"])) for row in rows if row["seeds"]}
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{file} is damaged: remove it") from None


def values_of(settings: Mapping[str, Value]) -> tuple[str, ...]:
    """The values of `COMPARED`, as text, by which a setting is known whatever it is called."""
    return tuple(map(str, compared(settings).values()))


def without_tables(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files that are no table of an experiment, which `results/*.csv` catches too, and a line for each table.

    ValueError where there is nothing but tables.
    """
    tables = [file for file in files if file.is_file() and is_table(file)]
    others = [file for file in files if file not in tables]
    if tables and not others:
        raise ValueError(f"{tables[0]} is the table of an experiment: give the result files of its runs")
    return others, [f"{file} is the table of an experiment, and left out" for file in tables]


def is_table(file: Path) -> bool:
    """Whether the first line that is no setting begins as that of `write_table`. OSError where it cannot be read."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        return next((line for line in lines if not line.startswith("#")), "").startswith(f"setting,{COMPARED[0]},")
