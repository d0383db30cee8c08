"""The typed schema: every key of a composed config, its unit, its default, its check.

Hydra composes plain YAML; `validate` turns it into these models or stops with one line
that names the key and the choices. A component (`_target_` plus keywords) is checked
against its class's own signature, so a new class needs no entry here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from lmexp.content import replace_files
from lmexp.errors import LmexpError

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MOST_AT_ONCE = 64
"""Jobs of a batch whose size is `auto`: more gain nothing, even where the memory holds them."""

DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")]


class Schema(BaseModel):
    """No unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Component(BaseModel):
    """A class and the keywords of its constructor, both from a yaml."""

    model_config = ConfigDict(extra="allow", frozen=True)

    target: str = Field(alias="_target_")

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check_keywords(self) -> Component:
        _signature_model(self.target).model_validate_json(json.dumps(self.keywords))
        return self

    def build(self) -> Any:
        """Construct the object; raises what its constructor raises."""
        checked = _signature_model(self.target).model_validate_json(json.dumps(self.keywords))
        values = {name: getattr(checked, name) for name in type(checked).model_fields}
        return _resolve(self.target)(**values)


class LandmarkWeights(Schema):
    """λ_landmark, one weight ≥ 0 per landmark group; see `lmexp.landmarks.groups`."""

    jaw: NonNegative
    left_eyebrow: NonNegative
    right_eyebrow: NonNegative
    nose_bridge: NonNegative
    lower_nose: NonNegative
    left_eye: NonNegative
    right_eye: NonNegative
    outer_lip: NonNegative
    inner_lip: NonNegative


class Optimizer(Schema):
    """Adam and its ramps; see `lmexp.schedule.Schedule` for the shapes."""

    steps: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    rampup: Fraction
    rampdown: Fraction
    noise_factor: NonNegative
    noise_ramp: Fraction
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]


class ProjectionOptimizer(Optimizer):
    """What the projection has beside an inversion: an early end, two stages, and a schedule of
    group weights."""

    patience: Annotated[int, Field(ge=1)] | None
    """Steps; a job whose mean total over so many steps is not lower by the fraction `least_gain`
    than over as many before goes on with the learning rate's ramp-down at once. None: none does."""
    least_gain: Fraction
    landmark_factor: NonNegative
    """Factor of the weights of the terms that need the expression, at the first step."""
    landmark_ramp: Fraction
    """Fraction of the steps in which that factor goes linearly to 1; 0: it is 1 throughout."""
    group_factors: dict[str, NonNegative] | None
    """Landmark groups -> factors of their weights at the first step, which go to 1 in the same
    fraction of the steps; a group that is not named has factor 1, and a weight of 0 stays 0. None:
    all have factor 1."""

    @field_validator("group_factors")
    @classmethod
    def _can_act(
        cls, factors: dict[str, float] | None, info: ValidationInfo
    ) -> dict[str, float] | None:
        if factors is None:
            return None
        groups = list(LandmarkWeights.model_fields)
        for name in factors:
            if name not in groups:
                raise ValueError(f"no landmark group {name!r}{suggest(name, groups)}")
        if not factors:
            raise ValueError("names no landmark group; name one, or set it to null")
        if info.data.get("landmark_ramp") == 0:
            raise ValueError(
                "with optimizer.landmark_ramp=0 they are 1 from the first step; set "
                "optimizer.landmark_ramp above 0, or optimizer.group_factors=null"
            )
        return factors


