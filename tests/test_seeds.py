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


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, 4186399962), (1, 1869972635), ("1", 1869972635), (np.int64(1), 1869972635)]
)
def test_known_values(seed, expected):
    assert make_complex(seed) == expected


@pytest.mark.parametrize("seed", [True, 1.0, None, torch.tensor(1)])
def test_what_is_no_seed(seed):
    before = torch.get_rng_state()
    for use in (make_complex, make_deterministic):
        with pytest.raises(TypeError, match="a seed must be an integer or text, not " + type(seed).__name__):
            use(seed)
    assert os.environ["PYTHONHASHSEED"] == "random" and torch.equal(torch.get_rng_state(), before)


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


def test_every_generator_is_seeded():
    make_deterministic(1)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    expected = (
        random.Random(1869972635).random(),
        np.random.RandomState(1869972635).rand(),
        torch.rand(1, generator=torch.Generator().manual_seed(1869972635)),
    )
    assert drawn == expected
    assert os.environ["PYTHONHASHSEED"] == "1869972635"
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


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_random_states_of_cuda(monkeypatch, num_devices):
    """Two generators in place of those of two GPUs; then there are fewer GPUs, as many, or more."""
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [generator.get_state() for generator in generators])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators[device].set_state(state))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    states = random_states()
    expected, later = ([torch.rand(1, generator=generator) for generator in generators] for _ in range(2))
    if num_devices == 1:
        expected[1] = torch.rand(1, generator=generators[1].clone_state())  # as if it had been left alone
    set_random_states(states)
    assert [torch.rand(1, generator=generator) for generator in generators] == expected != later


def test_cuda_that_was_never_used_stays_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", None)
    assert random_states()["cuda"] == []
