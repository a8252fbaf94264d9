"""The entry point named in the pickles of jobs that were queued before version 0.2. Remove this module in 0.3."""

from orchestrator.worker.job_main import job_main as job_main
