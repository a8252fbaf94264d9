"""How long a worker does not train between two chunks of AlexNet at full size: 457 MB of weights and momentum.

A boundary lasts from the end of a validation to the first step of the next chunk. Every chunk is promoted, and by
default every next chunk continues its child. With --vs REV, an earlier revision of the code runs by turns with this.

    python benchmarks/chunk_boundary.py --vs HEAD~1 --out boundary.json
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

import numpy as np
import torch
from PIL import Image
from torchvision import models

import jobs.alexnet
from jobs.alexnet import AlexNet

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 250
RUN = "from orchestrator.cli.main import main; main()"


class Params(jobs.alexnet.Params):
    log: str  # the times are appended to this file


class Boundary(AlexNet):
    """AlexNet that writes down when steps begin and validations end, and whose every score is better than the last."""

    Params = Params

    def training_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self._note("step")
        return super().training_loss(model, batch)

    def evaluation_metrics(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        values = super().evaluation_metrics(model, batch)
        if values["loss"].is_cuda:
            torch.cuda.synchronize()
        self._note("validated")
        return values | {"accuracy": torch.tensor(time.time() % 1e7, dtype=torch.float64)}

    def _note(self, what: str) -> None:
        with Path(self.params.log).open("a") as log:
            log.write(json.dumps([what, time.monotonic()]) + "\n")


def draw(folder: Path, each: int) -> None:
    """Write pictures of noise. The network has the size of the report's, and an epoch is short."""
    noise = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"{label:03d}").mkdir(parents=True)
        for number in range(each):
            pixels = noise.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label:03d}" / f"{number}.png")


def boundaries_s(code: Path, part: str, data: Path, args: argparse.Namespace) -> list[float]:
    """Launch a run in this process's place with the code in a folder; return the seconds of its boundaries."""
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        log = Path(place, "log")
        changes = {
            "name": "boundary",
            "job": "chunk_boundary:Boundary",
            "job_params": {"image_size": 63, "augment": "random", "log": str(log)},
            "training_source_dir": str(data / "train"),
            "testing_source_dir": str(data / "test"),
            "pretrained_weights": str(data / "weights.pth"),
            "validation_fraction": 0.5,
            "num_models": args.num_models,
            "stop_after_epochs": args.chunks,
            "stop_after_stale_cycles": None,
            "slurm_file": None,
            "loggers": [],
        }
        settings = Path(place, "settings.json")
        settings.write_text(json.dumps(json.loads((ROOT / f"settings/{part}.json").read_text()) | changes))
        command = [sys.executable, "-c", RUN, "launch", str(settings), "--executor", "inline", "--runs-dir", place]
        environment = os.environ | {"PYTHONPATH": f"{code}{os.pathsep}{ROOT / 'benchmarks'}"}
        done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        found, last = [], None
        for line in log.read_text().splitlines():
            what, at = json.loads(line)
            if what == "step" and last is not None and last[0] == "validated":
                found.append(at - last[1])
            last = (what, at)
    return found[1:] if args.num_models == 1 else found  # the first one may still load code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["part1", "part3"])
    parser.add_argument("--chunks", type=int, default=7, help="in each run")
    parser.add_argument("--num-models", type=int, default=1, help="with 1, each chunk continues the child of the last")
    parser.add_argument("--rounds", type=int, default=2, help="runs with each code, by turns")
    parser.add_argument("--vs", metavar="REV", help="a git revision to compare with")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the runs are written")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        data, codes = Path(scratch, "data"), {"now": ROOT}
        draw(data / "train", each=2)
        draw(data / "test", each=1)
        torch.save(models.alexnet(num_classes=1000).state_dict(), data / "weights.pth")
        if args.vs:
            codes[args.vs] = Path(scratch, "code")
            subprocess.run(["git", "worktree", "add", "-q", "--detach", codes[args.vs], args.vs], cwd=ROOT, check=True)
        try:
            for part in args.parts:
                found: dict[str, list[float]] = {name: [] for name in codes}
                for _ in range(args.rounds):
                    for name, code in codes.items():
                        found[name] += boundaries_s(code, part, data, args)
                results[part] = {name: _figures(values) for name, values in found.items()}
                for name, figures in results[part].items():
                    print(f"{part}, {name}: median {figures['median_s']:.2f} s of {figures['boundaries']} boundaries")
                if args.vs:
                    ratio = results[part]["now"]["median_s"] / results[part][args.vs]["median_s"]
                    results[part]["ratio"] = round(ratio, 3)
                    print(f"{part}: {ratio:.2f} of {args.vs}'s")
        finally:
            if args.vs:
                subprocess.run(["git", "worktree", "remove", "--force", codes[args.vs]], cwd=ROOT, check=False)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def _figures(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_s": round(statistics.median(seconds), 3),
        "boundaries": len(seconds),
        "all_s": [round(s, 3) for s in seconds],
    }


if __name__ == "__main__":
    main()
