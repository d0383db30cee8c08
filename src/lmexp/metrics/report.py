"""Scores as a part of a run's summary: they may be missing, and never cost the run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from lmexp.metrics.protocol import Exhibits, Scores

log = logging.getLogger("lmexp")


def report_scores(
    scores: Scores, exhibits: Exhibits, *, optimised: Collection[str], label: str
) -> dict[str, Any]:
    """The scores of one finished job, for its summary.

    The result is there and took long; whatever goes wrong here is a warning.

    Args:
        exhibits: of this job alone, N = 1.
        optimised: digests of the weights that took part in the optimisation.
        label: what the job is called.
    """
    try:
        (row,) = scores.score(exhibits, optimised)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s: scores left out (%s)", label, said)
        return {}
    return row