class Latent(Schema):
    """Which space is searched, and from where."""

    space: Literal["w", "w_plus"]
    start: Literal["mean", "inversion"]
    """`inversion`: the look is inverted first, `truncation_psi` says how far towards that the
    projection starts, and the inversion is strength 0 of the dial. `mean`: nothing is inverted."""
    samples: Annotated[int, Field(ge=2)]
    """Draws of the mapping network for w_avg, w_std and the prior."""
    samples_seed: Annotated[int, Field(ge=0, lt=2**32)]
    inversion: Optimizer
    """How the look is inverted first; read when `start` is `inversion`."""
    truncation_psi: Annotated[float, Field(ge=0, le=1)]
    """How far from w_avg the projection starts, towards the inversion: 1: at the inversion, 0: at
    w_avg. The truncation trick of StyleGAN (Karras et al., arXiv 1812.04948, appendix B), for it
    leads back to where faces are common. Read when `start` is `inversion`."""
    head_start: Annotated[float, Field(ge=0, le=1.5)]
    """Share of the way to the expression that the inversion is moved before the first step, along
    the generator's own statistics; see `lmexp.expression_map`. Read when `start` is `inversion`."""
    head_start_ws: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    """First and one past the last of ws that this moves, as far as there are so many."""
    head_start_samples: Annotated[int, Field(ge=16)]
    """Pictures from which a generator's statistics are measured, once."""
    moving_ws: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None
    """First and one past the last of ws that the projection moves, in W+; None: all. The inversion
    moves all of them."""
    starts: Annotated[int, Field(ge=1)]
    """Starts of each job, projected side by side; the best result is kept. See `lmexp.starts`."""
    starts_spread: NonNegative
    """Standard deviation of the starts after the first around it, in units of w_std."""

    @model_validator(mode="after")
    def _is_meant(self) -> Latent:
        if self.moving_ws is not None and self.space == "w":
            raise ValueError("moving_ws: W has one w for all layers; choose latent=w_plus, or null")
        if self.moving_ws is not None and self.moving_ws[0] >= self.moving_ws[1]:
            raise ValueError("moving_ws: holds no ws; the first must be less than the second")
        if self.head_start and self.head_start_ws[0] >= self.head_start_ws[1]:
            raise ValueError(
                "head_start_ws: holds no ws; the first must be less than the second, or set "
                "head_start to 0"
            )
        if self.starts > 1 and not self.starts_spread:
            raise ValueError("starts_spread: 0 makes all starts the same; set it above 0")
        return self


