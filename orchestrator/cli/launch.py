"""orch launch: from a settings file to running workers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, Json, RunsDir, Set, SettingsFile, has_jobs, print_json, say
from orchestrator.errors import LeaderboardError
from orchestrator.messages import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from jobs.training.trying import Tried
    from orchestrator.run.run import Run
    from orchestrator.settings.settings import Settings

MEND_EVERY_S = 10.0
PATIENCE_S = 300.0  # how long to keep trying while the database can't be used; jobs try as long


def launch(
    settings: SettingsFile,
    executor: Annotated[
        str | None, typer.Option(help="slurm, local or inline. Default: slurm if sbatch is installed, else local.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Chains that train at the same time.")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; start nothing.")
    ] = False,
    no_try: Annotated[
        bool, typer.Option("--no-try", help="Do not train a few steps here before anything is queued.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the board until the run ends.")] = False,
    json: Json = False,
) -> None:
    """Launch a run. A run that already exists is continued.

    First trains a few steps here, to find mistakes before anything is queued, and tests which lock works on the runs'
    file system; if something fails, nothing is started.
    """
    from orchestrator.files import permissions
    from orchestrator.files.run_folder import is_run
    from orchestrator.run.launch import launch as launch_run
    from orchestrator.run.run import Run
    from orchestrator.worker.user_job import data_source

    loaded, notes = _load(settings, set_ or [], workers, executor)
    runs_dir = runs_dir.absolute()  # now: the user's code may change the working folder
    folder = runs_dir / loaded.name
    existing = Run.open(folder) if is_run(folder) else None
    if existing:
        _refuse_changes(existing, loaded)
    import_paths = [str(Path.cwd())]
    tried = _tried(loaded, import_paths, notes, skip=no_try or (existing is not None and not dry_run))
    if existing is None and tried:
        loaded = loaded.model_copy(update={"channels_last": tried.channels_last})
    needed_gb = _disk(loaded, folder) if existing is None or dry_run else None
    if dry_run:
        if existing:
            existing.refuse_if_over(time.time())
        _print_plan(loaded, folder, existing is not None, needed_gb, dict(tried.profiles) if tried else {}, json)
        return
    run = existing or launch_run(
        loaded,
        runs_dir,
        import_paths,
        data_source=data_source(loaded),
        data_fingerprints=tried.fingerprints if tried else {},
    )
    permissions.use_umask(run.folder)
    for line in run.resume(time.time()) if existing else []:
        say(line)
    _follow(run, loaded.executor == "inline", wait, json)


def _follow(run: Run, inline: bool, wait: bool, json: bool) -> None:
    """Train an inline run, or wait for the run if asked to; then show it."""
    from orchestrator.cli import tables
    from orchestrator.records import RunState
    from orchestrator.run.run import STOPPED

    workers_ = counted(run.settings.workers, "worker")
    say(f"{run.name}: {workers_}, {run.queue.name} executor, in {run.folder}")
    if inline:
        say(f"worker 0 ended: {run.work_inline().outcome}")
    elif wait:
        _wait(run, quiet=json)
    if json:
        print_json({**run.status(), "board": run.board()})
    elif wait or inline:
        tables.show(tables.status(run.status()), tables.board(run.board()))
    state = run.summary()["state"]
    if state is RunState.FAILED or (state in STOPPED and not run.board()["entries"]):
        raise typer.Exit(1)


def _load(path: Path, overrides: list[str], workers: int | None, executor: str | None) -> tuple[Settings, list[str]]:
    from orchestrator.cluster.choose import default_executor
    from orchestrator.settings.loading import load

    loaded, notes = load(path, overrides, workers=workers, executor=executor)
    if loaded.executor is None:
        loaded = loaded.model_copy(update={"executor": default_executor()})
    if loaded.executor == "inline":
        loaded = loaded.model_copy(update={"workers": 1})
    return loaded, notes


def _tried(settings: Settings, import_paths: list[str], notes: list[str], skip: bool) -> Tried | None:
    """Check the job and, unless `skip`, train it for a few steps. Prints what was found. Raises JobSpecError."""
    from orchestrator.worker.user_job import check_job, try_job

    for line in notes + check_job(settings, import_paths):
        say(line)
    tried = None if skip else try_job(settings)
    for line in tried.lines if tried else []:
        say(line)
    return tried


def _disk(settings: Settings, folder: Path) -> float | None:
    """Estimate, print and return how many GB the checkpoints will take; None: not known."""
    from orchestrator.files import disk_budget
    from orchestrator.worker.user_job import checkpoint_bytes

    needed_gb, lines = disk_budget.demand(
        settings.num_models, settings.workers, settings.max_disk_gb, checkpoint_bytes(settings), folder
    )
    for line in lines:
        say(line)
    return needed_gb


def _refuse_changes(existing: Run, wanted: Settings) -> None:
    from orchestrator.errors import RunError
    from orchestrator.settings.loading import difference

    if wanted.lock == "auto":  # the first launch chose the kind of lock, so this is not a change
        wanted = wanted.model_copy(update={"lock": existing.settings.lock})
    if wanted.channels_last == "auto":  # the first launch may have found that the job fails with it
        wanted = wanted.model_copy(update={"channels_last": existing.settings.channels_last})
    if wanted.database_schema is None:  # the first launch generated a name, so this is not a change
        wanted = wanted.model_copy(update={"database_schema": existing.settings.database_schema})
    changed = difference(existing.settings, wanted)
    if changed:
        raise RunError(
            f"{existing.name} already exists with other settings. `orch resume {existing.name}` continues it with its "
            "own settings, `orch amend` changes them, and --set name=... launches a separate run. What differs:\n  "
            + "\n  ".join(changed)
        )


def _print_plan(
    settings: Settings, folder: Path, exists: bool, needed_gb: float | None, profiles: dict[str, str], json: bool
) -> None:
    from orchestrator.rules import claiming, stopping, succession

    cycle = settings.training_profiles
    stale_chunks = stopping.stale_chunks(settings.stop_after_stale_cycles, len(cycle), settings.num_models)
    first = [f"founder {i + 1}: {claiming.profile_at(0, cycle).name}" for i in range(settings.workers)]
    plan: dict[str, Any] = {
        "run": settings.name,
        "folder": str(folder.absolute()),
        "resumes": exists,
        "executor": settings.executor,
        "workers": settings.workers,
        "jobs_at_most": settings.workers * succession.jobs_at_most(settings.total_lifetime, settings.eon_lifetime),
        "worker_hours_at_most": round(settings.workers * settings.total_lifetime / 3600, 2),
        "disk_gb_at_most_about": None if needed_gb is None else round(needed_gb, 6),
        "stale_chunks_to_converge": stale_chunks,
        **({} if exists else {"first_claims": first}),
        "cycle": [profile.name for profile in cycle],
        "profiles": profiles,
    }
    if settings.executor == "slurm":
        plan |= _slurm_plan(settings, folder)
    if json:
        print_json(plan)
        return
    script = plan.pop("script", None)
    for name, description in plan.pop("profiles").items():
        print(f"profile {name}: {description}")
    for key, value in plan.items():
        print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    if script:
        print(f"\n# --- script of the first jobs; successors have --dependency=afterany:JOB and no --array\n{script}")


def _slurm_plan(settings: Settings, folder: Path) -> dict[str, Any]:
    """Return the first jobs' script and time limit, and an upper limit on the run's GPU hours."""
    from orchestrator.cluster.sbatch import gpu_count
    from orchestrator.cluster.slurm import SlurmQueue
    from orchestrator.worker.job_main import job_main

    queue = SlurmQueue(settings, folder.absolute(), job_main)
    gpus = queue.request.options.get("gpus-per-node", settings.gpus_per_worker)
    return {
        "time_limit_min": queue.request.time_min,
        "gpu_hours_at_most": round(settings.workers * gpu_count(gpus) * settings.total_lifetime / 3600, 2),
        "script": queue.script(settings.workers),
    }


def _wait(run: Run, quiet: bool) -> None:
    """Show the run until no job is left, and meanwhile restart broken chains. Ctrl-C ends the display, not the run.

    Raises LeaderboardError if the database can't be used for PATIENCE_S seconds (full disk, server down).
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, quiet=quiet)
    waiting = _Waiting(run, console)
    look_every_s = 0.5 if run.queue.name == "local" else 5.0  # all users share Slurm's controller, so ask it less often
    answered_at = time.monotonic()
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                try:
                    if waiting.is_over(live):
                        return
                    answered_at = time.monotonic()
                except LeaderboardError as error:
                    if time.monotonic() - answered_at > PATIENCE_S:
                        advice = (
                            f"Workers that are still running continue; `orch status {run.name}` restarts the others"
                        )
                        raise LeaderboardError(f"{error}. {advice}") from error
                    waiting.say(f"{error}; trying again")
                time.sleep(look_every_s)
    except KeyboardInterrupt:
        console.print(f"{run.name} continues; `orch status {run.name}` shows it, `orch cancel {run.name}` ends it")
        raise typer.Exit(130) from None  # the exit code that shells use for Ctrl-C


