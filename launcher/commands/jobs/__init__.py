"""Verbs that look at runs and end them, on this machine and on a cluster."""
