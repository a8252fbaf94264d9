"""A real Slurm cluster on one machine for tests and experiments, run as root or as a plain user.

    python slurm/devcluster up                start the cluster, unless it is running
    eval "$(python slurm/devcluster env)"     make sbatch, squeue and orch use it
    python slurm/devcluster down              stop it (`wipe` also deletes its folder)

All its files are in one folder. The README.md beside this file describes the cluster.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from devcluster_client import SlurmClient
from devcluster_config import (
    ACCOUNT,
    Shape,
    Stored,
    accounting_set_up,
    faketime_environment,
    install_database_command,
    mariadbd_command,
    munged_command,
    write_files,
)
from devcluster_processes import (
    DAEMON_PATH,
    DevClusterError,
    MissingPackagesError,
    Process,
    check_packages,
    find_processes,
    listens,
    reserved_ports,
    send_signal,
    start_time,
    wait_for,
)

__all__ = ["DevCluster", "DevClusterError", "MissingPackagesError", "Process", "Shape", "wait_for"]

# The path of slurmstepd's socket, FOLDER/spool/node1/node1_123456.4294967291, must fit in 107 bytes.
LONGEST_FOLDER = 60
LOCK = "lock"
NODE_IS_UP = ("idle", "mixed", "allocated", "completing")


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"orch-devcluster-{os.getuid()}"


class DevCluster(SlurmClient):
    """A cluster in a folder. Several clusters can run at the same time, with their own ports and sockets."""

    def __init__(self, folder: Path | str | None = None, shape: Shape | None = None) -> None:
        super().__init__(Path(folder or default_folder()).resolve())
        if len(str(self.folder)) > LONGEST_FOLDER or not re.fullmatch(r"[\w./+-]+", str(self.folder)):
            raise DevClusterError(
                f"folder {str(self.folder)!r}: at most {LONGEST_FOLDER} letters, digits and ./+-_ "
                "(the paths of the sockets in it must stay below 108 bytes)"
            )
        stored = Stored.load(self.folder)
        self.shape = shape or (stored.shape if stored else Shape())
        self.node_names = [f"node{number}" for number in range(1, self.shape.nodes + 1)]
        self._port = stored.port if stored else None
        self._owner = stored.owner if stored else None
        self._children: list[subprocess.Popen[bytes]] = []  # this process must reap them

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, shape: Shape | None = None) -> Iterator[DevCluster]:
        """Start a cluster in a new folder and wipe it at the end, or only stop it if ORCH_DEVCLUSTER_KEEP is set.

        Before that, wipe temporary clusters left behind by processes that were killed.
        """
        shape = shape or Shape()
        check_packages(shape.accounting, shape.faketime is not None)
        parent, prefix = default_folder().parent, f"{default_folder().name}-"
        for folder in parent.glob(f"{prefix}*"):
            with contextlib.suppress(DevClusterError, OSError):
                old = cls(folder)
                if old._owner and start_time(int(old._owner.split()[0])) != old._owner:
                    old.wipe()
        cluster = cls(tempfile.mkdtemp(prefix=prefix, dir=parent), shape)
        cluster._owner = start_time(os.getpid())
        try:
            cluster.start()
            yield cluster
        finally:
            if os.environ.get("ORCH_DEVCLUSTER_KEEP"):
                cluster.stop()
                Stored(cluster.shape, cluster._port or 0, owner=None).save(cluster.folder)
                print(f"kept: {cluster.folder}", file=sys.stderr)
            else:
                cluster.wipe()

    # --- the whole cluster

    def start(self) -> None:
        """Start all daemons that are not running, and return when every node accepts jobs."""
        check_packages(self.shape.accounting, self.shape.faketime is not None)
        with self._locked():
            stored, running = Stored.load(self.folder), self.processes()
            if stored and running and stored.shape != self.shape:
                raise DevClusterError(f"stop {self.folder} first: it runs with other options, {stored.shape}")
            with contextlib.ExitStack() as stack:
                if not running:
                    explicit = self.shape.port_base
                    ports = reserved_ports(self.shape.nodes + 2, explicit or self._port, explicit is not None)
                    self._port = stack.enter_context(ports)
                assert self._port is not None
                Stored(self.shape, self._port, self._owner).save(self.folder)
                write_files(self.folder, self.shape, self.user, self._port)
                try:
                    self._start_daemons()
                except BaseException:
                    self._end(lambda process: True, signal.SIGKILL)
                    raise

    def stop(self) -> None:
        """Cancel every job and stop every daemon; state and accounting stay in the folder."""
        if not self.folder.exists():
            return
        with self._locked():
            self._cancel_before_stop()
            self._end(lambda process: process.program in ("slurmctld", "slurmd"))
            self._end(lambda process: process.program in ("slurmscriptd", "slurmstepd", "job"), signal.SIGKILL)
            self._end(lambda process: process.program == "slurmdbd")  # mariadbd must still run when slurmdbd ends
            self._end(lambda process: True)

    def wipe(self) -> None:
        """Stop all processes immediately and delete the folder."""
        if not self.folder.exists():
            return
        names = {path.name for path in self.folder.iterdir()}
        if names - {LOCK} and Stored.load(self.folder) is None:
            raise DevClusterError(f"{self.folder} is not deleted: it is not a cluster's folder")
        with self._locked():
            self._cancel_before_stop()  # slurmstepd ends a job's processes more reliably than _end does
            self._end(lambda process: True, signal.SIGKILL)
            shutil.rmtree(self.folder)

    def processes(self) -> list[Process]:
        """Return all processes of the cluster: daemons, slurmstepds and the processes of jobs."""
        self._children = [child for child in self._children if child.poll() is None]
        return find_processes(self.folder)

    def is_running(self, program: str = "slurmctld", node: str | None = None) -> bool:
        return any((process.program, process.node) == (program, node) for process in self.processes())

    # --- single daemons

    def start_controller(self) -> None:
        """Start slurmctld, unless it is running, and return when it answers."""

        def answers() -> bool:
            return listens(self._port or 0) and " is UP" in self.run(["scontrol", "ping"], check=False).stdout

        self._spawn("slurmctld", ["slurmctld", "-D"], answers, faketime_environment(self.shape.faketime))

    def stop_controller(self) -> None:
        """Stop slurmctld as an administrator would, so that it saves its state. Jobs continue to run."""
        self._end(lambda process: process.program == "slurmctld")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld, to simulate a crash. It loses unsaved state, such as a job submitted a second ago."""
        self._end(lambda process: process.program in ("slurmctld", "slurmscriptd"), signal.SIGKILL)

    def kill_node(self, name: str, stepd: bool = True, *, jobs: bool = False, detect: bool = False) -> None:
        """SIGKILL a node's slurmd, its slurmstepds (`stepd`) and its jobs' processes (`jobs`); declare the node down.

        Without `jobs`, batch scripts keep running without Slurm's knowledge; claims have generations for this case.
        With `detect`, the node is not declared down; slurmctld detects the failure itself, which takes about 30 s.
        """
        self._check_node(name)
        doomed = {"slurmd"} | ({"slurmstepd"} if stepd else set()) | ({"job"} if jobs else set())
        self._end(lambda process: process.node == name and process.program in doomed, signal.SIGKILL)
        if not detect:
            self.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed"])
        wait_for(lambda: self.node_states()[name].startswith("down"), 90, f"{name} to be down")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, unless it is running, and return when the node accepts jobs."""
        self._check_node(name)
        self._spawn(f"slurmd-{name}", ["slurmd", "-D", "-N", name])

        def is_up() -> bool:
            state = self.node_states()[name]
            if "drain" in state:  # Slurm drains a node if it gets the same job twice
                self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False)
            return state in NODE_IS_UP

        wait_for(is_up, 60, f"{name} to be up")

    def clear(self) -> None:
        """Cancel every job, and kill the processes that jobs left on killed nodes."""
        self.cancel_all()
        self._end(lambda process: process.program == "job", signal.SIGKILL)

    # --- internal

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Allow only one start or stop at a time in a folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _check_node(self, name: str) -> None:
        if name not in self.node_names:
            raise DevClusterError(f"no node {name!r}: there are {', '.join(self.node_names)}")

    def _start_daemons(self) -> None:
        run, database = self.folder / "run", self.folder / "mysql"
        self._spawn("munged", munged_command(self.folder), lambda: listens(run / "munge.sock"))
        if self.shape.accounting:
            if not (database / "installed").exists():
                shutil.rmtree(database, ignore_errors=True)  # the remains of an incomplete installation
                self.run(install_database_command(self.folder, self.user), timeout_s=240)
                (database / "installed").touch()
            server, socket = mariadbd_command(self.folder, self.user), run / "mysql.sock"
            self._spawn("mariadbd", server, lambda: listens(socket))
            variables = {"MYSQL_UNIX_PORT": str(socket)}
            self._spawn("slurmdbd", ["slurmdbd", "-D"], lambda: listens((self._port or 0) + 1), variables)
            self._set_up_accounting()
        self.start_controller()
        for name in self.node_names:  # start all nodes before waiting for the first one
            self._spawn(f"slurmd-{name}", ["slurmd", "-D", "-N", name])
        for name in self.node_names:
            self.start_node(name)

    def _set_up_accounting(self) -> None:
        """Add the cluster and the user's account to the database. This must be done before the controller starts."""
        done = self.folder / "mysql" / "set-up"
        if done.exists():
            return
        commands = "\n".join(accounting_set_up(self.user))
        result = self.run(["sacctmgr", "--immediate"], stdin=commands)
        account = self.run(["sacctmgr", "-n", "-P", "list", "user", self.user, "format=DefaultAccount"])
        if account.stdout.strip() != ACCOUNT:  # the last command sets it
            raise DevClusterError(f"no accounting: sacctmgr: {result.stdout} {result.stderr}")
        done.touch()

    def _spawn(
        self,
        name: str,
        command: list[str],
        ready: Callable[[], bool] = lambda: True,
        variables: dict[str, str] | None = None,
    ) -> None:
        """Start a daemon, unless it is running, and return when it is ready.

        The daemon stays a child of this process, so that its pid is known, but gets a session of its own, so that
        Ctrl-C in this terminal does not stop it.
        """
        program, _, node = name.partition("-")
        if self.is_running(program, node or None):
            return
        environment = self.env() | {"PATH": DAEMON_PATH} | (variables or {})
        command[0] = shutil.which(command[0], path=DAEMON_PATH) or command[0]
        output = self.folder / "log" / f"{name}.out"
        with output.open("wb") as log, open(os.devnull) as nothing:
            child = subprocess.Popen(
                command, stdin=nothing, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._children.append(child)
        wait_for(lambda: ready() or child.poll() is not None, 30, f"{name} to be ready ({output})")
        if child.returncode is not None:
            last_lines = "\n".join(output.read_text(errors="replace").splitlines()[-10:])
            raise DevClusterError(f"{name} ended at once, exit {child.returncode} ({output}):\n{last_lines}")

    def _end(self, wanted: Callable[[Process], bool], number: signal.Signals = signal.SIGTERM) -> None:
        """Signal the wanted processes, SIGKILL those that have not ended after 10 s, and return when all have ended."""

        def left() -> list[Process]:
            return [process for process in self.processes() if wanted(process)]

        ending = {process.pid for process in left()}
        for attempt in (number, signal.SIGKILL):
            send_signal(left(), attempt, self.folder)
            with contextlib.suppress(DevClusterError):
                wait_for(lambda: not left(), 10, "the processes to end")
                break
        else:
            raise DevClusterError(f"not ended: {left()}")
        for child in self._children:  # left() omits children that have closed their log but not yet exited
            if child.pid in ending:
                child.wait(timeout=10)

    def _cancel_before_stop(self) -> None:
        """Cancel all jobs, which ends them more cleanly than signals do; give up if slurmctld does not answer."""
        if self.is_running("slurmctld"):
            with contextlib.suppress(DevClusterError, subprocess.TimeoutExpired):
                self.cancel_all(timeout_s=4)
