"""Real data sets in torchvision's layout, unpacked from a folder beside this repository. Without it, tests skip."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

UNPACK = Path(__file__).resolve().parents[3] / "shared" / "data" / "unpack.py"
CACHE = Path(tempfile.gettempdir()) / f"orch-test-data-{os.getuid()}"


def cifar10_root() -> Path:
    """Return the root folder for torchvision's CIFAR10."""
    return _root("cifar10")


def mnist_root() -> Path:
    """Return the root folder for torchvision's MNIST."""
    return _root("mnist")


def pets_root() -> Path:
    """Return the root folder for torchvision's OxfordIIITPet, with 370 of its pictures, 10 per breed."""
    return _root("pets")


def _root(name: str) -> Path:
    """Return the folder of a data set. The first test process on this machine unpacks it."""
    if not (UNPACK.is_file() and (UNPACK.parent / name).is_dir()):
        pytest.skip(f"no real data: {name} is not in {UNPACK.parent}")
    CACHE.mkdir(mode=0o700, exist_ok=True)
    done = CACHE / f"{name}.done"
    with FileLock(CACHE / "lock"):
        if not done.exists():
            subprocess.run([sys.executable, str(UNPACK), str(CACHE), name], check=True, capture_output=True)
            done.touch()
    return CACHE
