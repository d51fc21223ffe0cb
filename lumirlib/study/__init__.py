"""The study: runs and sweeps, their results on disk, costs, submissions; `report` makes tables and verdicts of them."""
