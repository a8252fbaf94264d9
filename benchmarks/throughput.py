"""Measure the training loop's images per second against a plain loop (torchvision's transforms and a DataLoader).

    python benchmarks/throughput.py --data FOLDER                      # davidnet on CIFAR-10, FOLDER its root
    python benchmarks/throughput.py --only alexnet-part1,alexnet-part2 # on generated pictures
    python benchmarks/throughput.py --data FOLDER --images 5000 --rounds 3 --out

The contenders alternate, so that other load on the machine affects all of them. Figures are medians over the rounds;
ratios are medians of the ratio in each round. For each contender, the figures are the images per second of training
(excluding evaluation, and orch's one-time decoding, which is part of ready_s) and the test accuracy after the same
number of images. For orch, `outside` is the share of training time outside forward, backward and the optimizer's step.
plain-bf16 is the plain loop with the autocast and channels_last that orch uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, Subset  # noqa: E402
from torchvision import datasets  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from jobs.davidnet import DavidNet  # noqa: E402
from jobs.image_sets import first_of_each_class  # noqa: E402
from jobs.training.learner import Learner, Predictor  # noqa: E402
from jobs.training.opening import load_job, set_up  # noqa: E402
from jobs.training.precision import Speed  # noqa: E402
from jobs.training.session import Session  # noqa: E402
from orchestrator.profile import Profile  # noqa: E402
from orchestrator.records import EpochResult, Work  # noqa: E402
from orchestrator.settings.loading import load  # noqa: E402
from orchestrator.settings.settings import Settings  # noqa: E402

CONTENDERS = ("orch", "plain", "plain-bf16")
CLASSES = 8  # number of classes of the generated pictures
PICTURE = (375, 500)  # height and width in pixels, typical of photographs in data sets
Figures = dict[str, Any]


@dataclass
class Case:
    """The settings of a job, and torchvision data sets of the same images."""

    name: str
    settings: Settings
    profile: Profile
    train: Callable[[], Dataset[Any]]
    test: Callable[[], Dataset[Any]]


# --- cases -------------------------------------------------------------------------------------------


def davidnet(options: argparse.Namespace, folder: Path) -> Case:
    params = {"train_images": options.images, "test_images": options.test_images}
    settings = _settings("davidnet", options, job_params=params, training_source_dir=str(options.data))
    job = load_job(settings)
    assert isinstance(job, DavidNet)
    plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*job.statistics)]
    share = (8 / 32) ** 2
    random = [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    erase = [v2.RandomErasing(1.0, (share, share), (1.0, 1.0))]

    def side(train: bool) -> Dataset[Any]:
        transform = v2.Compose([*random, *plain, *erase] if train else plain)
        source = datasets.CIFAR10(str(options.data), train=train, transform=transform)
        count = options.images if train else options.test_images
        return Subset(source, first_of_each_class(torch.tensor(source.targets), count, "images").tolist())

    profile = Profile("bench", learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    return Case("davidnet", settings, profile, lambda: side(True), lambda: side(False))


def alexnet(name: str, options: argparse.Namespace, folder: Path) -> Case:
    """Return the case of part 1 (all layers trained) or part 2 (only the classifier, on frozen random features)."""
    part = name.removeprefix("alexnet-")
    for side, count in (("train", options.images), ("test", max(CLASSES, options.images // 5))):
        if not (folder / side).exists():
            draw(folder / side, count, seed=side == "test")
    params = {"image_size": options.image_size, "augment": "random" if part == "part1" else "none"}
    sources = {f"{key}_source_dir": str(folder / side) for key, side in (("training", "train"), ("testing", "test"))}
    settings = _settings(part, options, job_params=params, pretrained_features=False, **sources)
    job = load_job(settings)
    normalize = next(step for step in job.data("train").steps if hasattr(step, "mean"))  # type: ignore[attr-defined]
    margin, size = options.image_size * 8 // 7, options.image_size
    random = [v2.RandomCrop(size), v2.RandomHorizontalFlip()]
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(normalize.mean, normalize.std)]

    def side_of(which: str) -> Dataset[Any]:
        crop = random if which == "train" and part == "part1" else [v2.CenterCrop(size)]
        return datasets.ImageFolder(str(folder / which), v2.Compose([v2.Resize(margin), *crop, *last]))

    profile = Profile("bench", learning_rate=0.005, momentum=0.9, weight_decay=5e-4)
    return Case(name, settings, profile, lambda: side_of("train"), lambda: side_of("test"))


CASES: dict[str, Callable[[argparse.Namespace, Path], Case]] = {
    "davidnet": davidnet,
    "alexnet-part1": lambda options, folder: alexnet("alexnet-part1", options, folder),
    "alexnet-part2": lambda options, folder: alexnet("alexnet-part2", options, folder),
}


def draw(folder: Path, count: int, seed: int) -> None:
    """Write JPEG files. Each class has its own colour and stripe width, each picture its own phase and noise."""
    pixels = np.random.default_rng(seed)
    height, width = PICTURE
    for number in range(count):
        label = number % CLASSES
        colour = np.array([80 + 120 * (label >> bit & 1) for bit in range(3)])
        stripes = 30 * np.sin(np.arange(width) / (4 + 3 * label) + pixels.uniform(0, 6))[None, :, None]
        noise = pixels.normal(0, 20, (height, width, 3))
        path = folder / f"class{label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(colour + stripes + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def _settings(name: str, options: argparse.Namespace, **changes: Any) -> Settings:
    batch_size = options.batch_size or {"davidnet": 512}.get(name, 100)
    given = {"select_on": "test", "max_batch_size": batch_size, "loggers": []} | changes
    settings, _ = load(ROOT / "settings" / f"{name}.json", **given)
    return settings


# --- orch --------------------------------------------------------------------------------------------


class Timed(Session):
    """Measures the seconds spent in forward, backward and step, and in evaluation."""

    steps_s = evaluation_s = 0.0

    def _train_epoch(self, learner: Learner, cut: Any, should_stop: Any) -> EpochResult | None:
        learner.step = self._timed(learner.step)  # type: ignore[method-assign]
        result = super()._train_epoch(learner, cut, should_stop)
        del learner.step
        return result

    def _evaluate(self, predictor: Predictor, split: Any) -> dict[str, float]:
        started, steps_s = self._now(), self.steps_s
        found = super()._evaluate(predictor, split)
        self.evaluation_s += self._now() - started
        self.steps_s = steps_s  # excludes computing outputs of frozen layers for evaluation
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = self._now()
            result = function(*arguments)
            self.steps_s += self._now() - started
            return result

        return run


def train_orch(case: Case, options: argparse.Namespace, seed: int) -> Figures:
    device = set_up(case.settings, options.cores)
    started = time.perf_counter()
    session = Timed(load_job(case.settings, device, options.cores))
    for split in ("train", "test"):
        session.feed(split)
    ready_s = time.perf_counter() - started
    # Count the forward passes of frozen layers, which run only once, when their outputs are cached.
    session._frozen._compute = session._timed(session._frozen._compute)  # type: ignore[method-assign]
    results: list[EpochResult] = []
    session.train(Work(case.profile, options.epochs, seed, 0, None, None), lambda: False, results.append)
    seconds = sum(result.seconds for result in results) - session.evaluation_s
    return {
        "images_per_s": options.images * options.epochs / seconds,
        "accuracy": results[-1].metrics["accuracy"],
        "outside": 1 - session.steps_s / seconds,
        "ready_s": ready_s,
    }


# --- the plain loop ----------------------------------------------------------------------------------


def train_plain(case: Case, options: argparse.Namespace, seed: int, tuned: bool) -> Figures:
    device = set_up(case.settings, options.cores)
    torch.manual_seed(seed)
    job = load_job(case.settings, device, options.cores)
    model = job.model().to(device)
    untuned = {"precision": "fp32", "channels_last": False}
    speed = Speed(case.settings if tuned else case.settings.model_copy(update=untuned), device)
    speed.lay_out(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=case.profile.learning_rate,
        momentum=case.profile.momentum,
        weight_decay=case.profile.weight_decay,
        nesterov=case.name == "davidnet",
    )
    common: dict[str, Any] = {"num_workers": options.loaders, "pin_memory": device.type == "cuda"}
    size = case.settings.max_batch_size
    train = DataLoader(case.train(), size, shuffle=True, persistent_workers=options.loaders > 0, **common)
    test = DataLoader(case.test(), size, **common)
    started = time.perf_counter()
    for _ in range(options.epochs):
        model.train()
        for images, targets in train:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with speed.autocast():
                loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.eval()
    right = total = 0
    with torch.inference_mode(), speed.autocast():
        for images, targets in test:
            right += int((model(images.to(device)).argmax(dim=1) == targets.to(device)).sum())
            total += len(targets)
    return {"images_per_s": options.images * options.epochs / seconds, "accuracy": right / total}


# --- the comparison ----------------------------------------------------------------------------------


def compare(case: Case, options: argparse.Namespace) -> Figures:
    rounds: dict[str, list[Figures]] = {name: [] for name in options.contenders}
    for number in range(options.rounds):
        turn = number % len(options.contenders)
        for name in (*options.contenders[turn:], *options.contenders[:turn]):
            seed = 1000 + number
            found = (
                train_orch(case, options, seed)
                if name == "orch"
                else train_plain(case, options, seed, tuned=name == "plain-bf16")
            )
            rounds[name].append(found)
            told = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"{case.name} round {number + 1} {name}: {told}", flush=True)
    return {name: _summary(name, rounds) for name in rounds}


def _summary(name: str, rounds: dict[str, list[Figures]]) -> Figures:
    own = rounds[name]
    summary: Figures = {key: round(statistics.median(one[key] for one in own), 4) for key in own[0]}
    summary["images_per_s_of_rounds"] = [round(one["images_per_s"], 2) for one in own]
    summary["accuracy_of_rounds"] = [round(one["accuracy"], 4) for one in own]
    if "orch" in rounds and name != "orch":
        ratios = [ours["images_per_s"] / its["images_per_s"] for ours, its in zip(rounds["orch"], own, strict=True)]
        summary["orch_is_faster_by"] = round(statistics.median(ratios), 3)
        summary["orch_is_faster_by_in_rounds"] = [round(ratio, 3) for ratio in ratios]
    return summary


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="torchvision's root of CIFAR-10, for davidnet")
    parser.add_argument("--images", type=int, default=2048, help="number of training images")
    parser.add_argument("--test-images", type=int, default=1000, help="number of test images, for davidnet")
    parser.add_argument("--image-size", type=int, default=224, help="side of alexnet's input in pixels")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="default: 512 for davidnet, 100 for alexnet")
    parser.add_argument("--only", default="davidnet", help=f"comma-separated cases, from {', '.join(CASES)}")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated; default: all")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loaders", type=int, help="processes of the plain loop's DataLoader; default: --cores")
    parser.add_argument(
        "--out", type=Path, nargs="?", const=ROOT / "benchmarks/results/throughput.json", help="write JSON to this file"
    )
    options = parser.parse_args()
    options.loaders = options.cores if options.loaders is None else options.loaders
    options.only, options.contenders = options.only.split(","), options.contenders.split(",")
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, known in ((options.only, CASES), (options.contenders, CONTENDERS)):
        unknown = [one for one in name if one not in known]
        if unknown:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    if "davidnet" in options.only and options.data is None:
        parser.error("davidnet needs --data, torchvision's root of CIFAR-10")


def machine(options: argparse.Namespace) -> Figures:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": options.cores,
        "cpu": torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None,
        "gpu": gpu,
        "load_before": round(os.getloadavg()[0], 2),  # load from other programs, which lowers the figures
        "torch": torch.__version__,
    }


def main() -> None:
    options = _options()
    facts = machine(options)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        os.environ["SLURM_TMPDIR"] = folder  # so that no cached images of an earlier run are used
        for name in options.only:
            case = CASES[name](options, Path(folder) / "pictures")
            found = compare(case, options)
            kept = ("images", "epochs", "rounds", "loaders", "image_size")
            result[name] = {"machine": facts, "figures": found, "batch_size": case.settings.max_batch_size}
            result[name] |= {key: getattr(options, key) for key in kept}
            for contender, figures in found.items():
                print(f"{name} {contender}: {figures}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
