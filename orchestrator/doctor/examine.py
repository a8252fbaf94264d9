"""`orch doctor`: is this cluster, this file system and this environment fit to run?

Facts are gathered first; pure functions turn them into findings, each with a level, and what to do about it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.cluster.host import gpus
from orchestrator.cluster.slurm import SlurmQueue
from orchestrator.doctor import machine, node, partition, two_node
from orchestrator.doctor.findings import Finding, Level
from orchestrator.doctor.slurm_facts import SlurmFacts, ask_slurm, has_slurm
from orchestrator.doctor.slurm_rules import judge_slurm
from orchestrator.doctor.two_node import Proof
from orchestrator.errors import SettingsError
from orchestrator.messages import counted
from orchestrator.records import LockKind, Profile
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings, SlurmSettings

WAIT_S = 900.0  # for the two-node job to start
NOT_TRIED = "`orch doctor --two-node` tries it with a short job"


def examine(
    settings_file: Path | None,
    runs_dir: Path,
    two_nodes: bool,
    wait_s: float = WAIT_S,
    say: Callable[[str], None] = print,
) -> list[Finding]:
    """Everything that can be found out. wait_s: how long the two-node job may wait to start. say: progress.

    Changes nothing: what it writes, it deletes, and what it queues, it waits for or cancels.
    """
    settings, findings = _settings(settings_file)
    with _scratch(runs_dir) as scratch:
        server = _server(settings)
        several = has_slurm() and settings.executor in (None, "slurm")
        folder = machine.look_at_folder(runs_dir, scratch, several, None if server else settings.lock)
        kind = folder.lock.kind if folder.lock else "flock"
        slurm, proof = _slurm(settings, settings_file is not None, scratch, two_nodes, wait_s, say, kind)
        findings += slurm + proof.findings
        findings += machine.judge_folder(folder)
        findings += machine.judge_locks(folder, several, server is not None, proof.locks_hold)
        findings += _database_elsewhere(settings, runs_dir)
        if server is not None and isinstance(scratch, Path):
            findings.append(_database(server, scratch))
    findings += [_data(path) for path in _data_folders(settings)]
    findings += machine.judge_disk(folder)
    findings.append(machine.judge_home(machine.look_at_home()))
    say("importing torch")
    python = machine.look_at_python()
    return findings + machine.judge_python(python, len(gpus()), gpu_expected=False, where="here")


def _settings(file: Path | None) -> tuple[Settings, list[Finding]]:
    """Those of the file, or for the rest of the examination the least that there can be."""
    if file is not None:
        try:
            settings, notes = load(file)
        except SettingsError as error:
            do = "mend the file; what follows is for a worker that asks for nothing"
            return _plain(), [Finding("error", "settings", str(error), do)]
        told = [Finding("note", "settings", line, "see docs/settings.md") for line in notes]
        return settings, [Finding("ok", "settings", f"{file} is valid: {counted(settings.workers, 'worker')}"), *told]
    what = "no settings file is given: what follows is for a worker that asks for nothing"
    return _plain(), [Finding("note", "settings", what, "orch doctor settings/YOURS.json looks at what they ask for")]


def _plain() -> Settings:
    return Settings(
        name="doctor", training_profiles=[Profile(name="none", learning_rate=1)], slurm=SlurmSettings(gpus=0)
    )


@contextmanager
def _scratch(runs_dir: Path) -> Iterator[Path | str]:
    """A folder on the file system of the runs; or why there can be none. Gone at the end."""
    try:
        made = Path(tempfile.mkdtemp(prefix=".orch-doctor-", dir=machine.nearest_folder(runs_dir)))
    except OSError as error:
        yield error.strerror or str(error)
        return
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _server(settings: Settings) -> str | None:
    """The URL of the database, if it is a server."""
    url = settings.database
    return url if url is not None and not url.startswith("sqlite") else None


def _database(url: str, scratch: Path) -> Finding:
    error = node.database_error(url, scratch)
    if error is None:
        return Finding("ok", "database", "the database server answers")
    return Finding("error", "database", error, 'start the server, or correct "database"')


def _database_elsewhere(settings: Settings, runs_dir: Path) -> list[Finding]:
    """The locks that were looked at are those of the runs folder."""
    if settings.database is None or _server(settings) is not None:
        return []
    what = f"database {settings.database} is a file of its own; the locks that were looked at are those in {runs_dir}"
    return [Finding("note", "database", what, "give the folder of that file as --runs-dir to look at its locks")]


def _data_folders(settings: Settings) -> tuple[str, ...]:
    """Those that the settings name."""
    given = (settings.training_source_dir, settings.testing_source_dir)
    return tuple(dict.fromkeys(path for path in given if path))


def _data(path: str) -> Finding:
    try:
        os.listdir(path)
    except OSError as error:
        do = "correct it in the settings; `orch prepare SETTINGS` fetches the data of ready jobs"
        return Finding("error", "data", f"{path}: can't be read here: {error.strerror or error}", do)
    return Finding("ok", "data", f"{path} can be read here")


# --- Slurm


def _slurm(
    settings: Settings,
    given: bool,
    scratch: Path | str,
    two_nodes: bool,
    wait_s: float,
    say: Callable[[str], None],
    lock: LockKind,
) -> tuple[list[Finding], Proof]:
    """What Slurm says, and what the two-node test says."""
    if settings.executor in ("local", "inline") and not two_nodes:
        what = f"not looked at: the settings' executor is {settings.executor}"
        do = "set executor to slurm, or leave it out, where jobs are to run on a cluster"
        return [Finding("note", "slurm", what, do)], two_node.NOT_TRIED
    if not has_slurm():
        what = "sbatch is not on the PATH: this is no node of a cluster, or its module is not loaded"
        level: Level = "error" if two_nodes or settings.executor == "slurm" else "note"
        do = "load it (`module load slurm`), or use --executor local: everything below holds for that"
        return [Finding(level, "slurm", what, do)], two_node.NOT_TRIED
    if isinstance(scratch, str):
        do = "choose another folder with --runs-dir, and look again"
        return [
            Finding("error", "slurm", f"not looked at, for nothing can be written beside the runs: {scratch}", do)
        ], two_node.NOT_TRIED
    cluster = SlurmQueue(settings, scratch, node.main)
    try:
        facts = ask_slurm(cluster, settings.name, settings.workers)
    except SettingsError as error:
        return [Finding("error", "settings", str(error), "correct slurm_file")], two_node.NOT_TRIED
    need = partition.need_of(cluster.request, settings.gpus_per_worker)
    eon_lifetime_s = settings.eon_lifetime if given else None
    found = judge_slurm(facts, cluster.request, need, settings.workers, eon_lifetime_s)
    if not facts.answers:
        return found, two_node.NOT_TRIED
    if not two_nodes:
        what = "not tried: whether a compute node can queue jobs, and whether it sees the runs folder and its locks"
        return [*found, Finding("note", "successors", what, NOT_TRIED)], two_node.NOT_TRIED
    usable, limit_min = _where(cluster.request.options.get("partition"), facts)
    needs = two_node.Needs(
        settings=settings,
        script=cluster.script(1),
        paths=_data_folders(settings),
        database=_server(settings),
        gpu=need.gpus > 0,
        refused_here=facts.answer is not None and not facts.answer.taken,
        lock=lock,
    )
    return found, two_node.prove(needs, scratch, usable, limit_min, wait_s, say)


def _where(wanted: object, facts: SlurmFacts) -> tuple[int, int | None]:
    """How many nodes are up where the workers run, and how many minutes a job may take there."""
    rows = [row for row in facts.partitions if row.get("PartitionName") in str(wanted).split(",")]
    rows = rows or [row for row in facts.partitions if row.get("Default") == "YES"]
    names = {row.get("PartitionName") for row in rows}
    up = {found.name for found in facts.nodes if found.partition in names and not found.away}
    most = [limit for row in rows if (limit := partition.max_minutes(row)) is not None]
    return len(up), min(most, default=None)
