"""Commands that score images against references, besides `ditmoe evaluate`."""
