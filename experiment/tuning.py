"""Fair tuning: every setting at its own learning rate, chosen on seeds that are not compared.

A rate is judged by the mean over the tuning seeds of the best validation accuracy of a run. A run that diverges has
none: it counts as 0 %. Test accuracies have no part in it.
"""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean

from command_line.files import write_atomically
from command_line.flag_types import as_typed
from reporting.tables import markdown, shown
from run_settings import Settings, determining, differences
from saved_runs.results import header_lines, read_header

Accuracies = Mapping[int, float | None]  # by seed, validation accuracy in percent; None where the run has diverged
Tuning = Mapping[str, Mapping[float, Accuracies]]  # by setting and rate


def mean_accuracy(accuracies: Accuracies) -> float:
    """What a rate is judged by, in percent; NaN without runs. Rounded to nine digits, so that ties are ties."""
    return round(fmean(accuracy or 0.0 for accuracy in accuracies.values()), 9) if accuracies else nan


def choose_learning_rates(tuning: Tuning) -> dict[str, float]:
    """For each setting, the rate with the highest mean of the best validation accuracies, the smallest on a tie."""
    means = {
        setting: {rate: mean_accuracy(seeds) for rate, seeds in rates.items()} for setting, rates in tuning.items()
    }
    return {setting: max(sorted(rates), key=rates.get) for setting, rates in means.items()}


def tuning_table(tuning: Tuning, chosen: Mapping[str, float]) -> str:
    """All rates with their mean validation accuracies, as a Markdown table."""
    rows = []
    for setting, rates in tuning.items():
        for rate, accuracies in rates.items():
            diverged = sum(accuracy is None for accuracy in accuracies.values())
            remarks = [f"{diverged} diverged"] if diverged else []
            remarks += ["chosen"] if rate == chosen.get(setting) else []
            row = {"setting": setting, "learning rate": as_typed(rate), "tuning seeds": f"{len(accuracies)}"}
            row["val accuracy (%)"] = shown(mean_accuracy(accuracies), ".2f")
            rows.append({**row, "remark": ", ".join(remarks)})
    return markdown(rows, list(rows[0]))


def explain_choice(tuning: Tuning, seeds: Sequence[int], left: int) -> list[str]:
    """Lines on how the rates are chosen, or on what is left to make before they are."""
    by_rate = [accuracies for rates in tuning.values() for accuracies in rates.values()]
    if left:
        return [f"The learning rates are not chosen yet: {left} of {len(by_rate) * len(seeds)} tuning runs are left."]
    means = "the mean of the best validation accuracies over the seeds " + ", ".join(map(str, seeds))
    lines = [f"The rates are chosen by {means}; a tie goes to the smaller one."]
    any_diverged = any(None in accuracies.values() for accuracies in by_rate)
    return [*lines, "A tuning run that diverged counts as 0 %."] if any_diverged else lines


def divergence_file(folder: Path, settings: Settings) -> Path:
    """Where it is noted that a run of the tuning has diverged, so that it is not made again."""
    return folder / f"{settings.run_name}-diverged.txt"


def note_divergence(folder: Path, settings: Settings, reason: str) -> None:
    """Write why a run has diverged, in one line below the settings that determined it."""
    lines = [*header_lines(determining(settings)), reason, ""]
    write_atomically(divergence_file(folder, settings), "\n".join(lines).encode())


def read_divergence(folder: Path, settings: Settings) -> str | None:
    """Why a run has diverged; None where that is not known of a run with these settings. OSError as from reading."""
    file = divergence_file(folder, settings)
    if not file.exists():
        return None
    *lines, reason = file.read_bytes().decode(errors="replace").splitlines() or [""]
    return None if differences(read_header(lines), determining(settings)) else reason
