"""This machine: its processes, its GPUs and its name."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

SAFE_PATH = "PYTHONSAFEPATH"  # a non-empty value makes Python not look for modules in its working folder (-P)
SET_BY_ORCH = "orch"


def job_python() -> str:
    """Return the command that starts Python in a job.

    -P: files in the working folder, such as a user's orchestrator/ or random.py, must not hide what starts the job.
    PYTHONHASHSEED: all jobs of a run must iterate over sets of strings in the same order. It is set here, and not in
    the environment of the submission, so that `sbatch --export=NONE` does not lose it.
    """
    return f"env PYTHONHASHSEED=0 {shlex.quote(sys.executable)} -P"


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as values for CUDA_VISIBLE_DEVICES, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def gpus_of(workers: Sequence[int], each: int) -> list[str | None]:
    """Return, for each worker, a CUDA_VISIBLE_DEVICES value that names `each` GPUs; None if the machine has fewer GPUs.
    If there are too few GPUs for all workers, several workers share the same GPUs."""
    names = gpus()
    shares = [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]
    return [shares[worker % len(shares)] if shares else None for worker in workers]


def host_name() -> str:
    """Return this machine's name and boot id. A restart changes the boot id; all earlier processes are then gone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text()[:8] if boot.exists() else ''}"


def this_process() -> tuple[int, float]:
    """Return this process's (pid, start time). Pids are reused, but the pair is unique on this machine."""
    return os.getpid(), psutil.Process().create_time()


def created_at(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def find_process(pid: int, created_at: float | None) -> psutil.Process | None:
    """Return the process with this pid and start time (created_at None: any start time); None if dead or a zombie."""
    try:
        process = psutil.Process(pid)
        if created_at is not None and abs(process.create_time() - created_at) > 0.5:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def send_signal(pid: int | None, created_at: float | None, signum: signal.Signals) -> None:
    process = None if pid is None else find_process(pid, created_at)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
