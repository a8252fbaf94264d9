"""orch pause, resume, drain, cancel, amend, keep: what changes a run that exists. Each can be said twice."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, RunsDir, has_jobs, open_run
from orchestrator.errors import RunError

if TYPE_CHECKING:
    from orchestrator.run.run import Run


def register(app: typer.Typer) -> None:
    for command in (pause, resume, drain, cancel, amend, keep):
        app.command()(command)


Named = Annotated[str, typer.Argument(metavar="RUN", help="Name or path of the run.")]


def pause(run: Named, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Let running jobs finish their chunk, and queue none, until `orch resume`."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.pause(time.time()), "running jobs finish their chunk")


def resume(run: Named, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Go on with a run that was paused, drained, cancelled, or has failed."""
    opened = open_run(run, runs_dir)
    for line in opened.resume(time.time()):
        print(line)
    status = opened.status()
    if opened.cluster.chains and not has_jobs(status):
        reasons = {worker["outcome"] for worker in status["workers"] if worker["outcome"]}
        raise RunError(
            f"{opened.name} is active, but none of its workers has a job: {'; '.join(reasons) or 'none was taken'}. "
            f"`orch resume {opened.name}` tries again"
        )
    print(f"{opened.name} is active")


def drain(run: Named, runs_dir: RunsDir = DEFAULT_RUNS_DIR) -> None:
    """Let running jobs finish their chunk; with the last of them the run is finished."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.drain(time.time()), "running jobs finish their chunk")


def cancel(
    run: Named,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    now: Annotated[bool, typer.Option("--now", help="Kill the jobs, without suspending their chunk.")] = False,
) -> None:
    """End a run and its jobs; running jobs suspend their chunk. `orch resume` goes on with it."""
    opened = open_run(run, runs_dir)
    _report(opened, opened.cancel(at_once=now, now=time.time()), "its board stays as it is")


def amend(
    run: Named,
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
    is_now = opened.leaderboard.run_state.snapshot()
    if is_now.state is not RunState.ACTIVE:
        print(f"{opened.name} is {is_now.state}; `orch resume {opened.name}` goes on with it")
    elif stopping.lifetime_over(time.time(), is_now.deadline):
        print(f"{opened.name} has lasted longer than its total_lifetime already: it ends with the chunks under way")


def _check_job(run: Run, changes: Sequence[str]) -> None:
    """What the job says to other profiles and loggers, as at launch. Takes the seconds that torch's import takes."""
    from orchestrator.settings import loading
    from orchestrator.worker import user_job

    amended = loading.amend(run.settings, changes)
    kept = {"training_profiles": run.settings.training_profiles, "loggers": run.settings.loggers}
    if amended.model_copy(update=kept) != amended:
        user_job.check_job(amended, run.leaderboard.run_state.row()["import_paths"])


def keep(
    run: Named,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=1)] = 60,
) -> None:
    """Keep a run's chains from a login node, where compute nodes can't submit jobs. Ends with the run."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    opened = open_run(run, runs_dir)
    try:
        opened.keep(every, time.time, time.sleep)
    except KeyboardInterrupt:
        return
    print(f"{opened.name} is over")


def _report(run: Run, trouble: Sequence[str], remark: str) -> None:
    state = run.summary()
    over = state["state"] in ("finished", "converged")
    print(f"{run.name} is {state['state']}; {state['reason'] if over else remark}")
    for line in trouble:
        print(line, file=sys.stderr)
    if trouble:
        raise typer.Exit(1)
