"""`orch doctor`: functions that gather facts about a machine and a cluster, and pure functions that judge the facts."""
