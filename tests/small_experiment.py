"""`python reproduce.py` with runs that train a small network on few images, wherever they are made."""

import argparse

import reproduce
import trained_networks
from experiment import making
from small import construct_small_network, train_small

make_run = making.make_run


def make_small_run(settings: argparse.Namespace, device: str | None, stops: list[int]) -> making.Outcome:
    """`making.make_run` on them, in a module that other processes import."""
    train_small()
    return make_run(settings, device, stops)


def main() -> None:
    """The command line."""
    train_small()
    trained_networks.construct_network = construct_small_network
    making.make_run = make_small_run
    reproduce.main()


if __name__ == "__main__":
    from small_experiment import main  # so that other processes find everything of this file by its import

    main()
