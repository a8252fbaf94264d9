"""The entry point of a job: find out which job this is, wait for its predecessor, and work.

If gpus_per_worker is 2 or more, a job has one process per GPU. Rank 0 is the worker; the other ranks follow its
commands, and use neither the database nor the queue.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from orchestrator.cluster.choose import open_this_job
from orchestrator.cluster.host import SAFE_PATH, SET_BY_ORCH, gpus, this_process
from orchestrator.cluster.place import Place, this_place
from orchestrator.cluster.protocol import ThisJob
from orchestrator.files import permissions
from orchestrator.files.run_folder import LOGS
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.engine import JOB_CONNECTS_FOR_S
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import Ending, StopFlag, Trainer, WithDefaults
from orchestrator.worker.user_job import import_ahead

if TYPE_CHECKING:
    from jobs.training.ranks import Ranks

log = logging.getLogger("orch")


def job_main(run_folder: str, worker_id: int) -> str:
    """Run one process of one job; submitit calls this function.

    On Slurm, this function ends the process instead of returning. Nothing uses the result that submitit would write,
    and with torch loaded, Python takes 0.1 s or more to exit, which would delay the successor. If a job has several
    processes, each also ends this way (see `leave`).
    """
    outcome = _work(run_folder, worker_id)
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" or this_place().count > 1:
        leave()
    return outcome


def leave() -> NoReturn:
    """End this process immediately, with exit code 0.

    After a broken connection to another rank, a normal exit may abort the process, because a thread of gloo needs the
    interpreter while the interpreter shuts down. Slurm would then kill rank 0 too.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(run_folder: str, worker_id: int) -> str:
    permissions.use_umask(Path(run_folder))
    if os.environ.get(SAFE_PATH) == SET_BY_ORCH:  # it would also affect processes that the user's code starts
        del os.environ[SAFE_PATH]
    stop = StopFlag()
    stop.listen()  # on every rank: signals must not kill the other ranks, since rank 0 decides when to stop
    place = this_place()
    if place.executor == "local" and os.getpgrp() != os.getpid():
        os.setsid()  # so that Ctrl-C in the terminal of the launch does not reach this job
    _log_to(Path(run_folder) / LOGS / f"worker-{worker_id}.log" if place.rank == 0 else None)
    team = Team(place) if place.count > 1 else None  # connect before the wait, so that all end if rank 0 dies meanwhile
    if team is not None and place.rank > 0:
        return team.follow(stop)
    from jobs.imports import start_in

    try:
        run = OpenedRun.opened(Path(run_folder), job_main, JOB_CONNECTS_FOR_S)
        start_in(run.import_paths)
        return be_worker(run, open_this_job(run.settings), worker_id, stop, team).outcome
    finally:
        if team is not None:
            team.dismiss()


class Team:
    """The processes of this job, connected to each other. Creating a Team imports torch."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._ranks: Ranks | None = None
        self._error: Exception | None = None
        try:
            from jobs.training.distributed import own_gpu
            from jobs.training.ranks import meet

            if place.executor != "local":  # local jobs get their GPUs after their predecessor has ended
                os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(gpus(), place.rank, place.count)
            self._ranks = meet(place.rank, place.count, place.meeting_file)
        except Exception as error:  # rank 0 reports the error when it opens the trainer
            log.error("%s", traceback.format_exc())
            self._error = error

    def follow(self, stop: StopFlag) -> str:
        ending = f"no connection to rank 0: {self._error}"
        if self._ranks is not None:
            from jobs.training.distributed import follow

            ending = follow(self._ranks, stop.listen_again)
        log.info("rank %d ends: %s", self._place.rank, ending)
        return ending

    def open_trainer(self, run: OpenedRun, cores: int, gpus: str | None, stop: StopFlag) -> Trainer:
        """Open the job's trainer. Raises the error if connecting the processes or opening the job has failed."""
        from jobs.training.distributed import Opening, lead

        if self._ranks is None:
            raise self._error or AssertionError("the ranks are not connected, but there is no error")

        def end_the_job() -> None:
            stop.reason = stop.reason or "the failure of one of its processes"

        opening = Opening(run.settings, cores, run.import_paths, str(run.folder), gpus)
        return lead(self._ranks, opening, end_the_job)

    def dismiss(self) -> None:
        if self._ranks is not None:
            from jobs.training.distributed import dismiss

            dismiss(self._ranks)


def be_worker(run: OpenedRun, this_job: ThisJob, worker_id: int, stop: StopFlag, team: Team | None = None) -> Ending:
    """Wait for this job's predecessor to end, then do this job's work."""
    chains, token = run.leaderboard.chains, this_job.token()
    job, predecessor = chains.find(token, worker_id)
    if job is None:
        return Ending(f"the database has no job {token} of worker {worker_id}; another job has replaced it")
    run.leaderboard.database.release_connection()
    this_job.wait_turn(predecessor, lambda: stop.reason is not None)
    if stop.reason:
        return Ending(f"stopped by {stop.reason} before the job began to work")
    run.refresh()  # the settings may have been amended during the wait
    this_job.settings = run.settings
    from jobs.imports import look_first_in

    look_first_in(run.import_paths)
    max_failures, local = run.settings.max_failures, run.queue.name == "local"
    has_work = chains.wants_successor(worker_id, time.time(), max_failures)
    importing = import_ahead(run.settings.job) if has_work else None
    start = JobStart(token, worker_id, *this_job.identity(), *this_process())
    started = chains.start(start, time.time(), max_failures, run.queue.chains)
    if isinstance(started, str):
        log.warning("this job does nothing: %s", started)
        return Ending(started)
    if local:
        os.environ["CUDA_VISIBLE_DEVICES"] = started.worker.device or ""
    opened: list[Trainer] = []

    def open_trainer() -> Trainer:
        if importing is not None:
            importing.join()
        if team is not None:
            visible = os.environ["CUDA_VISIBLE_DEVICES"] if local else None
            trainer = team.open_trainer(run, this_job.cores(), visible, stop)
        else:
            from orchestrator.worker.user_job import open_trainer  # imports torch, which takes seconds

            trainer = open_trainer(run.settings, this_job.cores(), run.folder)
        opened.append(trainer if isinstance(trainer, Trainer) else WithDefaults(trainer))
        return opened[0]

    ending = JobLoop(run, this_job, open_trainer, time.time, stop).work(started)
    for trainer in opened:
        try:
            trainer.close()
        except BaseException:  # not a failure of the job, since its work is already in the database
            log.warning("the trainer could not be closed: %s", traceback.format_exc())
    return ending


def _log_to(path: Path | None) -> None:
    """Log to stderr and, if path is given, to that file."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
