"""Measure davidnet's test accuracy and training time over many seeds; the goal is 94 % after 24 epochs.

    python benchmarks/davidnet_seeds.py --data FOLDER [--seeds 10] [--settings settings/davidnet.json]
        [--set job_params.cutout=12] [--compile] [--limit-s 450] [--at-least 0.94] [--out FILE.json] [--log FILE.log]

FOLDER is torchvision's root of CIFAR-10. Each seed is one founder, trained for one chunk under the settings' first
profile, with the workers' training loop but without a board. It trains on all 50,000 training images and is tested
after each epoch. Only the last epoch's accuracy counts; no model is selected by it. The exit code is 1 if the mean is
below --at-least. On a CPU use --epochs 1 --images 5000; the schedule is shortened accordingly.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from jobs.training.opening import open_session  # noqa: E402
from jobs.training.precision import choose_precision  # noqa: E402
from jobs.training.session import Session  # noqa: E402
from orchestrator.profile import Profile  # noqa: E402
from orchestrator.records import EpochResult, Finished, Work  # noqa: E402
from orchestrator.settings.loading import load  # noqa: E402
from orchestrator.settings.settings import Settings  # noqa: E402

Say = Callable[[str], None]


def settings_of(options: argparse.Namespace) -> Settings:
    """Return settings that train on all training images and measure the accuracy on the test set."""
    overrides = list(options.set)
    if options.images:
        overrides += [f"job_params.train_images={options.images}"]
    if options.compile:
        overrides += ["compile=true"]
    settings, _ = load(
        options.settings, overrides, training_source_dir=str(options.data), select_on="test", gpus_per_worker=1
    )
    return settings


def first_profile(settings: Settings, epochs: int) -> Profile:
    """Return the first profile, its schedule scaled to the number of epochs."""
    profile = settings.training_profiles[0]
    if profile.schedule is None or "epochs" not in profile.schedule:
        return profile
    share, corners = epochs / settings.epochs_per_chunk, profile.schedule["epochs"]
    scaled = [corner * share for corner in corners] if isinstance(corners, list) else corners * share
    return replace(profile, schedule=dict(profile.schedule) | {"epochs": scaled})


def train(session: Session, profile: Profile, epochs: int, seed: int) -> dict[str, Any]:
    """Train one founder. `seconds` covers training and testing, but not creating the model or loading the data."""
    results: list[EpochResult] = []
    began = time.perf_counter()
    outcome = session.train(Work(profile, epochs, seed, 0, None, None), lambda: False, results.append)
    assert isinstance(outcome, Finished)
    return {
        "seed": seed,
        "accuracy": results[-1].metrics["accuracy"] if math.isfinite(outcome.score) else 0.0,
        "test_loss": results[-1].metrics["loss"],
        "train_loss": results[-1].metrics["train_loss"],
        "seconds": sum(result.seconds for result in results),
        "wall_s": time.perf_counter() - began,
        "accuracy_of_epochs": [round(result.metrics["accuracy"], 4) for result in results],
        "seconds_of_epochs": [round(result.seconds, 3) for result in results],
    }


def train_all(session: Session, profile: Profile, options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """Train the requested number of seeds, or fewer if the time limit is reached."""
    began = time.perf_counter()
    runs: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        spent = time.perf_counter() - began
        if runs and spent + max(run["wall_s"] for run in runs[-3:]) > options.limit_s:
            say(f"{len(runs)} of {options.seeds} seeds in {spent:.0f} s; another would exceed --limit-s")
            break
        run = train(session, profile, options.epochs, seed)
        runs.append(run)
        say(
            f"seed {seed:3d}: accuracy {run['accuracy']:.4f}, test loss {run['test_loss']:.4f}, train loss "
            f"{run['train_loss']:.4f}, {run['seconds']:.1f} s; by epoch: "
            + " ".join(f"{accuracy:.3f}" for accuracy in run["accuracy_of_epochs"])
        )
    return runs


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Summarise the runs. The first seed's time is excluded (unless it is the only one): it includes kernel tuning."""
    accuracies = [run["accuracy"] for run in runs]
    seconds = [run["seconds"] for run in runs[1:] or runs]
    return {
        "seeds": len(runs),
        "mean": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
        "min": min(accuracies),
        "max": max(accuracies),
        "seconds_mean": statistics.fmean(seconds),
        "seconds_first": runs[0]["seconds"],
    }


def machine(session: Session) -> dict[str, Any]:
    cuda = session.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(session.device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": str(choose_precision(session.settings.precision, session.device)).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="torchvision's root of CIFAR-10")
    parser.add_argument("--settings", type=Path, default=ROOT / "settings/davidnet.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in orch launch")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="epochs per seed; default: the settings' epochs_per_chunk")
    parser.add_argument("--images", type=int, help="total number of training images, the first ones of each class")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="number of CPU threads")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start no seed that would end after this time")
    parser.add_argument("--at-least", type=float, default=0.0, help="exit with code 1 if the mean accuracy is lower")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/davidnet_seeds.json")
    parser.add_argument("--log", type=Path, help="append to this file; default: --out with the suffix .log")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    log = options.log or options.out.with_suffix(".log")
    for path in (options.out, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    options.epochs = options.epochs or settings.epochs_per_chunk
    with log.open("a") as lines:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=lines, flush=True)

        session = open_session(settings, options.threads)
        assert isinstance(session, Session)
        profile = first_profile(settings, options.epochs)
        about = machine(session)
        say(f"{settings.name}, {options.epochs} epochs, {time.strftime('%Y-%m-%d %H:%M')}: {json.dumps(about)}")
        say(f"job_params {json.dumps(settings.job_params)}, batch {settings.max_batch_size}")
        say(f"profile {json.dumps(asdict(profile))}")
        runs = train_all(session, profile, options, say)
        found = summary(runs)
        say(
            f"accuracy on the test set: mean {found['mean']:.4f}, std {found['std']:.4f}, min {found['min']:.4f}, max "
            f"{found['max']:.4f} of {found['seeds']} seeds; {found['seconds_mean']:.1f} s per seed, "
            f"{found['seconds_first']:.1f} s for the first seed"
        )
    kept = {"name", "job_params", "max_batch_size", "precision", "channels_last", "compile", "deterministic"}
    recipe = settings.model_dump(mode="json", include=kept) | {"profile": asdict(profile), "epochs": options.epochs}
    result = {"summary": found, "machine": about, "recipe": recipe, "runs": runs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if found["mean"] >= options.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
