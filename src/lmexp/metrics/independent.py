"""Scores by judges that nothing optimises: who it is, what the face does, what else changed."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.groups import GROUPS
from lmexp.losses.lpips import feature_distance, normalise, spread
from lmexp.losses.mask import Region, keep_mask
from lmexp.losses.perceptual.protocol import PerceptualNetwork, load_network
from lmexp.losses.prior import GaussianSpace
from lmexp.metrics.aspect_ratios import eye_aspect_ratio, mouth_aspect_ratio
from lmexp.metrics.dlib_judge import DlibJudge, Verdict, identity_mean
from lmexp.metrics.nme import nme
from lmexp.metrics.protocol import Exhibits
from lmexp.metrics.similarity import align_by_similarity
from lmexp.recording.images import to_picture
from lmexp.weights import store

log = logging.getLogger("lmexp")

_REMEMBERED = 256
"""Likenesses of baselines that are kept: the same photos come again in every job of a sweep."""

PerceptualJudge = Literal["stlpips_alex", "stlpips_vgg", "hed_vgg16"]
LandmarkJudge = Literal["full", "slim"]


@dataclass(frozen=True)
class _Faces:
    """What dlib saw in a batch of pictures; row k is job k's."""

    found: tuple[bool, ...]
    landmarks: Tensor
    identity: Tensor

    @staticmethod
    def of(verdicts: Sequence[Verdict]) -> _Faces:
        return _Faces(
            found=tuple(verdict.found for verdict in verdicts),
            landmarks=torch.from_numpy(np.stack([verdict.landmarks for verdict in verdicts])),
            identity=torch.from_numpy(np.stack([verdict.identity for verdict in verdicts])),
        )


