"""A step on the generator's own faces: what a job takes, before the jobs are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lmexp.inputs import generate_face
from lmexp.latents import start_at_mean
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Context, Targets, Term
from lmexp.projection import project
from lmexp.schedule import Schedule

SHARE = 0.85
"""Of the free memory that a batch may take: graphs and convolutions ask for some beside it."""


def make_targets(context: Context, rows: int, landmark_weights: torch.Tensor) -> Targets:
    """Looks and expressions drawn from the generator itself.

    Args:
        landmark_weights: [68].

    Returns:
        `rows` of them.
    """
    # One at a time: this must not take more memory than a step does.
    made = [generate_face(context, seed) for seed in range(2 * rows)]
    faces, landmarks = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Targets(
        look=faces[:rows],
        look_landmarks=landmarks[:rows],
        expression=faces[rows:],
        expression_landmarks=landmarks[rows:],
        landmark_weights=landmark_weights.to(faces).expand(rows, -1),
    )


def take_a_step(context: Context, terms: Mapping[str, Term], targets: Targets, space: str) -> None:
    """Project from the mean; the result is of no use.

    Args:
        context: as `project` takes it.
        space: "w" or "w_plus".
    """
    rows = len(targets.look)
    weights = [{name: term.weight for name, term in terms.items()}] * rows
    start = start_at_mean(
        context.generator,
        context.latent_statistics,
        space=space,
        seeds=range(rows),
        device=targets.look.device,
    )
    objective = Objective.bind(terms, weights, context, targets)
    project(context, objective, start, Schedule(1), seeds=range(rows))


def count_rows(
    context: Context,
    terms: Mapping[str, Term],
    landmark_weights: torch.Tensor,
    space: str,
    most: int,
) -> int:
    """How many rows of a batch the GPU's free memory holds, measured by steps with one and three.

    Args:
        context: without compilation and graphs, which take no more.
        landmark_weights: [68].
        most: at most that many.

    Returns:
        From 1 to `most`.
    """
    device = context.latent_statistics.w_avg.device
    peaks = []
    for rows in (1, 3):
        targets = make_targets(context, rows, landmark_weights)
        torch.cuda.reset_peak_memory_stats(device)
        take_a_step(context, terms, targets, space)
        peaks.append(torch.cuda.max_memory_allocated(device))
        del targets
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return share_out(free, peaks, torch.cuda.memory_allocated(device), most)


def share_out(free: int, peaks: Sequence[int], now: int, most: int) -> int:
    """Rows that fit, from what one row and three took at most.

    Args:
        free: bytes that nobody uses.
        peaks: bytes in use at most, with one row and with three.
        now: bytes in use without any.
        most: at most that many rows.
    """
    each = max((peaks[1] - peaks[0]) / 2, 1.0)
    shared = max(peaks[0] - each - now, 0.0)
    return max(1, min(most, int((SHARE * free - shared) / each)))
