import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from dask.system import CPU_COUNT

import light
import train
from cluster import ENVIRONMENT, TESTS, Cluster, cluster
from command_line import settings
from experiment import making
from experiment.making import ClusterError, Outcome, make_runs
from light import light_run, process_of
from saved_runs.checkpoint import load_checkpoint
from saved_runs.lock import lock_run
from saved_runs.paths import RunFiles, run_files
from saved_runs.results import read_results
from small import train_small

KILLED = "its process was killed 3 times, perhaps for lack of memory"


@pytest.fixture
def light_runs(monkeypatch):
    """Make stand-ins in place of runs, in other processes too."""
    monkeypatch.setattr(making, "make_run", light.make_run)
    monkeypatch.setattr(making, "make_run_in_worker", light.make_run_in_worker)


def outcomes(path: Path, *names: str, stops: list[int] | None = None, **options) -> dict[str, Outcome]:
    """What comes of stand-ins, by name."""
    runs = [light_run(name, path) for name in names]
    return {run.name: outcome for run, outcome in make_runs(runs, [] if stops is None else stops, **options)}


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- one run --------------------------------------------------------------------------------------------------------


def small_run(path: Path, *flags: str) -> Namespace:
    """The settings of a run on a few digits."""
    return settings.parse(["--dataset", "digits", "--batch_size", "48", "--path", str(path), *flags])


def test_run_does_not_begin_anew(small_network, tmp_path):
    run = small_run(tmp_path, "--num_epochs", "2", "--restart")
    first = making.make_run(run, "cpu", [])
    assert first.num_epochs == 2 and run.restart
    file = run_files(tmp_path, run.name).results
    written = file.stat().st_mtime_ns
    assert making.make_run(run, "cpu", []).test_accuracy == read_results(file).test_accuracy
    assert file.stat().st_mtime_ns == written


