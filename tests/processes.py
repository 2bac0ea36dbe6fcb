"""Runs whose every step is noted, to compare those of one process with those that torchrun's processes make together.

    torchrun --nproc_per_node=2 tests/processes.py FOLDER

makes the runs of FOLDER/jobs.json, one after the other; what process R saw is in FOLDER/R.pt. With arguments of
train.py after the folder, it makes one run of them that waits to be stopped, with the small network on a few digits.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist
from sklearn import datasets

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from command_line.signals import ARRIVED
from small import construct_small_network, load_few_digits, train_small
from training import preparation

RANK = os.environ.get("RANK", "0")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DRIVER = str(Path(__file__).absolute())


def record(job: dict[str, Any]) -> dict[str, Any]:
    """Make a run in the current folder and return what comes of it.

    Args:
        job: 'flags' of train.py; 'small' for the small network on a few digits; 'double' for computing in float64, in
            which rounding stays small; further flags of process R under its number.

    Returns:
        'images', those of every call of the network; 'losses' of every training step; 'groups', the names in the
        optimizer's groups with their learning rate and weight decay, and 'scales', all γ, both before the first step;
        'columns' of the results; 'error', what was printed on standard error; 'code', the exit code.
    """
    seen: dict[str, Any] = {"images": [], "losses": [], "groups": [], "scales": {}, "columns": {}, "code": 0}
    compute_logits, train_one_epoch, check_finite = train.compute_logits, train.train_one_epoch, train.check_finite

    def noted_logits(network, images, settings):
        seen["images"].append(images)
        return network(images.double()) if job.get("double") else compute_logits(network, images, settings)

    def noted_epoch(network, batches, optimizer, *arguments):
        weights = {name.removeprefix("module."): weight for name, weight in network.named_parameters()}
        names = {id(weight): name for name, weight in weights.items()}
        if not seen["groups"]:
            for group in optimizer.param_groups:
                of_group = [names[id(weight)] for weight in group["params"]]
                seen["groups"].append((of_group, group["lr"], group["weight_decay"]))
            seen["scales"] = {name: weights[name].tolist() for name in seen["groups"][1][0]}
        return train_one_epoch(network, batches, optimizer, *arguments)

    def noted_check(loss, what):
        if "step" in what:
            seen["losses"].append(loss)
        check_finite(loss, what)

    noted = {"compute_logits": noted_logits, "train_one_epoch": noted_epoch, "check_finite": noted_check}
    errors = io.StringIO()
    with ExitStack() as patches:
        patches.enter_context(patch.multiple(train, **noted))
        if job.get("small"):
            patches.enter_context(patch.object(preparation, "construct_network", construct_small_network))
            patches.enter_context(patch.object(datasets, "load_digits", load_few_digits))
        if job.get("double"):
            patches.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        patches.enter_context(redirect_stderr(errors))
        try:
            results = train.main([*job["flags"], *job.get(RANK, [])])
            seen["columns"] = {name: column.tolist() for name, column in results.columns.items()}
        except SystemExit as end:
            seen["code"] = end.code
    return {**seen, "error": errors.getvalue()}


def run_until_stopped(folder: Path, flags: list[str]) -> None:
    """One run that stands still after its first epoch until a signal arrives; torchrun sends one if a process dies.

    Files in the folder have this process's number and exit code.
    """
    compute_logits = train.compute_logits

    def wait_for_signal(*arguments: Any) -> Any:
        while list(folder.glob("results/*.csv")) and not ARRIVED:
            time.sleep(0.01)
        return compute_logits(*arguments)

    train_small()
    train.compute_logits = wait_for_signal
    (folder / f"process-{RANK}").write_text(str(os.getpid()))
    try:
        train.main(flags)
    except SystemExit as end:
        (folder / f"code-{RANK}").write_text(str(end.code))
        raise


@contextmanager
def started(command: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """A command, of which nothing is left at the end."""
    with output.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.wait()


def init_anew(init: Callable[..., None], number: int, backend: str, timeout: timedelta) -> None:
    """`dist.init_process_group` for another run of the same processes, which needs keys of its own in their store."""
    store, rank, size = next(dist.rendezvous("env://"))
    init(backend, store=dist.PrefixStore(str(number), store), rank=rank, world_size=size, timeout=timeout)


def main(folder: Path, *flags: str) -> None:
    """The command line."""
    if flags:
        run_until_stopped(folder.absolute(), list(flags))
    else:
        os.chdir(folder)
        jobs = json.loads(Path("jobs.json").read_text())
        seen = {}
        for number, (name, job) in enumerate(jobs.items()):
            with patch.object(dist, "init_process_group", partial(init_anew, dist.init_process_group, number)):
                seen[name] = record(job)
        torch.save(seen, f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
