"""`python reproduce.py` with runs that train a small network on few images, wherever they are made."""

import figures
import reproduce
from small import construct_small_network, train_small

run_cell, run_in_worker = reproduce.run_cell, reproduce.run_in_worker


def run_small_cell(cell: reproduce.Cell, device: str | None) -> tuple[reproduce.Cell, reproduce.Outcome]:
    """`reproduce.run_cell` on them."""
    train_small()
    return run_cell(cell, device)


def run_small_in_worker(cell: reproduce.Cell, device: str | None) -> tuple[reproduce.Cell, reproduce.Outcome]:
    """`reproduce.run_in_worker` on them."""
    train_small()
    return run_in_worker(cell, device)


def main() -> None:
    """The command line."""
    train_small()
    figures.construct_network = construct_small_network
    reproduce.run_cell, reproduce.run_in_worker = run_small_cell, run_small_in_worker
    reproduce.main()


if __name__ == "__main__":
    from small_experiment import main  # so that other processes find everything of this file by its import

    main()