class IndependentScores:
    """The result and its baselines (look, inversion, expression photo), by the same judges.

    docs/scores.md defines every number. A judge whose weights cannot be had is warned of once,
    and its numbers are left out; the others' stay.

    Args:
        side: faces, landmarks and openings are judged on pictures of this side, px, so that
            generators of different resolutions are judged alike.
        likeness_side: LPIPS is measured on pictures of this side, px. Its networks' heads were
            fitted to people's judgements of patches of 64 px.
        perceptual: networks for LPIPS; the first whose weights were not optimised judges.
        fans: packaged landmark networks; the first whose weights were not optimised is the second
            judge of landmarks and openings. dlib's takes wide-open mouths for half open ones.
        changed: regions, in both photos, that count as changed where LPIPS is measured
            outside of what changed.
        dilation, softness: of these regions; see `keep_mask`.
        variance_floor: see `GaussianSpace.measure`.
        failed_nme: aligned NME over the 68 points above which a result counts as failed, in %
            of the distance between the outer eye corners.
    """

    def __init__(
        self,
        side: Annotated[int, Field(ge=128)] = 256,
        likeness_side: Annotated[int, Field(ge=64)] = 128,
        perceptual: tuple[PerceptualJudge, ...] = ("stlpips_vgg", "hed_vgg16", "stlpips_alex"),
        fans: tuple[LandmarkJudge, ...] = ("full", "slim"),
        changed: tuple[Region, ...] = ("mouth", "eyes", "brows"),
        dilation: Annotated[float, Field(ge=0)] = 0.08,
        softness: Annotated[float, Field(ge=0)] = 0.05,
        variance_floor: Annotated[float, Field(gt=0, lt=1)] = 1e-4,
        failed_nme: Annotated[float, Field(gt=0)] = 15.0,
    ) -> None:
        self.side = side
        self.likeness_side = likeness_side
        self.perceptual = perceptual
        self.fans = fans
        self.changed = changed
        self.dilation = dilation
        self.softness = softness
        self.variance_floor = variance_floor
        self.failed_nme = failed_nme
        self._dlib: DlibJudge | None = None
        self._networks: dict[str, PerceptualNetwork] = {}
        self._missing: set[str] = set()
        self._space: tuple[Tensor, GaussianSpace] | None = None
        self._look: tuple[str, list[Tensor]] | None = None
        self._likenesses: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._fan: dict[LandmarkJudge, EmbeddedFan] = {}
        self._found: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def score(self, exhibits: Exhibits, optimised: Collection[str] = ()) -> list[dict[str, Any]]:
        """Measure finished jobs; see `Scores.score`."""
        shown = (
            ("result", exhibits.result),
            ("look", exhibits.look),
            ("inversion", exhibits.inversion),
            ("expression", exhibits.expression),
        )
        pictures = {
            name: _resize(images, self.side) for name, images in shown if images is not None
        }
        jobs = len(exhibits.result)
        rows: list[dict[str, Any]] = [{name: {} for name in pictures} for _ in range(jobs)]
        judges: dict[str, Any] = {}
        self._score_faces(pictures, rows, judges)
        self._score_shapes(pictures, optimised, rows, judges)
        self._score_likeness(pictures, exhibits, optimised, rows, judges)
        self._score_latents(exhibits, rows)
        for row in rows:
            row["judges"] = judges
        return rows

    # -- dlib -------------------------------------------------------------------------------

    def _score_faces(
        self,
        pictures: Mapping[str, Tensor],
        rows: list[dict[str, Any]],
        judges: dict[str, Any],
    ) -> None:
        judge = self._load_dlib()
        if judge is None:
            return
        judges |= {f"dlib_{name}": sha256 for name, sha256 in judge.weights_sha256.items()}
        faces = {
            name: _Faces.of([judge.look_at(to_picture(image)) for image in images])
            for name, images in pictures.items()
        }
        for name, now in faces.items():
            measured = _compare(now, faces["look"], faces["expression"])
            for k, row in enumerate(rows):
                row[name]["face_found"] = now.found[k]
                row[name] |= _row(measured, k)
        for row in rows:
            kept = row["result"]["identity_cosine"]
            if "inversion" in row and row["inversion"]["identity_cosine"] > 0:
                row["identity_kept"] = kept / row["inversion"]["identity_cosine"]
            row["failure"] = self._find_failure(row["result"])
            row["failed"] = bool(row["failure"])

    def _find_failure(self, result: Mapping[str, Any]) -> str:
        if not result["face_found"]:
            return "no face found"
        error = result["nme_aligned"]["all"]
        if not error <= self.failed_nme:
            return f"aligned NME {error:.1f} % above {self.failed_nme:g} %"
        return ""

    def _load_dlib(self) -> DlibJudge | None:
        if self._dlib is None and "dlib" not in self._missing:
            try:
                self._dlib = DlibJudge()
            except LmexpError as error:
                self._miss("dlib", "identity, landmarks and openings", error)
        return self._dlib

    # -- FAN --------------------------------------------------------------------------------

    def _score_shapes(
        self,
        pictures: Mapping[str, Tensor],
        optimised: Collection[str],
        rows: list[dict[str, Any]],
        judges: dict[str, Any],
    ) -> None:
        for variant in self.fans:
            network = self._fan.setdefault(variant, EmbeddedFan(variant).eval())
            if network.weights_sha256 not in optimised:
                break
        else:
            return
        judges["fan"] = network.weights_sha256
        found = {
            name: torch.cat([self._find_landmarks(network, image[None]) for image in images])
            for name, images in pictures.items()
        }
        for name, landmarks in found.items():
            measured = _compare_shapes(landmarks, found["expression"])
            for k, row in enumerate(rows):
                row[name]["fan"] = _row(measured, k)

    def _find_landmarks(self, network: EmbeddedFan, picture: Tensor) -> Tensor:
        """[1, 3, s, s] -> [1, 68, 2], float64, on the CPU; of the same photo remembered."""
        key = _digest(network.weights_sha256, picture)
        if key not in self._found:
            maps = network.to(picture.device)(picture)
            self._found[key] = decode(maps, picture.shape[-1]).double().cpu()
        self._found.move_to_end(key)
        while len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)
        return self._found[key]

    # -- likeness ---------------------------------------------------------------------------

    def _score_likeness(
        self,
        pictures: Mapping[str, Tensor],
        exhibits: Exhibits,
        optimised: Collection[str],
        rows: list[dict[str, Any]],
        judges: dict[str, Any],
    ) -> None:
        name = next(
            (name for name in self.perceptual if store.find_entry(name).sha256 not in optimised),
            None,
        )
        network = None if name is None else self._load_network(name)
        if name is None or network is None:
            return
        judges["perceptual"] = name
        judges["perceptual_weights"] = network.weights_sha256
        if isinstance(network, torch.nn.Module):
            network.to(exhibits.look.device)
        pictures = {name: _resize(images, self.likeness_side) for name, images in pictures.items()}
        keep = keep_mask(
            (exhibits.look_landmarks, exhibits.expression_landmarks),
            self.changed,
            resolution=exhibits.look.shape[-1],
            side=self.likeness_side,
            dilation=self.dilation,
            softness=self.softness,
        ).to(pictures["look"])
        for k, row in enumerate(rows):
            of_job = {picture: images[k : k + 1] for picture, images in pictures.items()}
            for picture, measured in self._measure_likeness(
                network, of_job, keep[k : k + 1]
            ).items():
                row[picture] |= measured

    def _measure_likeness(
        self, network: PerceptualNetwork, pictures: Mapping[str, Tensor], keep: Tensor
    ) -> dict[str, dict[str, float]]:
        """One job's LPIPS to its look, by picture; what a former job has had is remembered.

        Args:
            pictures: [1, 3, s, s] each.
            keep: [1, 1, s, s], 0 where the expression changes the face.
        """
        look = pictures["look"]
        # By definition; the network would take its time to say so.
        found = {"look": {"lpips": 0.0, "lpips_outside": 0.0}}
        keys = {
            picture: _digest(network.weights_sha256, look, images, keep)
            for picture, images in pictures.items()
            if picture != "look"
        }
        for picture, key in keys.items():
            if key in self._likenesses:
                self._likenesses.move_to_end(key)
                found[picture] = self._likenesses[key]
        new = [picture for picture in keys if picture not in found]
        if not new:
            return found
        # The look's own pixels fill what changed: features beside it see into it.
        whole = torch.cat([pictures[picture] for picture in new])
        outside = torch.lerp(look, whole, keep)
        target = self._look_features(network, look)
        features = network.features(torch.cat((whole, outside)))
        channels, count = network.channel_weights, len(new)
        measured = {
            "lpips": feature_distance([layer[:count] for layer in features], target, channels),
            "lpips_outside": feature_distance(
                [layer[count:] for layer in features], target, channels, spread(keep, target)
            ),
        }
        for index, picture in enumerate(new):
            found[picture] = self._likenesses[keys[picture]] = _row(measured, index)
        while len(self._likenesses) > _REMEMBERED:
            self._likenesses.popitem(last=False)
        return found

    def _look_features(self, network: PerceptualNetwork, look: Tensor) -> list[Tensor]:
        """Of the last look; a table over recipes scores pair by pair."""
        key = _digest(network.weights_sha256, look)
        if self._look is None or self._look[0] != key:
            self._look = key, [normalise(layer) for layer in network.features(look)]
        return self._look[1]

    def _load_network(self, name: PerceptualJudge) -> PerceptualNetwork | None:
        if name not in self._networks and name not in self._missing:
            try:
                self._networks[name] = load_network(name)
            except LmexpError as error:
                self._miss(name, "LPIPS", error)
        return self._networks.get(name)

    def _miss(self, judge: str, what: str, error: LmexpError) -> None:
        self._missing.add(judge)
        log.warning("scores: %s left out (%s); scores=none leaves all of them out", what, error)

    # -- latents ----------------------------------------------------------------------------

    def _score_latents(self, exhibits: Exhibits, rows: list[dict[str, Any]]) -> None:
        if exhibits.samples is None:
            return
        if self._space is None or self._space[0] is not exhibits.samples:
            space = GaussianSpace.measure(exhibits.samples, self.variance_floor)
            self._space = (exhibits.samples, space)
        for name, ws in (("result", exhibits.ws), ("inversion", exhibits.inversion_ws)):
            if ws is None:
                continue
            distance = self._space[1].standardise(ws).square().mean((1, 2))
            for k, row in enumerate(rows):
                row.setdefault(name, {})["manifold"] = float(distance[k])


