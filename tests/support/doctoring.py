"""Code shared by the doctor's tests: findings, settings, and tallies of the lock test."""

from __future__ import annotations

from typing import Any

from orchestrator.doctor import machine
from orchestrator.doctor.findings import Finding
from orchestrator.locking.proof import Tally
from orchestrator.settings.settings import Settings

VERSIONS = dict.fromkeys(machine.PACKAGES, "1")


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def one(findings: list[Finding], topic: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.topic == topic]
    return finding


def settings(eon_lifetime: float = 2400, database: str | None = None, **slurm: Any) -> Settings:
    values = {"name": "a", "training_profiles": [{"name": "a", "learning_rate": 0.1}], "slurm": slurm}
    return Settings.model_validate(values | {"eon_lifetime": eon_lifetime, "database": database})


def tally(done: int = 300, switches: int = 9, waits: tuple[float, ...] = (0.1,), **more: Any) -> Tally:
    return Tally(**{"kind": "lock", "wanted": 300, "errors": ()} | more, done=done, switches=switches, waits_s=waits)
