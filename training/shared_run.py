"""A run on disk that several processes make together."""

import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn, optim

from run_settings import Settings
from saved_runs.run import Run
from seeds import random_states, set_random_states

if TYPE_CHECKING:
    from training.processes import Processes


class SharedRun(Run):
    """A run of which the first process alone has the files; the others get from it what is in them.

    Every epoch and evaluation begins with its random generators in all processes, so that all draw the same order and
    flips. After these, the others go on with a seed of their own, for networks with dropout.

    Between two batches all agree on whether to go on: a signal, or an image that is damaged, ends all at the same step.
    """

    def __init__(self, world: "Processes", settings: Settings, stops: list[int] | None) -> None:
        super().__init__(settings, stops)
        self.world, self.processes = world, world.size

    def __enter__(self) -> "SharedRun":
        self.world.together(super().__enter__ if self.world.first else lambda: None)
        self.results, state = self.world.from_first((self.results, self.state))
        if not self.world.first:
            self.state = self.saved_state = state
        return self

    def __exit__(self, *error: object) -> None:
        self.world.pulse.ending.set()
        super().__exit__(*error)

    def resume(self, network: nn.Module, optimizer: optim.Optimizer, scheduler: optim.lr_scheduler.LRScheduler) -> None:
        super().resume(network, optimizer, scheduler)
        if not self.world.first:
            self.state = self.saved_state = None

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        states = self.world.from_first(random_states() if self.world.first else None)
        if not self.world.first:
            set_random_states(states)
        remaining = super().steps(batches)
        batch = self.world.together(lambda: next(remaining, None))
        self.seed_others()
        while batch is not None:
            if len(batch[1]):  # or else this process has no share of the last images of an evaluation
                yield batch
            batch = self.world.together(lambda: next(remaining, None))

    def seed_others(self) -> None:
        """Let the random generators of all processes but the first one go ways of their own."""
        if not self.world.first:
            seed = torch.randint(2**32, (self.world.rank,))[-1].item()
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)

    def record(self, *numbers: float) -> None:
        self.world.together(lambda: Run.record(self, *numbers) if self.world.first else None)
        self.results = self.world.from_first(self.results)
