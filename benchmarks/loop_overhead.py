"""What orch's training loop costs beside forward, backward and the optimizer's step; and the fingerprint of the data.

Trains LeNet-5 on 10,000 random images of MNIST's size for an epoch, validation excluded. With --vs REV, an earlier
revision of the code runs by turns with this.

    python benchmarks/loop_overhead.py --vs HEAD~1 --out benchmarks/results/loop_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BATCH_SIZE, EPOCHS = 10_000, 100, 1
FINGERPRINTED = 60_000


def measure() -> dict[str, float]:
    """Train with the code on sys.path, and return images per second and the share of time outside the steps' parts."""
    import torch

    from jobs.data.images import ImageTensors
    from jobs.data.splits import Split
    from jobs.job import JobContext
    from jobs.lenet5 import LeNet5
    from jobs.training.session import Session
    from orchestrator.records import Work
    from orchestrator.settings.settings import Settings

    spent = [0.0]  # seconds in forward, backward and step

    class Timed(LeNet5):
        def data(self, split: Split) -> Any:
            pixels = torch.randint(0, 256, (IMAGES, 1, 28, 28), dtype=torch.uint8)
            return ImageTensors(pixels, torch.arange(IMAGES) % 10)

        def training_loss(self, model: Any, batch: Any) -> Any:
            started = time.perf_counter()
            loss = super().training_loss(model, batch)
            spent[0] += time.perf_counter() - started
            return loss

    def timed(method: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = method(*given, **named)
            spent[0] += time.perf_counter() - started
            return result

        return call

    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "2")))
    torch.Tensor.backward = timed(torch.Tensor.backward)  # type: ignore[method-assign]
    torch.optim.Adam.step = timed(torch.optim.Adam.step)  # type: ignore[method-assign]
    profile = {"name": "only", "learning_rate": 0.001}
    given = {"name": "b", "training_profiles": [profile], "max_batch_size": BATCH_SIZE, "validation_fraction": 0.01}
    settings = Settings.model_validate(given | {"job": "jobs.lenet5:LeNet5"})
    session = Session(Timed(JobContext(settings)))
    work = Work(settings.training_profiles[0], EPOCHS, seed=1, repeat=0, parent=None, suspended=None)
    session.feed("train"), session.feed("validation")
    session.train(work, lambda: False, lambda _epoch: None)  # warms up
    spent[0], started = 0.0, time.perf_counter()
    session.train(work, lambda: False, lambda _epoch: None)
    took = time.perf_counter() - started
    images = EPOCHS * session.feed("train").count
    return {"images_per_s": images / took, "outside": 1 - spent[0] / took}


def fingerprint_s() -> dict[str, float]:
    """Return how long the fingerprint of 60,000 examples takes: in memory, and read one by one with listed targets."""
    import torch
    from torch.utils.data import Dataset

    from jobs.data.fingerprint import fingerprint_of
    from jobs.data.images import ImageTensors
    from jobs.data.splits import labels_of

    class Listed(Dataset[Any]):
        def __init__(self, data: ImageTensors) -> None:
            self.data, self.targets = data, data.targets.tolist()

        def __len__(self) -> int:
            return FINGERPRINTED

        def __getitem__(self, index: int) -> Any:
            return self.data[index]

    pixels = torch.zeros(FINGERPRINTED, 3, 32, 32, dtype=torch.uint8)
    memory = ImageTensors(pixels, torch.arange(FINGERPRINTED) % 10)
    took = {}
    for name, data in (("in_memory_s", memory), ("listed_s", Listed(memory))):
        started = time.perf_counter()
        fingerprint_of(data, labels_of(data), range(FINGERPRINTED))
        took[name] = round(time.perf_counter() - started, 4)
    return took


def in_process(code: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(code)}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    done = subprocess.run(command, env=environment, cwd=code, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", metavar="REV", help="a revision of this repository that runs by turns with this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure()))
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        codes = {"this": ROOT}  # each runs in a process of its own
        if options.vs:
            codes["other"] = Path(folder) / "other"
            archive = subprocess.run(["git", "archive", options.vs], cwd=ROOT, check=True, capture_output=True).stdout
            codes["other"].mkdir()
            subprocess.run(["tar", "-x", "-C", str(codes["other"])], input=archive, check=True)
        rounds = [{name: in_process(code) for name, code in codes.items()} for _ in range(options.rounds)]
    result: dict[str, Any] = {"rounds": options.rounds, "images": IMAGES, "batch_size": BATCH_SIZE}
    for name in codes:
        for what in ("images_per_s", "outside"):
            result[f"{name}_{what}"] = round(statistics.median(one[name][what] for one in rounds), 4)
    if options.vs:
        ratios = [one["this"]["images_per_s"] / one["other"]["images_per_s"] for one in rounds]
        result |= {
            "vs": options.vs,
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
        }
    result["fingerprint_of_60000"] = fingerprint_s()
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
