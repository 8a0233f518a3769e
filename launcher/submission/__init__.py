"""From a command to a job of Slurm: settings of site and options, checks by the planner, the request."""
