"""What an experiment shows while its runs are made: on a terminal, what moves; elsewhere, a line now and then."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from threading import Event, Thread

from tqdm import tqdm

from command_line.endings import say
from command_line.flag_types import as_typed
from experiment.plan import PlannedRun

REDRAW_SECONDS = 0.5


class Display:
    """A bar over the runs, the table, and a line for each run at work; where there is no terminal, a line for each run
    that begins or ends.

    Args:
        runs: those to make, by name.
        num_done: how many there are besides.
        rows: of the table.
    """

    def __init__(self, runs: Mapping[str, PlannedRun], num_done: int, rows: Sequence[str]) -> None:
        self.runs, self.rows = runs, rows
        self.at_work: dict[str, tuple[float, str]] = {}  # by name: when it began, its bar
        self.most = 1  # that were at work at a time
        self.seconds: list[float] = []  # that runs have taken
        self.on_terminal = sys.stderr.isatty()
        self.options = {"disable": not self.on_terminal, "leave": False, "dynamic_ncols": True}
        self.options["file"] = sys.stderr  # a run in this process has another one
        bar = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self.bar = tqdm(total=num_done + len(runs), initial=num_done, bar_format=bar, **self.options)
        self.lines: list[tqdm] = []
        self.num_done = num_done
        self.closed, self.thread = Event(), Thread(target=self.keep_moving, daemon=True)
        if self.on_terminal:
            self.thread.start()

    def tell(self, run: argparse.Namespace, bar: str) -> None:
        """A run has begun, or drawn its bar anew."""
        if run.run_name not in self.at_work and not self.on_terminal:
            say(f"{run.run_name} begins")
        began, _ = self.at_work.get(run.run_name, (time.monotonic(), ""))
        self.at_work[run.run_name] = began, bar
        self.most = max(self.most, len(self.at_work))

    def end(self, name: str, text: str, rows: Sequence[str], failed: bool) -> None:
        """A run has ended, of which there is `text` to say; a terminal shows it where the run has failed."""
        began, _ = self.at_work.pop(name, (time.monotonic(), ""))
        if not failed:
            self.seconds.append(time.monotonic() - began)
        self.num_done, self.rows = self.num_done + 1, rows
        if failed or not self.on_terminal:
            time_left = self.time_left()
            say(f"{self.num_done}/{self.bar.total} {text}{f' ({time_left})' * bool(time_left)}")
        self.draw()

    def time_left(self) -> str:
        """How long the other runs may take, from the mean of those that were made; empty where there is none."""
        if not self.seconds or self.num_done == self.bar.total:
            return ""
        mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        left = [max(0, mean - (now - began)) for began, _ in self.at_work.copy().values()]
        left += [mean] * (self.bar.total - self.num_done - len(left))
        return f"about {tqdm.format_interval(sum(left) / min(self.most, len(left)))} left"

    def keep_moving(self) -> None:
        """Draw all again and again."""
        while not self.closed.wait(REDRAW_SECONDS):
            self.draw()

    def draw(self) -> None:
        """Draw all as it is now."""
        if not self.on_terminal:
            return
        texts = list(self.rows)
        for name, (began, bar) in self.at_work.copy().items():
            what = f"{describe(self.runs[name])}{': ' * bool(bar)}{bar}"
            texts.append(f"{tqdm.format_interval(time.monotonic() - began)} {what}")
        with tqdm.get_lock():
            while len(self.lines) < len(texts):
                position = len(self.lines) + 1
                self.lines.append(tqdm(bar_format="{desc}{bar}", position=position, **self.options))
            for line, text in zip_longest(self.lines, texts, fillvalue=""):
                line.set_description_str(text)
            self.bar.n = self.num_done
            self.bar.set_postfix_str(self.time_left())

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.closed.set()
        if self.on_terminal:
            self.thread.join()
        for line in (*reversed(self.lines), self.bar):
            line.close()


def describe(run: PlannedRun) -> str:
    """A run among the others of its experiment."""
    rate = f" at {as_typed(run.settings.learning_rate)}" if run.for_tuning else ""
    return f"{run.setting}{rate}, seed {run.settings.seed}"
