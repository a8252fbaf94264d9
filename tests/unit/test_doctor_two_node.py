"""The findings that the reports of the two-node test give, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.probe import Answer
from orchestrator.doctor import node, two_node
from orchestrator.doctor.findings import worst
from orchestrator.doctor.locks import Unreadable
from orchestrator.doctor.machine import PythonFacts
from orchestrator.errors import Refusal, SubmissionError
from orchestrator.locking.mounts import Mount
from tests.support.doctoring import VERSIONS, one, settings, tally

NEEDS = two_node.Needs(settings(), "#!/bin/sh\n", gpu=True)


def report(task: int, **changes: Any) -> node.NodeReport:
    values = {
        "task": task,
        "host": f"n{task + 1}",
        "folder_problem": None,
        "written_sha256": "x",
        "mount": Mount("/work", "nfs4", "nas:/", ("vers=4.2",)),
        "can_submit": Answer(True, ""),
        "squeue": True,
        "met": True,
        "tallies": [tally(), tally(kind="database")],
        "missing": [],
        "python": PythonFacts("3.11.7", VERSIONS, "12.4", ("H200",)),
        "done": True,
    }
    return node.NodeReport(**(values | changes))


def outcome(first: dict[str, Any] | None, second: dict[str, Any] | None, **changes: Any) -> two_node.TestOutcome:
    reports = (
        None if first is None else report(0, **first),
        None if second is None else report(1, **{"python": None} | second),
    )
    values = {
        "nodes": 2,
        "reports": reports,
        "counted": {"lock": 600, "database": 600},
        "wrong_files": (),
        "ended": "COMPLETED",
    }
    return two_node.TestOutcome(**(values | changes))


LOST = {"lock": 590, "database": 600}
DAMAGED = {"lock": 600, "database": Unreadable("damaged")}
REFUSED = Answer(False, "sbatch: error: Access/permission denied")
FULL = Answer(False, "sbatch: error: QOSMaxSubmitJobPerUserLimit")


@pytest.mark.parametrize(
    ("given", "level", "topic", "words", "holds"),
    [
        (outcome({}, {}), "ok", "lock test", "0 lost", True),
        (
            outcome({}, {}, counted=LOST),
            "error",
            "lock test",
            "10 of 600 updates were lost",
            False,
        ),
        (
            outcome({}, {}, counted=DAMAGED),
            "error",
            "lock test",
            "damaged",
            False,
        ),
        (outcome({"can_submit": REFUSED}, {}), "warning", "successors", "permission denied", True),
        (outcome({"can_submit": FULL}, {}), "ok", "successors", "can queue their successors", True),
        (outcome({"squeue": False}, {}), "warning", "successors", "squeue does not answer", True),
        (outcome({"folder_problem": "No such file"}, {}), "error", "runs folder", "not the same", True),
        (outcome({}, {}, wrong_files=("from-task-1: gone",)), "error", "runs folder", "from-task-1", True),
        (outcome({"met": False}, {"met": False}), "error", "runs folder", "did not see each other", None),
        (outcome({}, {"host": "n1"}), "warning", "two-node test", "both tasks were on n1", None),
        (outcome(None, None, ended="FAILED"), "error", "runs folder", "left nothing", None),
        (outcome(None, None, stopped="it did not start"), "warning", "two-node test", "did not start", None),
        (outcome({}, None, ended="TIMEOUT"), "error", "two-node test", "TIMEOUT", None),
        (outcome({}, {"done": False, "tallies": []}, ended="TIMEOUT"), "error", "two-node test", "on n2", None),
        (outcome({"missing": ["/data"]}, {}), "error", "data", "/data: can't be read on n1", True),
        (
            outcome({"database_problem": "refused"}, {}),
            "error",
            "database",
            "on n1: refused",
            True,
        ),
        (outcome({"python": PythonFacts(error="no torch")}, {}), "error", "python on n1", "no torch", True),
        (
            outcome({"mount": Mount("/l", "lustre", "m:/", ("localflock",))}, {}),
            "error",
            "locks",
            "on n1: Lustre",
            True,
        ),
    ],
)
def test_what_the_nodes_reported(given, level, topic, words, holds):
    findings = two_node.judge(given, NEEDS)
    assert worst(findings) == level
    assert any(finding.topic == topic and words in finding.what for finding in findings), findings
    assert two_node.locks_hold(given) is holds


def test_if_a_node_can_t_submit_the_advice_is_orch_keep_on_a_login_node():
    findings = two_node.judge(outcome({"can_submit": REFUSED}, {}), NEEDS)
    assert "orch keep" in one(findings, "successors").do


def test_a_database_server_that_does_not_answer_says_why_without_the_password(tmp_path):
    said = node.database_error("postgresql+psycopg://me:secret@127.0.0.1:1/orch", tmp_path)
    assert said
    assert "secret" not in said
    assert node.database_error(f"sqlite:///{tmp_path}/none.db", tmp_path)


def test_a_report_survives_its_file(tmp_path):
    assert node.read_report(tmp_path, 0) is None
    given = report(0)
    node.write_report(tmp_path, given)
    assert node.read_report(tmp_path, 0) == given
    (tmp_path / "report-0.json").write_text("{")
    assert node.read_report(tmp_path, 0) is None


@pytest.mark.parametrize(
    ("refusal", "nodes_tried", "level"),
    [(Refusal.TOO_MANY_NODES, [2, 1], "warning"), (Refusal.OTHER, [2], "error"), (Refusal.NO_ROOM, [2], "error")],
)
def test_one_node_is_tried_if_two_are_refused_whatever_the_message_says(
    tmp_path, monkeypatch, refusal, nodes_tried, level
):
    tried: list[int] = []

    def run(needs: two_node.Needs, scratch: Path, nodes: int, *_: object) -> two_node.TestOutcome:
        tried.append(nodes)
        if nodes == 2:
            raise SubmissionError("no", refusal=refusal)
        return outcome({}, {"host": "n1"}, nodes=1)

    monkeypatch.setattr(two_node, "_run", run)
    proof = two_node.prove(NEEDS, tmp_path, 1.0, lambda _line: None)
    assert tried == nodes_tried
    assert worst(proof.findings) == level
    assert proof.locks_hold is None
