"""The command line of `python slurm/devcluster`, which calls the methods of DevCluster."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from devcluster import DevCluster, default_folder
from devcluster_config import Shape
from devcluster_processes import DevClusterError, MissingPackagesError

COMMANDS = {
    "up": "start the cluster's daemons, unless they run already",
    "down": "cancel every job and stop the cluster; keep its folder",
    "wipe": "stop the cluster and delete its folder",
    "status": "show the cluster's nodes, queue and processes; exit code 1 if it does not run",
    "env": "print the line that makes a shell use the cluster",
    "run": "run a command that uses the cluster: run -- sbatch --wrap hostname",
    "kill-controller": "SIGKILL slurmctld",
    "stop-controller": "stop slurmctld",
    "start-controller": "start slurmctld",
    "kill-node": "SIGKILL a node's slurmd and slurmstepds: kill-node node1",
    "start-node": "start a node's slurmd: start-node node1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return _do(options.command, options.words, _cluster(options))
    except DevClusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 2 if isinstance(error, MissingPackagesError) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="devcluster",
        description="A real Slurm cluster on one machine.",
        epilog="\n".join(f"{name:18}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("words", nargs="*", metavar="...", help="a node, or the command to run")
    parser.add_argument("--folder", type=Path, help=f"the cluster's folder: {default_folder()}")
    up = parser.add_argument_group("up", "options; the default is the last value used in this folder")
    up.add_argument("--nodes", type=int, help="number of nodes: 4")
    up.add_argument("--cpus", type=int, help="declared CPUs of each node: 16")
    up.add_argument("--gpus", type=int, help="declared GPUs of each node: 2")
    up.add_argument("--no-accounting", dest="accounting", action="store_false", default=None)
    up.add_argument("--faketime", metavar="SPEC", help="the controller's clock; '+0 x10' is ten times as fast")
    up.add_argument("--port-base", type=int, help="the first of nodes + 2 ports; default: free ports")
    options = parser.parse_args(arguments)
    if options.command.endswith("-node") and len(options.words) != 1:
        parser.error(f"{options.command} needs a node's name")
    if options.command == "run" and not options.words:
        parser.error("run needs a command")
    return options


def _cluster(options: argparse.Namespace) -> DevCluster:
    cluster = DevCluster(options.folder)
    given = {field.name: getattr(options, field.name) for field in fields(Shape)}
    given = {name: value for name, value in given.items() if value is not None}
    return DevCluster(options.folder, replace(cluster.shape, **given)) if given else cluster


def _do(command: str, words: list[str], cluster: DevCluster) -> int:
    simple: dict[str, Callable[[], None]] = {
        "down": cluster.stop,
        "wipe": cluster.wipe,
        "kill-controller": cluster.kill_controller,
        "stop-controller": cluster.stop_controller,
        "start-controller": cluster.start_controller,
        "kill-node": lambda: cluster.kill_node(words[0]),
        "start-node": lambda: cluster.start_node(words[0]),
    }
    if command in simple:
        simple[command]()
    elif command == "up":
        cluster.start()
        print(f"{cluster.shape.nodes} nodes are up in {cluster.folder}; for this shell: {_export(cluster)}")
    elif command == "env":
        print(_export(cluster))
    elif command == "run":
        return subprocess.run(words, env=cluster.env(), check=False).returncode
    elif command == "status":
        return _status(cluster)
    return 0


def _export(cluster: DevCluster) -> str:
    return f"export SLURM_CONF={shlex.quote(str(cluster.conf))}"


def _status(cluster: DevCluster) -> int:
    for process in sorted(cluster.processes(), key=lambda process: (process.program, process.node or "")):
        print(f"{process.pid:8} {process.program} {process.node or ''}")
    if not cluster.is_running("slurmctld"):
        print(f"no controller runs in {cluster.folder}")
        return 1
    for command in (["sinfo", "-l"], ["squeue"]):
        print(cluster.run(command).stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
