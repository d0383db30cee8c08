"""Build, project, record: one job, or the jobs of a sweep.

The only reader of the config. Jobs that differ in photos, seed and weights alone are
projected as one batch; every job keeps a folder of its own, and one job's failure leaves
the others alone. The same jobs again finish what is unfinished and skip what is done.
"""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lmexp import expression_map
from lmexp.config import Experiment, Optimizer, digest
from lmexp.errors import LmexpError
from lmexp.faces.targets import AlignedFace, align_photo
from lmexp.follower import Follower
from lmexp.inputs import Source
from lmexp.inversion import InversionStore, invert
from lmexp.jobs import Job, Outcome, Request, Settle, open_jobs
from lmexp.landmarks import groups
from lmexp.latents import Latents, expand, mark_moving, start_at_mean, truncate
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import CheckedTerm, Context, Targets
from lmexp.projection import project
from lmexp.recording import provenance
from lmexp.recording.atomic_file import DiskFullError, make_folder
from lmexp.recording.images import to_images, to_picture
from lmexp.recording.progress import ProgressBar, job_title
from lmexp.recording.run_folder import RunFolder
from lmexp.recording.tracker import Tracker
from lmexp.results import Projected, conclude
from lmexp.schedule import Schedule
from lmexp.starts import Starts
from lmexp.stopping import Interrupted, StopRequest, listen
from lmexp.workbench import Workbench

log = logging.getLogger("lmexp")


def run(
    requests: Sequence[Request],
    root: Path,
    sweep: str | None = None,
    *,
    bench: Workbench | None = None,
    stop: StopRequest | None = None,
    settle: Settle | None = None,
    take_over: bool = False,
    done: int = 0,
    total: int | None = None,
) -> list[Outcome]:
    """Run jobs to their end.

    Args:
        requests: any mixture; hardware and tracker are the first one's.
        root: where the run folders are made.
        sweep: name that groups the jobs in the tracker; None for a single run.
        bench: what earlier calls have built; None builds anew.
        stop: asked between steps; None listens to Ctrl-C and SIGTERM.
        settle: told each outcome as soon as it is known.
        take_over: go on with jobs whose status says that another process is at work on them;
            for who knows that it is dead.
        done: jobs of the same sweep that were done before, and `total` all that it has, for the
            words of the progress bar.

    Returns:
        One outcome per request, in their order.

    Raises:
        LmexpError: the hardware or a component that all jobs need cannot be had.
        DiskFullError: there is no room for results; what `settle` was not told is not done.
    """
    first = requests[0].config
    tracker: Tracker = first.tracker.build()
    session = _Session(
        bench or Workbench(first.hardware), tracker, root, sweep, total or len(requests)
    )
    session.done = done
    session.tell = settle
    if stop is not None:
        session.stop = stop
        return session.run(requests, take_over)
    with listen() as stop:
        session.stop = stop
        return session.run(requests, take_over)


