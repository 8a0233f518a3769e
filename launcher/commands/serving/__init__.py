"""Verbs that serve others."""
