"""Checks a run's database and folder for the invariants that hold whenever and wherever a process died."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.files import checkpoints
from orchestrator.files.checkpoint_record import read_record
from orchestrator.rules.checkpoint_names import generation_of, record_name
from orchestrator.run.run import Run

CONSUMED = ("promoted", "discarded")
HELD = ("live", "suspended")
CLOCK_S = 1.0  # events this close may be in either order, because the clock is read before the lock is taken


def violations(run: Run, over: bool = True) -> list[str]:
    """Return a line for each violated invariant. over: the run has ended, so no job may be open."""
    reader = run.leaderboard.reader
    tables = {name: reader.rows(name) for name in ("run", "job", "checkpoint", "entry", "chunk", "epoch", "event")}
    return [
        *_files(run, tables),
        *_worst_never_falls(tables),
        *_positions(tables),
        *_generations(tables),
        *_chains(tables, over),
        *_epochs(tables),
    ]


def _files(run: Run, tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Invariants 1 and 6: all files used by the board and claims are complete, and a collection leaves no others."""
    folder = run.folder / "checkpoints"
    problems = []
    by_id = {c["checkpoint_id"]: c for c in tables["checkpoint"]}
    for entry in tables["entry"]:
        if entry["on_board"]:
            checkpoint = by_id[entry["checkpoint_id"]]
            try:
                checkpoints.verify(folder, checkpoint["file"], checkpoint["sha256"])
                record = read_record(folder, checkpoint["file"])
            except CheckpointError as error:
                problems.append(f"1: entry {entry['entry_id']}: {error}")
                continue
            if (record.sha256, record.score) != (checkpoint["sha256"], checkpoint["score"]):
                problems.append(f"1: the record of {checkpoint['file']} differs from the database")
    if sum(e["on_board"] for e in tables["entry"]) > run.settings.num_models:
        problems.append("1: more entries than slots")
    referenced, live = run.leaderboard.reader.references()
    problems += [f"6: {name} is referred to and missing" for name in referenced if not (folder / name).exists()]
    checkpoints.collect(folder, run.leaderboard.reader.references)
    keep = {name for file in referenced for name in (file, record_name(file))}
    # A killed job's claim stays live until another worker checks it; until then, the files it was writing are kept.
    left = [
        p.name
        for p in folder.iterdir()
        if p.name not in keep and generation_of(p.name) not in live and not p.match("frozen-*.weights")
    ]
    problems += [f"6: {name} was not collected" for name in left]
    return problems


