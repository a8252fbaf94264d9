"""The parts of a development cluster: its shape, its files, and the command lines of its daemons."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from devcluster_processes import faketime_library

TEMPLATES = Path(__file__).resolve().parent / "templates"
SUBFOLDERS = ("etc", "run", "log", "state", "spool", "dev", "jobs", "tmp")
CLUSTER = "devcluster"
ACCOUNT = "research"


@dataclass(frozen=True)
class Shape:
    """The options of a cluster. Saved in its folder, so that `down` and the next `up` need no options."""

    nodes: int = 4
    cpus: int = 16  # per node, as declared to Slurm; the machine may have fewer
    gpus: int = 2  # per node; not real, but Slurm sets CUDA_VISIBLE_DEVICES for them
    accounting: bool = True  # run slurmdbd, which sacct, accounts and QOS need
    faketime: str | None = None  # the controller's clock, as in faketime(1): '+0 x10' runs ten times as fast
    port_base: int | None = None  # the first of nodes + 2 ports; None: choose free ports


@dataclass(frozen=True)
class Stored:
    """The content of cluster.json, which identifies a cluster's folder and tells later commands how to use it."""

    shape: Shape
    port: int  # the first port in use
    owner: str | None  # for a temporary cluster: start_time() of the process that made it

    @classmethod
    def load(cls, folder: Path) -> Stored | None:
        try:
            values = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        return cls(Shape(**values["shape"]), values["port"], values["owner"])

    def save(self, folder: Path) -> None:
        new = folder / "cluster.json.new"
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.replace(folder / "cluster.json")  # atomic: another process may be reading it


def write_files(folder: Path, shape: Shape, user: str, port: int) -> None:
    """Create the folders, configuration files, munge key and fake GPU devices that the daemons need."""
    for name in SUBFOLDERS:
        (folder / name).mkdir(exist_ok=True)
    values: dict[str, object] = asdict(shape) | {
        "folder": folder,
        "user": user,
        "host": socket.gethostname().split(".")[0],
        "controller_port": port,
        "database_port": port + 1,
        "first_node_port": port + 2,
        "last_node_port": port + 1 + shape.nodes,
        "last_gpu": shape.gpus - 1,
        # Only the controller's clock is fast. By this clock, nodes answer late and credentials expire early.
        "cred_expire_s": 60 if shape.faketime else 5,
        "slurmd_timeout_s": 100 if shape.faketime else 10,
    }

    def filled(name: str) -> str:
        return Template((TEMPLATES / name).read_text()).substitute(values)

    no_accounting = "AccountingStorageType=accounting_storage/none"
    values["accounting"] = filled("accounting.conf") if shape.accounting else no_accounting
    for name in ("slurm.conf", "slurmdbd.conf", "gres.conf", "cgroup.conf"):
        (folder / "etc" / name).write_text(filled(name) if name != "gres.conf" or shape.gpus else "")
    (folder / "etc" / "slurmdbd.conf").chmod(0o600)  # slurmdbd requires this mode
    for number in range(shape.gpus):
        with contextlib.suppress(FileExistsError):
            (folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
    key = folder / "etc" / "munge.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))


def munged_command(folder: Path) -> list[str]:
    files = {
        "key-file": "etc/munge.key",
        "socket": "run/munge.sock",
        "pid-file": "run/munged.pid",
        "seed-file": "run/munge.seed",
        "log-file": "log/munged.log",
    }
    # Without --force, munged refuses folders that belong to neither root nor the user munge.
    options = [f"--{name}={folder}/{path}" for name, path in files.items()]
    return ["munged", "--foreground", "--force", *options]


def install_database_command(folder: Path, user: str) -> list[str]:
    """Return the command that installs the database. The cluster's user needs no password as its root."""
    # When a server starts, it deletes all temporary tables in its tmpdir. In /tmp, they might belong to other servers.
    where = [f"--datadir={folder}/mysql", f"--tmpdir={folder}/tmp", f"--user={user}"]
    root = ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}", "--skip-test-db"]
    return ["mariadb-install-db", "--no-defaults", *where, *root]


def mariadbd_command(folder: Path, user: str) -> list[str]:
    files = {
        "datadir": "mysql",
        "tmpdir": "tmp",
        "socket": "run/mysql.sock",
        "pid-file": "run/mariadbd.pid",
        "log-error": "log/mariadbd.log",
    }
    options = [f"--{name}={folder}/{path}" for name, path in files.items()]
    options += [f"--user={user}", "--skip-networking", "--innodb-buffer-pool-size=64M"]
    options += ["--innodb-flush-log-at-trx-commit=0"]  # losing data in a power cut is acceptable in tests
    options += ["--innodb-lock-wait-timeout=900"]  # slurmdbd requires it
    return ["mariadbd", "--no-defaults", *options]


def faketime_environment(faketime: str | None) -> dict[str, str]:
    if faketime is None:
        return {}
    return {
        "LD_PRELOAD": str(faketime_library()),
        "FAKETIME": faketime,
        "FAKETIME_DONT_FAKE_MONOTONIC": "0",  # fake the monotonic clock too, because Slurm's timers use it
    }


def accounting_set_up(user: str) -> list[str]:
    """Return the sacctmgr commands for a new database. Tests use the QOS `one` and `two` to make Slurm refuse jobs."""
    return [
        f"add cluster {CLUSTER}",
        "add qos one MaxSubmitJobsPerUser=1",
        "add qos two MaxSubmitJobsPerUser=2",
        f"add account {ACCOUNT} Cluster={CLUSTER}",
        f"add user {user} Account={ACCOUNT} AdminLevel=Admin QOS=normal,one,two DefaultQOS=normal",
        f"modify user {user} set DefaultAccount={ACCOUNT}",  # needed for root, which already has a default account
    ]
