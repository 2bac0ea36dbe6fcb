"""The tables of an experiment: one setting beside another, seed by seed, as text and as rows of numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

import numpy as np

from power import LEVEL, POWER, detectable_difference, effect_size, seeds_needed, sign_flip_p_value
from settings import COMPARED, Value, compared


@dataclass
class Comparison:
    """One setting beside another, seed by seed.

    Attributes:
        setting: what it is called; of a contrast, "A vs B".
        accuracies: its test accuracies in percent, by seed; none for a contrast, whose settings have rows of their own.
        differences: its accuracy minus the other's, by seed, for the seeds that both have.
        interval: the 95 % confidence interval of the mean difference, two-sided.
        p_value: of `t_test.evaluate`. Like the interval, NaN for fewer than two pairs and where all differences are
            equal.
        corrected_p_value: the p-value after Holm's correction for all comparisons made together; NaN until
            `t_test.apply_holm_correction` sets it.
        planned: how many pairs are planned; 0 where it is not known.
        reference: the other setting.
    """

    setting: str
    accuracies: dict[int, float]
    differences: dict[int, float]
    interval: tuple[float, float]
    p_value: float
    corrected_p_value: float = nan
    planned: int = 0
    reference: str = "baseline"

    @property
    def mean(self) -> float:
        """Mean of the accuracies."""
        return float(np.mean(list(self.accuracies.values()))) if self.accuracies else nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the accuracies."""
        return float(np.std(list(self.accuracies.values()), ddof=1)) if len(self.accuracies) > 1 else nan

    @property
    def difference(self) -> float:
        """Mean of the differences."""
        return float(np.mean(list(self.differences.values()))) if self.differences else nan

    @property
    def improved(self) -> int:
        """The number of seeds with a better accuracy than the other setting's."""
        return sum(difference > 0 for difference in self.differences.values())

    @cached_property
    def sign_flip_p_value(self) -> float:
        """p-value of `power.sign_flip_p_value`, not corrected. It takes up to a second."""
        return sign_flip_p_value(list(self.differences.values()))

    @property
    def effect_size(self) -> float:
        """Cohen's d_z of `power.effect_size`."""
        return effect_size(list(self.differences.values()))

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds it would take at this effect size: see `power.seeds_needed`."""
        return seeds_needed(list(self.differences.values()))

    @property
    def detectable_difference(self) -> float:
        """What as many pairs as are planned can find: see `power.detectable_difference`."""
        return detectable_difference(list(self.differences.values()), self.planned or len(self.differences))

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at the level of 0.05, or why it cannot say anything yet."""
        if len(self.differences) < self.planned:
            return f"interim: {len(self.differences)} of {self.planned}"
        if len(self.differences) < 2:
            return "no test: under 2 pairs"
        if np.isnan(self.p_value):
            return "no test: all are equal"
        return "significant" if self.corrected_p_value <= LEVEL else "not significant"


CONTRAST_COLUMNS = ("setting", "difference (95 % CI)", "p", "p (Holm)", "improved", "verdict")
TABLE_COLUMNS = ("setting", "seeds", "accuracy (%)", *CONTRAST_COLUMNS[1:])
NARROW_TABLE_COLUMNS = ("setting", "seeds", "accuracy (%)", "difference", "p", "p (Holm)")


def tables(comparisons: Sequence[Comparison]) -> list[str]:
    """All that there is to say of the comparisons, as one to three Markdown tables."""
    contrasts = [c for c in comparisons if is_contrast(c)]
    texts = [table([c for c in comparisons if not is_contrast(c)])]
    texts += [table(contrasts, CONTRAST_COLUMNS)] if contrasts else []
    return texts + ([certainty_table(comparisons)] if any(c.setting != c.reference for c in comparisons) else [])


def table(comparisons: Sequence[Comparison], columns: Sequence[str] = TABLE_COLUMNS) -> str:
    """The comparisons as a Markdown table with aligned columns. The baseline is compared with nothing."""
    rows = []
    for c in comparisons:
        row = {"setting": c.setting, "seeds": f"{len(c.accuracies)}"}
        row["accuracy (%)"] = f"{c.mean:.2f} ± {c.deviation:.2f}".replace("nan", "–")
        if c.setting != c.reference:
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
        if c.setting != c.reference:
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


def is_contrast(c: Comparison) -> bool:
    """Whether it is of two settings that were asked for beside the comparisons with the baseline."""
    return c.reference != "baseline"


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
        if c.setting != c.reference:
            row |= {"pairs": len(c.differences), "difference": c.difference, "lower": c.interval[0]}
            row |= {"upper": c.interval[1], "p_value": c.p_value, "corrected_p_value": c.corrected_p_value}
            row |= {"improved": c.improved, "verdict": c.verdict, "sign_flip_p_value": c.sign_flip_p_value}
            row |= {"effect_size": c.effect_size, "seeds_needed": c.seeds_needed}
            row |= {"detectable_difference": c.detectable_difference, "compared_with": c.reference}
        rows.append({name: None if value != value else value for name, value in row.items()})  # NaN is not itself
    return rows