def _worst_never_falls(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Invariant 2, checked over the whole event log (for a metric where higher is better)."""
    problems = []
    last = None
    for event in tables["event"]:
        if event["kind"] == "condemned":
            last = None
        if event["kind"] == "promoted" and event["data"]["evicted"] is not None:
            worst = event["data"]["worst"]
            if last is not None and worst < last:
                problems.append(f"2: event {event['event_id']}: the worst fell from {last} to {worst}")
            last = worst
    return problems


def _positions(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Invariant 3, checked for every entry that was ever on the board."""
    problems = []
    by_checkpoint = {e["checkpoint_id"]: e for e in tables["entry"]}
    chunk_of = {c["chunk_id"]: c for c in tables["chunk"]}
    work: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in tables["chunk"]:
        if chunk["entry_id"] is not None:
            work[chunk["entry_id"]].append(chunk)
    for checkpoint in tables["checkpoint"]:
        entry = by_checkpoint[checkpoint["checkpoint_id"]]
        made_by = chunk_of[checkpoint["chunk_id"]]
        wanted = 0 if checkpoint["parent_id"] is None else made_by["position"] + 1
        if entry["start_position"] != wanted:
            problems.append(f"3: entry {entry['entry_id']} starts at {entry['start_position']}, not at {wanted}")
        if checkpoint["parent_id"] is None and (made_by["position"], made_by["entry_id"]) != (0, entry["entry_id"]):
            problems.append(f"3: the chunk that made founder {entry['entry_id']} is not position 0 of it")
    for entry in tables["entry"]:
        problems += _positions_of(entry, work[entry["entry_id"]])
    return problems


def _positions_of(entry: dict[str, Any], work: list[dict[str, Any]]) -> list[str]:
    problems = []
    start, name = entry["start_position"], f"3: entry {entry['entry_id']}"
    taken = [c["position"] for c in work if c["state"] in CONSUMED + HELD]
    if len(taken) != len(set(taken)):
        problems.append(f"{name} consumed a position twice: {sorted(taken)}")
    if any(c["position"] < start for c in work):
        problems.append(f"{name} has work before its start {start}")
    given_back = {c["position"] for c in work if c["state"] in ("expired", "failed")}
    for position in range(start, max(taken, default=start)):
        if position not in taken and position not in given_back:
            problems.append(f"{name} skipped position {position}")
    for lost in work:  # the next claim takes the position that was given back
        if lost["state"] in ("expired", "failed"):
            later = [c for c in work if c["claimed_at"] > lost["finished_at"] + CLOCK_S]
            if later and min(later, key=lambda c: c["chunk_id"])["position"] > lost["position"]:
                between = [c for c in work if c["chunk_id"] > lost["chunk_id"] and c["position"] == lost["position"]]
                if not between:
                    problems.append(f"{name}: position {lost['position']} was given back and not taken next")
    return problems


def _generations(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Invariant 4: each claim has its own generation, one that the run has issued."""
    generations = [c["generation"] for c in tables["chunk"]]
    problems = [] if len(generations) == len(set(generations)) else ["4: two claims have the same generation"]
    if generations and max(generations) > tables["run"][0]["generation"]:
        problems.append("4: a claim has a generation that was never given")
    return problems


def _chains(tables: dict[str, list[dict[str, Any]]], over: bool) -> list[str]:
    """Invariant 5: a chain's links have no gap, at most one of its jobs runs, and none is open at the end."""
    problems = []
    for worker_id, jobs in itertools.groupby(
        sorted(tables["job"], key=lambda j: (j["worker_id"], j["link"])), key=lambda j: j["worker_id"]
    ):
        links = list(jobs)
        if [j["link"] for j in links] != list(range(len(links))):
            problems.append(f"5: worker {worker_id} has links {[j['link'] for j in links]}")
        worked = [j for j in links if j["started_at"] is not None]
        for before, after in itertools.pairwise(worked):
            if before["ended_at"] is None or before["ended_at"] > after["started_at"] + CLOCK_S:
                problems.append(f"5: worker {worker_id}: links {before['link']} and {after['link']} overlap")
        if over and any(j["state"] in ("submitting", "queued", "running") for j in links):
            problems.append(f"5: worker {worker_id} has an open job after the end")
    return problems


def _epochs(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Invariant 7: every epoch of a finished chunk is recorded once, and epochs of lineages and the run add up."""
    problems = []
    counted: dict[int, int] = defaultdict(int)
    for epoch in tables["epoch"]:
        counted[epoch["chunk_id"]] += 1
    for chunk in tables["chunk"]:
        if counted[chunk["chunk_id"]] != (chunk["epochs"] or 0):
            problems.append(
                f"7: chunk {chunk['chunk_id']} has {counted[chunk['chunk_id']]} epochs, says {chunk['epochs']}"
            )
    if len(tables["epoch"]) != tables["run"][0]["epochs"]:
        problems.append(f"7: {len(tables['epoch'])} epochs, the run says {tables['run'][0]['epochs']}")
    by_id = {c["checkpoint_id"]: c for c in tables["checkpoint"]}
    for checkpoint in tables["checkpoint"]:
        before = by_id[checkpoint["parent_id"]]["epochs"] if checkpoint["parent_id"] else 0
        if checkpoint["epochs"] != before + counted[checkpoint["chunk_id"]]:
            problems.append(f"7: checkpoint {checkpoint['checkpoint_id']} counts {checkpoint['epochs']} epochs")
    return problems