def _compare(now: _Faces, look: _Faces, expression: _Faces) -> dict[str, Any]:
    """Every number that dlib gives for pictures `now`; tensors [N], nested by name."""
    return {
        "identity_cosine": _identity_cosine(now.identity, look.identity),
        "identity_distance": torch.linalg.vector_norm(now.identity - look.identity, dim=1),
        "leak_cosine": _identity_cosine(now.identity, expression.identity),
        "leak_distance": torch.linalg.vector_norm(now.identity - expression.identity, dim=1),
        **_compare_shapes(now.landmarks, expression.landmarks),
    }


def _compare_shapes(now: Tensor, expression: Tensor) -> dict[str, Any]:
    """What landmarks [N, 68, 2] say, px; tensors [N], nested by name."""
    aligned = align_by_similarity(now, expression)
    mouth, eyes = mouth_aspect_ratio(now), eye_aspect_ratio(now)
    return {
        "nme": _with_mouth(nme(now, expression)),
        "nme_aligned": _with_mouth(nme(aligned, expression)),
        "mouth_aspect_ratio": mouth,
        "mouth_error": (mouth - mouth_aspect_ratio(expression)).abs(),
        "eye_aspect_ratio": eyes,
        "eye_error": (eyes - eye_aspect_ratio(expression)).abs(),
    }


def _identity_cosine(one: Tensor, other: Tensor) -> Tensor:
    """[N, 128] each -> [N]; centred on the mean of many people, so that strangers are near 0."""
    mean = torch.from_numpy(identity_mean())
    return F.cosine_similarity(one - mean, other - mean)


def _with_mouth(errors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the mouth as a whole: its 20 points, inner and outer lips."""
    outer, inner = len(GROUPS["outer_lip"]), len(GROUPS["inner_lip"])
    total = errors["outer_lip"] * outer + errors["inner_lip"] * inner
    return {**errors, "mouth": total / (outer + inner)}


def _row(measured: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Job k's numbers of a nested dictionary of [N]."""
    return {
        name: _row(value, k) if isinstance(value, Mapping) else float(value[k])
        for name, value in measured.items()
    }


def _digest(weights: str, *tensors: Tensor) -> str:
    """Equal for the same network and the same pictures."""
    total = hashlib.sha256(weights.encode())
    for tensor in tensors:
        total.update(tensor.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _resize(images: Tensor, side: int) -> Tensor:
    """[N, 3, R, R] -> [N, 3, side, side] in [-1, 1], anti-aliased."""
    images = images.float()
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    return images.clamp(-1, 1)
