"""Code that runs inside a job: open the run, wait for the predecessor, train chunks, queue the successor."""
