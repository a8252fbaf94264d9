"""What runs in a job: find out which one it is, wait for its turn, and be a worker."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from orchestrator.cluster.local import this_process
from orchestrator.run import Run
from orchestrator.worker import Ending, StopFlag, Worker

log = logging.getLogger("orch")


def job_main(run_folder: str, worker_id: int) -> str:
    """What submitit runs: one job of one chain."""
    stop = StopFlag()
    stop.listen()
    run = Run.open(Path(run_folder))
    if run.cluster.name == "local" and os.getpgrp() != os.getpid():
        os.setsid()  # a terminal's Ctrl-C is not for the jobs that were launched from it
    _log_to(run.folder / "logs" / f"worker-{worker_id}.log")
    return be_worker(run, run.cluster.token(), worker_id, stop).outcome


def be_worker(run: Run, token: str, worker_id: int, stop: StopFlag) -> Ending:
    """Wait for the turn of the job with this token, and do its work."""
    job, predecessor = run.leaderboard.chains.find(token, worker_id)
    if job is None:
        return Ending(f"no job {token} of worker {worker_id} is known; another one took its place")
    run.cluster.wait_turn(predecessor, lambda: stop.reason is not None)
    if stop.reason:
        return Ending(f"stopped by {stop.reason} before it began")
    run = Run.open(run.folder)  # it may have been amended during the wait
    cluster_id, host = run.cluster.identity()
    started = run.leaderboard.chains.start(
        token,
        worker_id,
        cluster_id,
        host,
        *this_process(),
        time.time(),
        run.settings.max_failures,
        successor=run.cluster.chains,
    )
    if isinstance(started, str):
        log.warning("this job does nothing: %s", started)
        return Ending(started)
    if run.cluster.name == "local":
        os.environ["CUDA_VISIBLE_DEVICES"] = started.worker.device or ""
    sys.path[:0] = [p for p in run.leaderboard.reader.run_row()["import_paths"] if p not in sys.path]

    def open_trainer() -> Any:
        from orchestrator.user_job import open_trainer  # imports torch, which takes seconds

        return open_trainer(run.settings, run.cluster.cores())

    worker = Worker(run.folder, run.settings, run.version, run.leaderboard, run.cluster, open_trainer, time.time, stop)
    return worker.run(started)


def _log_to(path: Path) -> None:
    """A line for each thing that happens: in the job's own output and in the worker's log."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(path)):
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
