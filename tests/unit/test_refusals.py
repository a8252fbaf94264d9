"""The kind of refusal and the message that follow from sbatch's output."""

from __future__ import annotations

import pytest

from orchestrator.cluster.probe import Answer
from orchestrator.cluster.sbatch import Request, refusal_of, refused
from orchestrator.errors import Refusal

ASKED = Request({"partition": "gpu"}, 60, 60, ())


@pytest.mark.parametrize(
    ("printed", "refusal", "message"),
    [
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller",
            Refusal.UNREACHABLE,
            "Slurm does not answer",
        ),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", Refusal.NO_ROOM, "leaves no room for 3 more jobs"),
        ("sbatch: error: Job violates accounting/QOS policy", Refusal.NO_ROOM, "leaves no room for 3 more jobs"),
        ("sbatch: error: Node count specification invalid", Refusal.TOO_MANY_NODES, "the requested number of nodes"),
        (
            "sbatch: error: Invalid partition name specified",
            Refusal.OTHER,
            "slurm.partition gpu: this partition does not exist",
        ),
        ("something new", Refusal.OTHER, "sbatch refused the jobs: something new"),
    ],
)
def test_each_refusal_has_its_kind_and_its_message(printed: str, refusal: Refusal, message: str) -> None:
    error = refused(printed, ASKED, 3)
    assert refusal_of(printed) is error.refusal is Answer(False, printed).refusal is refusal
    assert message in str(error)
    assert Answer(True, printed).refusal is None
