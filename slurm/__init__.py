"""What talks to Slurm: the tasks of a step, jobs and their scripts, the queue, and what it says of a run."""
