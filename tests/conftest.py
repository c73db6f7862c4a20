"""Running the scripts as a user does, and measuring contact forces."""

import os
import subprocess
import sys
from pathlib import Path

import mujoco
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# a run of a few seconds that still has every part: several rollouts, checkpoints, evaluations, a shortened last rollout
SMALL = (
    "--total-timesteps 3000 --num-envs 4 --num-steps 64 --minibatch-size 128 "
    "--checkpoint-every 1000 --eval-every 1500 --eval-episodes 3"
)


def run_script(name: str, *flags: str, **env: str | None) -> subprocess.CompletedProcess:
    """Run a script of the project to its end; environment variables given as None are unset."""
    environment = {**os.environ, **{key: value for key, value in env.items() if value is not None}}
    for key in (key for key, value in env.items() if value is None):
        environment.pop(key, None)
    command = [sys.executable, str(ROOT / name), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def train(log_dir: Path, *flags: str) -> Path:
    """Train to the end and return the run's directory."""
    before = set(log_dir.glob("*")) if log_dir.exists() else set()
    done = run_script("ppo_residual_so101.py", "--log-dir", str(log_dir), *flags)
    assert done.returncode == 0, done.stderr
    (run_dir,) = set(log_dir.glob("*")) - before
    return run_dir


def press_force_n(model: mujoco.MjModel, data: mujoco.MjData) -> float:
    """Normal force between fingertips and sheet, summed over contacts."""
    sheet = model.geom("sheet_col").id
    fingers = [model.geom(name).id for name in ("fixed_finger_col", "moving_finger_col")]
    force, total = np.zeros(6), 0.0
    for i, contact in enumerate(data.contact[: data.ncon]):
        if contact.geom1 in fingers and contact.geom2 == sheet:
            mujoco.mj_contactForce(model, data, i, force)
            total += force[0]
    return total


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The directory of a finished small run with default settings."""
    return train(tmp_path_factory.mktemp("logs"), *SMALL.split())
