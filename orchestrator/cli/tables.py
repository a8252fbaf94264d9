"""Tables for the terminal, built from the same values that --json prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.messages import counted

if TYPE_CHECKING:
    from orchestrator.doctor.findings import Finding

STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def show(*views: RenderableType) -> None:
    """Print the views on standard output."""
    console = Console()
    for view in views:
        console.print(view)


def _table(*headings: str, title: str | None = None) -> Table:
    """Make a table without borders, so that it fits in 80 characters."""
    return Table(
        *headings, title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )


def _add_whole(table: Table, heading: str, cells: Sequence[str]) -> None:
    """Add a column whose cells are never cut off: other columns shrink instead, and a long heading is wrapped."""
    width = max([min(len(heading), 10), *map(len, cells)])
    folded = Text(heading, no_wrap=False, overflow="fold")
    table.add_column(folded, justify="right", no_wrap=True, min_width=width, max_width=width)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cells(row: dict[str, Any], keys: Sequence[str]) -> list[str]:
    return ["-" if row.get(key) is None else str(row[key]) for key in keys]


def _stand_in(report: dict[str, Any]) -> list[str]:
    """Return a line that says that the data are artificial, if they are."""
    data = report.get("data") or {}
    return [f"STAND-IN DATA: {data.get('name')}"] if data.get("stand_in") else []


def board(board: dict[str, Any]) -> Table:
    metric, entries = board["metric"]["name"], board["entries"]
    held = f"{len(entries)} of {counted(board['num_models'], 'model')}, {counted(board['founders'], 'lineage')}"
    title = f"{board['run']}: {held}; {metric} on the {board['select_on']} set"
    table = _table(title="\n".join([title, *_stand_in(board)]))
    whole = {"rank": [str(entry["rank"]) for entry in entries], metric: [_score(entry["score"]) for entry in entries]}
    if any(entry["test_metrics"] for entry in entries):
        whole["on test"] = [_score((entry["test_metrics"] or {}).get(metric)) for entry in entries]
    for heading, cells in whole.items():
        _add_whole(table, heading, cells)
    for heading in ("epochs", "worked on"):
        table.add_column(heading, justify="right")
    for heading in ("profile", "founder", "parent", "promoted"):
        table.add_column(heading)
    for entry, *cells in zip(entries, *whole.values(), strict=True):
        more = _cells(entry, ("epochs", "worked_on", "profile", "founder", "parent"))
        table.add_row(*cells, *more, entry["promoted_at"][11:16])
    return table


def status(state: dict[str, Any]) -> Group:
    why = f" ({state['reason']})" if state["reason"] else ""
    chunks = ", ".join(f"{count} {name}" for name, count in state["chunks"].items())
    lines = [
        Text(f"{state['run']}: {state['state']}{why}", style="bold"),
        Text(f"best {_score(state['best'])}   epochs {state['epochs']}   training {state['train_seconds']:.0f} s"),
        Text(f"chunks: {chunks}"),
        Text(f"ends at the latest at {state['deadline']}"),
        Text(f"lock: {state['lock']}"),
        *(Text(line, style="bold yellow") for line in _stand_in(state)),
    ]
    if state["last_error"]:
        error = f"last error ({state['last_error_at']}): {state['last_error']} (more in {state['logs']})"
        lines.append(Text(error, style="red"))
    lines += [Text(f"warning: {line}", style="yellow") for line in state["warnings"]]
    columns = ("worker", "state", "job", "node", "link", "outcome")
    table = _table(*columns)
    for worker in state["workers"]:
        table.add_row(*_cells(worker, columns))
    return Group(*lines, table)


def runs(rows: list[dict[str, Any]]) -> Table:
    table = _table("run", "state")
    best = [_score(row.get("best")) for row in rows]
    _add_whole(table, "best", best)
    for heading in ("epochs", "launched", "reason"):
        table.add_column(heading)
    for row, best_score in zip(rows, best, strict=True):
        reason = row.get("reason") or ""
        table.add_row(row["run"], row["state"], best_score, *_cells(row, ("epochs", "created_at")), reason)
    return table


def findings(of_doctor: Sequence[Finding]) -> Table:
    table = _table("level", "topic", "found -> what to do")
    table.columns[0].no_wrap = True
    for finding in of_doctor:
        text = Text(finding.what)
        if finding.do:
            text.append(f"\n-> {finding.do}", style="bold")
        table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.topic, text)
    return table
