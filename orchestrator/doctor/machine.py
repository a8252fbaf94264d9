"""This machine: the Python environment, the disk, the home folder, the runs folder. Facts first, then findings."""

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
# In a separate process: a broken torch may crash it, and this process stays small.
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
    torch.ops.torchvision.nms  # missing if torchvision was compiled for another torch
    facts["built_for_cuda"] = torch.version.cuda
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] \
        if torch.cuda.is_available() else []
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print("facts:" + json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """What a new Python process of this environment reports."""

    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    built_for_cuda: str | None = None
    gpus: tuple[str, ...] = ()  # names of the GPUs that torch can use
    error: str | None = None


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """The runs folder, or the nearest folder above it if it does not exist yet."""

    runs_dir: str
    exists: bool
    looked_at: str
    not_writable: str | None  # why; None: it is writable
    mode: int
    mount: Mount | None
    free_bytes: int
    free_files: int | None  # None: this file system does not count
    lock_error: str | None  # why no lock protects a database here
    lock: Choice | None = None  # the lock of a run that is launched here


# --- facts


def look_at_python(timeout_s: float = PYTHON_TIMEOUT_S) -> PythonFacts:
    command = [sys.executable, "-c", LOOK_AT_PYTHON, json.dumps(PACKAGES)]
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
    """scratch: a folder beside the runs, or why there is none. wanted: the settings' lock; None: no lock is needed."""
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
    """Why the home folder can't be written; None: it can."""
    try:
        with tempfile.TemporaryFile(dir=Path.home()) as file:
            file.write(b"orch doctor")
    except (OSError, RuntimeError) as error:  # RuntimeError: its place is not known
        return str(error)
    return None


# --- findings


def judge_python(facts: PythonFacts, gpus_listed: int, gpu_expected: bool, host: str | None = None) -> list[Finding]:
    """gpus_listed: by nvidia-smi. gpu_expected: is it an error if torch sees none? host: None for this machine."""
    where, topic = ("here", "python") if host is None else (f"on {host}", f"python on {host}")
    if facts.error:
        do = (
            "install a torch and a torchvision that belong together (`make install`, or `pip install "
            "--force-reinstall torch torchvision` from one index), and activate that environment in slurm.setup"
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
        what = f"{len(facts.gpus)} visible to torch (CUDA {facts.built_for_cuda}): {facts.gpus[0]}"
        return Finding("ok", topic, what)
    if facts.built_for_cuda is None and (gpu_expected or gpus_listed):
        what = f"torch is built for CPUs only: {gpus_listed or 'the'} GPUs would not be used"
        return Finding(level, topic, what, "install a CUDA build of torch (pytorch.org)")
    if gpus_listed:
        what = f"nvidia-smi lists {gpus_listed} GPUs, and torch (CUDA {facts.built_for_cuda}) can use none"
        do = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this build of torch (`nvidia-smi`)"
        return Finding(level, topic, what, do)
    if gpu_expected:
        what = f"the job asked for a GPU, and none is visible to torch {where}"
        do = "look at `srun nvidia-smi -L` with the same options: does slurm.gpus or slurm.gres name GPUs?"
        return Finding("error", topic, what, do)
    do = "usual on a login node: `orch doctor --two-node` looks at what a job sees. With --executor local, CPUs train"
    do = do if host is None else "fine for CPUs; slurm.gpus asks for a GPU"
    return Finding("note", topic, f"no GPU is visible to torch {where}", do)


def judge_folder(facts: FolderFacts) -> list[Finding]:
    """Is the runs folder writable, and can every user write it?"""
    topic, folder = "runs folder", facts.looked_at
    if facts.not_writable is not None:
        do = "choose another folder with --runs-dir (or ORCH_RUNS_DIR)"
        return [Finding("error", topic, f"{folder} can't be written: {facts.not_writable}", do)]
    made = "is writable" if facts.exists else f"will be made in {folder}"
    findings = [Finding("ok", topic, f"{facts.runs_dir} {made}")]
    if facts.mode & stat.S_IWOTH and facts.exists:
        what = f"{folder} can be written by every user, and jobs execute its files"
        findings.append(Finding("warning", topic, what, f"chmod o-w {folder}"))
    elif facts.mode & stat.S_IWOTH and not facts.mode & stat.S_ISVTX:
        what = f"{folder}, where the runs folder will be made, can be written by every user"
        findings.append(Finding("warning", topic, what, f"chmod o-w {folder}, or choose another --runs-dir"))
    return findings


def judge_disk(facts: FolderFacts) -> list[Finding]:
    """Free space and free files; a quota may be smaller."""
    free = facts.free_bytes / GIB
    findings = []
    if free < DISK_LOW_GIB:
        level: Level = "error" if free < DISK_FULL_GIB else "warning"
        what = f"{free:.2f} GiB are free on {facts.looked_at}: a few dozen checkpoints of a large model fill that"
        findings.append(Finding(level, "disk", what, "free some, or choose another --runs-dir"))
    if facts.free_files is not None and facts.free_files < FILES_LOW:
        what = f"{facts.free_files} more files fit on {facts.looked_at} (`df -i`)"
        findings.append(Finding("warning", "disk", what, "delete files, or choose another --runs-dir"))
    command = quota_command(facts.mount) if facts.mount else None
    quota = f"; your quota may be smaller: {command}" if command else ""
    return findings or [Finding("ok", "disk", f"{free:.0f} GiB are free on {facts.looked_at}{quota}")]


def judge_home(error: str | None) -> Finding:
    """error: why the home folder can't be written."""
    if error is None:
        return Finding("ok", "home", "the home folder is writable")
    do = "set TORCH_HOME and XDG_CACHE_HOME to a writable folder (slurm.setup does it for jobs), or free some quota"
    return Finding("warning", "home", f"the home folder can't be written, and caches go there: {error}", do)


def judge_locks(facts: FolderFacts, slurm: bool, server: bool, proven: bool | None) -> list[Finding]:
    """slurm: do jobs run on several nodes? server: is the database a server, which needs no lock?
    proven: did the two-node test show that locks hold? None: not tested."""
    if server:
        return [Finding("ok", "locks", "the database is a server: it needs no lock on a file")]
    advice = _mount_advice(facts, slurm)
    if facts.lock and facts.lock.kind == "soft" and advice.level in ("warning", "error"):
        do = f"nothing: the soft lock is taken. For a faster one, {advice.do}"
        advice = Finding("note", "locks", advice.what, do)
    if proven and advice.level in ("note", "warning"):
        advice = Finding("ok", "locks", f"{facts.mount or facts.looked_at}: locks hold, as the two-node test shows")
    if facts.lock_error:
        return [advice, Finding("error", "locks", f"in {facts.looked_at}, {facts.lock_error}", ELSEWHERE)]
    return [advice, *([Finding("ok", "locks", f"a run takes this lock: {facts.lock}")] if facts.lock else [])]


def _mount_advice(facts: FolderFacts, slurm: bool) -> Finding:
    mount = facts.mount
    if mount is None:
        what = f"the file system of {facts.looked_at} is not known (no /proc/self/mountinfo)"
        return Finding("warning", "locks", what, "`orch doctor --two-node` tests its locks")
    if slurm and mount.fstype in LOCAL:
        what = f"{mount}: a local file system, which the nodes of a cluster usually do not share"
        do = "put the runs on a file system that all nodes see (--runs-dir); `orch doctor --two-node` tests it"
        return Finding("warning", "locks", what, do)
    advice = lock_advice(mount.fstype, mount.options)
    return Finding(advice.level, "locks", f"{mount}: {advice.what}", advice.do)
