"""Kill a sweep at random moments, run the same command again, and compare with a run never stopped.

    python scripts/torture_resume.py --kills 20

A sweep of tiny projections (a random generator, no downloads) is killed by SIGKILL at moments
drawn from a seed: while it starts, inverts, projects, saves, writes its results. Whenever it
reaches its end, every job is compared bit for bit with the reference: latents, noise maps,
losses of every step, and each saved state (parameters and Adam's moments) with the reference's
state of the same step. Then it begins anew, until all kills are spent. With --disk-full the same
is done once on a file system that is too small, where the kernel allows to mount one. Exits
with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmexp import cli
from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder
from lmexp.recording.state import load_state, save_state

JOBS = (
    "experiment=debug",
    "generator.resolution=32",
    "loss=[landmarks,prior,noise]",
    "loss.noise.weight=100",
    "latent.head_start=0",
    "optimizer.steps=12",
    "recording.video_frames=3",
    # Every step: so a kill often falls into the writing of a state.
    "recording.save_every_seconds=0.0001",
    "figure=[triptych]",
    "hardware.threads=1",
    "+sweep=seeds",
)


def sweep_process(words: Sequence[str], states: Path) -> int:
    """Start the sweep as a process of its own; forked, so that it need not import torch again."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with Path("output.txt").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        keep_states(states)
        sys.argv = ["lmexp", *words]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def keep_states(folder: Path) -> None:
    """Keep a copy of every state that is saved, by job and step; finished jobs delete their own."""
    original = Recorder.save_state

    def save(self: Recorder, next_step: int, state: Any) -> None:
        original(self, next_step, state)
        copies = folder / self.job.run_id
        copies.mkdir(parents=True, exist_ok=True)
        save_state(copies / f"{next_step:04d}.safetensors", state)

    Recorder.save_state = save  # type: ignore[method-assign]


def sweep_folder(root: Path) -> Path:
    (index,) = root.glob("*/index.json")
    return index.parent


def compare(root: Path, states: Path, reference: Path, reference_states: Path) -> list[str]:
    """What differs between a sweep and its reference; the number of compared states is said too."""
    faults = []
    mine, theirs = sweep_folder(root), sweep_folder(reference)
    jobs = json.loads((theirs / "index.json").read_text())["jobs"]
    if [(job["folder"], job["state"] in ("finished", "skipped")) for job in jobs] != [
        (job["folder"], job["state"] in ("finished", "skipped"))
        for job in json.loads((mine / "index.json").read_text())["jobs"]
    ]:
        faults.append("index.json: other jobs, or some unfinished")
    for job in jobs:
        one, other = RunFolder(mine / job["folder"]), RunFolder(theirs / job["folder"])
        (ws, noise), (other_ws, other_noise) = one.read_projection(), other.read_projection()
        for name, left, right in (
            ("ws", [ws], [other_ws]),
            ("noise", noise, other_noise),
            ("picture", [one.read_picture("proj")], [other.read_picture("proj")]),
        ):
            if len(left) != len(right) or not all(map(np.array_equal, left, right)):
                faults.append(f"{job['folder']}: {name} differs")
        if one.read_metrics() != other.read_metrics():
            faults.append(f"{job['folder']}: losses differ")
        left_over = [path.name for path in one.path.rglob("*.part")]
        if left_over:
            faults.append(f"{job['folder']}: left over {left_over}")
    for path in sorted(states.glob("*/*.safetensors")):
        other_path = reference_states / path.relative_to(states)
        state, wanted = load_state(path), load_state(other_path)
        if set(state) != set(wanted) or not all(
            torch.equal(torch.as_tensor(state[key]), torch.as_tensor(wanted[key])) for key in state
        ):
            faults.append(f"state {path.parent.name} before step {path.stem} differs")
    return faults


def where_killed(root: Path) -> str:
    """What the sweep was doing, for the tally."""
    states = list(root.glob("*/*/status.json"))
    if not list(root.glob("*/index.json")):
        return "before its index"
    read = [RunFolder(path.parent).read_status() for path in states]
    if any(status is not None and status.state == "running" for status in read):
        return "while a job was projected or written"
    return "between jobs, or while a look was inverted"


def torture(kills: int, seed: int, words: Sequence[str], longest: float) -> int:
    """Kill `kills` times; gives the number of faults."""
    draw = random.Random(seed)
    began = time.monotonic()
    pid = sweep_process([*words, "output_dir=reference"], Path("reference_states"))
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        print(Path("output.txt").read_text(), f"the reference ended with {code}", sep="\n")
        return 1
    duration = time.monotonic() - began
    print(f"reference: {duration:.1f} s, never stopped")
    done, rounds, faults = 0, 0, 0
    tally: Counter[str] = Counter()
    root, states = Path("tortured"), Path("tortured_states")
    last = False
    while done < kills or not last:
        last = done >= kills
        pid = sweep_process([*words, f"output_dir={root}"], states)
        if not last:
            time.sleep(draw.uniform(0, duration * longest))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL:
            done += 1
            tally[where_killed(root)] += 1
            continue
        found = [f"exit code {code}"] if code else []
        found += compare(root, states, Path("reference"), Path("reference_states"))
        rounds += 1
        faults += len(found)
        print(*(found or ["a whole sweep: every bit as the reference"]), sep="\n")
        if not last:
            shutil.rmtree(root)
            shutil.rmtree(states)
    compared = len(list(states.glob("*/*.safetensors")))
    print(f"{done} kills, {rounds} whole sweeps, {compared} states compared in the last one")
    for where, count in tally.most_common():
        print(f"  {count:3d} {where}")
    return faults


def fill_disk(words: Sequence[str]) -> int:
    """A sweep on a file system that gets full, then on with the same command when it has room."""
    mount = Path("small").resolve()
    mount.mkdir()
    size = 192
    script = (
        f"mount -t tmpfs -o size={size}k tmpfs {mount} && "
        f"{{ {sys.executable} -m lmexp {' '.join(map(repr, words))} output_dir={mount}/runs; "
        "echo code $?; "
        f"mount -o remount,size=64m {mount} && "
        f"{sys.executable} -m lmexp {' '.join(map(repr, words))} output_dir={mount}/runs; "
        f"echo code $?; cp -r {mount}/runs full; }}"
    )
    answer = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    codes = [line for line in answer.stdout.splitlines() if line.startswith("code ")]
    said = answer.stdout + answer.stderr
    if not codes:
        print(f"full disk: no file system can be mounted here ({answer.stderr.strip()}); left out")
        return 0
    faults = [] if codes == ["code 1", "code 0"] else [f"exit codes {codes}"]
    if "no space left" not in said or "Traceback" in said:
        faults.append(f"it did not say so in one line:\n{said}")
    if not faults:
        faults = compare(Path("full"), Path("none"), Path("reference"), Path("reference_states"))
    print(*(faults or ["full disk: said so, went on with room, every bit as the reference"]))
    return len(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--longest", type=float, default=0.6, help="share of the whole sweep's time"
    )
    parser.add_argument("--disk-full", action="store_true")
    parser.add_argument("words", nargs="*", help="more overrides")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        words = [*JOBS, *asked.words]
        faults = torture(asked.kills, asked.seed, words, asked.longest)
        if asked.disk_full:
            faults += fill_disk(words)
        os.chdir("/")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
