"""The exponential moving average of the weights that a rank's optimiser owns, in flat tensors like theirs."""

from collections.abc import Sequence

from ditmoe.model.ema import update_ema
from ditmoe.parallel.engine.fragments import Fragment
from ditmoe.parallel.engine.update import Update


class Averages:
    """fp32, beside each tensor that AdamW steps: of a few large ones, however many parameters there are."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        """Start from the weights."""
        stepped = {id(fragment.stepped): fragment.stepped.detach().view(-1) for fragment in fragments}
        self._weights = list(stepped.values())
        self._averages = [weights.clone() for weights in self._weights]
        flat = dict(zip(stepped, self._averages, strict=True))
        self.of_fragments = [flat[id(f.stepped)].narrow(0, f.offset, f.weight.numel()) for f in fragments]
        """Views, one for each fragment."""

    def update(self, update: Update, decay: float) -> None:
        """average ← decay·average + (1 − decay)·weights, if the step counted."""
        update_ema(self._averages, self._weights, decay, update.counted())
