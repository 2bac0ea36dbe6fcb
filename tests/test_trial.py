"""Networks of one's own that can or cannot be trained, saved and resumed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from command_line.flag_types import SettingError
from run_settings import Settings
from training.trial import check_network


class Odd(nn.Module):
    """A network whose outputs can depend on more than its state: `change` makes what it computes of its features."""

    def __init__(self, change: Callable[["Odd", Tensor], Tensor], **more: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("forgotten", torch.zeros(1), persistent=False)
        self.classify = nn.Linear(8, 10)
        self.change = change
        vars(self).update(more)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.change(self, self.features(images).mean((2, 3))))


def count_in_buffer(network: Odd, features: Tensor) -> Tensor:
    network.forgotten += network.training
    return features + network.forgotten


def once(network: Odd, features: Tensor) -> Tensor:
    if network.training and not network.ready:
        network.scale.fill_(features.std().item())
        network.ready = True
    return features / network.scale


def drop(network: Odd, features: Tensor) -> Tensor:
    if network.training:
        features = features * torch.rand(features.shape, generator=network.generator)
    return features


def leave(*_: Any) -> Tensor:
    raise SystemExit(0)


def leave_evaluation(network: Odd, features: Tensor) -> Tensor:
    return features if network.training else leave()


NOT_HELD = {
    "buffer that is not persistent": lambda: Odd(count_in_buffer),
    "flag beside a buffer": lambda: Odd(once, ready=False),
    "generator of its own": lambda: Odd(drop, generator=torch.Generator().manual_seed(1)),
}
OTHERS = {
    "exit": (lambda: Odd(leave), "cannot train on two images of 8×8 pixels: SystemExit: 0"),
    "complex": (lambda: nn.Sequential(Odd(lambda _, x: x), Complex()), "computes logits of type torch.complex64"),
    "tuple in evaluation": (lambda: Twice(Odd(lambda _, x: x)), r"computes tuple .* in evaluation mode"),
    "exit in evaluation": (lambda: Odd(leave_evaluation), "cannot be evaluated: SystemExit: 0"),
    "no gradient": (lambda: nn.Sequential(Odd(lambda _, x: x), Detached()), "from which no gradient leads to its par"),
}


class Twice(nn.Sequential):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return logits if self.training else (logits, logits)


class Complex(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits + 0j


class Detached(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.detach()


def check(monkeypatch, build: Callable[[], nn.Module]) -> None:
    """`check_network`, where a new network of the run is what `build` gives."""
    monkeypatch.setattr("training.trial.construct", lambda *_: build())
    monkeypatch.setattr("training.trial.find_seed_problem", lambda *_: None)  # which would import a module
    image_set = SimpleNamespace(splits={"train": torch.arange(8)}, classes=range(10), size=(8, 8))
    check_network(Settings(network="own:odd", dataset="flowers", batch_size=4), build(), image_set)


@pytest.mark.parametrize("kind", NOT_HELD)
def test_state_that_no_checkpoint_holds_is_refused(monkeypatch, kind):
    with pytest.raises(SettingError, match=r"depends on more than its state_dict.*; keep"):
        check(monkeypatch, NOT_HELD[kind])


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_trained_is_refused(monkeypatch, kind):
    build, problem = OTHERS[kind]
    with pytest.raises(SettingError, match=problem):
        check(monkeypatch, build)


def test_draws_of_the_global_generators_are_no_state(monkeypatch):
    check(monkeypatch, lambda: Odd(lambda network, x: F.dropout(x, 0.5, network.training)))


LATE = """
from torch import nn

class Late(nn.Sequential):
    def forward(self, images):
        if len(images) > 2:
            raise SystemExit(0)
        return super().forward(images)

def late(num_classes):
    return Late(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_exit_within_a_run_is_no_success(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("late_network.py").write_text(LATE)
    with pytest.raises(RuntimeError, match=r"late_network:late has ended the program by sys.exit\(0\)"):
        train.train(Settings(dataset="digits", network="late_network:late", num_epochs=1, device="cpu"))