class _Session:
    """One call of `run`: what its jobs share."""

    stop: StopRequest

    def __init__(
        self, bench: Workbench, tracker: Tracker, root: Path, sweep: str | None, total: int
    ) -> None:
        self.bench = bench
        self.tracker = tracker
        self.root = root
        self.sweep = sweep
        self.total = total
        self.git = provenance.describe_git()
        self.outcomes: dict[int, Outcome] = {}
        self.done = 0
        self.tell: Settle | None = None

    def run(self, requests: Sequence[Request], take_over: bool) -> list[Outcome]:
        made, jobs = open_jobs(requests, self.root, self.sweep, self.tracker, 1, take_over)
        for index, twin in made.twins.items():
            log.info("job %d is the same as job %d; it runs once", index + 1, twin + 1)
        for index, outcome in made.settled.items():
            self.settle(index, outcome)
            self.done += outcome.state == "skipped"
        if made.batches:
            make_folder(self.root)  # before work that could not be kept
        for batch in made.batches:
            self._run_batch([(index, jobs[index]) for index in batch])
        for index, twin in made.twins.items():
            self.settle(index, replace(self.outcomes[twin], request=requests[index]))
        return [self.outcomes[index] for index in range(len(requests))]

    def settle(self, index: int, outcome: Outcome) -> None:
        """What became of request `index`."""
        self.outcomes[index] = outcome
        if self.tell is not None:
            self.tell(index, outcome)

    # -- one batch ------------------------------------------------------------------------

    def _run_batch(self, members: Sequence[tuple[int, Job]]) -> None:
        """Project jobs together; if that fails, in two halves, so the fault stays with its job."""
        if self.stop.requested:
            for index, job in members:
                reason = "stopped before its turn"
                self.settle(index, Outcome(job.request, "interrupted", job.folder, reason))
            return
        fault: Exception | str
        try:
            able = self._check(members)
            if not able:
                return
            context = self.bench.context(able[0][1].config)
            ready = list(self._align(able, context))
            for portion in self._portions(ready):
                self._project(portion, context)
            return
        except Interrupted:
            for index, job in self._left(members):
                reason = "stopped while its look was inverted"
                self.settle(index, Outcome(job.request, "interrupted", job.folder, reason))
            return
        except DiskFullError:
            raise
        except torch.cuda.OutOfMemoryError:
            fault = "the GPU has too little memory for a single job"
        except Exception as error:
            # Its frames hold the batch's tensors, which would leave no memory to the halves.
            traceback.clear_frames(error.__traceback__)
            fault = error
        # Here, for within an `except` the exception that is handled keeps those frames alive.
        self._halve(self._left(members), fault)

    def _left(self, members: Sequence[tuple[int, Job]]) -> list[tuple[int, Job]]:
        return [(index, job) for index, job in members if index not in self.outcomes]

    def _halve(self, left: Sequence[tuple[int, Job]], fault: Exception | str) -> None:
        """Go on with fewer jobs at a time, from what they have saved; a lone job has failed."""
        if len(left) == 1:
            index, job = left[0]
            self._fail(index, job, fault)
            return
        half = (len(left) + 1) // 2
        if isinstance(fault, str):
            gc.collect()
            torch.cuda.empty_cache()
            log.warning("the GPU's memory does not hold %d jobs; going on with %d", len(left), half)
        else:
            said = _one_line(fault)
            log.info("%d jobs failed together (%s); going on with %d", len(left), said, half)
        for part in (left[:half], left[half:]):
            steps: dict[int, list[tuple[int, Job]]] = defaultdict(list)
            for index, job in part:
                job.read_state()
                steps[job.first_step].append((index, job))
            for members in steps.values():
                self._run_batch(members)

    def _fail(self, index: int, job: Job, fault: Exception | str, step: int = 0) -> None:
        """Settle a job as failed; an exception that nobody foresaw leaves its traceback too."""
        reason = str(fault)
        try:
            if isinstance(fault, Exception) and not isinstance(fault, LmexpError):
                job.recorder.folder.create().write_fault("".join(traceback.format_exception(fault)))
                reason = f"{_one_line(fault)}; an error of lmexp's own, see fault.txt in its folder"
            job.recorder.fail(reason, step=step or job.first_step)
        except LmexpError as error:  # the reason is still told, though not in the folder
            log.warning("%s", error)
        self.settle(index, Outcome(job.request, "failed", job.folder, reason))

    def _check(self, members: Sequence[tuple[int, Job]]) -> list[tuple[int, Job]]:
        """The jobs whose terms have all they need; the others fail before anything is computed."""
        generator = self.bench.module(members[0][1].config.generator)
        # The very one that `bind` will get: a term may keep what it loads for it.
        generator = self.bench.acceleration.network(generator)
        able: list[tuple[int, Job]] = []
        for index, job in members:
            try:
                for term in self.bench.used_terms(job.config).values():
                    if isinstance(term, CheckedTerm):
                        term.check(generator)
            except DiskFullError:  # no fault of this job's
                raise
            except LmexpError as error:
                self._fail(index, job, error)
                continue
            able.append((index, job))
        return able

    def _align(
        self, members: Sequence[tuple[int, Job]], context: Context
    ) -> Iterator[tuple[int, Job]]:
        for index, job in members:
            try:
                look = self._face(job.config, job.look, "look", context)
                expression = self._face(job.config, job.expression, "expression", context)
            except (DiskFullError, torch.cuda.OutOfMemoryError):  # no fault of this job's
                raise
            except Exception as error:
                self._fail(index, job, error)
                continue
            if job.config.inputs.lay_over:
                expression = self.bench.laid_over(expression, look)
            job.faces = (look, expression)
            yield index, job

    def _face(
        self,
        config: Experiment,
        source: Source,
        role: Literal["look", "expression"],
        context: Context,
    ) -> AlignedFace:
        side = context.generator.resolution
        if source.path is None:
            assert source.seed is not None
            return self.bench.generated_face(config, source.seed)
        path, which = source.path, config.inputs.face_of(role)

        def align() -> AlignedFace:
            return align_photo(
                path,
                detector=self.bench.component(config.detector),
                network=context.heatmap_network,
                side=side,
                face=which,
                device=self.bench.device,
            )

        face = self.bench.aligned_face(config, source.digest, side, which, align)
        for warning in face.warnings:
            log.warning("inputs.%s: %s", role, warning)
        return face

    def _portions(self, ready: Sequence[tuple[int, Job]]) -> Iterator[Sequence[tuple[int, Job]]]:
        """As many jobs at a time as the memory holds, if that is to be found out."""
        if not ready:
            return
        config = ready[0][1].config
        size = len(ready)
        if config.hardware.batch_size == "auto" and size > 1:
            size = max(1, self.bench.count_rows(config) // config.latent.starts)
        # Portions of about one size, so that what is compiled for one serves the others.
        count = -(-len(ready) // size)
        size = -(-len(ready) // count)
        if count > 1:
            log.info("the memory holds %d of %d jobs at a time", size, len(ready))
        for first in range(0, len(ready), size):
            yield ready[first : first + size]

    # -- the stages -----------------------------------------------------------------------

    def _project(self, members: Sequence[tuple[int, Job]], context: Context) -> None:
        jobs = [job for _, job in members]
        config = jobs[0].config
        began = time.monotonic()
        targets = self._targets(jobs)
        start, inverted = self._start(jobs, context, targets)
        for k, job in enumerate(jobs):
            expression, expression_landmarks = targets.expression_of(k)
            job.recorder.start(
                look=targets.look[k],
                expression=expression,
                look_landmarks=targets.look_landmarks[k],
                expression_landmarks=expression_landmarks,
                first_step=job.first_step,
                diff=self.git.diff if self.git else "",
            )
            if inverted is not None:
                folder, (latents, images) = RunFolder(job.folder), inverted
                folder.write_picture("inversion", to_picture(images[k]))
                ws = expand(latents.ws[k : k + 1], context.generator.num_ws)
                folder.write_inversion(
                    ws.float().cpu().numpy(),
                    [noise[k].float().cpu().numpy() for noise in latents.noise_bufs],
                )
        starts = Starts(config.latent.starts, config.latent.starts_spread)
        objective = self._objective(starts.repeat(jobs), starts.repeat_targets(targets))
        moves = mark_moving(config.latent.moving_ws, start.ws)
        seeds = [job.config.seed for job in jobs]
        states = [state for job in jobs if job.state for state in starts.split(job.state)]
        title = job_title(self.done + 1, len(jobs), self.total)
        with ProgressBar(config.optimizer.steps, first_step=jobs[0].first_step, title=title) as bar:
            follower = Follower(members, bar, self.outcomes, self.settle, self.stop)
            final = project(
                self.bench.stepping_context(config),
                objective,
                starts.scatter(start, seeds, context.latent_statistics.w_std, moves),
                _schedule(config.optimizer),
                seeds=starts.repeat(seeds),
                moves=moves,
                first_step=jobs[0].first_step,
                resume=states if len(states) == len(jobs) * starts.count else None,
                callback=starts.follow(follower),
                looks_at=follower.looks_at,
            )
        final, chosen = starts.choose(
            objective,
            context,
            final,
            seeds=starts.repeat(seeds),
            first_view=config.optimizer.steps,
        )
        projected = Projected(context, targets, final, chosen, inverted, began)
        conclude(members, projected, self.bench, self.git, self.outcomes, self.settle)
        self.done += len(members)

    def _targets(self, jobs: Sequence[Job]) -> Targets:
        faces = [job.faces for job in jobs if job.faces is not None]
        looks, expressions = [pair[0] for pair in faces], [pair[1] for pair in faces]
        device = self.bench.device
        weights = [groups.expand(job.config.landmark_weights.model_dump()) for job in jobs]
        return Targets(
            look=to_images([face.image for face in looks], device),
            look_landmarks=torch.stack([face.landmarks_tensor() for face in looks]).to(device),
            expression=to_images([face.image for face in expressions], device),
            expression_landmarks=torch.stack([face.landmarks_tensor() for face in expressions]).to(
                device
            ),
            landmark_weights=torch.stack(weights).to(device),
        )

    def _objective(self, jobs: Sequence[Job], targets: Targets) -> Objective:
        terms = self.bench.terms(jobs[0].config)
        weights = [
            {
                name: job.config.loss[name].keywords.get("weight", term.weight)
                for name, term in terms.items()
            }
            for job in jobs
        ]
        return Objective.bind(terms, weights, self.bench.stepping_context(jobs[0].config), targets)

    def _start(
        self, jobs: Sequence[Job], context: Context, targets: Targets
    ) -> tuple[Latents, tuple[Latents, Tensor] | None]:
        """Where each job starts; the looks' inversions and their images [N, 3, R, R], if any."""
        config = jobs[0].config
        mean = start_at_mean(
            context.generator,
            context.latent_statistics,
            space=config.latent.space,
            seeds=[job.config.seed for job in jobs],
            device=self.bench.device,
        )
        if config.latent.start == "mean":
            return mean, None
        inversions = invert(
            [self._inversion_key(job) for job in jobs],
            mean,
            _schedule(config.latent.inversion),
            seeds=[job.config.seed for job in jobs],
            context=self.bench.stepping_context(config),
            bind=lambda rows: self._look_objective(jobs, rows, targets),
            store=InversionStore(
                Path(config.output_dir) / ".inversions", config.recording.save_every_seconds
            ),
            stop=self.stop,
        )
        with torch.no_grad():
            images = torch.cat(
                [
                    context.generator.synthesis(
                        expand(inversions.ws[k : k + 1], context.generator.num_ws),
                        tuple(noise[k : k + 1] for noise in inversions.noise_bufs),
                    )
                    for k in range(len(jobs))
                ]
            )
        start = truncate(inversions, mean, config.latent.truncation_psi)
        return self._head_start(jobs, context, targets, start), (inversions, images)

    def _head_start(
        self, jobs: Sequence[Job], context: Context, targets: Targets, start: Latents
    ) -> Latents:
        """The inversions, part of the way to their expressions already."""
        latent = jobs[0].config.latent
        if not latent.head_start:
            return start
        assert targets.expression_landmarks is not None and targets.landmark_weights is not None
        ws = expression_map.head_start(
            start.ws,
            self.bench.expression_map(jobs[0].config),
            context.generator,
            context.heatmap_network,
            context.latent_statistics,
            look_landmarks=targets.look_landmarks,
            expression_landmarks=targets.expression_landmarks,
            weights=targets.landmark_weights,
            share=latent.head_start,
            rows=latent.head_start_ws,
        )
        return replace(start, ws=ws)

    def _look_objective(
        self, jobs: Sequence[Job], rows: Sequence[int], targets: Targets
    ) -> Objective:
        """The objective of some jobs' looks alone."""
        chosen = list(rows)
        looks = Targets(look=targets.look[chosen], look_landmarks=targets.look_landmarks[chosen])
        objective = self._objective([jobs[row] for row in rows], looks)
        if not objective.names:
            raise LmexpError(
                "latent.start: inversion needs a loss term of the look with weight > 0, such as "
                "lpips; or start at the mean"
            )
        return objective

    def _inversion_key(self, job: Job) -> str:
        """Equal for jobs whose looks are inverted in the same way: one inversion serves them."""
        plain = job.config.by_content()
        terms = self.bench.terms(job.config)
        used = {
            name: plain["loss"][name] for name, term in terms.items() if not term.needs_expression
        }
        latent = {
            key: value
            for key, value in plain["latent"].items()
            if not key.startswith(("head_start", "moving_ws", "starts", "truncation_psi"))
        }
        parts = [plain["generator"], latent, used, job.config.seed, job.look.digest]
        return digest(
            [*parts, plain["landmarks"], plain["detector"], job.config.inputs.face_of("look")]
        )


def _one_line(fault: Exception) -> str:
    said = " ".join(str(fault).split())
    return said if isinstance(fault, LmexpError) else f"{type(fault).__name__}: {said}"


def _schedule(optimizer: Optimizer) -> Schedule:
    return Schedule.read(optimizer.model_dump())
