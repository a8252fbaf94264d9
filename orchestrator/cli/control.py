"""orch pause, resume, drain, cancel, amend, keep: control an existing run. All commands can be repeated safely."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, RunName, RunsDir, has_jobs, open_run, say
from orchestrator.errors import RunError

if TYPE_CHECKING:
    from orchestrator.run.run import Run


def pause(run: RunName, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Let running jobs finish their chunk, and queue no new ones, until `orch resume`."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.pause(time.time()), "running jobs finish their chunk")


def resume(run: RunName, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Continue a run that was paused, drained or cancelled, or that failed."""
    opened = open_run(run, runs_dir)
    for line in opened.resume(time.time()):
        print(line)
    status = opened.status()
    if opened.queue.chains and not has_jobs(status):
        reasons = {worker["outcome"] for worker in status["workers"] if worker["outcome"]}
        raise RunError(
            f"{opened.name} is active, but none of its workers has a job: {'; '.join(reasons) or 'none was accepted'}. "
            f"Run `orch resume {opened.name}` to try again"
        )
    print(f"{opened.name} is active")


def drain(run: RunName, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Let running jobs finish their chunk; when the last job has ended, the run is finished."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.drain(time.time()), "running jobs finish their chunk")


def cancel(
    run: RunName,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    now: Annotated[bool, typer.Option("--now", help="Kill the jobs, without suspending their chunk.")] = False,
) -> None:
    """End a run and its jobs; running jobs suspend their chunk. `orch resume` continues the run."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.cancel(at_once=now, now=time.time()), "its board stays as it is")


def amend(
    run: RunName,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A new value; @FILE reads it from a JSON file.")
    ],
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Change settings of a run while it runs: lifetimes, workers, profiles, stop rules, slurm."""
    from orchestrator.records import RunState
    from orchestrator.rules import stopping

    opened = open_run(run, runs_dir)
    _check_job(opened, set_)
    for line in opened.amend(set_, time.time()) or ["nothing changes"]:
        print(line)
    snapshot = opened.leaderboard.run_state.snapshot()
    if snapshot.state is not RunState.ACTIVE:
        try:
            opened.refuse_if_over(time.time())
            print(f"{opened.name} is {snapshot.state}; `orch resume {opened.name}` continues it")
        except RunError as error:
            print(error)
    elif stopping.lifetime_over(time.time(), snapshot.deadline):
        print(f"{opened.name} has already lasted longer than its total_lifetime: it ends after the current chunks")


def _check_job(run: Run, changes: Sequence[str]) -> None:
    """If profiles or loggers change, check them with the job, as at launch. Takes seconds: this imports torch."""
    from orchestrator.settings import loading
    from orchestrator.worker import user_job

    amended = loading.amend(run.settings, changes)
    kept = {"training_profiles": run.settings.training_profiles, "loggers": run.settings.loggers}
    if amended.model_copy(update=kept) != amended:
        user_job.check_job(amended, run.import_paths)


def keep(
    run: RunName,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    every: Annotated[float, typer.Option(help="Seconds between checks.", min=1)] = 60,
) -> None:
    """Restart broken chains from a login node until the run ends, for clusters whose compute nodes can't submit."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    opened = open_run(run, runs_dir)
    try:
        opened.keep(every, time.time, time.sleep)
    except KeyboardInterrupt:
        return
    print(f"{opened.name} has ended")


def _report(run: Run, trouble: Sequence[str], remark: str) -> None:
    from orchestrator.run.run import OVER

    state = run.summary()
    print(f"{run.name} is {state['state']}; {state['reason'] if state['state'] in OVER else remark}")
    for line in trouble:
        say(line)
    if trouble:
        raise typer.Exit(1)
