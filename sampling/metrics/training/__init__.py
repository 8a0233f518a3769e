"""Trainings of small networks, which go on where they were killed."""
