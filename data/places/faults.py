"""What is wrong with a shard, apart from what is wrong with a setting: a source's policy decides what follows."""

from ditmoe.model.errors import UserError


class ShardFault(UserError):
    """A shard cannot be used: it is missing, unreachable, truncated, or not what the index says.

    Where nothing catches it, it ends the run like any UserError, with "shard: reason" for its message.
    """

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"{shard}: {reason}")
        self.shard = shard
        """The shard's place, without secrets."""
        self.reason = reason
        """What is wrong."""

    def __reduce__(self) -> tuple[type["ShardFault"], tuple[str, str]]:
        return type(self), (self.shard, self.reason)  # between processes
