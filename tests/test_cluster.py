import logging
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import light
from cluster import TESTS, Cluster, cluster
from experiment import cluster as engine
from experiment import making
from experiment.cluster import ClusterError
from experiment.making import make_runs
from light import begun, light_run, outcomes, process_of, saved, wait_until
from run_settings import Settings
from saved_runs.results import Results


@pytest.fixture(autouse=True)
def light_runs(monkeypatch):
    """Make stand-ins in place of runs."""
    monkeypatch.setattr(making, "make_run", light.make_run_in_worker)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with one worker."""
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.add_worker()
        started.workers(1)
        yield started


def test_every_outcome(shared_cluster, tmp_path):
    made = outcomes(tmp_path, "deadly", "a", "diverged", "busy", scheduler=shared_cluster.address, device="cuda:7")
    assert made.pop("a").header["device"] == made.pop("busy").header["device"] == "cuda:7"
    assert {name: f"{type(error).__name__}: {error}" for name, error in made.items()} == {
        "deadly": "ChildProcessError: it was lost 3 times: its process was killed by SIGKILL",
        "diverged": "FloatingPointError: it is diverged",
    }


def test_experiments_on_one_cluster_are_stopped_one_by_one(shared_cluster, tmp_path):
    """One of them is at work, so that the other one waits for the worker."""
    scheduler, slow, first, second, given = shared_cluster.address, light_run("slow", tmp_path), [], [], []
    with ThreadPoolExecutor() as pool:
        try:
            being_made = pool.submit(outcomes, tmp_path, "slow", "never", stops=first, scheduler=scheduler)
            process_of(slow)
            waiting = pool.submit(outcomes, tmp_path, "a", "b", stops=second, scheduler=scheduler, show=given.extend)
            wait_until(lambda: given)
            second.append(signal.SIGINT)
            assert waiting.result() == {}
            assert not being_made.done() and not begun(given[0]).exists()
        finally:
            first.append(signal.SIGTERM)
        assert being_made.result() == {"slow": signal.SIGTERM}
    assert saved(slow).exists()


def test_folder_that_workers_do_not_share(shared_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # what is made here is not there
    with pytest.raises(ClusterError, match=f"tcp.*: {tmp_path} must be a folder that all workers share"):
        outcomes(tmp_path, "a", scheduler=shared_cluster.address)


def test_workers_without_the_project(tmp_path):
    """One of the first is refused, one that joins is left alone; so a run that loses its worker goes on in another."""
    with cluster(tmp_path) as started:
        useless, reported = started.add_worker(PYTHONPATH=""), []
        [address] = started.workers(1)
        with pytest.raises(
            ClusterError, match=f"{address}: it cannot import experiment: start .* PYTHONPATH={TESTS.parent}"
        ):
            outcomes(tmp_path, "a", scheduler=started.address)
        useless.kill()
        first = started.add_worker()
        wait_until(lambda: len(known := started.workers(1)) == 1 and address not in known)
        runs = [light_run(name, tmp_path) for name in "ab"]
        made = make_runs(runs, scheduler=started.address, report=reported.append)
        next(made)
        started.add_worker(PYTHONPATH="")
        started.add_worker()
        started.workers(3)
        first.kill()
        assert [type(outcome) for _, outcome in made] == [Results]
        assert len(reported) == 1 and reported[0].startswith("no runs for a worker that has joined: tcp")


def test_worker_that_is_frozen(tmp_path, monkeypatch):
    """It is named, and not waited for."""
    with cluster(tmp_path) as started:
        worker, stops, reported = started.add_worker(), [], []
        [address] = started.workers(1)

        def show(at_work: list[Settings]) -> None:
            if at_work and begun(at_work[0]).exists():
                worker.send_signal(signal.SIGSTOP)
                monkeypatch.setattr(engine, "ANSWER_SECONDS", 0.5)  # for the one question to it
                stops.append(signal.SIGTERM)

        def report(line: str) -> None:
            monkeypatch.setattr(engine, "ANSWER_SECONDS", 10)
            reported.append(line)

        options = {"scheduler": started.address, "stops": stops, "show": show, "report": report}
        assert outcomes(tmp_path, "slow", "never", **options) == {}
        assert reported == [f"the worker {address} does not answer: its run may go on"]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What Dask's client would log, on standard error as a rule."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger("distributed.client").addHandler(handler)
    yield records
    logging.getLogger("distributed.client").removeHandler(handler)


def test_cluster_that_comes_and_goes(logged, tmp_path, monkeypatch):
    """It has no worker yet, then one that dies with its run; one is killed, whose run is saved, and goes on in one that
    joins; the scheduler dies."""
    with cluster(tmp_path) as started:
        with monkeypatch.context() as patch, pytest.raises(ClusterError, match=f"{started.address} has no workers"):
            patch.setattr(engine, "WORKER_SECONDS", 0)
            outcomes(tmp_path, "a", scheduler=started.address)
        with monkeypatch.context() as patch:
            patch.setattr(making, "make_run", light.die)
            patch.setattr(making, "ATTEMPTS", 1)
            started.add_worker()
            assert "it was lost 1 times: its worker tcp" in str(outcomes(tmp_path, "a", scheduler=started.address)["a"])
        first = started.add_worker()
        runs = [light_run(name, tmp_path) for name in ("interrupted", "slow")]
        made = make_runs(runs, scheduler=started.address)

        def disturb() -> None:
            process_of(runs[0])
            first.kill()
            started.add_worker()
            process_of(runs[1])
            started.scheduler.kill()

        with ThreadPoolExecutor() as pool:
            disturbing = pool.submit(disturb)
            run, outcome = next(made)
            assert run.name == "interrupted" and isinstance(outcome, Results)
            with pytest.raises(
                ClusterError, match=f"Dask scheduler at {started.address} does not answer any more: start it"
            ):
                next(made)
            disturbing.result()
    assert logged == []


@pytest.mark.parametrize("listens", [False, True])
def test_address_of_no_scheduler(listens, tmp_path, monkeypatch):
    """Nothing is there, or something that never says a word."""
    monkeypatch.setattr(engine, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        with pytest.raises(ClusterError, match=f"no Dask scheduler answers at {address}"):
            outcomes(tmp_path, "a", scheduler=address)
