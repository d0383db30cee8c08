from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from lmexp.composition import conf_folder
from lmexp.config import Component, Experiment, Inputs, digest, suggest, validate
from lmexp.errors import LmexpError
from lmexp.losses.landmarks import LandmarkHeatmaps

PHOTOS = {"look": "a", "expression": "b"}


def composed(*overrides: str) -> Experiment:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return validate(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def default() -> Experiment:
    return composed()


@pytest.mark.parametrize(
    "override",
    [
        "hardware=cuda",
        "hardware.batch_size=9",
        "tracker=none",
        "landmarks@judge=fan_slim",
        "figure=[triptych]",
        "recording.video_frames=3",
        "output_dir=elsewhere",
        "inputs.look=photo.jpg",  # photos count by their content, which the digest stands for
    ],
)
def test_identity_leaves_out_what_the_result_does_not_depend_on(
    default: Experiment, override: str
) -> None:
    assert composed(override).identity(PHOTOS) == default.identity(PHOTOS)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "optimizer.steps=3",
        "loss.lpips.weight=2",
        "landmark_weights.jaw=3",
        "latent=w",
        "inputs.lay_over=false",
        "inputs.face=1",
        "generator=mobile_1024",
    ],
)
def test_identity_has_all_that_the_result_depends_on(default: Experiment, override: str) -> None:
    assert composed(override).identity(PHOTOS) != default.identity(PHOTOS)
    assert default.identity({**PHOTOS, "look": "other"}) != default.identity(PHOTOS)


def test_a_checkpoint_counts_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in (first, second):
        path.write_bytes(b"one")

    def identity(path: Path) -> str:
        return composed("generator=stylegan2", f"generator.checkpoint={path}").identity(PHOTOS)

    before = identity(first)
    assert identity(second) == before
    second.write_bytes(b"another")
    assert identity(second) != before
    absent = identity(tmp_path / "absent.pkl")
    assert absent not in (before, identity(tmp_path / "other.pkl"))


def test_one_batch_holds_jobs_that_differ_in_photos_seed_and_weights(default: Experiment) -> None:
    key = default.batch_key()
    for override in ("seed=1", "loss.lpips.weight=0", "landmark_weights=mouth", "inputs.look=c"):
        assert composed(override).batch_key() == key, override
    for override in (
        "optimizer.steps=3",
        "loss.landmarks.norm=l1",
        "latent=w",
        "generator=tiny_random",
    ):
        assert composed(override).batch_key() != key, override


def test_group_factors_are_part_of_what_a_run_is(default: Experiment) -> None:
    ramp = "optimizer.landmark_ramp=0.5"
    plain = composed(ramp)
    one = composed(ramp, "optimizer.group_factors={jaw: 20, inner_lip: 0.2}")
    assert one.optimizer.group_factors == {"jaw": 20.0, "inner_lip": 0.2}
    # Neither the order nor the way a number is written makes another run.
    same = composed(ramp, "optimizer.group_factors={inner_lip: 0.2, jaw: 20.0}")
    other = composed(ramp, "optimizer.group_factors={jaw: 2}")
    assert one.identity(PHOTOS) == same.identity(PHOTOS) != other.identity(PHOTOS)
    assert plain.identity(PHOTOS) not in (one.identity(PHOTOS), other.identity(PHOTOS))
    assert one.batch_key() == same.batch_key() != other.batch_key()
    assert default.optimizer.group_factors is None


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_a_component_is_built_from_its_checked_keywords() -> None:
    target = "lmexp.losses.landmarks.LandmarkHeatmaps"
    term = Component.model_validate({"_target_": target, "weight": 2, "norm": "l1"}).build()
    assert isinstance(term, LandmarkHeatmaps)
    assert (term.weight, term.norm, term.squared_group_weights) == (2.0, "l1", False)


@pytest.mark.parametrize("keywords", [{"weight": -1}, {"weight": "1"}, {"norm": 2}, {"x": 1}])
def test_a_component_refuses_what_its_class_does_not_take(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Component.model_validate(
            {"_target_": "lmexp.losses.landmarks.LandmarkHeatmaps", **keywords}
        )


@pytest.mark.parametrize("face", [0, 2, None, [1, 0], [None, 3]])
def test_which_face(default: Experiment, face: Any) -> None:
    inputs = Inputs.model_validate_json(json.dumps(default.inputs.model_dump() | {"face": face}))
    look, expression = face if isinstance(face, list) else (face, face)
    assert (inputs.face_of("look"), inputs.face_of("expression")) == (look, expression)


def test_suggestions() -> None:
    assert "did you mean 'steps'?" in suggest("stepz", ["steps", "seed"])
    assert suggest("zzz", ["steps", "seed"]).endswith("choices: steps, seed")
    assert suggest("zzz", []) == ""


def test_validate_counts_the_other_mistakes() -> None:
    with pytest.raises(LmexpError, match=r"^optimizer\.steps: .*\(and 2 more\)$"):
        composed("optimizer.steps=0", "seed=-1", "hardware.batch_size=0")
