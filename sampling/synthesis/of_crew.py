"""A synthesis by a crew: what its workers are told, and the parts that they build from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ditmoe.data.crew.making import Make, absolute, absolute_place, by_crew, check_same, stage_of
from ditmoe.data.crew.tasks import AnyParts
from ditmoe.parallel.ranks import own_device
from ditmoe.sampling.metrics.classifier import ClassifierSettings
from ditmoe.sampling.metrics.quality import Scorer, make_scorer, mean_parts, scoring_network
from ditmoe.sampling.synthesis.make import check_scorer, drawer, shards_of
from ditmoe.sampling.synthesis.plan import Synthesis, SynthesisOptions, prepare_synthesis

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew

_OPTIONS = TypeAdapter(SynthesisOptions)


def made_by(crew: "Crew", synthesis: Synthesis) -> Make:
    """Has the parts of a synthesis made by a crew."""
    return by_crew(crew, parts_of_stage, request_for(synthesis))


def request_for(synthesis: Synthesis) -> dict[str, Any]:
    """What a worker builds the same synthesis from, wherever it was started."""
    options = synthesis.options
    told = replace(
        options,
        source=synthesis.checkpoint.absolute(),
        step=None,
        out=options.out.absolute(),
        score=replace(options.score, features_path=absolute(options.score.features_path)),
        reference=None if options.reference is None else absolute_place(str(options.reference)),
        index=absolute(options.index),
        cache=options.cache.absolute(),
        vae=absolute(options.vae),
        overwrite=False,
    )
    return {
        "options": _OPTIONS.dump_python(told, mode="json"),
        # As they are: a checked number is a float, and their fingerprints are of what they print.
        "classifiers": [asdict(told.score.classifier), asdict(told.score.feature_classifier)],
        "synthesis": _identity(synthesis),
    }


def parts_of_stage(request: Mapping[str, Any]) -> AnyParts:
    """The parts of one stage of a synthesis, in a worker.

    Args:
        request: `request_for`, and the stage.

    Raises:
        UserError: this machine sees another checkpoint, other real images, or another scoring network.
    """
    stage, told = stage_of(request)
    work = _work(told)
    if stage == "means":
        return work.means()
    if stage == "drawn":
        return work.store.parts
    assert stage == "shards", stage
    return shards_of(work.synthesis, work.store, work.scorer, work.device)


class _Work:
    """The synthesis that a worker is at."""

    def __init__(self, synthesis: Synthesis) -> None:
        self.synthesis = synthesis
        self.device = own_device("auto", "--processes")
        draw = drawer(synthesis, self.device, several=True)
        self.store = synthesis.store.drawn_by(draw, synthesis.labels_of)

    @cached_property
    def scorer(self) -> Scorer | None:
        """What its shards are scored with."""
        options, real = self.synthesis.options, self.synthesis.real
        if real is None:
            return None
        scorer = make_scorer(options.score, real, self.synthesis.plan["classes"], options.cache, self.device)
        check_scorer(self.synthesis, scorer)
        return scorer

    def means(self) -> AnyParts:
        """The mean features of the real images."""
        options, real = self.synthesis.options, self.synthesis.real
        assert real is not None
        return mean_parts(scoring_network(options.score, real, options.cache, self.device), real, options.cache)


@lru_cache(maxsize=1)
def _work(told: str) -> _Work:
    """Kept, with its networks, from one stage to the next."""
    request = json.loads(told)
    options = _OPTIONS.validate_python(request["options"])
    score, features = (ClassifierSettings(**settings) for settings in request["classifiers"])
    options = replace(options, score=replace(options.score, classifier=score, feature_classifier=features))
    synthesis = prepare_synthesis(options)
    check_same(synthesis.checkpoint, _identity(synthesis), request["synthesis"])
    return _Work(synthesis)


def _identity(synthesis: Synthesis) -> dict[str, str]:
    return {"synthesis": synthesis.fingerprint}