def test_what_a_run_raises_is_one_line(tmp_path, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("a loss is\nnot finite")

    run = small_run(tmp_path)
    monkeypatch.setattr(train, "train", diverge)
    assert making.make_run(run, "cpu", []) == "FloatingPointError: a loss is not finite"
    assert "nonsense" in making.make_run(run, "nonsense", [])


def test_stopped_run(small_network, tmp_path):
    run = small_run(tmp_path, "--num_epochs", "1000")
    stops = []
    with ThreadPoolExecutor() as pool:
        being_made = pool.submit(making.make_run, run, "cpu", stops)
        wait_until(run_files(tmp_path, run.name).checkpoint.exists)
        stops.append(signal.SIGTERM)
        assert being_made.result(timeout=10) == signal.SIGTERM


def test_run_of_another_process_is_waited_for(small_network, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "LOCK_SECONDS", 0.01)
    run, stops = small_run(tmp_path, "--num_epochs", "2"), []
    with ThreadPoolExecutor() as pool, lock_run(run_files(tmp_path, run.name)):
        waiting, stopped = (
            pool.submit(making.make_run, run, "cpu", []),
            pool.submit(making.make_run, run, "cpu", stops),
        )
        stops.append(signal.SIGINT)
        assert stopped.result(timeout=10) == signal.SIGINT
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
    assert waiting.result().num_epochs == 2


# --- in this process ------------------------------------------------------------------------------------------------


def test_one_after_the_other(light_runs, tmp_path):
    assert list(outcomes(tmp_path, "a", "b", "c").items()) == [(name, "done on None") for name in "abc"]
    assert process_of(light_run("c", tmp_path)) == os.getpid()


def test_no_run_begins_after_a_stop(light_runs, tmp_path):
    assert outcomes(tmp_path, "a", stops=[signal.SIGTERM]) == {}
    stops = []
    threading.Thread(target=lambda: process_of(light_run("slow", tmp_path)) and stops.append(signal.SIGTERM)).start()
    assert outcomes(tmp_path, "a", "slow", "b", stops=stops) == {"a": "done on None", "slow": signal.SIGTERM}


def test_interrupt_that_no_handler_notes_ends_the_experiment(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    made = list(make_runs([small_run(tmp_path, "--seed", seed) for seed in "12"], [], device="cpu"))
    assert [outcome for _, outcome in made] == [signal.SIGINT]


def test_import_is_quick():
    code = "import sys, experiment.making; sys.exit(bool({'torch', 'dask', 'distributed'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


# --- in processes of this machine -----------------------------------------------------------------------------------


def make_small_run(*arguments) -> Outcome:
    """`making.make_run` with a small network, in any process."""
    train_small()
    return MAKE_RUN(*arguments)


MAKE_RUN = making.make_run


def numbers(run: Namespace) -> dict[str, list]:
    """The numbers of a run."""
    columns = read_results(run_files(run.path, run.name).results).columns
    return {name: column.tolist() for name, column in columns.items()}


def run_at_work(runs: list[Namespace], epochs: int) -> tuple[Namespace, psutil.Process]:
    """A run that is in the middle of being made and has made that many epochs, and the process that makes it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)
        for run in runs:
            files = run_files(run.path, run.name)
            if not files.results.exists() or not epochs < read_results(files.results).num_epochs < 120:
                continue
            for process in psutil.Process().children():
                if any(Path(opened.path) == files.lock.resolve() for opened in process.open_files()):
                    return run, process
    raise TimeoutError


@pytest.fixture
def one_of_two(monkeypatch) -> Iterator[int]:
    """Compute here with as many threads as each of two processes gets."""
    threads, half = torch.get_num_threads(), max(1, CPU_COUNT // 2)
    torch.set_num_threads(half)
    yield half
    torch.set_num_threads(threads)


def test_killed_process_and_stopped_experiment(small_network, one_of_two, tmp_path, monkeypatch):
    """What comes of them in the end is, bit for bit, what comes of undisturbed runs."""
    flags = ["--num_epochs", "150", "--checkpoint_seconds", "0.1"]
    alone, runs = (
        [small_run(tmp_path / folder, *flags, "--seed", seed) for seed in "12"] for folder in ("alone", "disturbed")
    )
    assert all(outcome.num_epochs == 150 for _, outcome in make_runs(alone, [], device="cpu"))
    stops = []

    def disturb() -> Namespace:
        run, process = run_at_work(runs, 10)
        process.kill()
        run_at_work([run], 40)
        stops.append(signal.SIGTERM)
        return run

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(making, "make_run", make_small_run)
        disturbing = pool.submit(disturb)
        made = {run.name: outcome for run, outcome in make_runs(runs, stops, jobs=2, device="cpu")}
        stopped = disturbing.result()
    assert made[stopped.name] == signal.SIGTERM
    state = load_checkpoint(run_files(stopped.path, stopped.name).checkpoint)
    assert state["columns"] == numbers(stopped) and 40 < len(state["columns"]["epoch"]) < 150
    assert state["settings"]["machine"].endswith(f", {one_of_two} threads")
    assert all(outcome.num_epochs == 150 for _, outcome in make_runs(runs, [], device="cpu"))
    assert [numbers(run) for run in runs] == [numbers(run) for run in alone]


def test_run_that_kills_its_process_does_not_stop_the_others(light_runs, tmp_path):
    made = outcomes(tmp_path, "a", "deadly", "b", "c", jobs=2)
    assert made.pop("deadly") == KILLED
    assert made.keys() == {"a", "b", "c"} and all(outcome.startswith("done") for outcome in made.values())


def kill_children(number: int) -> None:
    """Kill that many processes that are about to make runs, each as soon as it is there."""
    killed = set()
    while len(killed) < number:
        for process in set(psutil.Process().children()) - killed:
            with suppress(psutil.Error):
                if any("spawn_main" in word for word in process.cmdline()):
                    process.kill()
                    killed.add(process)
        time.sleep(0.01)


def test_process_that_is_killed_before_it_is_there(light_runs, tmp_path):
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill_children, 2)
        assert outcomes(tmp_path, "a", "b", jobs=2).keys() == {"a", "b"}
        killing.result(timeout=1)


def test_processes_that_cannot_be_started(light_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "ATTEMPTS", 1)
    with ThreadPoolExecutor() as pool, pytest.raises(ClusterError, match="2 processes cannot be started"):
        pool.submit(kill_children, 1)
        outcomes(tmp_path, "a", "b", jobs=2)


def test_processes_share_out_two_gpus(light_runs, tmp_path):
    """One that takes the place of another takes over its GPU."""
    made = outcomes(tmp_path, "unlucky", "patient", "patient too", jobs=3)
    assert sorted(made.values()) == ["done on cuda:0", "done on cuda:0", "done on cuda:1"]


@pytest.mark.parametrize("device", ["cpu", "cuda:2"])
def test_device_that_is_given(device, light_runs, tmp_path):
    assert outcomes(tmp_path, "a", "b", jobs=2, device=device) == dict.fromkeys("ab", f"done on {device}")


class Experiment:
    """An experiment of stand-ins on a terminal of its own."""

    def __init__(self, path: Path, *names: str) -> None:
        self.pid, self.terminal = pytest.importorskip("pty").fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, TESTS / "light.py", str(path), *names], ENVIRONMENT)

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, negative for a signal, and the lines on the terminal, once no process writes there."""
        shown = b""
        with suppress(OSError):  # Linux raises it when all of its processes are gone, others read nothing more
            while piece := os.read(self.terminal, 10_000):
                shown += piece
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), shown.decode().splitlines()


def test_ctrl_c_in_a_terminal(tmp_path):
    """It reaches all processes, also one that is idle."""
    experiment = Experiment(tmp_path, "a", "slow")
    process_of(light_run("a", tmp_path)), process_of(light_run("slow", tmp_path))
    os.killpg(experiment.pid, signal.SIGINT)
    code, lines = experiment.end()
    assert (code, sorted(re.sub("cuda:.", "", line) for line in lines)) == (0, ["a done on ", "slow 2"])
    assert (tmp_path / "begun" / "slow saved").exists()


@pytest.mark.parametrize("names", [("SIGINT", "SIGINT"), ("SIGKILL",)], ids=["Ctrl-C twice", "kill -9"])
def test_processes_do_not_outlive_the_experiment(names, tmp_path):
    experiment = Experiment(tmp_path, "slow", "slow too")
    numbers = [getattr(signal, name) for name in names]
    processes = [psutil.Process(process_of(light_run(name, tmp_path))) for name in ("slow", "slow too")]
    for number in numbers:
        os.killpg(experiment.pid, number) if number == signal.SIGINT else os.kill(experiment.pid, number)
        time.sleep(0.1)
    assert experiment.end() == (-numbers[-1], [])
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)
    assert all((tmp_path / "begun" / f"{name} saved").exists() for name in ("slow", "slow too"))


