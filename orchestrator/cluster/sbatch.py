"""Compute the options for sbatch, and interpret sbatch's error messages. All functions are pure."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import Refusal, SubmissionError
from orchestrator.messages import shown
from orchestrator.settings.sbatch_values import check_option, checked_setup, is_owned, option_name
from orchestrator.settings.settings import Settings

# Seconds between the end of a job's work and the warning signal, for validation, the checkpoint and the exit.
GRACE_S = 60
DEFAULT_SIGNAL_DELAY_S = 60

SHORT = {
    "A": "account", "C": "constraint", "G": "gpus", "L": "licenses", "N": "nodes", "M": "clusters", "c": "cpus-per-task",
    "n": "ntasks", "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude", "J": "job-name",
    "o": "output", "e": "error", "d": "dependency", "a": "array", "D": "chdir",
}  # fmt: skip
GPU_KEYS = {"gpus", "gres", "gpus-per-node", "gpus-per-task", "gpus-per-socket"}
# The first line that starts with one of these words is the batch script's command; all earlier lines are setup.
COMMANDS = ("srun", "python", "python3", "exec", "mpirun", "torchrun", "orch")


@dataclass(frozen=True, slots=True)
class Request:
    """The sbatch request for one worker job."""

    options: Mapping[str, Any]  # keys: long names of sbatch options; True: an option without a value
    time_min: int
    signal_delay_s: int
    setup: tuple[str, ...]


def read_script(text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the #SBATCH options (by long name) and the setup lines of a batch script.

    Raises ValueError, quoting the line that can't be parsed.
    """
    options: dict[str, Any] = {}
    setup: list[str] = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            options.update(_read_options(line))
        elif line.strip() and not line.lstrip().startswith("#"):
            if line.split()[0] in COMMANDS:
                break
            setup.append(line)
    return options, setup


def _read_options(line: str) -> dict[str, Any]:
    try:
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError as error:  # an unclosed quotation mark
        raise ValueError(f"{shown(line.strip(), 100)!r}: {error}") from error
    options: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        elif len(word) >= 2 and word[0] == "-" and word[1] in SHORT:
            name, equals, value = SHORT[word[1]], word[2:], word[2:].removeprefix("=")
        else:
            raise ValueError(f"{shown(line.strip(), 100)!r}: {shown(word, 100)!r} is not an sbatch option")
        if not equals and words and not words[0].startswith("-"):
            value = words.pop(0)
        options[name] = value or True
    return options


