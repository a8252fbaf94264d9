"""This machine: the Python environment, the disk, the home folder, the runs folder. Facts, then what they mean."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.doctor.findings import Finding
from orchestrator.doctor.locks import lock_advice, quota_command
from orchestrator.errors import LockError
from orchestrator.locking.choice import Choice, choose
from orchestrator.locking.mounts import ELSEWHERE, Mount, is_local, mount_here
from orchestrator.records import WantedLock

GIB = 2**30
DISK_FULL_GIB, DISK_LOW_GIB = 1.0, 20.0
FILES_LOW = 10_000
PYTHON_TIMEOUT_S = 180.0  # importing torch from a busy shared file system takes minutes at worst

PACKAGES = ("torch", "torchvision", "numpy", "submitit", "sqlalchemy", "filelock", "pydantic", "scikit-learn")
# In a process of its own: a broken torch may end it, and this one stays small.
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
    torch.ops.torchvision.nms  # compiled for another torch, it is not there
    facts["built_for_cuda"] = torch.version.cuda
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] \
        if torch.cuda.is_available() else []
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print("facts:" + json.dumps(facts))
"""


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """What a fresh Python of this environment says of itself."""

    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    built_for_cuda: str | None = None
    gpus: Sequence[str] = ()  # that torch can use
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """Of the runs folder, or of the nearest folder above it while it is not there."""

    runs_dir: str
    exists: bool
    looked_at: str
    writable: str | None  # why it is not; None: it is
    mode: int
    mount: Mount | None
    free_bytes: int
    free_files: int | None  # None: this file system does not count
    lock_error: str | None  # why no lock holds here
    lock: Choice | None = None  # what a run that is launched here takes


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
    return PythonFacts(**json.loads(line.removeprefix("facts:")))


def nearest_folder(path: Path) -> Path:
    """The path, or the first folder above it that is there; absolute, without symbolic links."""
    path = path.expanduser().absolute()
    while not path.is_dir():
        path = path.parent
    return path.resolve()


def look_at_folder(runs_dir: Path, scratch: Path | str, several_nodes: bool, wanted: WantedLock | None) -> FolderFacts:
    """scratch: a folder that was made beside the runs, or why it could not be made. wanted: the settings' lock; None:
    no lock is needed."""
    folder = nearest_folder(runs_dir)
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
        writable=scratch if isinstance(scratch, str) else None,
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
    except (OSError, RuntimeError) as error:  # RuntimeError: it is not known where it is
        return str(error)
    return None


# --- what they mean


def judge_python(facts: PythonFacts, gpus_listed: int, gpu_expected: bool, where: str) -> list[Finding]:
    """gpus_listed: by nvidia-smi. gpu_expected: is it an error if torch sees none? where: for messages."""
    topic = "python" if where == "here" else f"python {where}"
    if facts.error:
        do = (
            "install a pair of torch and torchvision that belong together (`make install`, or "
            "`pip install --force-reinstall torch torchvision` from one index), and activate it in slurm.setup"
        )
        return [Finding("error", topic, f"torch and torchvision don't work {where}: {facts.error}", do)]
    named = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    found = [Finding("ok", topic, f"Python {facts.python}, {named}")]
    missing = [name for name in PACKAGES if name not in facts.versions]
    if missing:
        found.append(Finding("error", topic, f"not installed: {', '.join(missing)}", "pip install -e ."))
    return [*found, _judge_cuda(facts, gpus_listed, gpu_expected, where)]


def _judge_cuda(facts: PythonFacts, gpus_listed: int, gpu_expected: bool, where: str) -> Finding:
    topic = "cuda" if where == "here" else f"cuda {where}"
    if facts.gpus:
        return Finding(
            "ok", topic, f"{len(facts.gpus)} visible to torch (CUDA {facts.built_for_cuda}): {facts.gpus[0]}"
        )
    if facts.built_for_cuda is None and (gpu_expected or gpus_listed):
        what = f"torch is built for CPUs only: {gpus_listed or 'the'} GPUs would not be used"
        return Finding(
            "error" if gpu_expected else "warning", topic, what, "install a CUDA build of torch (pytorch.org)"
        )
    if gpus_listed:
        what = f"nvidia-smi lists {gpus_listed} GPUs, and torch (CUDA {facts.built_for_cuda}) can use none"
        do = "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this build of torch (`nvidia-smi`)"
        return Finding("error" if gpu_expected else "warning", topic, what, do)
    if gpu_expected:
        what = f"the job asked for a GPU, and none is visible to torch {where}"
        do = "look at `srun nvidia-smi -L` with the same options: is it GPUs that slurm.gpus or slurm.gres names?"
        return Finding("error", topic, what, do)
    what = f"no GPU is visible to torch {where}"
    do = "usual on a login node: `orch doctor --two-node` looks at what a job sees. With --executor local, CPUs train"
    return Finding("note", topic, what, do if where == "here" else "fine for CPUs; slurm.gpus asks for one")


