"""A GPU that is only pretended: what runs on one is run on a CPU, and what would be wrong there is found."""
