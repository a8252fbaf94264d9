"""What runs in a job: find out which one it is, wait for its turn, and be a worker.

With gpus_per_worker, a job has a process for each GPU. Rank 0 is the worker; the others follow it and know
neither the database nor the queue.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.cluster.host import gpus, this_process
from orchestrator.cluster.place import Place, this_place
from orchestrator.files import permissions
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.engine import JOB_CONNECTS_FOR_S
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import Ending, StopFlag
from orchestrator.worker.user_job import import_ahead

if TYPE_CHECKING:
    from jobs.training.ranks import Ranks

log = logging.getLogger("orch")


def job_main(run_folder: str, worker_id: int) -> str:
    """What submitit runs: one process of one job of one chain.

    On Slurm it does not return: nobody reads the result that submitit would write, and Python's own end with
    torch loaded takes a tenth of a second and more, for which the successor would wait. Neither does it where a job
    has several processes: see leave.
    """
    outcome = _work(run_folder, worker_id)
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" or this_place().count > 1:
        leave()
    return outcome


def leave() -> NoReturn:
    """End this process with exit code 0, now.

    With its connections to other ranks broken, Python's own end may be an abort instead (a thread of gloo's that
    wants the interpreter while it ends), for which the cluster would kill rank 0.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(run_folder: str, worker_id: int) -> str:
    permissions.use_umask(Path(run_folder))
    stop = StopFlag()
    stop.listen()  # followers too, which do nothing about it: rank 0 says when to stop
    place = this_place()
    if place.executor == "local" and os.getpgrp() != os.getpid():
        os.setsid()  # a terminal's Ctrl-C is not for the jobs that were launched from it
    _log_to(Path(run_folder) / "logs" / f"worker-{worker_id}.log" if place.rank == 0 else None)
    team = Team(place) if place.count > 1 else None  # before the wait for its turn: so none waits for who is no more
    if team is not None and place.rank > 0:
        return team.follow()
    try:
        run = OpenedRun.opened(Path(run_folder), job_main, JOB_CONNECTS_FOR_S)
        return be_worker(run, run.cluster.token(), worker_id, stop, team).outcome
    finally:
        if team is not None:
            team.dismiss()


class Team:
    """The processes of this job. Imports torch."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._ranks: Ranks | None = None
        self._error: Exception | None = None
        try:
            from jobs.training.distributed import own_gpu
            from jobs.training.ranks import meet

            if place.executor != "local":  # there, the GPUs are known when it is this job's turn
                os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(gpus(), place.rank, place.count)
            self._ranks = meet(place.rank, place.count, place.meeting_file)
        except Exception as error:  # rank 0 goes on to where the chain can take note of it
            log.error("%s", traceback.format_exc())
            self._error = error

    def follow(self) -> str:
        ending = f"no contact to rank 0: {self._error}"
        if self._ranks is not None:
            from jobs.training.distributed import follow

            ending = follow(self._ranks)
        log.info("rank %d ends: %s", self._place.rank, ending)
        return ending

    def open_trainer(self, run: OpenedRun, gpus: str | None, stop: StopFlag) -> Any:
        """Raises what kept the processes from coming together, or from opening the job."""
        from jobs.training.distributed import lead

        if self._ranks is None:
            raise self._error or AssertionError("either there are ranks or there is an error")

        def end_the_job() -> None:
            stop.reason = stop.reason or "the failure of one of its processes"

        import_paths = run.leaderboard.run_state.row()["import_paths"]
        settings = run.settings.model_dump(mode="json")
        return lead(self._ranks, settings, run.cluster.cores(), import_paths, gpus, end_the_job, run.folder)

    def dismiss(self) -> None:
        if self._ranks is not None:
            from jobs.training.distributed import dismiss

            dismiss(self._ranks)


def be_worker(run: OpenedRun, token: str, worker_id: int, stop: StopFlag, team: Team | None = None) -> Ending:
    """Wait for the turn of the job with this token, and do its work."""
    job, predecessor = run.leaderboard.chains.find(token, worker_id)
    if job is None:
        return Ending(f"no job {token} of worker {worker_id} is known; another one took its place")
    run.cluster.wait_turn(predecessor, lambda: stop.reason is not None)
    if stop.reason:
        return Ending(f"stopped by {stop.reason} before it began")
    run = OpenedRun.opened(run.folder, job_main, JOB_CONNECTS_FOR_S)  # it may have been amended during the wait
    from jobs.imports import look_first_in

    look_first_in(run.leaderboard.run_state.row()["import_paths"])
    ahead = None
    if run.leaderboard.chains.wants_successor(worker_id, time.time(), run.settings.max_failures):  # there is work
        ahead = import_ahead(run.settings.job)
    start = JobStart(token, worker_id, *run.cluster.identity(), *this_process())
    started = run.leaderboard.chains.start(start, time.time(), run.settings.max_failures, run.cluster.chains)
    if isinstance(started, str):
        log.warning("this job does nothing: %s", started)
        return Ending(started)
    local = run.cluster.name == "local"
    if local:
        os.environ["CUDA_VISIBLE_DEVICES"] = started.worker.device or ""

    opened: list[Any] = []

    def open_trainer() -> Any:
        if ahead is not None:
            ahead.join()
        if team is not None:
            opened.append(team.open_trainer(run, os.environ["CUDA_VISIBLE_DEVICES"] if local else None, stop))
        else:
            from orchestrator.worker.user_job import open_trainer  # imports torch, which takes seconds

            opened.append(open_trainer(run.settings, run.cluster.cores(), run.folder))
        return opened[0]

    worker = JobLoop(run.folder, run.settings, run.version, run.leaderboard, run.cluster, open_trainer, time.time, stop)
    ending = worker.run(started)
    for trainer in opened:
        _close(trainer)
    return ending


def _close(trainer: Any) -> None:
    """Let its loggers write what is left; a trainer of the user's own need not have any."""
    try:
        getattr(trainer, "close", lambda: None)()
    except Exception:  # the job's work is done and written down
        log.warning("the trainer could not be closed: %s", traceback.format_exc())


def _log_to(path: Path | None) -> None:
    """A line for each thing that happens: in the process's own output and, if path is given, the worker's log."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path is not None:
        handlers.append(logging.FileHandler(path))
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
