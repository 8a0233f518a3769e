"""What waits to be drawn: users take turns, one image each, so that nobody waits for another's fifty thousand."""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

USERS_SHARE: Final = 4
"""So many users fill the queue."""


class QueueFull(Exception):
    """No more fits."""

    def __init__(self, waiting: int, message: str) -> None:
        super().__init__(message)
        self.waiting = waiting
        """Items that wait."""


class FairQueue(Generic[Item]):
    """First in, first out for each user; round robin between users. Not locked: its owner does that."""

    def __init__(self, limit: int) -> None:
        """Make an empty queue.

        Args:
            limit: items of one user; of all together `USERS_SHARE` times as many.
        """
        self.limit = limit
        self._waiting: dict[Hashable, deque[Item]] = {}
        """User → items, the user whose turn it is first; a user without items is not there."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, user: Hashable, items: Sequence[Item], *, bounded: bool = True) -> None:
        """Add all items of a user, or none.

        Args:
            bounded: the limits hold.

        Raises:
            QueueFull: they do not fit.
        """
        total, own = len(self), len(self._waiting.get(user, ()))
        if bounded and own + len(items) > self.limit:
            raise QueueFull(
                own, f"{own} of your images wait; expected {self.limit} at most with {len(items)} more"
            )
        if bounded and total + len(items) > USERS_SHARE * self.limit:
            raise QueueFull(
                total, f"{total} images wait; expected {USERS_SHARE * self.limit} at most with {len(items)} more"
            )
        if items:
            self._waiting.setdefault(user, deque()).extend(items)

    def take(self) -> Item | None:
        """The next item of the user whose turn it is, who then comes last; None: nothing waits."""
        if not self._waiting:
            return None
        user = next(iter(self._waiting))
        items = self._waiting.pop(user)
        item = items.popleft()
        if items:
            self._waiting[user] = items
        return item

    def remove(self, user: Hashable, item: Item) -> bool:
        """Take an item out; False: it does not wait."""
        items = self._waiting.get(user)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[user]
        return True
