"""How long a worker does not train between two chunks of AlexNet at full size: 457 MB of weights and momentum.

A boundary lasts from the end of a validation to the first step of the next chunk. Every chunk is promoted, and by
default every next chunk continues its child. With --vs REV, an earlier revision of the code runs by turns with this.

    python benchmarks/chunk_boundary.py --vs HEAD~1 --out boundary.json
"""

from __future__ import annotations

import argparse
import itertools
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


def measured_s(code: Path, part: str, data: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Launch a run with the code in a folder. Return the seconds of each boundary and of the chunk that it begins:
    from the end of one validation to the end of the next."""
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
        notes = [json.loads(line) for line in log.read_text().splitlines()]
    between = [(a[1], b[1]) for a, b in itertools.pairwise(notes) if (a[0], b[0]) == ("validated", "step")]
    ends = [end for end, _ in between[1:]] + [notes[-1][1]]
    found = [(begin - end, following - end) for (end, begin), following in zip(between, ends, strict=True)]
    return found[1:]  # the first boundary may still load code


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
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
                for _ in range(args.rounds):
                    for name, code in codes.items():
                        found[name] += measured_s(code, part, data, args)
                results[part] = {name: _figures(values) for name, values in found.items()}
                for name, figures in results[part].items():
                    print(
                        f"{part}, {name}: {figures['boundary_s']:.2f} s at a boundary, {figures['chunk_s']:.2f} s from "
                        f"chunk to chunk (medians of {figures['boundaries']})"
                    )
                if args.vs:
                    ratio = results[part]["now"]["boundary_s"] / results[part][args.vs]["boundary_s"]
                    results[part]["ratio"] = round(ratio, 3)
                    print(f"{part}: {ratio:.2f} of {args.vs}'s")
        finally:
            if args.vs:
                subprocess.run(["git", "worktree", "remove", "--force", codes[args.vs]], cwd=ROOT, check=False)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def _figures(seconds: list[tuple[float, float]]) -> dict[str, Any]:
    boundaries, chunks = zip(*seconds, strict=True)
    return {
        "boundary_s": round(statistics.median(boundaries), 3),
        "chunk_s": round(statistics.median(chunks), 3),
        "boundaries": len(seconds),
        "all_boundaries_s": [round(s, 3) for s in boundaries],
        "all_chunks_s": [round(s, 3) for s in chunks],
    }


if __name__ == "__main__":
    main()
