"""Measure how fast many processes claim and record chunks through the leaderboard, compared with other stores.

    python benchmarks/bookkeeping.py                                  # orch, Optuna's two storages, raw sqlite3
    python benchmarks/bookkeeping.py --history 10,1000,100000,1000000 # starting with this many finished chunks
    python benchmarks/bookkeeping.py --workers 8,64,512 --think-s 10  # workers that train between claim and record

A latency is the time in seconds to claim and record one chunk, including waits. Each figure is the median of --rounds
rounds, in which the contenders alternate. To install the other stores: pip install 'orch[bench]'.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from contenders import Contender, OptunaJournal, OptunaRdb, Orch, RawSqlite  # noqa: E402

Figures = dict[str, Any]
BUSY_PERCENT = 30.0
PATIENCE_S = 300.0  # how long to wait for all processes to be ready


# --- one measurement ---------------------------------------------------------------------------------


def rest(longest_s: float) -> None:
    """Wait until CPU usage is low, for at most longest_s."""
    end = time.monotonic() + longest_s
    while time.monotonic() < end and psutil.cpu_percent(1.0) > BUSY_PERCENT:
        pass


def measure(contender: Contender, disk: Path, processes: int, seconds: float, think_s: float = 0.0) -> Figures:
    """Measure the chunks per second of all processes together, and the bookkeeping time of one chunk."""
    folder = Path(tempfile.mkdtemp(prefix=f"{contender.name}-", dir=disk))
    try:
        contender.prepare(folder, processes)
        context = multiprocessing.get_context("fork")  # so that processes don't import modules again
        barrier = context.Barrier(processes)
        gc.collect()
        gc.freeze()  # otherwise garbage collection in each child copies shared memory
        children = [
            context.Process(target=_work, args=(contender, folder, number, barrier, seconds, think_s))
            for number in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        results = [json.loads(path.read_text()) for path in folder.glob("result-*.json")]
    finally:
        contender.drop(folder)
        shutil.rmtree(folder)
    assert len(results) == processes, f"{processes - len(results)} processes of {contender.name} died"
    return _summary(results, seconds)


def _work(contender: Contender, folder: Path, number: int, barrier: Barrier, seconds: float, think_s: float) -> None:
    """Run one process: one warm-up chunk, then as many chunks as the time allows."""
    begin, finish = contender.open(folder, number)
    finish(begin())
    draw = random.Random(number)
    waits_s, errors, counted = [], [], 0
    barrier.wait(PATIENCE_S)
    if think_s:
        time.sleep(draw.uniform(0, think_s))  # the workers of a real run don't start at the same moment
    started = time.monotonic()
    while (before := time.monotonic()) < started + seconds:
        try:
            chunk = begin()
            claimed = time.monotonic()
            if think_s:
                time.sleep(draw.uniform(0.5 * think_s, 1.5 * think_s))
            trained = time.monotonic()
            finish(chunk)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:200])
            continue
        after = time.monotonic()
        waits_s.append(claimed - before + after - trained)
        counted += after <= started + seconds
    result = {"waits_s": waits_s, "chunks": counted, "errors": errors}
    (folder / f"result-{number}.json").write_text(json.dumps(result))


def _summary(results: Sequence[Figures], seconds: float) -> Figures:
    waits_s = sorted(wait for result in results for wait in result["waits_s"])
    chunks = [result["chunks"] for result in results]
    errors = [error for result in results for error in result["errors"]]
    return {
        "chunks_per_s": round(sum(chunks) / seconds, 1),
        "p50_s": _quantile(waits_s, 0.50),
        "p99_s": _quantile(waits_s, 0.99),
        "max_s": _quantile(waits_s, 1.0),
        "fewest_chunks": min(chunks),
        "most_chunks": max(chunks),
        "errors": len(errors),
        **({"error": errors[0]} if errors else {}),
    }


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 5) if ordered else None


def median_of(rounds: Sequence[Figures]) -> Figures:
    """Return the median of each figure over the rounds. Chunk counts: the smallest and the largest; errors: the sum."""
    merged: Figures = {}
    for key in rounds[0]:
        values = [r[key] for r in rounds if r.get(key) is not None]
        if key == "error" or not values:
            continue
        worst = {"fewest_chunks": min, "most_chunks": max, "errors": sum}.get(key, statistics.median)
        merged[key] = worst(values)
    merged["chunks_per_s_of_rounds"] = [r["chunks_per_s"] for r in rounds]
    merged["max_s_of_rounds"] = [r["max_s"] for r in rounds]
    said = [r["error"] for r in rounds if "error" in r]
    return merged | ({"error": said[0]} if said else {})


# --- the three kinds of measurement ------------------------------------------------------------------


def compare(contenders: Sequence[Contender], options: argparse.Namespace) -> Figures:
    """Measure every contender with every number of processes, alternating so that noise affects all contenders."""
    found: Figures = {}
    for processes in options.processes:
        rounds: dict[str, list[Figures]] = {c.name: [] for c in contenders}
        for _ in range(options.rounds):
            for contender in contenders:
                rest(options.wait_idle_s)
                rounds[contender.name].append(measure(contender, options.dir, processes, options.seconds))
        found[str(processes)] = {name: median_of(figures) for name, figures in rounds.items()}
        ours = found[str(processes)]["orch"]
        for name, figures in found[str(processes)].items():
            figures["ratio_of_orch"] = _ratio(ours["chunks_per_s"], figures["chunks_per_s"])
            show(f"{processes:>3} processes  {name:<15}", figures, f"orch is {figures['ratio_of_orch']} times as fast")
    return found


def over_history(options: argparse.Namespace) -> Figures:
    processes = options.processes[-1] if options.processes_given else 16
    rounds: dict[int, list[Figures]] = {size: [] for size in options.history}
    for _ in range(options.rounds):
        for size in options.history:
            contender = Orch(options.database, history=size)
            rest(options.wait_idle_s)
            rounds[size].append(measure(contender, options.dir, processes, options.seconds))
    found = {str(size): median_of(figures) for size, figures in rounds.items()}
    first = found[str(options.history[0])]["chunks_per_s"]
    for size, figures in found.items():
        figures["ratio_to_smallest"] = _ratio(figures["chunks_per_s"], first)
        show(f"{int(size):>9,} chunks of history", figures, f"{figures['ratio_to_smallest']} of the rate of the first")
    return {"processes": processes, **found}


def over_workers(options: argparse.Namespace) -> Figures:
    found: Figures = {"think_s": options.think_s}
    for workers in options.workers:
        seconds = max(options.seconds, 3 * options.think_s)
        contender = Orch(options.database)
        rounds = [measure(contender, options.dir, workers, seconds, options.think_s) for _ in range(options.rounds)]
        figures = found[str(workers)] = median_of(rounds)
        figures["share_of_time_waiting"] = round(figures["p50_s"] / (figures["p50_s"] + options.think_s), 5)
        show(f"{workers:>4} workers", figures, f"{figures['share_of_time_waiting']:.2%} of a worker's time")
    return found


def _ratio(one: float, other: float) -> float | None:
    return round(one / other, 2) if other else None


def show(what: str, figures: Figures, remark: str) -> None:
    print(
        f"{what} {figures['chunks_per_s']:>7.1f} chunks/s   p50 {_ms(figures.get('p50_s'))} "
        f"p99 {_ms(figures.get('p99_s'))} max {_ms(figures.get('max_s'))} ms   "
        f"{figures['fewest_chunks']} to {figures['most_chunks']} chunks a process, "
        f"{figures['errors']} errors   {remark}",
        flush=True,
    )


def _ms(seconds: float | None) -> str:
    return "     -" if seconds is None else f"{1000 * seconds:6.1f}"


# --- the machine -------------------------------------------------------------------------------------


def machine(disk: Path) -> Figures:
    mounts = [p for p in psutil.disk_partitions(all=True) if disk.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    if mount and mount.fstype in ("tmpfs", "ramfs"):
        raise SystemExit(f"{disk} is on {mount.fstype}, where fsync costs nothing; give --dir on a disk")
    waits_s = []
    with tempfile.TemporaryFile(dir=disk) as file:
        for _ in range(200):
            os.pwrite(file.fileno(), b"x" * 4096, 0)
            before = time.perf_counter()
            os.fsync(file.fileno())
            waits_s.append(time.perf_counter() - before)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "filesystem": mount.fstype if mount else None,
        "fsync_p50_s": _quantile(sorted(waits_s), 0.50),
        "fsync_p99_s": _quantile(sorted(waits_s), 0.99),
        "load_before": round(os.getloadavg()[0], 2),  # load from other programs, which lowers the figures
        "python": sys.version.split()[0],
        "sqlite": sqlite3.sqlite_version,
    }


def _numbers(kind: Callable[[str], int] = int) -> Callable[[str], list[int]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=_numbers(), help="default: 1,4,16,64; with --history: 16")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history", type=_numbers(), help="numbers of finished chunks, such as 10,1000,100000,1000000")
    parser.add_argument("--workers", type=_numbers(), help="numbers of workers, such as 8,64,512; see --think-s")
    parser.add_argument("--think-s", type=float, default=10.0, help="mean training time of a chunk in seconds")
    parser.add_argument(
        "--wait-idle-s", type=float, default=0.0, help="longest wait for an idle machine before each measurement"
    )
    parser.add_argument("--only", help="contenders by name, such as orch,raw-sqlite")
    parser.add_argument("--database", help="an SQLAlchemy URL for orch; default: SQLite in --dir")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "bench", help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bookkeeping.json")
    options = parser.parse_args()
    options.processes_given = options.processes is not None
    options.processes = options.processes or [1, 4, 16, 64]
    options.dir = options.dir.resolve()
    return options


def main() -> None:
    options = _options()
    options.dir.mkdir(parents=True, exist_ok=True)
    facts = machine(options.dir)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    which = "postgresql" if options.database else "sqlite"
    if options.history:
        section, found = f"history-{which}", over_history(options)
    elif options.workers:
        section, found = f"workers-{which}", over_workers(options)
    else:
        contenders: list[Contender] = [Orch(options.database), OptunaRdb(), OptunaJournal(), RawSqlite()]
        wanted = options.only.split(",") if options.only else [c.name for c in contenders]
        section, found = f"compare-{which}", compare([c for c in contenders if c.name in wanted], options)
    # Keep the file's other sections.
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    result[section] = {"machine": facts, "seconds": options.seconds, "rounds": options.rounds, "figures": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
