"""The page of the service: its files, and what it shows of runs and evaluations."""
