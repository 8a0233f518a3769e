"""`ditmoe submit`: hand a verb to Slurm."""
