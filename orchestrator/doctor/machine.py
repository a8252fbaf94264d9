"""Check this machine: the Python environment, the disk, the home folder and the runs folder."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from orchestrator.doctor.findings import Finding, Level
from orchestrator.doctor.locks import lock_advice, quota_command
from orchestrator.errors import LockError
from orchestrator.files.run_folder import nearest_folder
from orchestrator.locking.choice import Choice, choose
from orchestrator.locking.mounts import ELSEWHERE, LOCAL, Mount, mount_here
from orchestrator.records import WantedLock

GIB = 2**30
DISK_FULL_GIB, DISK_LOW_GIB = 1.0, 20.0
FILES_LOW = 10_000
PYTHON_TIMEOUT_S = 180.0  # importing torch from a busy shared file system can take minutes

PACKAGES = ("torch", "torchvision", "numpy", "submitit", "sqlalchemy", "filelock", "pydantic", "scikit-learn")
# This script runs in a separate process: a broken torch may crash Python, and importing torch takes much memory.
LOOK_AT_PYTHON = """
import importlib.metadata, json, sys
facts = {"python": sys.version.split()[0], "versions": {}}
for name in json.loads(sys.argv[1]):
    try:
        facts["versions"][name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
try:
    import torch, torchvision
    torch.ops.torchvision.nms  # raises if torchvision was compiled for another version of torch
    facts["built_for_cuda"] = torch.version.cuda
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] \
        if torch.cuda.is_available() else []
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print("facts:" + json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """Facts about this Python environment, reported by a new process."""

    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    built_for_cuda: str | None = None
    gpus: tuple[str, ...] = ()  # names of the GPUs that torch can use
    error: str | None = None


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """Facts about the runs folder or, if it does not exist yet, its nearest existing parent."""

    runs_dir: str
    exists: bool
    looked_at: str  # the folder that these facts describe: the runs folder or that parent
    not_writable: str | None  # why no file can be created in the folder; None if the folder is writable
    mode: int
    mount: Mount | None
    free_bytes: int
    free_files: int | None  # free inodes; None: this file system has no limit on files
    lock_error: str | None  # why no lock works in this folder; None if one works or no lock was tested
    lock: Choice | None = None  # the lock that a run launched here would use


# --- facts


def look_at_python(timeout_s: float = PYTHON_TIMEOUT_S) -> PythonFacts:
    command = [sys.executable, "-P", "-c", LOOK_AT_PYTHON, json.dumps(PACKAGES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return PythonFacts(error=f"{type(error).__name__}: {error}"[:500])
    line = next((line for line in done.stdout.splitlines() if line.startswith("facts:")), None)
    if line is None:
        return PythonFacts(error=f"Python ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return TypeAdapter(PythonFacts).validate_json(line.removeprefix("facts:"))


def look_at_folder(
    runs_dir: Path, scratch: Path | OSError, several_nodes: bool, wanted: WantedLock | None
) -> FolderFacts:
    """Gather the facts. scratch: a folder beside the runs, or the error of its creation. wanted: the settings' lock;
    None: no lock is needed."""
    folder = nearest_folder(runs_dir.expanduser()).resolve()
    lock, lock_error = None, None
    if isinstance(scratch, Path) and wanted is not None:
        try:
            lock = choose(scratch, several_nodes, wanted)
        except (LockError, OSError) as error:
            lock_error = str(error)
    free = os.statvfs(folder)
    return FolderFacts(
        runs_dir=str(runs_dir.absolute()),
        exists=runs_dir.is_dir(),
        looked_at=str(folder),
        not_writable=None if isinstance(scratch, Path) else scratch.strerror or str(scratch),
        mode=folder.stat().st_mode,
        mount=mount_here(folder),
        free_bytes=free.f_bavail * free.f_frsize,
        free_files=free.f_favail if free.f_files else None,
        lock_error=lock_error,
        lock=lock,
    )


def look_at_home() -> str | None:
    """Return why the home folder is not writable, or None if it is."""
    try:
        with tempfile.TemporaryFile(dir=Path.home()) as file:
            file.write(b"orch doctor")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        return str(error)
    return None


# --- findings


def judge_python(facts: PythonFacts, gpus_listed: int, gpu_expected: bool, host: str | None = None) -> list[Finding]:
    """Check Python, its packages and the GPUs. gpus_listed: the number of GPUs that nvidia-smi lists. gpu_expected:
    whether it is an error to have no GPU. host: the machine's name; None: this machine."""
    where, topic = ("here", "python") if host is None else (f"on {host}", f"python on {host}")
    if facts.error:
        do = (
            "install matching versions of torch and torchvision (`make install`, or `pip install --force-reinstall "
            "torch torchvision` from one index), and activate that environment in slurm.setup"
        )
        return [Finding("error", topic, f"torch and torchvision don't work {where}: {facts.error}", do)]
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    findings = [Finding("ok", topic, f"Python {facts.python}, {versions}")]
    missing = [name for name in PACKAGES if name not in facts.versions]
    if missing:
        findings.append(Finding("error", topic, f"not installed: {', '.join(missing)}", "pip install -e ."))
    return [*findings, _judge_cuda(facts, gpus_listed, gpu_expected, host)]


def _judge_cuda(facts: PythonFacts, gpus_listed: int, gpu_expected: bool, host: str | None) -> Finding:
    where, topic = ("here", "cuda") if host is None else (f"on {host}", f"cuda on {host}")
    level: Level = "error" if gpu_expected else "warning"
    if facts.gpus:
        what = f"GPUs that torch can use: {len(facts.gpus)} (CUDA {facts.built_for_cuda}): {facts.gpus[0]}"
        return Finding("ok", topic, what)
    if facts.built_for_cuda is None and (gpu_expected or gpus_listed):
        what = f"torch is built for CPUs only, so {gpus_listed or 'the'} GPUs would not be used"
        return Finding(level, topic, what, "install a CUDA build of torch (pytorch.org)")
    if gpus_listed:
        what = f"nvidia-smi lists {gpus_listed} GPUs, but torch (CUDA {facts.built_for_cuda}) can't use any"
        do = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this build of torch (`nvidia-smi`)"
        return Finding(level, topic, what, do)
    if gpu_expected:
        what = f"the job asked for a GPU, but torch sees none {where}"
        do = "check that slurm.gpus or slurm.gres asks for GPUs, and run `srun nvidia-smi -L` with the same options"
        return Finding("error", topic, what, do)
    do = "usual on a login node: `orch doctor --two-node` shows what a job sees. --executor local would train on CPUs"
    do = do if host is None else "fine for training on CPUs; to train on GPUs, set slurm.gpus"
    return Finding("note", topic, f"no GPU is visible to torch {where}", do)


def judge_folder(facts: FolderFacts) -> list[Finding]:
    """Check that the runs folder is writable, but not by every user."""
    topic, folder = "runs folder", facts.looked_at
    if facts.not_writable is not None:
        do = "choose another folder with --runs-dir (or ORCH_RUNS_DIR)"
        return [Finding("error", topic, f"{folder} can't be written: {facts.not_writable}", do)]
    made = "is writable" if facts.exists else f"will be created in {folder}"
    findings = [Finding("ok", topic, f"{facts.runs_dir} {made}")]
    if facts.mode & stat.S_IWOTH and facts.exists:
        what = f"{folder} can be written by every user, and jobs execute the files in it"
        findings.append(Finding("warning", topic, what, f"chmod o-w {folder}"))
    elif facts.mode & stat.S_IWOTH and not facts.mode & stat.S_ISVTX:
        what = f"{folder}, where the runs folder will be created, can be written by every user"
        findings.append(Finding("warning", topic, what, f"chmod o-w {folder}, or choose another --runs-dir"))
    return findings


def judge_disk(facts: FolderFacts) -> list[Finding]:
    """Check the free space and the number of files that can still be created."""
    free = facts.free_bytes / GIB
    findings = []
    if free < DISK_LOW_GIB:
        level: Level = "error" if free < DISK_FULL_GIB else "warning"
        what = f"only {free:.2f} GiB are free on {facts.looked_at}: a few dozen checkpoints of a large model fill them"
        findings.append(Finding(level, "disk", what, "free some space, or choose another --runs-dir"))
    if facts.free_files is not None and facts.free_files < FILES_LOW:
        what = f"only {facts.free_files} more files can be created on {facts.looked_at} (`df -i`)"
        findings.append(Finding("warning", "disk", what, "delete files, or choose another --runs-dir"))
    command = quota_command(facts.mount) if facts.mount else None
    quota = f"; your quota may be smaller: {command}" if command else ""
    return findings or [Finding("ok", "disk", f"{free:.0f} GiB are free on {facts.looked_at}{quota}")]


def judge_home(error: str | None) -> Finding:
    """Report whether the home folder is writable. error: why a test file could not be written; None: it was written."""
    if error is None:
        return Finding("ok", "home", "the home folder is writable")
    do = "set TORCH_HOME and XDG_CACHE_HOME to writable folders (for jobs, in slurm.setup), or delete files there"
    return Finding("warning", "home", f"the home folder, which holds caches, can't be written: {error}", do)


def judge_locks(facts: FolderFacts, slurm: bool, server: bool, proven: bool | None) -> list[Finding]:
    """Check the locks on the runs folder. slurm: whether jobs run on several nodes. server: whether the database is on
    a server. proven: whether the locks worked in the two-node test; None: not known."""
    if server:
        return [Finding("ok", "locks", "the database is a server, which needs no file lock")]
    advice = _mount_advice(facts, slurm)
    if facts.lock and facts.lock.kind == "soft" and advice.level in ("warning", "error"):
        do = f"nothing: the soft lock is used instead. For a faster lock, {advice.do}"
        advice = Finding("note", "locks", advice.what, do)
    if proven and advice.level in ("note", "warning"):
        advice = Finding("ok", "locks", f"{facts.mount or facts.looked_at}: the two-node test shows that locks work")
    if facts.lock_error:
        return [advice, Finding("error", "locks", f"in {facts.looked_at}, {facts.lock_error}", ELSEWHERE)]
    return [advice, *([Finding("ok", "locks", f"a run uses this lock: {facts.lock}")] if facts.lock else [])]


def _mount_advice(facts: FolderFacts, slurm: bool) -> Finding:
    mount = facts.mount
    if mount is None:
        what = f"the file system of {facts.looked_at} is not known (no /proc/self/mountinfo)"
        return Finding("warning", "locks", what, "`orch doctor --two-node` tests its locks")
    if slurm and mount.fstype in LOCAL:
        what = f"{mount}: a local file system, which the nodes of a cluster usually do not share"
        do = "put the runs on a file system that all nodes share (--runs-dir); `orch doctor --two-node` tests it"
        return Finding("warning", "locks", what, do)
    advice = lock_advice(mount.fstype, mount.options)
    return Finding(advice.level, "locks", f"{mount}: {advice.what}", advice.do)
