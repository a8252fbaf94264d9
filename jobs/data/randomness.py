"""Seeds, and the random state of Python, NumPy, torch and the GPUs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def hash_seed(*parts: int) -> int:
    """Return a seed below 2**63: a hash of numbers that identify its use (numpy's SeedSequence, O'Neill 2015)."""
    return int(np.random.SeedSequence([p & (2**63 - 1) for p in parts]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    seed_cpu(seed)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed Python, NumPy and torch, but not the GPUs: data loading must not change the model's random numbers there."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of Python, NumPy, torch and every GPU, in types that torch.load(weights_only=True) reads."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(words), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state returned by random_state. GPUs missing from the state are left unchanged."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    for index, gpu in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(gpu.cpu(), index)


def cpu_state() -> tuple[Any, Any, Tensor]:
    """Return the random state of Python, NumPy and torch, but not of the GPUs."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_cpu_state(state: tuple[Any, Any, Tensor]) -> None:
    python, numpy, cpu = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the CPU's random state on exit. GPUs are not touched, because loader processes must not use them."""
    state = cpu_state()
    try:
        yield
    finally:
        set_cpu_state(state)


@contextmanager
def all_random_state_kept() -> Iterator[None]:
    """Restore the random state on exit, also that of the GPUs."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
