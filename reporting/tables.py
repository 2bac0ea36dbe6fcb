"""The tables of an experiment: one method beside another, seed by seed, as text and as rows of numbers."""

import csv
import io
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path

from command_line.files import write_atomically
from reporting.comparison import Comparison, is_contrast
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
        row = {"setting": c.method, "seeds": f"{len(c.accuracies)}"}
        row["accuracy (%)"] = f"{shown(c.mean, '.2f')} ± {shown(c.deviation, '.2f')}"
        if c.reference is not None:
            low, high = (shown(bound, "+.2f") for bound in c.interval)
            row["difference"] = shown(c.difference, "+.2f")
            row["difference (95 % CI)"] = f"{row['difference']} " + ("–" if low == "–" else f"({low} to {high})")
            row |= {"p": shown(c.p_value, ".2g"), "p (Holm)": shown(c.corrected_p_value, ".2g")}
            row |= {"improved": f"{c.improved} of {len(c.differences)}", "verdict": c.verdict}
        rows.append(row)
    return markdown(rows, columns)


def certainty_table(comparisons: Sequence[Comparison]) -> str:
    """What the comparisons say beside the t-test, as a Markdown table."""
    rows = [
        {"setting": c.method, "p (sign flips)": shown(c.sign_flip_p_value, ".2g"), "d_z": shown(c.effect_size, ".2f")}
        for c in comparisons
        if c.reference is not None
    ]
    return markdown(rows, ("setting", "p (sign flips)", "d_z"))


def shown(number: float, form: str) -> str:
    """A number in this form, or a dash where there is none."""
    return "–" if isnan(number) else format(number, form)


def markdown(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Rows of text by column as a Markdown table with aligned columns."""
    rows = [dict(zip(columns, columns, strict=True)), *rows]
    widths = {name: max(len(row.get(name, "")) for row in rows) for name in columns}
    rows.insert(1, {name: "-" * width for name, width in widths.items()})
    return "\n".join(f"| {' | '.join(row.get(name, '').ljust(widths[name]) for name in columns)} |" for row in rows)


def table_rows(comparisons: Sequence[Comparison], methods: Mapping[str, Mapping[str, Value]]) -> list[dict[str, Value]]:
    """One row per comparison, in full precision, with its method's settings; None where a value does not exist."""
    rows = []
    for c in comparisons:
        row = {"setting": c.method, **dict.fromkeys(COMPARED), "seeds": None}
        if not is_contrast(c):
            row |= {**compared(methods[c.method]), "seeds": len(c.accuracies)}
        row |= {"mean": c.mean, "standard_deviation": c.deviation}
        if c.reference is not None:
            row |= {"pairs": len(c.differences), "difference": c.difference, "lower": c.interval[0]}
            row |= {"upper": c.interval[1], "p_value": c.p_value, "corrected_p_value": c.corrected_p_value}
            row |= {"improved": c.improved, "verdict": c.verdict, "sign_flip_p_value": c.sign_flip_p_value}
            row |= {"effect_size": c.effect_size, "compared_with": c.reference}
        rows.append({name: None if value != value else value for name, value in row.items()})  # NaN is not itself
    return rows


def write_table(stem: Path, header: Mapping[str, Value], rows: Sequence[Mapping[str, Value]], text: str) -> list[Path]:
    """Write the table of an experiment as STEM.csv, below the settings that its runs share, and `text` as STEM.md.

    Returns both. OSError where one cannot be written.
    """
    stream = io.StringIO()
    stream.writelines(f"{line}\n" for line in header_lines(header))
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    writer = csv.DictWriter(stream, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents = {stem.with_name(f"{stem.name}.csv"): stream.getvalue(), stem.with_name(f"{stem.name}.md"): f"{text}\n"}
    for file, content in contents.items():
        write_atomically(file, content.encode())
    return list(contents)


def read_table_seeds(stem: Path, header: Mapping[str, Value]) -> dict[tuple[str, ...], tuple[str, int]]:
    """By `values_of` each method in the table STEM.csv, its name and how many finished runs it has; empty without one.

    ValueError where the file is of other settings than these, which its runs share, or not a table.
    """
    file = stem.with_name(f"{stem.name}.csv")
    if not file.exists():
        return {}
    lines = file.read_bytes().decode(errors="replace").splitlines()
    if not is_table(file):
        raise ValueError(f"{file} is not the table of an experiment: move it away, or give another --name")
    try:
        before = DEFAULTS | read_header(lines)
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        seeds = {values_of(row): (row["setting"], int(row["seeds"])) for row in rows if row["seeds"]}
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{file} is damaged: remove it") from None
    now = DEFAULTS | header
    unlike = [name for name in before | now if before.get(name) != now.get(name)]
    if unlike:
        listed = "; ".join(f"{name} {before.get(name)}, here {now.get(name)}" for name in unlike)
        raise ValueError(f"{file} is of other settings: {listed}. Move it away, or give another --name")
    return seeds


def values_of(settings: Mapping[str, Value]) -> tuple[str, ...]:
    """The values of `COMPARED`, as text, by which a method is known whatever it is called."""
    return tuple(map(str, compared(settings).values()))


def without_tables(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files that are not a table of an experiment, which `results/*.csv` catches too, and a line for each table.

    ValueError where there is nothing but tables.
    """
    tables = [file for file in files if file.is_file() and is_table(file)]
    others = [file for file in files if file not in tables]
    if tables and not others:
        raise ValueError(f"{tables[0]} is the table of an experiment: give the result files of its runs")
    return others, [f"{file} is the table of an experiment, and left out" for file in tables]


def is_table(file: Path) -> bool:
    """Whether the first line that is not a setting begins as that of `write_table`. OSError where it cannot be read."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        return next((line for line in lines if not line.startswith("#")), "").startswith(f"setting,{COMPARED[0]},")
