"""What several tests share: small runs, storages, invariants, jobs."""
