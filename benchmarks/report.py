"""The three attempts of the original report in small: on drawings made here, on a CPU, without a network.

    python benchmarks/report.py [--seeds 3] [--folder build/report] [--out FILE.json]

orch itself trains the "pretrained" network, on other drawn classes. Part 1 starts from random weights. Part 2 trains a
new classifier on the frozen features of that network. Part 3 starts from that network and trains all but the first
convolution. Each part is a run of two local workers with the report's profiles and as many epochs as the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats  # comes with scikit-learn

from jobs.data.sketches import draw_stand_in
from orchestrator.cli.main import main as command_line
from orchestrator.run.run import Run

ROOT = Path(__file__).resolve().parents[1]
MARK = "made-by-report.py"  # a file in the folder that this script fills, and may delete
PARTS = ("part1", "part2", "part3")
REPORT = {"part1": 57.78, "part2": 65.56, "part3": 71.92}  # test accuracy in percent, on 250 classes of real sketches
OLD_SYSTEM = (
    "the report's system: 3,754 to 3,906 epochs a part; 78 % and 88 % of the evaluations in two parts discarded; "
    "its cost is not known"
)
# AlexNet's convolutions on small pictures, with a smaller classifier: 1.7 million of its 61 million parameters.
SMALL = {
    "job_params.image_size": 63,
    "job_params.hidden_units": 256,
    "job_params.normalization": "training",
    "max_batch_size": 20,
    "slurm_file": None,
    "loggers": [],
    "stop_after_stale_cycles": None,
    "total_lifetime": 1800,
    "eon_lifetime": 1800,
}
CLASSES, EPOCHS, EPOCHS_PER_CHUNK, MODELS = 8, 25, 5, 2
OTHER_CLASSES = 20
PRETRAINING = {
    "num_models": 1,
    "epochs_per_chunk": 14,
    "training_profiles": [
        {
            "name": "pretraining",
            "learning_rate": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.0005,
            "schedule": {"name": "MultiStepLR", "every": "epoch", "milestones": [11], "gamma": 0.1},
        }
    ],
}


def orch(*words: str) -> None:
    """Run an `orch` command in this process, which saves importing torch for each. Raises SystemExit if it fails."""
    print(f"$ orch {' '.join(words)}", flush=True)
    sys.argv = ["orch", *words]
    try:
        command_line()
    except SystemExit as end:
        if end.code not in (0, None):
            raise


def launch(part: str, name: str, data: Path, runs: Path, *, workers: int, **changes: Any) -> Run:
    """Launch a run of a part's settings file on drawings, and wait for its end."""
    folders = {"training_source_dir": str(data / "train"), "testing_source_dir": str(data / "test")}
    given = {**SMALL, "name": name, **folders, **changes}
    overrides = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    settings = str(ROOT / f"settings/{part}.json")
    orch(
        "launch",
        settings,
        "--executor",
        "local",
        "--workers",
        str(workers),
        "--runs-dir",
        str(runs),
        *overrides,
        "--wait",
    )
    return Run.open(runs / name)


def pretrain(folder: Path, runs: Path) -> Path:
    """Train a network on other drawn classes, and export its weights."""
    draw_stand_in(folder / "other", print, OTHER_CLASSES, seed=1)
    epochs = PRETRAINING["epochs_per_chunk"]
    launch("part1", "pretraining", folder / "other", runs, workers=1, stop_after_epochs=epochs, **PRETRAINING)
    weights = folder / "pretrained.pth"
    orch("export", "pretraining", "--runs-dir", str(runs), "--out", str(weights))
    return weights


def figures(run: Run) -> dict[str, Any]:
    """Return what a run found and what it cost."""
    entries, status = run.board()["entries"], run.status()
    rows = run.leaderboard.reader.rows("chunk")
    spent = {
        state: sum(row["epochs"] or 0 for row in rows if row["state"] == state) for state in ("promoted", "discarded")
    }
    begun = run.leaderboard.run_state.snapshot().created_at
    return {
        "test_accuracy": round(entries[0]["test_metrics"]["accuracy"], 4),
        "validation_accuracy": round(entries[0]["score"], 4),
        "epochs": status["epochs"],
        "discarded_epochs": spent["discarded"],
        "training_s": round(status["train_seconds"], 1),
        "run_s": round(max(row["ended_at"] or begun for row in run.leaderboard.reader.rows("job")) - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/report", help="where data and runs are written")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    begun = time.monotonic()
    folder = args.folder.absolute()
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"--folder {folder}: it has files that this script did not write; delete it, or name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    runs = folder / "runs"
    source = draw_stand_in(folder / "own", print, CLASSES)
    weights = pretrain(folder, runs)
    results: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for seed in range(args.seeds):
        for part in PARTS:
            name = f"{part}-{seed}"
            changes = {
                "seed": seed, "pretrained_weights": str(weights), "num_models": MODELS,
                "epochs_per_chunk": EPOCHS_PER_CHUNK, "stop_after_epochs": EPOCHS,
            }  # fmt: skip
            run = launch(part, name, folder / "own", runs, workers=2, **changes)
            orch("evaluate", name, "--runs-dir", str(runs))
            results[part].append(figures(run))
    total_s = time.monotonic() - begun
    print(f"\n{source}\n")
    print("\n".join(table(results)))
    print(OLD_SYSTEM)
    print("\n".join(comparisons(results)))
    print(f"{total_s:.0f} s in all, on {os.cpu_count()} cores")
    if args.out:
        args.out.write_text(
            json.dumps({"seconds": round(total_s), "data": str(source), "parts": results}, indent=1) + "\n"
        )


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the parts' mean test accuracies beside the report's, as a Markdown table."""
    lines = [
        "| | test accuracy, mean | of each seed | the report's | epochs | discarded | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, found in results.items():
        scores = [100 * one["test_accuracy"] for one in found]
        epochs, discarded = (sum(one[key] for one in found) for key in ("epochs", "discarded_epochs"))
        each = ", ".join(f"{score:.1f}" for score in scores)
        seconds = statistics.mean(one["training_s"] for one in found)
        lines.append(
            f"| {part} | {statistics.mean(scores):.1f} % | {each} | {REPORT[part]:.2f} % | {epochs // len(found)} | "
            f"{discarded / epochs:.0%} | {seconds:.0f} s |"
        )
    return lines


def comparisons(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the differences between one part and the next, paired by seed, with 95 % intervals (Student's t)."""
    lines = []
    for lower, higher in itertools.pairwise(PARTS):
        scores = [[100 * one["test_accuracy"] for one in results[part]] for part in (lower, higher)]
        differences = [after - before for before, after in zip(*scores, strict=True)]
        mean, interval = statistics.mean(differences), _interval(differences)
        order = "as in the report" if mean > 0 else "NOT as in the report"
        lines.append(f"{higher} - {lower}: {mean:+.1f} points{interval}, {order}")
    return lines


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return f" (95 % interval {mean - half:+.1f} to {mean + half:+.1f})"


if __name__ == "__main__":
    main()