class _Waiting:
    """What `orch launch --wait` does until the run ends."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run = run
        self._console = console
        self._printed = ""
        self._mended_at = time.time()

    def say(self, line: str) -> None:
        """Print the line, unless it repeats the previous one."""
        if line != self._printed:
            self._console.print(line, highlight=False)
            self._printed = line

    def is_over(self, live: Live) -> bool:
        from rich.console import Group

        from orchestrator.cli import tables
        from orchestrator.run.run import STOPPED

        state = self._run.status()
        if self._console.is_terminal:
            live.update(Group(tables.status(state), tables.board(self._run.board())), refresh=True)
        else:
            self.say(_line(state))
        if not has_jobs(state):
            return state["state"] in STOPPED or not self._mend()  # not over if broken chains were restarted
        if time.time() - self._mended_at > MEND_EVERY_S:  # a killed job may have broken its chain
            self._mend()
        return False

    def _mend(self) -> bool:
        """Restart broken chains. Returns whether any was broken."""
        self._mended_at = time.time()
        done = self._run.reconcile(self._mended_at)
        for line in done:
            self._console.print(line, highlight=False)
        return bool(done)


def _line(state: dict[str, Any]) -> str:
    best = "-" if state["best"] is None else f"{state['best']:.4f}"
    chunks = state["chunks"]
    return (
        f"{state['state']}: best {best}, {chunks['promoted']} promoted, {chunks['discarded']} discarded, "
        f"{counted(state['epochs'], 'epoch')}"
    )
