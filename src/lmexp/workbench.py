"""The frozen objects of experiments, built once and shared by all jobs that need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lmexp import expression_map, inputs, rehearsal
from lmexp.acceleration import Acceleration
from lmexp.config import MOST_AT_ONCE, Component, Experiment, Hardware, Latent, digest
from lmexp.errors import LmexpError
from lmexp.expression_map import ExpressionMap
from lmexp.faces import store
from lmexp.faces.agreement import lay_over
from lmexp.faces.store import FaceStore
from lmexp.faces.targets import AlignedFace
from lmexp.landmarks import groups
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.latents import LatentStatistics, measure
from lmexp.losses.protocol import Context, Term
from lmexp.recording.images import to_picture
from lmexp.recording.progress import ProgressBar

_HALF = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_BYTES = 256 << 20
"""Of pictures that are kept of one kind: 1,365 of 256 px, 85 of 1024 px."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Workbench:
    """Builds generators, networks and terms, and keeps them by what they were built from."""

    def __init__(self, hardware: Hardware) -> None:
        self.device = _open_device(hardware)
        self._memory_format = (
            torch.channels_last if hardware.channels_last else torch.contiguous_format
        )
        self.acceleration = Acceleration(
            half=_HALF[hardware.precision],
            compile=hardware.compile,
            # A worker of a sweep may have been given a CPU in place of the GPU.
            graphs=hardware.graphs and self.device.type == "cuda",
        )
        self._built: dict[str, Any] = {}
        self._faces: dict[str, AlignedFace] = {}
        self._laid_over: dict[tuple[int, int], tuple[AlignedFace, AlignedFace, AlignedFace]] = {}

    def context(self, config: Experiment) -> Context:
        generator = self.module(config.generator)
        return Context(
            generator=generator,
            heatmap_network=self.module(config.landmarks),
            latent_statistics=self.statistics(config.generator, config.latent),
        )

    def stepping_context(self, config: Experiment) -> Context:
        """The context as a projection's steps use it, with what `hardware` makes faster."""
        return self.context(config).accelerated(self.acceleration)

    def count_rows(self, config: Experiment) -> int:
        """How many rows of a batch the device's memory holds, measured once; 1 on a CPU."""
        if self.device.type != "cuda":
            return 1
        # Weights differ from batch to batch of a sweep; only whether a term is on takes memory.
        used = [name for name, term in self.terms(config).items() if term.weight]
        key = digest(["rows", config.batch_key(), used])
        if key not in self._built:
            # Compilation and graphs take no more, and would take time here.
            context = self.context(config).accelerated(Acceleration(half=self.acceleration.half))
            weights = groups.expand(config.landmark_weights.model_dump())
            self._built[key] = rehearsal.count_rows(
                context, self.terms(config), weights, config.latent.space, MOST_AT_ONCE
            )
        rows: int = self._built[key]
        return rows

    def terms(self, config: Experiment) -> dict[str, Term]:
        return {name: self.component(spec) for name, spec in config.loss.items()}

    def used_terms(self, config: Experiment) -> dict[str, Term]:
        """Those of a weight that is not 0."""
        return {
            name: term
            for name, term in self.terms(config).items()
            if config.loss[name].keywords.get("weight", term.weight) > 0
        }

    def term_weights(self, config: Experiment) -> dict[str, str]:
        """Digests of the networks that loss terms in use have loaded."""
        used = self.used_terms(config)
        found = {name: getattr(term, "weights_sha256", None) for name, term in used.items()}
        return {f"loss.{name}": sha256 for name, sha256 in found.items() if sha256}

    def component(self, spec: Component) -> Any:
        key = digest(spec.model_dump(mode="json", by_alias=True))
        if key not in self._built:
            self._built[key] = spec.build()
        return self._built[key]

    def module(self, spec: Component) -> Any:
        """A component that is a `torch.nn.Module`: frozen, in eval mode, on the device."""
        module = self.component(spec)
        assert isinstance(module, nn.Module)
        module.eval().requires_grad_(False)
        return module.to(self.device, memory_format=self._memory_format)  # type: ignore[call-overload]

    def aligned_face(
        self,
        config: Experiment,
        photo: str,
        side: int,
        face: int | None,
        align: Callable[[], AlignedFace],
    ) -> AlignedFace:
        """A photo's face, aligned once: a sweep shows the same few photos to each of its jobs.

        It is kept in `OUTPUT_DIR/.aligned`, for the runs that come later.

        Args:
            photo: the SHA-256 of its file.
            side: px.
            face: which of it.
            align: makes it if it is not known.
        """
        parts = (config.detector, config.landmarks)
        plain = [part.model_dump(mode="json", by_alias=True) for part in parts]
        network: HeatmapNetwork = self.component(config.landmarks)
        key = digest([*plain, network.weights_sha256, photo, side, face, store.VERSION])

        def find() -> AlignedFace:
            kept = FaceStore(Path(config.output_dir) / ".aligned")
            found = kept.read(key)
            if found is None:
                found = align()
                kept.write(key, found)
            return found

        return _keep(self._faces, key, find, side)

    def generated_face(self, config: Experiment, seed: int) -> AlignedFace:
        """A face of the generator: aligned by construction."""
        parts = (config.generator, config.landmarks, config.latent)
        plain = [part.model_dump(mode="json", by_alias=True) for part in parts]
        key = digest(["generated", *plain, seed])
        context = self.context(config)

        def make() -> AlignedFace:
            image, landmarks = inputs.generate_face(context, seed)
            return AlignedFace.of_aligned(to_picture(image[0]), landmarks[0].cpu().numpy())

        return _keep(self._faces, key, make, context.generator.resolution)

    def laid_over(self, expression: AlignedFace, look: AlignedFace) -> AlignedFace:
        """The expression's face laid over the look's, once a pair: resampling takes 0.1 s."""
        # The entry holds both faces, so that nothing else gets their ids.
        entry = _keep(
            self._laid_over,
            (id(expression), id(look)),
            lambda: (expression, look, lay_over(expression, look)),
            len(look.image),
        )
        return entry[2]

    def expression_map(self, config: Experiment) -> ExpressionMap:
        """How the generator's latents move its landmarks; measured once if nobody has yet."""
        samples = config.latent.head_start_samples
        plain = config.generator.model_dump(mode="json", by_alias=True)
        key = digest([plain, "expression_map", samples])
        if key not in self._built:
            generator, network = self.module(config.generator), self.module(config.landmarks)
            statistics = self.statistics(config.generator, config.latent)
            found = expression_map.find(generator, network, statistics, samples)
            if found is None:
                title = "measuring the generator, once (latent.head_start=0 goes without)"
                with ProgressBar(samples, title=title) as bar:
                    found = expression_map.measure(
                        generator,
                        network,
                        statistics,
                        samples,
                        progress=lambda done: bar.update(done - 1, {}),
                    )
                expression_map.keep(found, generator, network, samples)
            self._built[key] = found
        built: ExpressionMap = self._built[key]
        return built

    def statistics(self, generator: Component, latent: Latent) -> LatentStatistics:
        plain = generator.model_dump(mode="json", by_alias=True)
        key = digest([plain, latent.samples, latent.samples_seed])
        if key not in self._built:
            self._built[key] = measure(
                self.module(generator), latent.samples, latent.samples_seed, self.device
            )
        statistics: LatentStatistics = self._built[key]
        return statistics


def _keep(known: dict[_Key, _Value], key: _Key, make: Callable[[], _Value], side: int) -> _Value:
    """What is known by that key, or made now; of pictures of that side beyond `_BYTES` the oldest
    are forgotten."""
    if key not in known:
        known[key] = make()
        if len(known) > max(1, _BYTES // (3 * side**2)):
            known.pop(next(iter(known)))
    return known[key]


def _open_device(hardware: Hardware) -> torch.device:
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    device = torch.device(hardware.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LmexpError(
                "hardware.device: cuda, but torch sees no CUDA GPU here; use hardware=cpu, or "
                "install a torch build that matches your driver"
            )
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise LmexpError(
                f"hardware.device: cuda:{device.index}, but there are {count} GPUs; "
                f"choices: {', '.join(f'cuda:{i}' for i in range(count))}"
            )
        # A projection meets few shapes, and each of them often; trying takes its time, though.
        torch.backends.cudnn.benchmark = hardware.tune_convolutions
        if device.index is not None:
            # Else whatever is opened without a name (pinned memory, streams) is on GPU 0.
            torch.cuda.set_device(device)
    return device
