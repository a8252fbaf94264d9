"""What Slurm said, against what the settings ask for. Pure."""

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
    """Everything that Slurm said, against what the settings ask for. eon_lifetime_s: None if it is nobody's wish."""
    if not facts.answers:
        do = "check with `scontrol ping`; is SLURM_CONF right, is munge running, is this a node of the cluster?"
        said = f": {facts.answer.said[-300:]}" if facts.answer else ""
        return [Finding("error", "slurm", f"Slurm's commands are here, and it does not answer{said}", do)]
    found = [
        Finding("ok", "slurm", f"{facts.version} answers, cluster {facts.config.get('ClusterName', '?')}"),
        _judge_accounting(facts),
    ]
    wanted = asked.options.get("partition")
    found += judge_partition(str(wanted) if wanted else None, facts.partitions, facts.nodes, asked, need)
    if eon_lifetime_s is not None:
        found += judge_working_time(eon_lifetime_s, asked)
    if facts.answer:
        found.append(_judge_answer(facts, asked, workers))
    if facts.accounting_answers and facts.standing.association is None:
        what = (
            f"you have no association with account {asked.options.get('account', '(none)')}: its limits are not known"
        )
        do = "`sacctmgr show associations user=$USER` lists yours; slurm.account chooses one"
        found.append(Finding("warning", "limits", what, do))
    enforced = facts.limits_enforced
    found += limits.judge_cluster(facts.config, workers)
    found += limits.judge_submission(limits.submit_limits(facts.standing), workers, facts.others, enforced)
    return found + limits.judge_running(facts.standing, workers, need.gpus, enforced)


def _judge_accounting(facts: SlurmFacts) -> Finding:
    if not facts.accounting:
        what = "the cluster has no accounting (slurmdbd): Slurm can't say how jobs ended or what they used"
        return Finding("note", "accounting", what, "nothing: orch keeps its own ledger")
    if not facts.accounting_answers:
        what = "slurmdbd does not answer: limits are not known, nor how jobs ended"
        return Finding("warning", "accounting", what, "try again; `sacctmgr show cluster` shows whether it does")
    return Finding("ok", "accounting", "slurmdbd answers")


def _judge_answer(facts: SlurmFacts, asked: Request, workers: int) -> Finding:
    """What sbatch --test-only says to the script of the run's first jobs."""
    assert facts.answer is not None, "asked before it is judged"
    if facts.answer.taken:
        return Finding("ok", "submission", f"sbatch --test-only takes the run's jobs: {workers} of them")
    if facts.answer.refusal is Refusal.UNREACHABLE:
        return Finding("error", "slurm", f"Slurm does not answer: {facts.answer.said}", "try again; `scontrol ping`")
    what = f"sbatch --test-only refuses the run's jobs. {advice(facts.answer.said, asked, workers)}"
    return Finding("error", "submission", what, "change the settings as said, and look again")
