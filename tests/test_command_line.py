import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line.endings import one_line_endings
from command_line.signals import STOP_SIGNALS, on_signals
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
    ("command", "flag"),
    [
        *(("train.py", "--bn_weight"), ("reproduce.py", "--seeds"), ("t_test.py", "--proposed")),
        *(("figures.py", "--output"), ("mechanism.py", "--output")),
    ],
)
def test_help_and_wrong_flags_are_answered_before_the_slow_imports(command, flag):
    shown = run_command(command, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {command}") and flag in shown.stdout
    wrong = run_command(command, "--nonsense", "1")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith(f"{command}: error: ") and wrong.stderr.count("\n") == 1
    assert command in ("train.py", "reproduce.py") or flag in wrong.stderr  # which it needs
    assert (
        "ModuleNotFoundError"
        in run_command(
            command,
            *{"train.py": [], "reproduce.py": [], "mechanism.py": ["--output", "b"]}.get(
                command, ["--proposed", "a", "--baseline", "b"] if command == "t_test.py" else ["a", "--output", "b"]
            ),
        ).stderr
    )  # the test would notice


@pytest.mark.parametrize(
    ("parser", "titles"),
    [
        (make_parser(), ["the paper's method", "training", "files and device", "beyond the paper"]),
        (plan.make_parser(), ["the comparison", "files and devices"]),
    ],
    ids=["train.py", "reproduce.py"],
)
def test_help_shows_flags_in_groups(parser, titles):
    assert re.findall(r"^(\S.*):$", parser.format_help(), re.MULTILINE)[-len(titles) :] == titles


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
        assert parse(flags).name == header["name"] == file.stem


def test_wrong_values_are_answered_before_the_slow_imports():
    wrong = run_command("train.py", "--dataset", "digits", "--batch_size", "2000")
    assert wrong.returncode == 2 and "has 1293 training images" in wrong.stderr
    assert run_command("reproduce.py", "--seeds", "3-1").returncode == 2
    assert run_command("reproduce.py", "--momentum", "2").returncode == 2


SAY = """
import os, sys
sys.path.insert(0, {folder!r})
from command_line.endings import one_line_endings, say
with one_line_endings("x.py"):
    say("a line")
    {between}
    say("another", "line" * 20000)
open({file!r}, "w").write("done")
"""


@pytest.mark.parametrize("how", ["{} >&-", "{} 2>&-", "{} >&- 2>&-", "{} > /dev/full", "{} | head -n 1"])
def test_nobody_reads_what_is_said(tmp_path, how):
    if "/dev/full" in how and not Path("/dev/full").exists():
        pytest.skip("this system has no device that is always full")
    file = tmp_path / "file"
    (tmp_path / "x.py").write_text(SAY.format(folder=str(ROOT), file=str(file), between="import time; time.sleep(0.2)"))
    command = how.format(f"{sys.executable} {tmp_path / 'x.py'}")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == "done"
    assert done.stdout in ("", "a line\n") or "2>&-" in how


def test_ctrl_c_while_modules_are_imported(tmp_path):
    slow = "import sys, time; print('importing', flush=True); time.sleep(60)"
    (tmp_path / "torch.py").write_text(slow)
    command = [
        sys.executable,
        "-c",
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r});"
        f"sys.path.insert(1, {str(ROOT)!r}); sys.argv = ['train.py'];"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "train.py: stopped before it began\n")


AFTER_THE_END = """
import sys, time
sys.path.insert(0, {folder!r})
from command_line.endings import answer_at_once, one_line_endings, say
answer_at_once("x.py", list)
with one_line_endings("x.py"):
    say("all is done")
time.sleep(2)
"""


def test_ctrl_c_after_the_last_line():
    command = [sys.executable, "-c", AFTER_THE_END.format(folder=str(ROOT))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "all is done\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_ends_a_command_in_one_line(capsys, number):
    with pytest.raises(SystemExit) as stop, one_line_endings("x.py", lambda: "stopped; come again"):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "x.py: stopped; come again\n"


def test_signal_that_arrives_while_it_begins_to_be_handled(monkeypatch):
    install, stops, earlier = signal.signal, [], [signal.getsignal(number) for number in STOP_SIGNALS]

    def install_late(number, handler):
        install(number, handler)
        if handler not in (*earlier, signal.SIG_DFL, signal.SIG_IGN) and not stops:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    monkeypatch.setattr(signal, "signal", install_late)
    with on_signals(stops.append):
        pass
    assert stops == [STOP_SIGNALS[0]]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == earlier


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals that are closed")
def test_signal_that_is_ignored_stays_so():
    """As under nohup."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stops = []
        with on_signals(stops.append):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert stops == []
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n lines"), "error: two lines"),
        (FileNotFoundError(2, "No such file", "a.csv"), "error: [Errno 2] No such file: 'a.csv'"),
        (RuntimeError("CUDA out of memory"), "error: there is too little memory\n"),
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
