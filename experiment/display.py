"""What an experiment shows while its runs are made: on a terminal, what moves; elsewhere, a line now and then."""

import re
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from tqdm import tqdm

from command_line.endings import say, shows_bar
from command_line.flag_types import as_typed
from experiment.plan import PlannedRun
from run_settings import Settings
from saved_runs.results import run_files


class Display:
    """A bar over the experiment, the table, and a line for each run at work; where there is no terminal, a line for
    each run that begins or ends.

    A run's progress is read from its result file. `runs` are those to make, by name; `num_done` others are finished;
    `rows` are those of the table.
    """

    def __init__(self, runs: Mapping[str, PlannedRun], num_done: int, rows: Sequence[str]) -> None:
        self.runs, self.num_done, self.rows = runs, num_done, rows
        self.epochs = {name: count_epochs(run.settings) for name, run in runs.items()}
        self.epochs_before = sum(self.epochs.values())
        self.left = {name: run.settings.num_epochs for name, run in runs.items()}  # epochs of runs that have not ended
        self.start = time.monotonic()
        self.began: dict[str, float] = {}  # when each run did
        self.at_work: list[str] = []
        self.on_terminal = shows_bar()
        self.options = {"disable": not self.on_terminal, "leave": False, "dynamic_ncols": True}
        bar = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}{postfix}]"
        self.bar = tqdm(total=num_done + len(runs), bar_format=bar, **self.options)
        self.lines: list[tqdm] = []

    def show(self, at_work: Sequence[Settings]) -> None:
        """Show how far the runs at work are."""
        self.at_work = [settings.run_name for settings in at_work]
        for name, settings in zip(self.at_work, at_work, strict=True):
            if name not in self.began and not self.on_terminal:
                say(f"{name} begins")
            self.began.setdefault(name, time.monotonic())
            self.epochs[name] = count_epochs(settings)
        self.draw()

    def end(self, name: str, text: str, rows: Sequence[str], failed: bool) -> None:
        """Note that a run has ended. `text` is printed, on a terminal only if the run failed."""
        self.epochs[name] = count_epochs(self.runs[name].settings)
        del self.left[name]
        self.at_work.remove(name)
        self.num_done, self.rows = self.num_done + 1, rows
        if failed or not self.on_terminal:
            time_left = f" ({left})" if (left := self.time_left()) else ""
            say(f"{self.num_done}/{self.bar.total} {text}{time_left}")
        self.draw()

    def time_left(self) -> str:
        """How long the other runs may take, by the epochs that were made; empty where there are none."""
        made = sum(self.epochs.values()) - self.epochs_before
        left = sum(num_epochs - self.epochs[name] for name, num_epochs in self.left.items())
        if made <= 0 or not left:
            return ""
        return f"about {tqdm.format_interval((time.monotonic() - self.start) * left / made)} left"

    def draw(self) -> None:
        """Draw all as it is now."""
        if not self.on_terminal:
            return
        texts = list(self.rows)
        for name in self.at_work:
            method, _, settings, for_tuning = self.runs[name]
            elapsed = tqdm.format_interval(time.monotonic() - self.began[name])
            rate = f" at {as_typed(settings.learning_rate)}" if for_tuning else ""
            epoch = min(self.epochs[name] + 1, settings.num_epochs)
            texts.append(f"{elapsed} {method}{rate}, seed {settings.seed}: epoch {epoch}/{settings.num_epochs}")
        while len(self.lines) < len(texts):
            self.lines.append(tqdm(bar_format="{desc}{bar}", position=len(self.lines) + 1, **self.options))
        for line, text in zip_longest(self.lines, texts, fillvalue=""):
            line.set_description_str(text)
        self.bar.n = self.num_done + sum(self.epochs[name] / self.left[name] for name in self.at_work)
        self.bar.set_description_str(f"{self.num_done}/{self.bar.total}", refresh=False)
        self.bar.set_postfix_str(self.time_left())

    def close(self) -> None:
        """Leave the terminal as it was."""
        for line in (*reversed(self.lines), self.bar):
            line.close()


def count_epochs(settings: Settings) -> int:
    """How many epochs of a run are in its result file."""
    file = run_files(settings.path, settings.run_name).results
    try:
        return len(re.findall(rb"^\d.*\n", file.read_bytes(), re.MULTILINE))
    except OSError:  # it has not begun
        return 0
