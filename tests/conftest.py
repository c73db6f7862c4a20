"""Running the scripts as a user does."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The directory of a finished small run with default settings."""
    return train(tmp_path_factory.mktemp("logs"), *SMALL.split())
