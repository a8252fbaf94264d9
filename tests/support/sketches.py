"""The alexnet job and its shipped settings files, with a few small pictures as data."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.job import Job
from jobs.training.opening import load_job
from orchestrator.profile import Profile
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")
CLASSES = 8
SEED = 5  # the founder's seed in these tests
ALEX = Profile("alex", learning_rate=0.01, momentum=0.9, weight_decay=0.0005)


def draw(folder: Path, each: int, seed: int, classes: int = CLASSES) -> None:
    pixels = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        colour = [80 + 120 * (label >> bit & 1) for bit in range(3)]
        for number in range(each):
            picture = (np.array(colour) + pixels.integers(-50, 50, (90, 100, 3))).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"class{label}" / f"{number}.png")


def settings_of(part: str, sketches: Path, **changes: Any) -> Settings:
    """Load a shipped settings file, changed to use small pictures in small batches from these folders."""
    small = {
        "training_source_dir": str(sketches / "train"),
        "testing_source_dir": str(sketches / "test"),
        "job_params": {"image_size": 63},
        "max_batch_size": 30,
        "validation_fraction": 0.25,
    }
    settings, _ = load(ROOT / "settings" / f"{part}.json", **(small | changes))
    return settings


def job_of(part: str, sketches: Path, **changes: Any) -> Job:
    return load_job(settings_of(part, sketches, **changes))


def orch(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ORCH_RUNS_DIR", "TORCH_HOME")}
    command = [str(ORCH), *arguments]
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=240)


def sketch_archive(path: Path, classes: Mapping[str, Iterable[int]], others: Iterable[str] = ()) -> Path:
    """Write an archive like that of the sketches: png/CLASS/NUMBER.png. others: more files in it."""
    pixels = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for label, numbers in classes.items():
            for number in reversed([*numbers]):
                content = io.BytesIO()
                Image.fromarray(pixels.integers(0, 256, (64, 64), dtype=np.uint8)).save(content, "png")
                archive.writestr(f"png/{label}/{number}.png", content.getvalue())
        for name in others:
            archive.writestr(name, "x")
    return path
