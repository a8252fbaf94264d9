"""Code shared by several tests: small runs, storages, invariants, jobs."""
