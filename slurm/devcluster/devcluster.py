"""A real Slurm cluster on one machine, as root or as a plain user: for the tests, and for trying things out.

    python slurm/devcluster up                start it, or do nothing if it runs
    eval "$(python slurm/devcluster env)"     now sbatch, squeue and orch talk to it
    python slurm/devcluster down              stop it (wipe: and delete its folder)

Everything is in one folder. README.md in this folder describes the cluster.
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

# slurmstepd's socket, FOLDER/spool/node1/node1_123456.4294967291, must fit in the 107 bytes of such a path.
LONGEST_FOLDER = 60
LOCK = "lock"
NODE_IS_UP = ("idle", "mixed", "allocated", "completing")


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"orch-devcluster-{os.getuid()}"


class DevCluster(SlurmClient):
    """One cluster in one folder. Several can run at the same time: each has its own ports and sockets."""

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
        """A started cluster in a new folder, wiped at the end; only stopped if ORCH_DEVCLUSTER_KEEP is set.

        Temporary clusters whose owner was killed before it could wipe them are wiped first.
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
        """Start every daemon that does not run, and return when every node takes jobs."""
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
            self._end(lambda process: process.program == "slurmdbd")  # it still writes to the database
            self._end(lambda process: True)

    def wipe(self) -> None:
        """Stop everything at once and delete the folder."""
        if not self.folder.exists():
            return
        names = {path.name for path in self.folder.iterdir()}
        if names - {LOCK} and Stored.load(self.folder) is None:
            raise DevClusterError(f"{self.folder} is not deleted: it is not a cluster's folder")
        with self._locked():
            self._cancel_before_stop()  # slurmstepd knows the processes of a job better than we do
            self._end(lambda process: True, signal.SIGKILL)
            shutil.rmtree(self.folder)

    def processes(self) -> list[Process]:
        """Every process of the cluster: daemons, slurmstepds and what the jobs run."""
        self._children = [child for child in self._children if child.poll() is None]
        return find_processes(self.folder)

    def is_running(self, program: str = "slurmctld", node: str | None = None) -> bool:
        return any((process.program, process.node) == (program, node) for process in self.processes())

    # --- its parts

    def start_controller(self) -> None:
        """Start slurmctld, if it does not run, and return when it answers."""

        def answers() -> bool:
            return listens(self._port or 0) and " is UP" in self.run(["scontrol", "ping"], check=False).stdout

        self._spawn("slurmctld", ["slurmctld", "-D"], answers, faketime_environment(self.shape.faketime))

    def stop_controller(self) -> None:
        """End slurmctld as an administrator does: it saves its state first. Jobs run on."""
        self._end(lambda process: process.program == "slurmctld")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld, as a crash does. What it has not saved is lost, such as a job of the last second."""
        self._end(lambda process: process.program in ("slurmctld", "slurmscriptd"), signal.SIGKILL)

    def kill_node(self, name: str, stepd: bool = True, *, jobs: bool = False, detect: bool = False) -> None:
        """SIGKILL a node's slurmd, its slurmstepds, and with `jobs` what they run; then declare it down.

        Without `jobs` the batch scripts outlive their node, unknown to Slurm: for this case claims have generations.
        With `detect` the node is not declared down: slurmctld finds out by itself, which takes about 30 s.
        """
        self._check_node(name)
        doomed = {"slurmd"} | ({"slurmstepd"} if stepd else set()) | ({"job"} if jobs else set())
        self._end(lambda process: process.node == name and process.program in doomed, signal.SIGKILL)
        if not detect:
            self.run(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed"])
        wait_for(lambda: self.node_states()[name].startswith("down"), 90, f"{name} to be down")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, if it does not run, and return when the node takes jobs."""
        self._check_node(name)
        self._spawn(f"slurmd-{name}", ["slurmd", "-D", "-N", name])

        def is_up() -> bool:
            state = self.node_states()[name]
            if "drain" in state:  # Slurm drains a node when it finds a job twice on it
                self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"], check=False)
            return state in NODE_IS_UP

        wait_for(is_up, 60, f"{name} to be up")

    def clear(self) -> None:
        """Cancel every job, and end the processes that jobs left on killed nodes."""
        self.cancel_all()
        self._end(lambda process: process.program == "job", signal.SIGKILL)

    # --- internal

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One start or stop at a time in a folder."""
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
                shutil.rmtree(database, ignore_errors=True)  # an incomplete installation
                self.run(install_database_command(self.folder, self.user), timeout_s=240)
                (database / "installed").touch()
            server, socket = mariadbd_command(self.folder, self.user), run / "mysql.sock"
            self._spawn("mariadbd", server, lambda: listens(socket))
            variables = {"MYSQL_UNIX_PORT": str(socket)}
            self._spawn("slurmdbd", ["slurmdbd", "-D"], lambda: listens((self._port or 0) + 1), variables)
            self._set_up_accounting()
        self.start_controller()
        for name in self.node_names:  # all before waiting for the first
            self._spawn(f"slurmd-{name}", ["slurmd", "-D", "-N", name])
        for name in self.node_names:
            self.start_node(name)

    def _set_up_accounting(self) -> None:
        """The cluster and the user's account must be in the database before the controller starts."""
        done = self.folder / "mysql" / "set-up"
        if done.exists():
            return
        commands = "\n".join(accounting_set_up(self.user))
        result = self.run(["sacctmgr", "--immediate"], stdin=commands)
        account = self.run(["sacctmgr", "-n", "-P", "list", "user", self.user, "format=DefaultAccount"])
        if account.stdout.strip() != ACCOUNT:  # which the last command sets
            raise DevClusterError(f"no accounting: sacctmgr: {result.stdout} {result.stderr}")
        done.touch()

    def _spawn(
        self,
        name: str,
        command: list[str],
        ready: Callable[[], bool] = lambda: True,
        variables: dict[str, str] | None = None,
    ) -> None:
        """Start a daemon, unless it runs, and return when it is ready.

        It stays a child of this process, so that its pid is known, in a session of its own, so that Ctrl-C in this
        terminal does not reach it.
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
        """Signal the wanted processes and return when they have ended; SIGKILL for those that take too long."""

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
        for child in self._children:  # it has closed the files that identify it, but may still be ending
            if child.pid in ending:
                child.wait(timeout=10)

    def _cancel_before_stop(self) -> None:
        """Jobs end better by scancel than by our signals; a controller that does not answer is stopped anyway."""
        if self.is_running("slurmctld"):
            with contextlib.suppress(DevClusterError, subprocess.TimeoutExpired):
                self.cancel_all(timeout_s=4)
