"""For jobs that were queued before 0.2: their pickles name this module. To be removed with 0.3."""

from orchestrator.worker.job_main import job_main as job_main
