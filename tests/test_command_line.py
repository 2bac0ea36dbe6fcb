import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import figures
import reproduce
import t_test
import train
from command_line.endings import answer_at_once, one_line_endings
from command_line.signals import (
    ARRIVED,
    STOP_AT_END_OF_INPUT,
    STOP_SIGNALS,
    catch_signals,
    handle,
    until_stopped,
)
from experiment import plan
from run_settings import DEFAULTS, WITHOUT_EFFECT, make_parser, parse

ROOT = Path(__file__).parent.parent
WITHOUT_SLOW_IMPORTS = """
import runpy, sys
sys.path.insert(0, {folder!r})
for name in ("torch", "torchvision", "sklearn", "scipy", "matplotlib", "distributed", "numpy"):
    sys.modules[name] = None  # importing it is an error
sys.argv = {argv!r}
runpy.run_path({file!r}, run_name="__main__")
"""


def run_command(*argv: str, **options) -> subprocess.CompletedProcess:
    """A command that ends in an ImportError where it imports what takes long."""
    file = str(ROOT / argv[0])
    code = WITHOUT_SLOW_IMPORTS.format(folder=str(ROOT), argv=[file, *argv[1:]], file=file)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("command", "flag", "right"),
    [
        ("train.py", "--bn_weight", []),
        ("reproduce.py", "--seeds", []),
        ("t_test.py", "--proposed", ["--proposed", "a", "--baseline", "b"]),
        ("figures.py", "--output", ["a"]),
    ],
)
def test_help_and_wrong_flags_are_answered_before_the_slow_imports(command, flag, right):
    shown = run_command(command, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {command}") and flag in shown.stdout
    wrong = run_command(command, "--nonsense", "1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith(f"{command}: error: ") and wrong.stderr.count("\n") == 1
    assert "required" not in wrong.stderr or flag in wrong.stderr
    missing = "without torch, torchvision, scipy, sklearn; it takes Python 3.11 or newer and pip install"
    assert missing in run_command(command, *right).stderr  # the test would notice


@pytest.mark.parametrize(
    ("parser", "titles"),
    [
        (make_parser(), ["the paper's method", "training", "files and device", "beyond the paper"]),
        (plan.make_parser(), ["the comparison", "files and devices"]),
    ],
    ids=["train.py", "reproduce.py"],
)
def test_help_shows_flags_in_groups(parser, titles):
    assert re.findall(r"^(\S.*):$", parser.format_help(), re.MULTILINE)[-len(titles) - 1 :] == [*titles, "examples"]


@pytest.mark.parametrize("command", [train, reproduce, t_test, figures], ids=lambda command: command.__name__)
def test_help_has_examples_that_are_right(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    examples = re.findall(rf"^ +python {command.__name__}\.py (.*)", shown, re.MULTILINE)
    assert examples and shown.endswith("\nUSAGE.md explains more.\n")
    parse_flags = {train: parse, reproduce: plan.parse}.get(command) or command.make_parser().parse_args
    for example in examples:
        parse_flags(shlex.split(example, comments=True))


@pytest.mark.parametrize("terminal", [True, False])
def test_start_is_announced_on_a_terminal(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    answer_at_once("x.py", lambda: None)
    assert capsys.readouterr() == ("", "x.py: starting, which takes some seconds\n" * terminal)


def test_order_of_flags_is_that_of_committed_files():
    """They have it in their headers, and in their names."""
    files = [*(ROOT / "results").glob("*/*-seed*.csv")]
    assert files
    for file in files:
        header = dict(re.findall(r"^# (\w+): (.*)$", file.read_text(), re.MULTILINE))
        of_numbers = [flag for flag in header if flag in DEFAULTS and flag not in WITHOUT_EFFECT]
        if "equivalent" in header:  # the newest of these flags: before it, there was another order
            assert of_numbers == [flag for flag in DEFAULTS if flag in of_numbers]
        given = {flag: header[flag] for flag in of_numbers if header[flag] not in ("null", "false")}
        flags = [f"--{flag}" if value == "true" else f"--{flag}={value}" for flag, value in given.items()]
        assert parse(flags).run_name == header["name"] == file.stem


def test_wrong_values_are_answered_before_the_slow_imports():
    wrong = run_command("train.py", "--dataset", "digits", "--batch_size", "2000")
    assert wrong.returncode == 2 and "has 1293 training images" in wrong.stderr
    assert run_command("reproduce.py", "--seeds", "3-1").returncode == 2


SAY = """
from pathlib import Path
from command_line.endings import one_line_endings, say
with one_line_endings("x.py"):
    say("a line")
    say("another", "line" * 20000)
Path({file!r}).write_text("done")
"""


@pytest.mark.parametrize("how", ["{} >&- 2>&-", "{} > /dev/full", "{} | head -n 1"])
def test_nobody_reads_what_is_said(tmp_path, how):
    file = tmp_path / "file"
    command = how.format(shlex.join([sys.executable, "-c", SAY.format(file=str(file))]))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == "done"
    assert done.stdout in ("", "a line\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_ends_a_command_in_one_line(capsys, number):
    with pytest.raises(SystemExit) as stop, one_line_endings("x.py", "stopped; come again"):
        signal.raise_signal(number)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "x.py: stopped; come again\n"


def test_every_signal_is_noted(capsys):
    """What is raised within a finalizer is lost; what follows looks at the record."""

    reached = []
    with pytest.raises(SystemExit) as stop, one_line_endings("x.py"):
        with suppress(KeyboardInterrupt):  # as Python does within a finalizer
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(STOP_SIGNALS[-1])  # a second one is noted, and does not disturb the ending
        reached.append(list(ARRIVED))
        for _ in until_stopped([1, 2]):
            reached.append("another step")
    assert stop.value.code == 128 + signal.SIGTERM and capsys.readouterr().err == "x.py: stopped\n"
    assert reached == [[signal.SIGTERM, STOP_SIGNALS[-1]]] and not ARRIVED


def test_signal_that_arrives_while_it_begins_to_be_handled(monkeypatch):
    install, seen, earlier = signal.signal, [], [signal.getsignal(number) for number in STOP_SIGNALS]

    def install_late(number, handler):
        install(number, handler)
        if handler is handle and not ARRIVED:
            signal.raise_signal(number)

    monkeypatch.setattr(signal, "signal", install_late)
    with catch_signals(raising=False):
        seen += ARRIVED
    assert seen == [STOP_SIGNALS[0]] and not ARRIVED
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == earlier


def test_second_ctrl_c_ends_a_command_at_once():
    code = "import signal; from command_line.signals import catch_signals\nwith catch_signals(raising=False):\n"
    code += "    signal.raise_signal(2); print('saving', flush=True); signal.raise_signal(2); print('still there')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "saving\n")


def test_signal_that_is_ignored_stays_so():
    """As under nohup."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals(raising=True):
            signal.raise_signal(signal.SIGHUP)
            assert not ARRIVED
    finally:
        signal.signal(signal.SIGHUP, earlier)


AT_END_OF_INPUT = """
import os, signal, time
{before}
from command_line.endings import one_line_endings
from command_line.signals import raise_if_stopped, stop_at_end_of_input
with one_line_endings("x.py"):
    stop_at_end_of_input()
    print("begun", flush=True)
    while True:
        raise_if_stopped()
        time.sleep(0.01)
"""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["", "SIGTERM ignored"])
def test_end_of_input_stops_a_command(before):
    """So a run ends with the process that has started it, also where signals do not reach it."""
    environment = {**os.environ, STOP_AT_END_OF_INPUT: "1"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", AT_END_OF_INPUT.format(before=before)]
    with subprocess.Popen(command, **streams, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdout.readline() == "begun\n"
        _, error = process.communicate("")
    assert (process.returncode, error) == (143, "x.py: stopped\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n lines"), "error: two lines"),
        (FileNotFoundError(2, "No such file", "a.csv"), "error: [Errno 2] No such file: 'a.csv'"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "error: there is too little memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: there is too little memory\n"),
        (RuntimeError("could not create a memory object"), "error: there is too little memory\n"),
        (MemoryError(), "error: there is too little memory\n"),
        (ValueError("\x1b[31m a\b.csv \udcff γ"), "error: \\x1b[31m a\\x08.csv \\udcff γ\n"),
    ],
)
def test_error_ends_a_command_in_one_line(capsys, error, line):
    with pytest.raises(SystemExit) as stop, one_line_endings("x.py"):
        raise error
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"x.py: {line}") and shown.count("\n") == 1


def test_long_value_is_cut(capsys):
    with pytest.raises(SystemExit), one_line_endings("x.py"):
        raise ValueError(f"argument --seed: not '{'9' * 5000}': give a small one")
    shown = capsys.readouterr().err
    assert shown.startswith("x.py: error: argument --seed: not '999") and shown.endswith("999': give a small one\n")
    assert len(shown) < 1100 and " ... " in shown


def test_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), one_line_endings("x.py"):
        raise KeyError("a mistake")
    for error in (KeyboardInterrupt(), KeyboardInterrupt("a mistake")):  # to which no signal has led
        with pytest.raises(RuntimeError, match="no signal has arrived"), one_line_endings("x.py"):
            raise error
    too_many_files = RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)")
    with pytest.raises(RuntimeError, match="Too many open files"), one_line_endings("train.py"):
        raise too_many_files


def test_letters_that_a_stream_does_not_know():
    code = "from command_line.endings import open_streams, say; open_streams(); say('γ ± 1')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "\\u03b3 \\xb1 1\n")


def test_hyphens_in_flags():
    assert parse(["--num-epochs", "5", "--batch-size=64", "--name", "a-b"]) == parse(
        ["--num_epochs", "5", "--batch_size=64", "--name=a-b"]
    )
