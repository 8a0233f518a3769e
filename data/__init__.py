"""Shards of images (write, index, verify) and the deterministic stream that training reads."""
