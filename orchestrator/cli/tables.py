"""What is shown in a terminal, from the same values that --json prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text


def _table(title: str | None = None) -> Table:
    """Narrow, for 80 characters."""
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")


def board(board: dict[str, Any]) -> Table:
    metric = board["metric"]["name"]
    tested = any(e["test_metrics"] for e in board["entries"])
    lineages = f"{board['founders']} lineage{'' if board['founders'] == 1 else 's'}"
    held = f"{len(board['entries'])} of {board['num_models']} models, {lineages}"
    table = _table(title=f"{board['run']}: {held}; {metric} on the {board['select_on']} set")
    for heading in ("rank", metric, *(["on test"] if tested else []), "epochs", "worked on"):
        table.add_column(heading, justify="right")
    for heading in ("profile", "founder", "parent", "promoted"):
        table.add_column(heading)
    for entry in board["entries"]:
        cells = [entry["rank"], f"{entry['score']:.4f}"]
        if tested:
            score = (entry["test_metrics"] or {}).get(metric)
            cells.append("-" if score is None else f"{score:.4f}")
        cells += [entry[key] for key in ("epochs", "worked_on", "profile", "founder", "parent")]
        cells.append(entry["promoted_at"][11:16])
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    return table


def status(state: dict[str, Any]) -> Group:
    why = f" ({state['reason']})" if state["reason"] else ""
    best = "-" if state["best"] is None else f"{state['best']:.4f}"
    chunks = ", ".join(f"{count} {name}" for name, count in state["chunks"].items())
    lines = [
        Text(f"{state['run']}: {state['state']}{why}", style="bold"),
        Text(f"best {best}   epochs {state['epochs']}   training {state['train_seconds']:.0f} s"),
        Text(f"chunks: {chunks}"),
        Text(f"ends at the latest {state['deadline']}"),
        Text(f"lock: {state['lock']}"),
    ]
    if state["last_error"]:
        lines.append(Text(f"last error: {state['last_error']} (more in {state['logs']})", style="red"))
    table = _table()
    for heading in ("worker", "state", "job", "node", "link", "last word"):
        table.add_column(heading)
    for w in state["workers"]:
        table.add_row(
            *(str(w[k] if w[k] is not None else "-") for k in ("worker", "state", "job", "node", "link", "outcome"))
        )
    return Group(*lines, table)


def runs(rows: list[dict[str, Any]]) -> Table:
    table = _table()
    for heading in ("run", "state", "best", "epochs", "launched", "reason"):
        table.add_column(heading)
    for row in rows:
        best = row.get("best")
        table.add_row(
            row["run"],
            row["state"],
            "-" if best is None else f"{best:.4f}",
            str(row.get("epochs", "-")),
            row.get("created_at") or "-",
            row.get("reason") or "",
        )
    return table
