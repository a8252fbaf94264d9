"""orch repair: check a run's database, and rebuild it from the checkpoints' records if it is damaged or lost.

Nothing is deleted: damaged files are kept under another name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.cluster.choose import open_queue
from orchestrator.cluster.host import gpus_of
from orchestrator.errors import CheckpointError, DamagedCheckpointError, RunError, SettingsError
from orchestrator.files import atomic, checkpoints, permissions
from orchestrator.files.checkpoint_record import CheckpointRecord, read_record
from orchestrator.files.run_folder import CHECKPOINTS, DATABASE_NAME, FOLDERS, JOBS, SETTINGS_NAME
from orchestrator.leaderboard import rebuild_plan
from orchestrator.leaderboard.engine import Database, journal_of
from orchestrator.leaderboard.health import Condition, RunRow, examine, open_jobs, run_row
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.leaderboard.rebuild import Origin, rebuild
from orchestrator.leaderboard.rebuild_plan import RebuildPlan
from orchestrator.locking import choice
from orchestrator.messages import counted, iso
from orchestrator.records import Evidence
from orchestrator.rules.checkpoint_names import SUFFIX, generation_of, record_name
from orchestrator.settings import loading
from orchestrator.settings.settings import Settings, new_schema


@dataclass
class RepairReport:
    """The problems found, and the repairs made (or, in a dry run, planned)."""

    run: str
    dry_run: bool
    condition: str  # of the database before the repair: healthy, damaged or lost
    problems: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # paths to which damaged files were renamed
    entries: list[dict[str, Any]] = field(default_factory=list)  # entries of the rebuilt board
    unknown: list[str] = field(default_factory=list)  # facts that the records do not contain


def repair(folder: Path, dry_run: bool, force: bool, now: float) -> RepairReport:
    """Repair the run in folder. force: repair the run even if it is not known whether its jobs are alive.

    Raises RunError if jobs are or may be alive, or if both database and settings are lost; LeaderboardError if the
    database can't be checked, or was written by an unknown version.
    """
    folder = folder.absolute()
    permissions.check_permissions(folder)
    written, trouble = _settings(folder)
    place = (written.database, written.database_schema) if written else (None, None)
    database = Database(place[0], folder, place[1])
    health = examine(database)
    for part in FOLDERS if not dry_run else ():
        (folder / part).mkdir(exist_ok=True)  # a purge of the file system may have deleted empty folders
    report = RepairReport(folder.name, dry_run, str(health.condition), list(health.problems))
    if health.condition is Condition.HEALTHY:
        try:
            board = Leaderboard.open(folder, *place)
            wrong = _entries_that_differ(folder, board)
        except SettingsError as error:
            wrong = [f"{database.name}: its settings are damaged: {error}"]
        if not wrong:
            _mend(folder, board, trouble, report, now)
            return report
        report.condition, report.problems = str(Condition.DAMAGED), wrong
    salvaged = run_row(database)
    written = written or (salvaged.settings if salvaged else None)
    if written is None:
        raise RunError(
            f"{trouble}, and {'; '.join(report.problems)}. Put back the settings file used to launch the run "
            f"as {folder / SETTINGS_NAME}, and run `orch repair {folder.name}` again"
        )
    _refuse_if_alive(folder, written, database, force)
    _rebuild(folder, written, database, salvaged, report, now)
    return report


def _settings(folder: Path) -> tuple[Settings | None, str]:
    """Read the settings in the run's folder. Returns (settings, "") or (None, why they can't be used)."""
    path = folder / SETTINGS_NAME
    try:
        return loading.thaw(path.read_text(encoding="utf-8")), ""
    except (OSError, ValueError) as error:
        return None, f"{path} can't be read: {getattr(error, 'strerror', None) or error}"
    except SettingsError as error:
        return None, f"{path} does not contain the settings of a run: {error}"


# --- an intact database


def _entries_that_differ(folder: Path, board: Leaderboard) -> list[str]:
    """Describe entries beyond the number of slots, and entries whose file and record contradict the database."""
    lines = []
    entries, slots = board.reader.entries(), board.settings.num_models
    if len(entries) > slots:
        lines.append(f"the board has {len(entries)} entries, but only {counted(slots, 'slot')}")
    for entry in entries:
        try:
            record = read_record(folder / CHECKPOINTS, entry["file"])
            if (record.sha256, record.score) == (entry["sha256"], entry["score"]):
                continue
            checkpoints.verify(folder / CHECKPOINTS, entry["file"], record.sha256)
        except CheckpointError:
            continue  # the file or the record is damaged; the database may be right
        lines.append(f"entry {entry['entry']}: {entry['file']} and its record agree, but the database differs")
    return lines


def _mend(folder: Path, board: Leaderboard, trouble: str, report: RepairReport, now: float) -> None:
    """Take damaged entries off the board, and restore lost settings."""
    text, _ = board.run_state.settings()
    if trouble:
        report.problems.append(trouble)
        report.done.append(f"{SETTINGS_NAME} is restored from the database")
        if not report.dry_run:
            _write_settings(folder, text)
    for entry in board.reader.entries():
        try:
            checkpoints.verify(folder / CHECKPOINTS, entry["file"], entry["sha256"])
        except DamagedCheckpointError as error:
            report.problems.append(str(error))
            report.done.append(f"entry {entry['entry']} (score {entry['score']:.6g}) is removed from the board")
            if not report.dry_run:
                board.board.condemn_entry(entry["entry"], str(error), now)


def _write_settings(folder: Path, text: str) -> None:
    atomic.publish(folder / SETTINGS_NAME, lambda target: target.write(f"{text}\n".encode()))


# --- are the run's jobs alive?


def _refuse_if_alive(folder: Path, settings: Settings, database: Database, force: bool) -> None:
    """Raise RunError if jobs of the run are alive or, unless force is set, may be alive."""
    from orchestrator.cluster import live_jobs

    owner = permissions.owner(folder)
    if owner is not None:
        raise RunError(
            f"the jobs of this run belong to {owner}: only {owner} can see whether they are alive and repair the run"
        )
    alive, unknown = _known_jobs(folder, settings, database)
    pids = [pid for pid in live_jobs.processes(folder) if pid != os.getpid()]
    listed = live_jobs.slurm_jobs(settings.name, folder) if settings.executor == "slurm" else []
    ids = sorted({*alive, *(listed or [])})
    if pids or ids:
        which = f" on this machine (processes {', '.join(map(str, pids))})" if pids else f": {', '.join(ids)}"
        kill = "kill" if pids else f"scancel {' '.join(ids)}"
        raise RunError(
            f"jobs of {folder.name} are alive{which}. End them (`orch cancel {folder.name}` if the database still "
            f"answers, otherwise {kill}), then run `orch repair {folder.name}` again"
        )
    if (listed is None or unknown) and not force:
        who = "Slurm does not answer" if listed is None else f"the jobs {', '.join(unknown)} can't be seen from here"
        raise RunError(
            f"{who}, so jobs of {folder.name} may be alive and would continue to write to the old database. Try again "
            "later, or on the machine where the jobs were started; --force repairs the run anyway"
        )


def _known_jobs(folder: Path, settings: Settings, database: Database) -> tuple[list[str], list[str]]:
    """Ask the queue about the jobs that are open according to the damaged database. Returns (cluster ids of the live
    jobs, cluster ids and hosts of the jobs that can't be seen from here)."""
    from orchestrator.worker.job_main import job_main

    submitted = [job for job in open_jobs(database) if job.cluster_id]
    evidence = open_queue(settings, folder, job_main).evidence(submitted)
    alive = [job for job in submitted if evidence[job.job_id] in (Evidence.QUEUED, Evidence.RUNNING)]
    unknown = [job for job in submitted if evidence[job.job_id] is Evidence.UNKNOWN]
    return [str(job.cluster_id) for job in alive], [f"{job.cluster_id} on {job.host}" for job in unknown]


# --- a lost database


def _rebuild(
    folder: Path, settings: Settings, database: Database, salvaged: RunRow | None, report: RepairReport, now: float
) -> None:
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    records, names, unusable = _read(folder / CHECKPOINTS)
    policy = settings.policy(1)
    plan = rebuild_plan.plan(records, names, policy.num_models, policy.metric, policy.cycle)
    report.problems += unusable.values()
    board = [rebuilt.record for rebuilt in plan.board]
    report.entries = [{"file": r.file, "score": r.score, "epochs": r.epochs, "parent": r.parent_file} for r in board]
    origin, more = _origin(folder, settings, salvaged, records, now)
    report.unknown += [*plan.notes, *more]
    entries = counted(len(plan.board), "entry", "entries")
    report.done.append(f"{entries} and {counted(len(plan.suspended), 'suspended chunk')} go into a new database")
    if report.dry_run:
        return
    report.kept += _set_aside(folder, unusable, stamp)
    if database.file is None:
        _rebuild_on_server(folder, settings, origin, plan, report, now)
    else:
        _rebuild_file(database, origin, plan, stamp, report, now)
        if not (folder / SETTINGS_NAME).exists():
            _write_settings(folder, origin.settings)
    report.done.append(f"the run is paused: `orch resume {folder.name}` continues it")


def _read(folder: Path) -> tuple[list[CheckpointRecord], list[str], dict[str, str]]:
    """Return (records of the intact checkpoints, names of all files, why each other checkpoint can't be used)."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    records, unusable = [], {}
    stems = {n.rpartition(".")[0] for n in names if generation_of(n) is not None and not n.startswith(".")}
    for stem in sorted(stems):
        file = stem + SUFFIX
        try:
            record = read_record(folder, file)
            checkpoints.verify(folder, file, record.sha256)
            records.append(record)
        except CheckpointError as error:
            unusable[file] = str(error)
    return records, names, unusable


def _set_aside(folder: Path, unusable: Iterable[str], stamp: str) -> list[str]:
    """Move unusable checkpoints to another folder, since `orch gc` would delete them. Returns that folder, if made."""
    aside = folder / f"{CHECKPOINTS}.damaged-{stamp}"
    for file in unusable:
        for name in (file, record_name(file)):
            source = folder / CHECKPOINTS / name
            if source.exists():
                aside.mkdir(exist_ok=True)
                source.rename(aside / name)
    return [str(aside)] if aside.is_dir() else []


def _origin(
    folder: Path, settings: Settings, salvaged: RunRow | None, records: Sequence[CheckpointRecord], now: float
) -> tuple[Origin, list[str]]:
    """Return the values for the run's row in the new database, and notes on values that had to be guessed."""
    notes = []
    with_origin = [r for r in sorted(records, key=lambda r: r.generation) if r.launched_at is not None]
    if salvaged:
        launched_at, import_paths = salvaged.launched_at, salvaged.import_paths
    elif with_origin:
        launched_at, import_paths = with_origin[-1].launched_at or now, list(with_origin[-1].import_paths)
    else:
        times = [r.created_at for r in records] + [path.stat().st_mtime for path in (folder / JOBS).glob("*")]
        launched_at, import_paths = min(times, default=now), [str(Path.cwd())]
        notes.append(
            f"no record contains the run's launch time and the folder of its job's module; {iso(launched_at)} and "
            f"{import_paths[0]} (the current folder) are used"
        )
    local = settings.executor == "local"
    wanted = range(settings.workers)
    devices = gpus_of(wanted, settings.gpus_per_worker) if local else [None for _ in wanted]
    text = loading.freeze(settings)
    deadline = launched_at + settings.total_lifetime
    return Origin(settings.name, text, import_paths, launched_at, deadline, devices), notes


def _rebuild_file(
    database: Database, origin: Origin, plan: RebuildPlan, stamp: str, report: RepairReport, now: float
) -> None:
    """Write the new database to a temporary folder. Then rename the old file, and move the new file to its place."""
    file = database.file
    assert file is not None, "this database is on a server"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not choice.record_path(file).exists():
        settings = loading.thaw(origin.settings)
        choice.write_record(file, choice.choose(file.parent, settings.several_nodes, settings.lock))
    kept = file.with_name(f"{file.name}.damaged-{stamp}")
    journal = journal_of(file)
    before = _identity(file)
    building = Path(tempfile.mkdtemp(prefix=".repair-", dir=file.parent))
    try:
        new = building / DATABASE_NAME
        rebuild(Database(f"sqlite:///{new}", building), origin, plan, str(kept) if before else None, now)
        with choice.lock_of(choice.read_record(file), file):
            if _identity(file) != before:
                raise RunError(f"{file} was changed during the repair; check the run again (`orch status`)")
            if _is_hot(journal):
                _keep(journal, journal_of(kept), report)
            if before:
                _keep(file, kept, report)
            new.rename(file)
            atomic.sync_folder(file.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _keep(source: Path, target: Path, report: RepairReport) -> None:
    source.rename(target)
    report.kept.append(str(target))


def _is_hot(journal: Path) -> bool:
    """Return whether the journal contains a transaction to roll back. If so, SQLite's journal starts with a byte other
    than 0."""
    try:
        with journal.open("rb") as file:
            return file.read(1) not in (b"", b"\0")
    except FileNotFoundError:
        return False


def _identity(file: Path) -> tuple[int, int, int] | None:
    """Return a value that changes with the file's contents; None if there is no file."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _rebuild_on_server(
    folder: Path, settings: Settings, origin: Origin, plan: RebuildPlan, report: RepairReport, now: float
) -> None:
    """Rebuild the database in a new schema; the old schema is not changed."""
    moved = settings.model_copy(update={"database_schema": new_schema(settings.name)})
    text = loading.freeze(moved)
    kept = f"the schema {settings.database_schema}"
    database = Database(moved.database, folder, moved.database_schema)
    rebuild(database, replace(origin, settings=text), plan, kept, now)
    _write_settings(folder, text)
    report.done.append(f"the run's tables are now in the schema {moved.database_schema}; {kept} was not changed")
