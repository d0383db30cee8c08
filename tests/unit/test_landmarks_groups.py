"""The nine groups partition the 68 landmarks; the mirror maps them onto each other."""

from __future__ import annotations

import math

import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.landmarks.groups import FLIP, GROUPS, NUM_LANDMARKS, OUTER_EYE_CORNERS, expand

REFERENCE = dict(zip(GROUPS, (0.05, 1, 1, 0.1, 1, 1, 1, 5, 5), strict=True))
MIRRORED = {
    "left_eyebrow": "right_eyebrow",
    "right_eyebrow": "left_eyebrow",
    "left_eye": "right_eye",
    "right_eye": "left_eye",
}


def test_groups_cover_every_landmark_once() -> None:
    members = [point for group in GROUPS.values() for point in group]
    assert members == list(range(NUM_LANDMARKS))


def test_nose_tip_belongs_to_the_bridge_alone() -> None:
    assert [name for name, group in GROUPS.items() if 30 in group] == ["nose_bridge"]
    assert GROUPS["nose_bridge"] == range(27, 31)
    assert GROUPS["lower_nose"] == range(31, 36)


def test_expand_spreads_each_weight_over_its_group() -> None:
    weights = expand(REFERENCE)
    assert weights.shape == (68,)
    assert weights.dtype == torch.float32
    expected = [0.05] * 17 + [1.0] * 10 + [0.1] * 4 + [1.0] * 17 + [5.0] * 20
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_expand_does_not_depend_on_the_order_of_its_keys() -> None:
    assert torch.equal(expand(dict(reversed(REFERENCE.items()))), expand(REFERENCE))


def test_unknown_group_is_named_with_the_choices() -> None:
    with pytest.raises(LmexpError, match=r"landmark_weights\.lips: unknown.*outer_lip") as caught:
        expand(REFERENCE | {"lips": 1.0})
    assert "\n" not in str(caught.value)


def test_missing_group_is_named() -> None:
    with pytest.raises(LmexpError, match=r"landmark_weights\.inner_lip: missing"):
        expand({name: 1.0 for name in GROUPS if name != "inner_lip"})


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_impossible_weight_is_refused(weight: float) -> None:
    with pytest.raises(LmexpError, match=r"landmark_weights\.jaw"):
        expand(REFERENCE | {"jaw": weight})


def test_mirror_is_an_involution_that_swaps_the_sides() -> None:
    assert sorted(FLIP) == list(range(NUM_LANDMARKS))
    assert [FLIP[FLIP[point]] for point in range(NUM_LANDMARKS)] == list(range(NUM_LANDMARKS))
    for name, group in GROUPS.items():
        assert {FLIP[point] for point in group} == set(GROUPS[MIRRORED.get(name, name)])
    assert tuple(FLIP[corner] for corner in OUTER_EYE_CORNERS) == OUTER_EYE_CORNERS[::-1]
    assert [point for point in range(NUM_LANDMARKS) if FLIP[point] == point] == [
        *(8, 27, 28, 29, 30, 33, 51, 57, 62, 66)
    ]
