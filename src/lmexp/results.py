"""What projected jobs come to: judged, told in numbers, written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmexp.jobs import Job, Outcome, Settle
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.latents import Latents, expand
from lmexp.losses.protocol import Context, Targets
from lmexp.metrics.nme import nme
from lmexp.metrics.protocol import Exhibits
from lmexp.metrics.report import report_scores
from lmexp.recording import provenance
from lmexp.recording.finishing import Finishing
from lmexp.recording.run_folder import RunFolder
from lmexp.workbench import Workbench


@dataclass(frozen=True)
class Projected:
    """A batch after its last step; row k of all is job k's.

    Attributes:
        context: what the jobs were computed with.
        targets: what they were after.
        latents: [N, …] each, what they found.
        chosen: what `Starts.choose` says of each.
        inverted: the inversions and their images [N, 3, R, R], if the jobs began there.
        began: when, by `time.monotonic`.
    """

    context: Context
    targets: Targets
    latents: Latents
    chosen: Sequence[dict[str, Any] | None]
    inverted: tuple[Latents, Tensor] | None
    began: float


def conclude(
    members: Sequence[tuple[int, Job]],
    projected: Projected,
    bench: Workbench,
    git: provenance.GitState | None,
    outcomes: Mapping[int, Outcome],
    settle: Settle,
) -> None:
    """Write every job's result, each while the next one is judged.

    Args:
        members: the batch's jobs in the order of its rows, by the index of their request.
        outcomes: by index, those of jobs that failed on the way.
        settle: told each outcome once it is written.

    Raises:
        DiskFullError, LmexpError: a result cannot be written; all others are.
    """
    wanted: dict[int, Tensor] = {}
    with Finishing() as finishing:
        for k, (index, job) in enumerate(members):
            if index in outcomes:
                continue
            assert job.faces is not None
            face = id(job.faces[1])
            if face not in wanted:  # a sweep's jobs mostly want one expression
                wanted[face] = _judge(job, bench, projected.targets.expression_of(k)[0])
            with torch.no_grad():
                result = _result(k, projected)
                summary = _summarise(k, job, result, wanted[face], projected, bench)
            summary |= {"batch_size": len(members), "git": git.as_dict() if git else None}
            finishing.add(
                partial(
                    job.recorder.finish,
                    # On the CPU: writing must not wait for what the GPU is given meanwhile.
                    image=result.image[0].cpu(),
                    landmarks=result.landmarks[0].cpu(),
                    ws=result.ws[0].cpu(),
                    noise_bufs=[noise[0].cpu() for noise in result.noise_bufs],
                    summary=summary,
                ),
                partial(settle, index, Outcome(job.request, "finished", job.folder, "", summary)),
            )


@dataclass(frozen=True)
class _Result:
    """One job's: `Recorder.finish` says what, with a leading axis of 1 each."""

    image: Tensor
    landmarks: Tensor
    ws: Tensor
    noise_bufs: tuple[Tensor, ...]


def _result(k: int, projected: Projected) -> _Result:
    context, latents = projected.context, projected.latents
    ws = expand(latents.ws[k : k + 1], context.generator.num_ws)
    noise_bufs = tuple(noise[k : k + 1] for noise in latents.noise_bufs)
    image = context.generator.synthesis(ws, noise_bufs)
    landmarks = decode(context.heatmap_network(image), context.generator.resolution)
    return _Result(image, landmarks, ws, noise_bufs)


@torch.no_grad()
def _judge(job: Job, bench: Workbench, image: Tensor) -> Tensor:
    """image: [3, R, R] -> [1, 68, 2], px, by the network that has no part in the optimisation."""
    judge: HeatmapNetwork = bench.module(job.config.judge)
    return decode(judge(image[None]), image.shape[-1])


def _summarise(
    k: int, job: Job, result: _Result, wanted: Tensor, projected: Projected, bench: Workbench
) -> dict[str, Any]:
    """The job in numbers, for summary.json.

    Args:
        wanted: [1, 68, 2], px, what the judge finds in the expression's photo.
    """
    context, targets, inverted = projected.context, projected.targets, projected.inverted
    num_ws = context.generator.num_ws
    digests = {
        "generator": context.generator.weights_sha256,
        "landmarks": context.heatmap_network.weights_sha256,
        **bench.term_weights(job.config),
    }
    row = slice(k, k + 1)
    expression, expression_landmarks = targets.expression_of(k)
    exhibits = Exhibits(
        result=result.image,
        look=targets.look[row],
        expression=expression[None],
        look_landmarks=targets.look_landmarks[row],
        expression_landmarks=expression_landmarks[None],
        inversion=inverted[1][row] if inverted else None,
        ws=result.ws,
        inversion_ws=expand(inverted[0].ws[row], num_ws) if inverted else None,
        samples=context.latent_statistics.samples,
    )
    judge: HeatmapNetwork = bench.module(job.config.judge)
    errors = nme(_judge(job, bench, result.image[0]), wanted)
    return {
        "label": job.label,
        "overrides": list(job.request.overrides),
        "config_hash": job.run_id,
        "steps": job.config.optimizer.steps,
        "seed": job.config.seed,
        **_last_step(job.recorder.folder),
        "starts": projected.chosen[k],
        "nme": {group: float(value) for group, value in errors.items()},
        "nme_judge_sha256": judge.weights_sha256,
        "nme_judge_independent": judge.weights_sha256 != context.heatmap_network.weights_sha256,
        "scores": report_scores(
            bench.component(job.config.scores),
            exhibits,
            optimised=set(digests.values()),
            label=job.label,
        ),
        # The batch's wall clock: a job's own share of a batch cannot be measured.
        "seconds": time.monotonic() - projected.began,
        "device": provenance.describe_device(bench.device),
        "device_uuid": provenance.identify_device(bench.device),
        "hardware": job.config.hardware.model_dump(mode="json"),
        "versions": provenance.describe_versions(),
        "weights_sha256": digests,
    }


def _last_step(folder: RunFolder) -> dict[str, Any]:
    """Steps taken, and the last one's terms; from the record: a resumed run may have had none left.

    A plateau can make the steps fewer than `optimizer.steps`.
    """
    last = folder.read_last_metrics()
    losses = {"raw": last["raw"], "weighted": last["weighted"], "total": last["loss"]}
    return {"steps_taken": last["step"] + 1, "losses": losses}
