"""What goes wrong with a shard as a whole."""


class ShardFault(Exception):
    """A shard that cannot be read; the source's policy decides what follows."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"{shard}: {reason}")
        self.shard = shard
        self.reason = reason
