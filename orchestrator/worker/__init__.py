"""What happens inside a job: open the run, wait for the turn, train chunk after chunk, queue the successor."""
