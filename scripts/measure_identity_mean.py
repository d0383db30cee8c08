"""The mean of dlib's identity vectors over many people, which the identity scores are centred on.

    python scripts/measure_identity_mean.py          # 500 generated people, a minute on a CPU

All of dlib's identity vectors lie in one direction: strangers' cosine is 0.85 ± 0.04. Less the mean
over many people it is 0 ± 0.2, and says who it is. Writes dlib_identity_mean.json into the package
and prints the cosines and distances of different people before and after.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from lmexp import inputs
from lmexp.composition import conf_folder
from lmexp.config import validate
from lmexp.latents import expand
from lmexp.metrics.dlib_judge import IDENTITY_MEAN, DlibJudge
from lmexp.recording.images import to_picture
from lmexp.workbench import Workbench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--out", type=Path, default=IDENTITY_MEAN)
    args = parser.parse_args()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        config = validate(compose("config", overrides=["generator=mobile_256"]))
    generator = Workbench(config.hardware).module(config.generator)
    judge, identities = DlibJudge(), []
    for seed in range(args.people):
        with torch.no_grad():
            w = generator.mapping(inputs.draw_z(seed, generator.z_dim))
            image = generator.synthesis(expand(w[:, None], generator.num_ws))[0]
        verdict = judge.look_at(to_picture(image))
        if verdict.found:
            identities.append(verdict.identity)
    vectors = np.stack(identities)
    mean = vectors.mean(0)
    for name, rows in (("as they are", vectors), ("less the mean", vectors - mean)):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        print(f"cosine of different people, {name}: {cosines.mean():.3f} ± {cosines.std():.3f}")
    distances = np.linalg.norm(vectors[:, None] - vectors, axis=2)[np.triu_indices(len(mean), 1)]
    print(f"their distance: {distances.mean():.3f} ± {distances.std():.3f}")
    content = {
        "people": len(vectors),
        "drawn": f"generated:0 … generated:{args.people - 1}, ψ = 1, whose face dlib finds",
        "generator_sha256": generator.weights_sha256,
        "identity_sha256": judge.weights_sha256["identity"],
        "mean": [round(float(value), 5) for value in mean],
    }
    args.out.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
