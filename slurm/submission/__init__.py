"""What is asked of Slurm, the batch script that asks for it, and the code that the job runs."""
