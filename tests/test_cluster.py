import logging
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import pytest

import light
from cluster import TESTS, Cluster, cluster
from experiment import cluster as engine
from experiment.cluster import ClusterError
from experiment.making import make_runs
from experiment.run_process import Outcome
from light import begun, light_run, process_of
from saved_runs.results import Results


@pytest.fixture(autouse=True)
def light_runs(monkeypatch):
    """Make stand-ins in place of runs."""
    monkeypatch.setattr(engine, "make_run_in_worker", light.make_run_in_worker)


def outcomes(path: Path, *names: str, stops: list[int] | None = None, **options) -> dict[str, Outcome]:
    """What comes of stand-ins, by name."""
    runs = [light_run(name, path) for name in names]
    return {run.name: outcome for run, outcome in make_runs(runs, [] if stops is None else stops, **options)}


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster with one worker."""
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.add_worker()
        started.workers(1)
        yield started


def test_every_outcome(shared_cluster, tmp_path):
    made = outcomes(tmp_path, "deadly", "a", "diverged", scheduler=shared_cluster.address, device="cuda:7")
    assert made.pop("a").header["device"] == "cuda:7"
    assert {name: f"{type(error).__name__}: {error}" for name, error in made.items()} == {
        "deadly": "ChildProcessError: its process was killed 3 times by SIGKILL",
        "diverged": "FloatingPointError: it is diverged",
    }


def test_experiments_on_one_cluster_are_stopped_one_by_one(shared_cluster, tmp_path):
    """One of them is at work, so that the other one waits for the worker."""
    options, first, second, told = {"scheduler": shared_cluster.address}, [], [], []
    with ThreadPoolExecutor() as pool:
        try:
            tell = {"tell": lambda run, bar: told.append((run.name, bar))}
            being_made = pool.submit(outcomes, tmp_path, "slow", "never", stops=first, **options, **tell)
            deadline = time.monotonic() + 60
            while ("slow", "epoch 1/1") not in told:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            waiting = pool.submit(outcomes, tmp_path, "a", "b", stops=second, **options)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
            second.append(signal.SIGINT)
            assert waiting.result(timeout=10) == {}
            assert not being_made.done()
        finally:
            first.append(signal.SIGTERM)
        assert being_made.result(timeout=10) == {"slow": signal.SIGTERM}
    assert begun(light_run("slow", tmp_path)).with_suffix(".saved").exists()


def test_folder_that_workers_do_not_share(shared_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # what is made here is not there
    with pytest.raises(ClusterError, match=f"{tmp_path} must be a folder that all workers share; not so for tcp"):
        outcomes(tmp_path, "a", scheduler=shared_cluster.address)


def test_worker_without_the_project(shared_cluster, tmp_path):
    others = shared_cluster.workers(1)
    worker = shared_cluster.add_worker(PYTHONPATH="")
    [address] = shared_cluster.workers(2) - others
    with pytest.raises(ClusterError, match=f"PYTHONPATH={TESTS.parent}: {address} cannot import experiment"):
        outcomes(tmp_path, "a", scheduler=shared_cluster.address)
    worker.kill()


def test_worker_that_joins_beside_one_without_the_project(tmp_path):
    with cluster(tmp_path) as started:
        first = started.add_worker()
        stops = []
        made = make_runs([light_run(name, tmp_path) for name in "ab"], stops, scheduler=started.address)
        next(made)
        started.add_worker(PYTHONPATH="")
        started.add_worker()
        started.workers(3)
        first.kill()
        patience = Timer(60, stops.append, [signal.SIGTERM])  # for a run that gets no worker
        patience.start()
        outcomes = [outcome for _, outcome in made]
        patience.cancel()
        assert [type(outcome) for outcome in outcomes] == [Results]


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
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 2)
    with cluster(tmp_path) as started:
        with monkeypatch.context() as patch, pytest.raises(ClusterError, match=f"{started.address} has no workers"):
            patch.setattr(engine, "ANSWER_SECONDS", 0.5)
            outcomes(tmp_path, "a", scheduler=started.address)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "make_run_in_worker", light.die)
            patch.setattr(engine, "ATTEMPTS", 1)
            started.add_worker()
            assert "its worker was lost" in str(outcomes(tmp_path, "a", scheduler=started.address)["a"])
        first = started.add_worker()
        runs = [light_run(name, tmp_path) for name in ("interrupted", "slow")]
        made = make_runs(runs, [], scheduler=started.address)

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
            assert begun(run).with_suffix(".saved").exists()
            with pytest.raises(
                ClusterError, match=f"Dask scheduler at {started.address} does not answer any more: start it"
            ):
                next(made)
            disturbing.result()
    assert logged == []


@pytest.mark.parametrize("listens", [False, True])
def test_address_of_no_scheduler(listens, tmp_path, monkeypatch):
    """Nothing is there, or something that never says a word."""
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        with pytest.raises(ClusterError, match=f"no Dask scheduler answers at {address}"):
            outcomes(tmp_path, "a", scheduler=address)
