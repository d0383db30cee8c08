from __future__ import annotations

import pytest
from hypothesis import settings

# Processes that share the cores make any example slow now and then; that is no fault.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")


@pytest.fixture
def recorded_files() -> frozenset[str]:
    """What the recorder of a finished job leaves in its folder."""
    return frozenset(
        {
            "config.yaml",
            "landmarks.npz",
            "metrics.jsonl",
            "proj.mp4",
            "proj.png",
            "proj_landmarks.png",
            "projected_noise.npz",
            "projected_w.npz",
            "status.json",
            "summary.json",
            "target_expression.png",
            "target_expression_landmarks.png",
            "target_look.png",
            "target_look_landmarks.png",
        }
    )
