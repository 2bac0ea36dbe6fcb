"""Seeds: small integers made into large ones, every random generator set with them, and the generators' states."""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import torch


def make_complex(simple_seed: int | str, verbose: bool = False) -> int:
    """Turn a simple seed, such as 1, into a number that uses all 32 bits.

    It is the last 32 bits of the MD5 of the seed's decimal text, so that 1 and '1' give the same. The seeds 0 to 88265
    give distinct values. The paper trains with 1 to 15 and draws the validation set with 0.

    Args:
        simple_seed: any integer, NumPy's included, or text.
        verbose: print the seed, its complex seed and that one's 32 bits.

    Returns:
        An integer in [0, 2**32).

    Raises:
        TypeError: `simple_seed` is neither: 1.0 and True would be other seeds than 1.
    """
    if isinstance(simple_seed, bool) or not isinstance(simple_seed, Integral | str):
        raise TypeError(f"a seed must be an integer or text, not {type(simple_seed).__name__}")
    digest = hashlib.md5(str(simple_seed).encode("utf-8"), usedforsecurity=False).hexdigest()
    complex_seed = int(digest[-8:], base=16)
    if verbose:
        print(f"seed {simple_seed}: complex seed {complex_seed}, in binary {complex_seed:032b}")
    return complex_seed


def make_deterministic(seed: int | str) -> None:
    """Seed every random generator with `make_complex(seed)` and let cuDNN use deterministic algorithms only.

    Seeds Python's `random`, NumPy's global generator, and torch on the CPU and on every accelerator. Sets
    PYTHONHASHSEED for child processes. Generators that were made by hand are left as they are.

    Raises:
        TypeError: `seed` is neither an integer nor text. Nothing is changed then.
    """
    complex_seed = make_complex(seed)
    os.environ["PYTHONHASHSEED"] = str(complex_seed)
    random.seed(complex_seed)
    np.random.seed(complex_seed)
    torch.manual_seed(complex_seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def random_states() -> dict[str, Any]:
    """The states of all global random generators: Python's, NumPy's, torch's on the CPU and, once used, on CUDA."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set all global random generators to what `random_states` gave. CUDA devices that are missing here are skipped."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for device in range(min(len(states["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(states["cuda"][device], device)


@contextmanager
def keep_random_states() -> Iterator[None]:
    """Leave all global random generators as they are, whatever is drawn within."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
