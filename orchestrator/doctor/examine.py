"""`orch doctor`: check that this cluster, this file system and this environment are ready for a run.

Some functions gather facts. Pure functions evaluate the facts and return findings, each with a level and advice.
"""

from __future__ import annotations

import os
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
from orchestrator.doctor.two_node import Needs, Proof
from orchestrator.errors import SettingsError
from orchestrator.files.run_folder import nearest_folder
from orchestrator.messages import counted
from orchestrator.profile import Profile
from orchestrator.records import LockKind
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings, SlurmSettings

WAIT_S = 900.0  # how long to wait for the two-node job to start
TRY_IT = "`orch doctor --two-node` tests this with a short job"


def examine(
    settings_file: Path | None,
    runs_dir: Path,
    two_nodes: bool,
    wait_s: float = WAIT_S,
    say: Callable[[str], None] = print,
) -> list[Finding]:
    """Run all checks. wait_s: how long to wait for the two-node job to start. say: called with progress messages.

    Before this function returns, it deletes its files, and the two-node job is over or cancelled.
    """
    settings, findings = _read_settings(settings_file)
    several_nodes = has_slurm() and settings.several_nodes
    with _scratch_folder(runs_dir) as scratch:
        wanted_lock = None if settings.uses_server else settings.lock
        folder = machine.look_at_folder(runs_dir, scratch, several_nodes, wanted_lock)
        lock = folder.lock.kind if folder.lock else "flock"
        slurm, needs = _examine_slurm(settings, settings_file is not None, scratch, two_nodes, lock)
        findings += slurm
        proof = two_node.prove(needs, scratch, wait_s, say) if needs and isinstance(scratch, Path) else Proof()
        findings += proof.findings
        findings += machine.judge_folder(folder)
        findings += machine.judge_locks(folder, several_nodes, settings.uses_server, proof.locks_hold)
        if settings.database is not None:
            findings.append(_judge_database(settings, runs_dir))
    findings += [_judge_data(path, settings.prepare_command) for path in settings.data_folders]
    findings += machine.judge_disk(folder)
    findings.append(machine.judge_home(machine.look_at_home()))
    say("importing torch")
    return findings + machine.judge_python(machine.look_at_python(), len(gpus()), gpu_expected=False)


def _read_settings(file: Path | None) -> tuple[Settings, list[Finding]]:
    """Read the settings file. Without a valid file, return minimal settings for the other checks."""
    minimal = Settings(
        name="doctor", training_profiles=[Profile(name="none", learning_rate=1)], slurm=SlurmSettings(gpus=0)
    )
    if file is None:
        what = "no settings file is given: the checks below assume default settings, without a GPU"
        return minimal, [Finding("note", "settings", what, "`orch doctor settings/YOURS.json` examines your settings")]
    try:
        settings, notes = load(file)
    except SettingsError as error:
        do = "correct the file; the checks below assume default settings, without a GPU"
        return minimal, [Finding("error", "settings", str(error), do)]
    findings = [Finding("ok", "settings", f"{file} is valid: {counted(settings.workers, 'worker')}")]
    return settings, findings + [Finding("note", "settings", note, "see docs/settings.md") for note in notes]


@contextmanager
def _scratch_folder(runs_dir: Path) -> Iterator[Path | OSError]:
    """Create, yield and finally remove a folder on the runs' file system. If this is impossible, yield the error."""
    try:
        above = nearest_folder(runs_dir.expanduser())
        folder = tempfile.TemporaryDirectory(prefix=".orch-doctor-", dir=above, ignore_cleanup_errors=True)
    except OSError as error:
        yield error
        return
    with folder:
        yield Path(folder.name)


def _examine_slurm(
    settings: Settings, given: bool, scratch: Path | OSError, two_nodes: bool, lock: LockKind
) -> tuple[list[Finding], Needs | None]:
    """Return findings about Slurm, and the two-node test's Needs (None if no such test is wanted or possible).

    given: whether the user named a settings file. lock: the lock that a run launched here would use.
    """
    if settings.executor in ("local", "inline") and not two_nodes:
        what = f"not checked: the settings' executor is {settings.executor}"
        do = "to run jobs on a cluster, set executor to slurm or leave it out"
        return [Finding("note", "slurm", what, do)], None
    if not has_slurm():
        what = "sbatch is not on the PATH: this machine is not part of a cluster, or Slurm's module is not loaded"
        level: Level = "error" if two_nodes or settings.executor == "slurm" else "note"
        do = "load it (`module load slurm`), or use --executor local; the checks below apply to the local executor"
        return [Finding(level, "slurm", what, do)], None
    if isinstance(scratch, OSError):
        what = f"not checked, because the runs folder is not writable: {scratch.strerror or scratch}"
        return [Finding("error", "slurm", what, "choose another folder with --runs-dir, and try again")], None
    queue = SlurmQueue(settings, scratch, node.main)
    try:
        facts = ask_slurm(queue, settings.name, settings.workers)
    except SettingsError as error:
        return [Finding("error", "settings", str(error), "correct slurm_file")], None
    need = partition.need_of(queue.request, settings.gpus_per_worker)
    findings = judge_slurm(facts, queue.request, need, settings.workers, settings.eon_lifetime if given else None)
    if not facts.answers:
        return findings, None
    if not two_nodes:
        what = "not tested: whether compute nodes can queue jobs, see the runs folder and respect its locks"
        return [*findings, Finding("note", "successors", what, TRY_IT)], None
    nodes_up, limit_min = _room_for_test(queue.request.options.get("partition"), facts)
    refused = not facts.answer.taken
    return findings, Needs(settings, queue.script(1), need.gpus > 0, nodes_up, limit_min, refused, lock)


def _room_for_test(wanted: object, facts: SlurmFacts) -> tuple[int, int]:
    """Return the number of nodes that are up in the workers' partitions, and the test job's time limit in minutes."""
    names = partition.names_of(wanted, facts.partitions)
    rows = [row for row in facts.partitions if row.get("PartitionName") in names]
    limits = [limit for row in rows if (limit := partition.max_minutes(row)) is not None]
    up = {one.name for one in facts.nodes if one.partition in names and not one.away}
    return len(up), min((*limits, two_node.TIME_MIN))


def _judge_database(settings: Settings, runs_dir: Path) -> Finding:
    """Check the database named in the settings. For a separate SQLite file, the file's folder is not examined."""
    url = str(settings.database)
    if not settings.uses_server:
        what = f"the database {url} is a separate file, but the locks were tested in {runs_dir}"
        return Finding("note", "database", what, "to test the locks there, give that file's folder as --runs-dir")
    error = node.database_error(url, runs_dir)
    if error is None:
        return Finding("ok", "database", "the database server answers")
    return Finding("error", "database", error, 'start the server, or correct "database"')


def _judge_data(path: str, command: str) -> Finding:
    try:
        os.listdir(path)
    except OSError as error:
        do = f"correct the path in the settings, or run `{command}` to download the data of built-in jobs"
        return Finding("error", "data", f"{path}: can't be read here: {error.strerror or error}", do)
    return Finding("ok", "data", f"{path} can be read here")
