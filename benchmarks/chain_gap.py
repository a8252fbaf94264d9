"""Measure how long GPUs are idle between two links of a chain, and from launch to the first chunk, on a real Slurm.

    python benchmarks/chain_gap.py [--links 8] [--out benchmarks/results/chain_gap.json]

The gap lasts from a job's last log line to its successor's first claim. Two lower bounds are measured in the same run
with the same concurrency: Slurm's own gap between two empty jobs (afterany), and the time to import torch.
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
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "slurm" / "devcluster")]

from devcluster import DevCluster  # noqa: E402

from orchestrator.run.launch import launch  # noqa: E402
from orchestrator.settings.settings import Settings  # noqa: E402

WORKERS = 2


def slurm_gaps_s(cluster: DevCluster, folder: Path, links: int) -> list[float]:
    """Measure the gaps in WORKERS chains of jobs that only write their start and end times."""
    script = "#!/bin/bash\n#SBATCH --output=/dev/null\nsrun bash -c 'date +%s.%N >> {file}; date +%s.%N >> {file}'\n"
    files = [[folder / f"chain-{worker}-{link}" for link in range(links)] for worker in range(WORKERS)]
    for chain in files:
        before: list[str] = []
        for file in chain:
            before = [f"--dependency=afterany:{cluster.sbatch(script.format(file=file), *before)}"]
    while cluster.squeue():
        time.sleep(0.1)
    times = [[[float(t) for t in file.read_text().split()] for file in chain] for chain in files]
    return [after[0] - earlier[1] for chain in times for earlier, after in itertools.pairwise(chain)]


def import_torch_s(times: int) -> list[float]:
    """Measure the time to import torch in WORKERS concurrent processes."""
    code = "import time; t = time.perf_counter(); import torch; print(time.perf_counter() - t)"
    seconds = []
    for _ in range(times):
        at_once = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(WORKERS)]
        seconds += [float(process.communicate()[0]) for process in at_once]
    return seconds


def run_gaps_s(folder: Path, links: int) -> tuple[list[float], float]:
    """Measure the gaps in a real run of digits, and the time from launch to the last worker's first claim."""
    settings = Settings.model_validate(
        {
            "name": "gap", "job": "jobs.digits:Digits", "executor": "slurm", "workers": WORKERS, "eon_lifetime": 3,
            "training_profiles": [{"name": "a", "learning_rate": 0.01}], "stop_after_stale_cycles": None,
            "total_lifetime": 3600, "slurm": {"gpus": 1, "cpus": 1, "mem_gb": 1},
        }
    )  # fmt: skip
    launched = time.time()
    run = launch(settings, folder / "runs", [str(ROOT)])

    def worked() -> list[dict[str, Any]]:
        return [j for j in run.leaderboard.reader.rows("job") if j["started_at"]]

    while max((j["link"] for j in worked()), default=0) < links:
        time.sleep(0.5)
    run.cancel(at_once=False, now=time.time())
    while run.leaderboard.run_state.snapshot().open_jobs:
        time.sleep(0.2)
    logs = [read_log(run.folder / "logs" / f"worker-{worker}.log") for worker in range(WORKERS)]
    gaps = [gap for log in logs for gap in gaps_in(log)]
    return gaps, max(next(at for at, text in log if text.startswith("chunk ")) for log in logs) - launched


def read_log(path: Path) -> list[tuple[float, str]]:
    """Return (time, text) of each INFO line; other lines, such as tracebacks, are skipped."""
    lines = []
    for line in path.read_text().splitlines():
        when, _, text = line.partition(" INFO ")
        if text:
            lines.append((datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), text))
    return lines


def gaps_in(log: list[tuple[float, str]]) -> list[float]:
    """Return the times from each "job ends" to the next "chunk N (generation ...)", which marks a claim."""
    gaps, ended = [], None
    for at, text in log:
        if text.startswith("job ends"):
            ended = at
        elif " (generation " in text and ended is not None:
            gaps.append(at - ended)
            ended = None
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--links", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/chain_gap.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, DevCluster.temporary() as cluster:
        os.environ.update(cluster.env())
        slurm = slurm_gaps_s(cluster, Path(folder), options.links)
        torch = import_torch_s(options.links)
        gaps, to_first = run_gaps_s(Path(folder), options.links)
        torch += import_torch_s(options.links)
    result = {
        "links": len(gaps),
        "gap_s": statistics.median(gaps),
        "slurm_gap_s": statistics.median(slurm),
        "import_torch_s": statistics.median(torch),
        "launch_to_first_claims_s": to_first,
    }
    result["own_s"] = result["gap_s"] - result["slurm_gap_s"] - result["import_torch_s"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"gap between links {result['gap_s']:.2f} s (median of {len(gaps)}) = Slurm's {result['slurm_gap_s']:.2f} s "
        f"+ import of torch {result['import_torch_s']:.2f} s + orch {result['own_s']:.2f} s; "
        f"from launch to every worker's first claim {to_first:.2f} s"
    )


if __name__ == "__main__":
    main()
