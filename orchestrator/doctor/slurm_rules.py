"""Compare what Slurm reported with what the settings request. Pure functions."""

from __future__ import annotations

from orchestrator.cluster.sbatch import Request, advice
from orchestrator.doctor import limits
from orchestrator.doctor.findings import Finding
from orchestrator.doctor.partition import Need, judge_partition, judge_working_time
from orchestrator.doctor.slurm_facts import SlurmFacts
from orchestrator.errors import Refusal


def judge_slurm(
    facts: SlurmFacts, asked: Request, need: Need, workers: int, eon_lifetime_s: float | None
) -> list[Finding]:
    """Evaluate what Slurm reported. eon_lifetime_s: None if the user has not given settings."""
    if not facts.answers:
        what = f"Slurm's commands are installed, but Slurm does not answer: {facts.answer.said[-300:]}"
        do = "run `scontrol ping`; check that SLURM_CONF is right, munge runs, and this node belongs to the cluster"
        return [Finding("error", "slurm", what, do)]
    name = facts.config.get("ClusterName", "?")
    findings = [Finding("ok", "slurm", f"{facts.version} answers, cluster {name}"), _judge_accounting(facts)]
    findings += judge_partition(asked.options.get("partition"), facts.partitions, facts.nodes, asked, need)
    if eon_lifetime_s is not None:
        findings += judge_working_time(eon_lifetime_s, asked)
    findings.append(_judge_answer(facts, asked, workers))
    accounting, enforced = facts.accounting or limits.Accounting(), facts.limits_enforced
    if facts.accounting and facts.accounting.association is None:
        account = asked.options.get("account", "(none)")
        what = f"you have no association with account {account}: its limits are not known"
        do = "`sacctmgr show associations user=$USER` lists yours; slurm.account chooses one"
        findings.append(Finding("warning", "limits", what, do))
    findings += limits.judge_cluster(facts.config, workers)
    findings += limits.judge_submission(limits.submit_limits(accounting), workers, facts.others, enforced)
    return findings + limits.judge_running(accounting, workers, need.gpus, enforced)


def _judge_accounting(facts: SlurmFacts) -> Finding:
    if not facts.has_slurmdbd:
        what = "the cluster has no accounting (slurmdbd): Slurm keeps no record of how jobs ended or what they used"
        return Finding("note", "accounting", what, "nothing: orch keeps its own records")
    if facts.accounting is None:
        what = "slurmdbd does not answer, so job limits and the outcome of ended jobs are not known"
        return Finding("warning", "accounting", what, "try again when `sacctmgr show cluster` works")
    return Finding("ok", "accounting", "slurmdbd answers")


def _judge_answer(facts: SlurmFacts, asked: Request, workers: int) -> Finding:
    """Evaluate what sbatch --test-only said about the script of the run's first jobs."""
    if facts.answer.taken:
        return Finding("ok", "submission", f"sbatch --test-only accepts the run's jobs ({workers})")
    if facts.answer.refusal is Refusal.UNREACHABLE:
        return Finding("error", "slurm", f"Slurm does not answer: {facts.answer.said}", "try again (`scontrol ping`)")
    what = f"sbatch --test-only refuses the run's jobs. {advice(facts.answer.said, asked, workers)}"
    return Finding("error", "submission", what, "change the settings accordingly, and run `orch doctor` again")
