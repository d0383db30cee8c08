from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.recording.state import load_state, save_state

STATE = {
    "ws": torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)),
    "shared": torch.ones(1, 1, 8).expand(2, 4, 8),
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "double": torch.tensor([[1 / 3]], dtype=torch.float64),
    "rng": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "none": torch.empty(0, 3),
    "step": 41,
    "lr": 0.1 + 0.2,
    "worst": float("nan"),
    "space": "w_plus",
    "warm": True,
}


def test_every_bit_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    loaded = load_state(path)
    assert loaded.keys() == STATE.keys()
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            read = loaded[name]
            assert isinstance(read, torch.Tensor)
            assert read.dtype == value.dtype and torch.equal(read, value), name
        elif name != "worst":
            assert loaded[name] == value and type(loaded[name]) is type(value)
    assert loaded["worst"] != loaded["worst"]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.97])
def test_one_flipped_bit_is_refused_in_one_line(tmp_path: Path, place: float) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(LmexpError, match="remove it") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_a_state_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LmexpError, match="damaged"):
        load_state(path)
    with pytest.raises(LmexpError, match="no saved state"):
        load_state(tmp_path / "missing.safetensors")
