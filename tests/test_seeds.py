import hashlib
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seeds import make_complex, make_deterministic, random_states, set_random_states


@pytest.fixture(autouse=True)
def keep_state(monkeypatch):
    """Give back what make_deterministic changes for the whole process."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("PYTHONHASHSEED", "random")


@pytest.mark.parametrize(("seed", "expected"), [(0, 4186399962), (1, 1869972635), ("1", 1869972635)])
def test_known_values(seed, expected):
    assert make_complex(seed) == expected


@pytest.mark.parametrize("seed", [2, "15", 88265, -3, 10**30, "a text", "γ"])
def test_last_32_bits_of_md5(seed):
    as_number = int.from_bytes(hashlib.md5(f"{seed}".encode()).digest(), "big")
    assert make_complex(seed) == as_number % 2**32


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers() | st.text(st.characters(exclude_categories=["Cs"])))
def test_any_seed(seed):
    digest = hashlib.md5(f"{seed}".encode()).digest()
    assert make_complex(seed) == int.from_bytes(digest[12:], "big")
    assert make_complex(seed) == make_complex(str(seed))


def test_first_collision():
    seen = {make_complex(seed) for seed in range(88266)}
    assert len(seen) == 88266
    assert make_complex(88266) in seen


def test_prints_only_when_asked(capsys):
    make_complex(1)
    assert capsys.readouterr().out == ""
    make_complex(1, verbose=True)
    out = capsys.readouterr().out
    assert "1869972635" in out and f"{1869972635:032b}" in out


@pytest.mark.parametrize("seed", [1, "1"])
def test_every_generator_is_seeded(seed):
    make_deterministic(seed)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    expected = (
        random.Random(1869972635).random(),
        np.random.RandomState(1869972635).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(1869972635)),
    )
    assert drawn == expected


def test_settings_for_reproducibility():
    make_deterministic(0)
    assert os.environ["PYTHONHASHSEED"] == "4186399962"
    assert torch.backends.cudnn.deterministic is True
    assert torch.backends.cudnn.benchmark is False


def test_random_states():
    make_deterministic(3)
    random.gauss(0, 1), np.random.randn(), torch.randn(1)  # generators that have half of a pair of normals left

    def draw() -> tuple:
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), *torch.randn(3).tolist()

    states = random_states()
    expected = draw()
    make_deterministic(4)
    assert draw() != expected
    set_random_states(states)
    assert draw() == expected