def test_killed_experiment_loses_no_epoch(tmp_path):
    """Its processes save all that they have done since the last checkpoint, which was after the first epoch."""
    flags = ["--num_epochs", "1000000", "--checkpoint_seconds", "1e9", "--device", "cpu"]
    baseline = small_run(tmp_path, *flags, "--bn_weight", "1", "--c", "1", "--input_norm", "dataset")
    runs = [baseline, small_run(tmp_path, *flags)]
    all_files = [run_files(tmp_path, run.name) for run in runs]
    command = [sys.executable, TESTS / "small_experiment.py", "--jobs", "2", "--seeds", "1", "--path", tmp_path]
    command += ["--dataset", "digits", "--batch_size", "48", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=ENVIRONMENT, **quiet) as experiment:
        for files in all_files:
            wait_until(lambda file=files.results: file.exists() and read_results(file).num_epochs > 10)
        experiment.kill()
    for files, run in zip(all_files, runs, strict=True):
        wait_until(lambda files=files: is_free(files), seconds=10)
        state = load_checkpoint(files.checkpoint)
        assert state["columns"] == numbers(run) and len(state["columns"]["epoch"]) > 10


def is_free(files: RunFiles) -> bool:
    """Whether no process is at work on a run."""
    with suppress(BlockingIOError), lock_run(files):
        return True
    return False


# --- on a cluster ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with two workers that are started again when they are killed."""
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.start("worker", "--nworkers", "2", "--nthreads", "2")
        started.workers(2)
        yield started