def minutes(time: str) -> int:
    """Convert a Slurm time to minutes, rounded up. Formats: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours[:minutes[:seconds]]. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9}(?::\d{1,9}){0,2})", time.strip())
    if not match:
        raise ValueError(f"time {shown(time, 100)!r}; allowed: MIN, MIN:SEC, H:MIN:SEC and DAYS-H:MIN:SEC")
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is None and len(parts) < 3:
        parts.insert(0, 0)  # the time has no hours
    hours, of_hour, seconds = (*parts, 0, 0)[:3]
    return max(1, (int(match[1] or 0) * 24 + hours) * 60 + of_hour + math.ceil(seconds / 60))


LOADING_S, LEAST_WORK_S = 10.0, 10.0  # minimum seconds to load the model and the data, and to train in one job


def too_short(asked: Request, eon_lifetime_s: float) -> str | None:
    """Explain why a job with this time limit would stop before it trains anything; None if the limit is long enough."""
    needed_s = asked.signal_delay_s + LOADING_S + min(eon_lifetime_s, LEAST_WORK_S)
    if 60 * asked.time_min >= needed_s:
        return None
    return (
        f"slurm.time_min: {asked.time_min} is too short: Slurm signals the job {asked.signal_delay_s} s before the limit "
        f"(slurm.signal_delay_s), and loading takes about {LOADING_S:.0f} s. Set it to at least {math.ceil(needed_s / 60)} "
        "minutes, or remove it to have the time limit computed from eon_lifetime"
    )


def request(settings: Settings, script: str | None) -> Request:
    """Build the request. Settings override the script, and additional_parameters overrides both. Raises ValueError."""
    wanted = settings.slurm
    options, setup = read_script(script) if script is not None else ({}, [])
    warned = re.fullmatch(r"(?:[BR]+:)?\w+@(\d{1,9})", str(options.pop("signal", "")))
    delay_s = wanted.signal_delay_s or (int(warned[1]) if warned else DEFAULT_SIGNAL_DELAY_S)
    needed_min = math.ceil((settings.eon_lifetime + GRACE_S + delay_s) / 60)
    script_time = options.pop("time", None)
    time_min = wanted.time_min or (minutes(str(script_time)) if script_time else needed_min)
    options = {option_name(name): value for name, value in options.items() if not is_owned(name)}
    own = {
        "partition": wanted.partition, "account": wanted.account, "qos": wanted.qos, "gres": wanted.gres,
        "cpus-per-task": wanted.cpus, "nice": wanted.nice, "constraint": wanted.constraint, "exclude": wanted.exclude,
        "mem": f"{math.ceil(wanted.mem_gb * 1024)}M" if wanted.mem_gb else None,
    }  # fmt: skip
    ask_for_gpus = wanted.gpus is not None or settings.gpus_per_worker > 1
    if ask_for_gpus or wanted.gres:
        options = {name: value for name, value in options.items() if name not in GPU_KEYS}
    options.update({name: value for name, value in own.items() if value is not None})
    gpus = settings.gpus_per_worker if wanted.gpus is None else wanted.gpus
    if gpus and (ask_for_gpus or not GPU_KEYS & set(options)):
        options["gpus-per-node"] = gpus
    options.setdefault("requeue", True)  # Slurm restarts the job after a preemption or a node failure
    options.update({option_name(name): value for name, value in wanted.additional_parameters.items()})
    options = {name: value for name, value in options.items() if value is not False}  # false removes an option
    for name, value in options.items():
        check_option(name, value)
    checked_setup(setup)
    return Request(options, time_min, delay_s, (*setup, *wanted.setup))


def gpu_count(wanted: object) -> int:
    """Return the number of GPUs requested by "2", "a100:2" or "a100:2,v100:1". A type without a number counts as 1."""
    counts = [part.rpartition(":")[2] for part in str(wanted).split(",")]
    return sum(int(count) if re.fullmatch("[0-9]{1,9}", count) else 1 for count in counts)


_NO_ROOM = ("Job violates accounting/QOS policy", "QOSMaxSubmitJob", "AssocMaxSubmitJob", "MaxSubmitJob")
# Substrings of sbatch's messages that identify why it refused; the first match wins.
_REFUSALS = (
    (Refusal.UNREACHABLE, (
        "Unable to contact slurm controller", "Connection refused", "Zero Bytes were transmitted", "Socket timed out",
        "Unable to establish control connection", "slurm_persist_conn_open", "Resource temporarily unavailable",
        "Slurm controller not responding", "failed to fetch config", "Could not establish a configuration source",
        "Unable to connect",
    )),
    (Refusal.NO_ROOM, _NO_ROOM),
    (Refusal.TOO_MANY_NODES, (
        "Node count specification invalid", "Requested node configuration is not available", "node count",
    )),
)  # fmt: skip

# Substrings of sbatch's messages (texts of Slurm's slurm_errno), each with the advice to print.
ADVICE = (
    ("Invalid partition name", "slurm.partition {partition}: this partition does not exist; `sinfo -s` lists all partitions"),
    ("Invalid account or account/partition combination",
     "you may not use slurm.account {account} in partition {partition}; `sacctmgr show associations user=$USER` lists yours"),
    ("Invalid account", "you may not use slurm.account {account}; `sacctmgr show associations user=$USER` lists yours"),
    ("Invalid qos", "slurm.qos {qos} is not allowed for this account; `sacctmgr show associations user=$USER` lists yours"),
    ("Requested time limit is invalid",
     "the time limit of {time_min} min is longer than partition {partition} allows (`sinfo -o '%P %l'`); lower eon_lifetime or "
     "set slurm.time_min"),
    ("Invalid job array specification",
     "a job array may not have {workers} tasks (`scontrol show config | grep MaxArraySize`); lower workers"),
    *((text,
       "the submit limit of your account or QOS leaves no room for {workers} more jobs; lower workers, or use another "
       "slurm.qos (`sacctmgr show qos format=name,maxsubmitjobsperuser`)") for text in _NO_ROOM),
    ("More processors requested than permitted",
     "slurm.cpus {cpus-per-task} is more than a node of partition {partition} has; `sinfo -o '%P %c'` shows how many"),
    ("Requested node configuration is not available",
     "no node of partition {partition} has what a worker requests ({asked}); `sinfo -o '%P %c %m %G %f'` shows what "
     "nodes have. Lower slurm.gpus, slurm.cpus or slurm.mem_gb, or change slurm.constraint"),
    ("Memory specification can not be satisfied", "slurm.mem_gb is more than a node of partition {partition} has"),
    ("Invalid generic resource",
     "Slurm does not know the requested GPUs ({asked}); `sinfo -o '%P %G'` lists its GPUs; slurm.gpus=0 requests none"),
    ("Required partition not available",
     "partition {partition} is inactive or drained; use another slurm.partition (`sinfo -s`) or wait"),
    ("Invalid feature specification",
     "slurm.constraint {constraint} is not a feature of any node; `sinfo -o '%P %f'` lists the features"),
    ("Invalid node name", "slurm.exclude or nodelist names a node that does not exist; `sinfo -N` lists the nodes"),
    ("Node count specification invalid", "the requested number of nodes is not allowed in partition {partition}"),
    ("User not part of group", "partition {partition} is not open to your group; use another slurm.partition"),
    ("Invalid wckey", "the cluster tracks wckeys: set one with slurm.additional_parameters.wckey"),
    ("unrecognized option", "slurm.additional_parameters or slurm_file holds an option that this sbatch does not know"),
)  # fmt: skip


def advice(output: str, request: Request, workers: int) -> str:
    """Return a message that says what to change and quotes sbatch's error. output: everything that sbatch printed."""
    options = request.options
    words: dict[str, Any] = {
        "partition": options.get("partition", "(the default)"), "account": options.get("account", "(the default)"),
        "qos": options.get("qos", "(the default)"), "constraint": options.get("constraint", "(none)"),
        "cpus-per-task": options.get("cpus-per-task", "(the default)"), "time_min": request.time_min, "workers": workers,
        "asked": ", ".join(f"{k}={v}" for k, v in sorted(options.items()) if k not in ("partition", "account", "requeue")),
    }  # fmt: skip
    for text, what in ADVICE:
        if text.lower() in output.lower():
            return f"{what.format(**words)}. sbatch said: {_reason(output)}"
    return f"sbatch refused the jobs: {_reason(output)}"


def refusal_of(output: str) -> Refusal:
    """Return why sbatch or another Slurm command refused, according to what it printed."""
    printed = output.lower()
    reasons = (reason for reason, texts in _REFUSALS if any(text.lower() in printed for text in texts))
    return next(reasons, Refusal.OTHER)


def refused(output: str, request: Request, workers: int) -> SubmissionError:
    """Return the exception to raise after sbatch refused the jobs and printed this output."""
    refusal = refusal_of(output)
    if refusal is Refusal.UNREACHABLE:
        message = f"Slurm does not answer: {_reason(output)}. `orch doctor` shows more; --executor local runs here"
    else:
        message = advice(output, request, workers)
    return SubmissionError(message, refusal=refusal)


def _reason(output: str) -> str:
    """Return the line of sbatch's output that gives the reason."""
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower() and line.strip()]
    return lines[-1] if lines else output.strip().partition("\n")[0]
