"""Running the scripts as a user does, comparing what they leave, and measuring contact forces."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; for the trainings they start, too

import mujoco
import numpy as np
import pytest
import torch

from so101.checkpoints import load_script
from so101_env import SO101Error

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # with nohup it would be ignored, by the scripts, too

ROOT = Path(__file__).resolve().parent.parent
# a run of a few seconds that still has every part: several rollouts, checkpoints, evaluations, a shortened last rollout
SMALL = (
    "--total-timesteps 3000 --num-envs 4 --num-steps 64 --minibatch-size 128 "
    "--checkpoint-every 1000 --eval-every 1500 --eval-episodes 3 --final-eval-episodes 7"
)


# for commands that call python by its name: that of the environment the tests run in
PYTHON_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def command(name: str) -> list[str]:
    """How to start a script: "eval_so101.py", or "so101.clone", which is found from any directory by PYTHONPATH."""
    return [sys.executable, str(ROOT / name)] if name.endswith(".py") else [sys.executable, "-m", name]


def environment(**env: str | None) -> dict[str, str]:
    """The environment for a script; variables given as None are unset."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return {key: value for key, value in merged.items() if value is not None}


def module_of(name: str) -> types.ModuleType:
    """The module of a script, see `command`."""
    return load_script(name if name.endswith(".py") else f"{name.removeprefix('so101.')}.py")


def run_script(name: str, *flags: str, **env: str | None) -> subprocess.CompletedProcess:
    """Run a script of the project to its end, see `command`; environment variables given as None are unset."""
    words = [*command(name), *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment(**env), timeout=300)


def train(log_dir: Path, *flags: str, script: str = "ppo_residual_so101.py", code: int = 0) -> Path:
    """Train to the end, or until the exit code, in this process, and return the run's directory."""
    before = set(log_dir.glob("*")) if log_dir.exists() else set()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    argv, handlers = sys.argv, {each: signal.getsignal(each) for each in signals}
    sys.argv = [script, "--log-dir", str(log_dir), *flags]
    try:
        assert module_of(script).main() == code
    finally:
        sys.argv = argv
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    (run_dir,) = set(log_dir.glob("*")) - before
    return run_dir


def error_of(monkeypatch: pytest.MonkeyPatch, name: str, *flags: str) -> str:
    """The error message of a script, run in this process with these flags; `run_script` gives its exit code, too."""
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SO101Error) as error:
        module_of(name).main()
    return str(error.value)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a, b, where: str = "") -> None:
    """Nested plain values and tensors are bit-identical."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_info(ours: dict, gymnasiums: dict, where: np.ndarray) -> None:
    """The same keys, and equal values where Gymnasium's mask says that they are valid."""
    assert {key for key in ours if key[0] != "_"} == {key for key in gymnasiums if key[0] != "_"}
    for key in (key for key in gymnasiums if key[0] != "_"):
        rows = where & gymnasiums[f"_{key}"]
        if isinstance(gymnasiums[key], dict):
            assert_same_info(ours[key], gymnasiums[key], rows)
        for i in np.flatnonzero(rows) if isinstance(gymnasiums[key], np.ndarray) else ():
            np.testing.assert_equal(ours[key][i], gymnasiums[key][i], err_msg=key)


def plain(value):
    """Results of step with lists in place of object arrays, which NumPy cannot compare."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, np.ndarray) and value.dtype.kind == "O" else value


def assert_equal_training_state(one: Path, other: Path) -> None:
    """Everything that training depends on is bit-identical: weights, optimiser, generators, environments."""
    files = [load(one), load(other)]
    for key in ("agent", "optimizer", "ranks", "global_step", "recorder"):
        assert_same(files[0][key], files[1][key], key)


def assert_equal_best_models(one: Path, other: Path) -> None:
    """The best models of two runs are of the same step and have the same weights, finalists and optimiser."""
    paths = [run / "best_model" / "best_model.pt" for run in (one, other)]
    assert_equal_training_state(*paths)
    for run, path in zip((one, other), paths):
        (own,) = run.glob(f"best_model/*_{load(path)['global_step']}_steps.pt")
        assert own.read_bytes() == path.read_bytes()
        steps = [finalist["step"] for finalist in load(run / "final_model.pt")["recorder"]["finalists"]]
        assert load(path)["global_step"] in steps


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
    """The directory of a finished small run with default settings, trained as a user does."""
    log_dir = tmp_path_factory.mktemp("logs")
    done = run_script("ppo_residual_so101.py", "--log-dir", str(log_dir), *SMALL.split())
    assert done.returncode == 0, done.stderr
    return next(log_dir.iterdir())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print why a test failed as soon as it has, not only at the end of the session."""
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") is None:
        reason = str(report.longrepr).strip().splitlines() or [""]
        errors = [line for line in reason if line.startswith("E ")] or reason[-1:]
        print(f"\nFAILED {report.nodeid} ({report.when}): {errors[0].removeprefix('E ').strip()[:300]}", flush=True)