def test_cluster(light_runs, shared_cluster, tmp_path):
    names = ["a", "deadly", "b", "c"]
    expected = {name: KILLED if name == "deadly" else "done on None" for name in names}
    assert outcomes(tmp_path, *names, scheduler=shared_cluster.address) == expected


def test_experiments_on_one_cluster_are_stopped_one_by_one(light_runs, shared_cluster, tmp_path):
    """One of them is at work on all workers, so that the other one waits for them."""
    options, first, second = {"scheduler": shared_cluster.address}, [], []
    with ThreadPoolExecutor() as pool:
        try:
            being_made = pool.submit(outcomes, tmp_path, "slow one", "slow two", stops=first, **options)
            process_of(light_run("slow one", tmp_path)), process_of(light_run("slow two", tmp_path))
            waiting = pool.submit(outcomes, tmp_path, "a", "b", "c", stops=second, **options)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
            second.append(signal.SIGINT)
            assert waiting.result(timeout=5) == {}
            assert not being_made.done()
        finally:
            first.append(signal.SIGTERM)
        assert being_made.result(timeout=5) == {"slow one": signal.SIGTERM, "slow two": signal.SIGTERM}


def test_folder_that_workers_do_not_share(light_runs, shared_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # what is made here is not there
    with pytest.raises(ClusterError, match=f"{tmp_path} must be a folder that all workers share; not so for tcp"):
        outcomes(tmp_path, "a", scheduler=shared_cluster.address)


def test_worker_without_the_project(light_runs, shared_cluster, tmp_path):
    others = shared_cluster.workers(2)
    worker = shared_cluster.add_worker(PYTHONPATH="")
    [address] = shared_cluster.workers(3) - others
    with pytest.raises(ClusterError, match=f"PYTHONPATH={TESTS.parent}: {address} cannot import experiment"):
        outcomes(tmp_path, "a", scheduler=shared_cluster.address)
    worker.kill()


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What Dask's client would log, on standard error as a rule."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("distributed.client").addHandler(handler)
    yield records
    logging.getLogger("distributed.client").removeHandler(handler)


def test_cluster_that_comes_and_goes(light_runs, logged, tmp_path, monkeypatch):
    """It has no worker yet; one dies, one that joins takes over its run; the scheduler dies."""
    monkeypatch.setattr(making, "CONNECT_SECONDS", 2)
    with cluster(tmp_path) as started:
        with monkeypatch.context() as patch, pytest.raises(ClusterError, match=f"{started.address} has no workers"):
            patch.setattr(making, "ANSWER_SECONDS", 0.5)
            outcomes(tmp_path, "a", scheduler=started.address)
        first = started.add_worker()
        made = make_runs([light_run(name, tmp_path) for name in ("unlucky", "slow")], [], scheduler=started.address)

        def disturb() -> None:
            assert process_of(light_run("unlucky", tmp_path)) == first.pid
            first.wait()  # it has been killed
            started.add_worker()
            process_of(light_run("slow", tmp_path))
            started.scheduler.kill()

        with ThreadPoolExecutor() as pool:
            disturbing = pool.submit(disturb)
            run, outcome = next(made)
            assert (run.name, outcome) == ("unlucky", "done on None")
            with pytest.raises(ClusterError, match=f"no Dask scheduler answers at {started.address}: start it"):
                next(made)
            disturbing.result()
    assert logged == []


@pytest.mark.parametrize("listens", [False, True])
def test_address_of_no_scheduler(listens, light_runs, tmp_path, monkeypatch):
    """Nothing is there, or something that never says a word."""
    monkeypatch.setattr(making, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        with pytest.raises(ClusterError, match=f"no Dask scheduler answers at {address}"):
            outcomes(tmp_path, "a", scheduler=address)


def test_runs_may_have_processes_of_their_own(light_runs, tmp_path):
    """As those that decode images."""
    assert sorted(outcomes(tmp_path, "parent", "parent too", jobs=2).values()) == ["done on cuda:0", "done on cuda:1"]
    assert (tmp_path / "begun" / "parent's child").exists() and (tmp_path / "begun" / "parent too's child").exists()