class Hardware(Schema):
    """Where and how wide to compute; never part of a run's identity."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
    devices: tuple[DeviceName, ...] | Literal["all"] | None = None
    """Devices of this host that a sweep's batches are shared out among, a process each; None for
    `device` alone."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"]
    """Jobs of a sweep projected at once; each of `latent.starts` counts. `auto`: as many as the
    GPU's free memory holds; one on a CPU."""
    threads: Annotated[int, Field(ge=1)] | None
    """CPU threads; None leaves the choice to torch."""
    channels_last: bool
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the frozen networks within the projection's steps. Latents, losses, Adam and
    the final pictures are float32 in any case."""
    compile: bool = False
    """Fuse networks and terms by torch.compile: slow at the first start, then seconds."""
    graphs: bool = False
    """Capture a step as one CUDA graph."""
    tune_convolutions: bool = True
    """Let cuDNN try its algorithms once a shape (on CUDA): the start waits for it."""

    @property
    def batch_limit(self) -> int:
        """Most jobs at once, before anybody knows how many the memory holds."""
        if self.batch_size != "auto":
            return self.batch_size
        names = [self.device] if self.devices is None else self.devices
        return MOST_AT_ONCE if "all" in names or any(n.startswith("cuda") for n in names) else 1

    @model_validator(mode="after")
    def _has_graphs(self) -> Hardware:
        if self.graphs and self.device == "cpu":
            raise ValueError("graphs: CUDA graphs need a CUDA GPU; set hardware.graphs=false")
        return self


class Inputs(Schema):
    """Two photos, each a path, `sample:astronaut`, or `generated:SEED` (the generator's own)."""

    look: Annotated[str, Field(min_length=1)]
    expression: Annotated[str, Field(min_length=1)]
    face: Annotated[int, Field(ge=0)] | tuple[int | None, int | None] | None
    """Which face of a photo with several, 0 the largest; one number or [look, expression]."""
    lay_over: bool
    """Bring the expression's eyes and nose bridge onto the look's first; see `faces.agreement`."""

    def face_of(self, role: Literal["look", "expression"]) -> int | None:
        if isinstance(self.face, tuple):
            return self.face[0 if role == "look" else 1]
        return self.face


class Recording(Schema):
    """What is kept of the way to the result."""

    video_frames: Annotated[int, Field(ge=0)]
    """Frames of proj.mp4, spread evenly over the steps; 0 for no video."""
    image_every: Annotated[int, Field(ge=0)]
    """Steps between images sent to the tracker; 0 for the final ones only."""
    save_every_seconds: Annotated[float, Field(gt=0)]
    """Time between saves of the state from which a killed run goes on."""


class Experiment(Schema):
    """A whole config, resolved and checked."""

    generator: Component
    landmarks: Component
    judge: Component
    """The landmark network that measures the result; another one than `landmarks`, so that the
    number is not what was optimised."""
    scores: Component
    """What else is measured of the result; see `lmexp.metrics.protocol.Scores`."""
    detector: Component
    loss: dict[str, Component]
    landmark_weights: LandmarkWeights
    latent: Latent
    optimizer: ProjectionOptimizer
    hardware: Hardware
    inputs: Inputs
    recording: Recording
    tracker: Component
    figure: dict[str, Component] = {}
    seed: Annotated[int, Field(ge=0)]
    output_dir: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _needs_a_loss(self) -> Experiment:
        used = [term for term in self.loss.values() if term.keywords.get("weight", 1) > 0]
        if not used:
            raise ValueError("loss: every term has weight 0, so there is nothing to optimise")
        if self.latent.start == "inversion" and all(
            _resolve(term.target).needs_expression for term in used
        ):
            raise ValueError(
                "latent.start: inversion needs a term of the look with weight > 0 in loss, "
                "such as lpips; or choose latent.start=mean"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """As plain data, keys in a fixed order, ready for YAML or JSON."""
        return self.model_dump(mode="json", by_alias=True)

    def by_content(self) -> dict[str, Any]:
        """As `plain`, but a file that a component names counts by its content, not its name."""
        plain = self.plain()
        for key in ("generator", "landmarks", "detector", "loss"):
            plain[key] = replace_files(plain[key])
        return plain

    def identity(self, photo_digests: Mapping[str, str]) -> str:
        """The hash that names the run: what the result depends on, and nothing else.

        Device, judge, scores, tracker, figures, recording and paths are left out; photos and
        checkpoints count by their content.
        """
        plain = self.by_content()
        for key in ("hardware", "judge", "scores", "tracker", "figure", "recording", "output_dir"):
            del plain[key]
        plain["inputs"] |= dict(photo_digests)
        return digest(plain)[:12]

    def batch_key(self) -> str:
        """Equal for jobs that one batch can hold: they differ only in photos, seed and weights."""
        plain = self.plain()
        for key in ("landmark_weights", "inputs", "seed", "figure"):
            del plain[key]
        # A term that is off for one job and on for another is a matter of weight alone.
        for term in plain["loss"].values():
            term.pop("weight", None)
        return digest(plain)


def digest(plain: Any) -> str:
    """SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def validate(composed: DictConfig) -> Experiment:
    """Check a composed config; raises `LmexpError` with one line on the first fault."""
    # A sweep's configs carry all of Hydra's own, in parts unresolvable.
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        missing = sorted(OmegaConf.missing_keys(own))
        if missing:
            examples = " ".join(f"{key}=VALUE" for key in missing)
            raise LmexpError(f"{', '.join(missing)}: missing; add to the command line {examples}")
        container = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise LmexpError(f"{key}{explain_interpolation(error)}") from error
    assert isinstance(container, dict)
    plain = {str(key): value for key, value in container.items()}
    try:
        return Experiment.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise LmexpError(_explain(error, plain)) from error
    except (TypeError, ValueError) as error:
        raise LmexpError(f"config: {error}") from error


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """One line for a ${key} that cannot be resolved, without the key that holds it."""
    line = str(error).splitlines()[0]
    if isinstance(error, InterpolationKeyError):
        line += "; in a file's name ${ is taken as it stands, if there is that file"
    return line


@cache
def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_ {target!r} cannot be imported: {error}") from error


@cache
def _signature_model(target: str) -> type[BaseModel]:
    """A pydantic model of the constructor's keywords."""
    built = _resolve(target)
    constructor = built.__init__ if inspect.isclass(built) else built
    hints = typing.get_type_hints(constructor, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(built).parameters.items():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints[name], default)
    return create_model(f"{built.__name__} keywords", __base__=Schema, **fields)


def _explain(error: ValidationError, plain: Mapping[str, Any]) -> str:
    """One line for the first fault: key, reason, choices, and how many more there are."""
    faults: dict[str, tuple[list[str], ErrorDetails]] = {}
    for fault in _flatten(error):
        location = _locate(fault, plain)
        # A union complains once for each of its types: the one that got deepest was meant.
        key = ".".join(location[:2])
        if key not in faults or len(location) > len(faults[key][0]):
            faults[key] = (location, fault)
    (location, first), *others = faults.values()
    words = [
        fault["ctx"]["expected"]
        for fault in _flatten(error)
        if fault["type"] == "literal_error" != first["type"] and _locate(fault, plain) == location
    ]
    line = _explain_one(location, first, plain, words)
    return f"{line} (and {len(others)} more)" if others else line


def _flatten(error: ValidationError) -> Iterator[ErrorDetails]:
    """The faults, those of a component's own keywords among them."""
    for fault in error.errors():
        nested = fault.get("ctx", {}).get("error")
        if isinstance(nested, ValidationError):
            for inner in _flatten(nested):
                yield {**inner, "loc": (*fault["loc"], *inner["loc"])}
        else:
            yield fault


def _locate(fault: ErrorDetails, plain: Mapping[str, Any]) -> list[str]:
    """The fault's key, without the names of types that pydantic puts between."""
    location: list[str] = []
    node: Any = plain
    for part in fault["loc"]:
        known = (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        )
        if known:
            node = node[part]
        if known or (part == fault["loc"][-1] and fault["type"] == "missing"):
            location.append(str(part))
    return location


def _explain_one(
    location: list[str], fault: ErrorDetails, plain: Mapping[str, Any], words: Sequence[str]
) -> str:
    """One fault's line; `words` would do as well as what its type asks for."""
    key = ".".join(location)
    kind, message = fault["type"], fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{key}: no such key{suggest(location[-1], _keys_beside(location, plain))}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "model_type":
        message = "is a group of keys; choose one of its files, or set one of its keys"
    if kind == "dict_type":
        message = "should be a mapping, such as '{NAME: VALUE}'"
    if kind == "string_pattern_mismatch" and key == "hardware.device":
        message = "choices: cpu, cuda, cuda:0, cuda:1, …"
    message = message.removeprefix("Input ").replace("String should have", "should have")
    message = ", or ".join([message, *words])
    value = fault.get("input")
    shown = "" if isinstance(value, Mapping) else f" (got {value!r})"
    return f"{key}: {message}{shown}" if key else message


def _keys_beside(location: list[str], plain: Mapping[str, Any]) -> list[str]:
    node: Any = plain
    for part in location[:-1]:
        node = node[part]
    if "_target_" in node:
        return list(_signature_model(node["_target_"]).model_fields)
    model: Any = Experiment
    for part in location[:-1]:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def suggest(word: str, choices: list[str]) -> str:
    """` (did you mean 'x'?); choices: …` for a word that is not among `choices`."""
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"{hint}; choices: {', '.join(choices)}" if choices else hint
