"""orch doctor: check that runs can work here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, Json, RunsDir, print_json, say


def doctor(
    settings: Annotated[
        Path | None, typer.Argument(metavar="[SETTINGS]", help="A settings file (JSON).", show_default=False)
    ] = None,
    two_node: Annotated[
        bool, typer.Option("--two-node", help="Run a short job on two nodes that tests the locks and a job's needs.")
    ] = False,
    wait: Annotated[float, typer.Option(metavar="MIN", help="Minutes to wait for that job to start.", min=0.1)] = 15,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    json: Json = False,
) -> None:
    """Check whether this cluster, file system and environment can run these settings. Exit code 1 if not."""
    from orchestrator.cli import tables
    from orchestrator.doctor.examine import examine
    from orchestrator.doctor.findings import exit_code

    try:
        findings = examine(settings, runs_dir, two_node, 60 * wait, say)
    except KeyboardInterrupt:
        say("stopped; no job is left in the queue")
        raise typer.Exit(130) from None
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count("error"), levels.count("warning")
    if json:
        print_json({"errors": errors, "warnings": warnings, "findings": [asdict(finding) for finding in findings]})
    else:
        tables.show(tables.findings(findings))
        print(f"errors: {errors}, warnings: {warnings}")
    raise typer.Exit(exit_code(findings))