def judge_folder(facts: FolderFacts) -> list[Finding]:
    """Is the runs folder writable, and by whom else?"""
    topic = "runs folder"
    if facts.writable is not None:
        do = "choose another folder with --runs-dir (or ORCH_RUNS_DIR)"
        return [Finding("error", topic, f"{facts.looked_at} can't be written: {facts.writable}", do)]
    found = []
    others = facts.mode & stat.S_IWOTH
    if others and facts.exists:
        what = f"{facts.looked_at} can be written by everybody, and jobs run what is in it"
        found.append(Finding("warning", topic, what, f"chmod o-w {facts.looked_at}"))
    elif others and not facts.mode & stat.S_ISVTX:
        what = f"{facts.looked_at}, where the runs folder will be, can be written by everybody"
        found.append(Finding("warning", topic, what, f"chmod o-w {facts.looked_at}, or choose another --runs-dir"))
    made = "is writable" if facts.exists else f"will be made in {facts.looked_at}"
    return [Finding("ok", topic, f"{facts.runs_dir} {made}"), *found]


def judge_disk(facts: FolderFacts) -> list[Finding]:
    """Free space and free files; a quota may be smaller."""
    free = facts.free_bytes / GIB
    command = quota_command(facts.mount) if facts.mount else None
    quota = f"; a quota of yours may be smaller: {command}" if command else ""
    clean = "free some, or choose another --runs-dir"
    found = []
    if free < DISK_FULL_GIB:
        found.append(Finding("error", "disk", f"{free:.2f} GiB are free on {facts.looked_at}", clean))
    elif free < DISK_LOW_GIB:
        what = f"{free:.1f} GiB are free on {facts.looked_at}: some tens of checkpoints of a large model fill that"
        found.append(Finding("warning", "disk", what, clean))
    if facts.free_files is not None and facts.free_files < FILES_LOW:
        what = f"{facts.free_files} more files fit on {facts.looked_at} (`df -i`)"
        found.append(Finding("warning", "disk", what, "delete files, or choose another --runs-dir"))
    return found or [Finding("ok", "disk", f"{free:.0f} GiB are free on {facts.looked_at}{quota}")]


def judge_home(error: str | None) -> Finding:
    """error: why the home folder can't be written."""
    if error is None:
        return Finding("ok", "home", "the home folder is writable")
    do = "set TORCH_HOME and XDG_CACHE_HOME to a writable folder (slurm.setup does it for jobs), or free some quota"
    return Finding("warning", "home", f"the home folder can't be written, and caches go there: {error}", do)


def judge_locks(facts: FolderFacts, slurm: bool, server: bool, proven: bool | None) -> list[Finding]:
    """slurm: do jobs run on several nodes? server: is the database one, so that no lock is needed?
    proven: by the two-node test, that locks hold or do not; None: not tested."""
    if server:
        return [Finding("ok", "locks", "the database is a server: no lock on a file is needed")]
    if facts.mount is None:
        what = f"the file system of {facts.looked_at} is not known (no /proc/self/mountinfo)"
        advice = Finding("warning", "locks", what, "`orch doctor --two-node` tests its locks")
    else:
        advice = lock_advice(facts.mount.fstype, facts.mount.options)
        if slurm and is_local(facts.mount.fstype):
            what = f"{facts.mount}: a local file system, which the nodes of a cluster do not share as a rule"
            do = "put the runs on a file system that all nodes see (--runs-dir); `orch doctor --two-node` tells"
            advice = Finding("warning", "locks", what, do)
    advice = _with_choice(advice, facts.lock)
    here = f"{facts.mount}: " if facts.mount and str(facts.mount) not in advice.what else ""
    advice = Finding(advice.level, advice.topic, f"{here}{advice.what}", advice.do)
    if proven and advice.level in ("note", "warning"):
        advice = Finding("ok", "locks", f"{facts.mount or facts.looked_at}: locks hold, as the two-node test shows")
    if facts.lock_error:
        return [advice, Finding("error", "locks", f"in {facts.looked_at}, {facts.lock_error}", ELSEWHERE)]
    chosen = [Finding("ok", "locks", f"a run takes this lock: {facts.lock}")] if facts.lock else []
    return [advice, *chosen]


def _with_choice(advice: Finding, lock: Choice | None) -> Finding:
    """Where flock does not reach, the soft lock is taken: then that is worth knowing, no more."""
    if lock is None or lock.kind != "soft" or advice.level not in ("warning", "error"):
        return advice
    return Finding("note", advice.topic, advice.what, f"nothing: the soft lock is taken. For a faster one, {advice.do}")
