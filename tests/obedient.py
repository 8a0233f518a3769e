"""In place of a crew: one process that makes each part from what a worker would be told."""

import json
from collections.abc import Sequence

from ditmoe.data.crew.tasks import AnyParts, Task, make_part
from ditmoe.data.storage.parts import Progress
from ditmoe.model.errors import UserError


class Obedient:
    """Makes parts in their order, here."""

    size = 2

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        """(stage, name) of each part."""

    def make(
        self,
        task: Task,
        parts: AnyParts,
        *,
        only: Sequence[int] | None = None,
        on_progress: Progress = lambda done: None,
    ) -> int:
        """As that of a crew."""
        missing = [part for part in only or range(len(parts.names)) if not parts.path(part).exists()]
        for part in missing:
            mistake, failure = make_part(task.builder, task.request, part, 600)
            assert failure is None, failure
            if mistake is not None:
                raise UserError(mistake)
            assert parts.path(part).exists()
            self.made.append((json.loads(task.request)["stage"], parts.names[part]))
        on_progress(len(parts.names))
        return len(missing)

    def stages(self) -> dict[str, int]:
        """Stage → the parts that were made of it."""
        stages = [stage for stage, _ in self.made]
        return {stage: stages.count(stage) for stage in dict.fromkeys(stages)}
