"""Command lines: every user error is one line with exit code 2."""

import subprocess
import sys

import pytest
from conftest import ROOT, error_of, run_script


def assert_error(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--total-timesteps 0", "--total-timesteps"),
        ("--num-envs -1", "--num-envs must be in [1, 4096]"),
        ("--num-envs 1000000", "--num-envs"),
        ("--num-envs 4096 --num-steps 65536", "--num-steps"),
        ("--update-epochs 0", "--update-epochs"),
        ("--minibatch-size 4096", "--minibatch-size"),
        ("--hidden-size 1000000", "--hidden-size"),
        ("--alpha 1.1", "--alpha must be in [0.0, 1.0], got 1.1"),
        ("--act-scale inf", "--act-scale"),
        ("--gamma 2", "--gamma"),
        ("--gamma nan", "--gamma"),
        ("--clip-coef 1e308", "--clip-coef"),
        ("--learning-rate 1e39", "--learning-rate"),
        ("--log-std-init nan", "--log-std-init"),
        ("--log-std-init 100", "--log-std-init"),
        ("--tape-margin 0.5", "--tape-margin"),
        ("--seed -3", "--seed"),
        ("--seed 18446744073709551616", "--seed"),
        ("--no-randomize --full-randomization", "--no-randomize"),
        ("--observe-base", "--base-policy"),
        ("--base-policy magic", "magic"),
        ("--log-dir /proc/nowhere", "--log-dir /proc/nowhere"),
        ("--log-dir README.md", "--log-dir README.md"),
        ("--track", "--track"),
        ("--run-name ../elsewhere", "--run-name '../elsewhere'"),
    ],
)
def test_bad_flags_of_the_trainer(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    line = error_of(monkeypatch, "ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), *flags.split())
    assert words in line and "\n" not in line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("eval_so101.py", "--base-policy magic", "known: zero, jacobian"),
        ("eval_so101.py", "--base-policy jacobian --tape-margin 3", "--tape-margin"),
        ("eval_so101.py", "--base-policy jacobian --episodes 0", "--episodes"),
        ("eval_so101.py", "--base-policy jacobian --episodes 1000000000", "--episodes"),
        ("so101.record", "--base-policy jacobian --dataset demos --action-noise nan", "--action-noise"),
        ("so101.record", "--base-policy jacobian --dataset=", "--dataset"),
        ("so101.record", "--base-policy jacobian --dataset tests", "exists"),
        ("so101.record", "--dataset demos", "--model PATH or --base-policy SPEC"),
        ("eval_so101.py", "--base-policy jacobian --seed -1", "--seed"),
        ("eval_so101.py", "--export policy.onnx", "--export needs --model"),
        (
            "eval_so101.py",
            "--base-policy jacobian --policy x",
            "--policy: there is no such flag; did you mean --model?",
        ),
        ("eval_so101.py", "--model MODEL --base-policy jacobian", "has its own base policy"),
        ("eval_so101.py", "--model MODEL --units deg", "--units"),
        ("eval_so101.py", "--model MODEL --tape-margin 3", "--tape-margin"),
        ("ppo_residual_so101.py", "--lr 3", "--lr: there is no such flag; did you mean --learning-rate?"),
        ("ppo_residual_so101.py", "--n_envs 3", "--n-envs: there is no such flag; did you mean --num-envs?"),
        ("ppo_residual_so101.py", "--gama 3", "--gama: there is no such flag; did you mean --gamma?"),
        ("ppo_residual_so101.py", "--xyzzy", "--xyzzy: there is no such flag; --help lists all flags"),
        ("ppo_residual_so101.py", "--run-name ..", "--run-name '..'"),
        ("eval_so101.py", "--base-policy jacobian --json nowhere/r.json", "--json"),
        ("eval_so101.py", "--base-policy jacobian --json tests", "--json tests"),
        ("eval_so101.py", "--base-policy jacobian --video v.avi", ".mp4"),
        ("eval_so101.py", "--base-policy bc:README.md", "README.md"),
        ("eval_so101.py", "--base-policy checkpoint:README.md", "not a readable checkpoint"),
        ("eval_so101.py", "--base-policy jacobian --render-mode human", "--video"),
        (
            "ppo_residual_so101.py",
            "--resume MODEL --tape-margin 0.02",
            "--tape-margin 0.02: MODEL was trained with 0.04",
        ),
        ("ppo_residual_so101.py", "--resume MODEL --total-timesteps 2999", "--total-timesteps"),
        ("so101.clone", "--dataset nowhere", "meta/info.json"),
        ("so101.clone", "--dataset nowhere --train-steps 0", "--train-steps"),
        ("so101.clone", "--dataset nowhere --chunk-size 0", "--chunk-size"),
        ("so101.clone", "--dataset nowhere --learning-rate nan", "--learning-rate"),
        ("so101.clone", "--dataset nowhere --hidden-size 1000000", "--hidden-size"),
        ("so101.replay", "--dataset nowhere", "nowhere"),
        ("so101.replay", "--dataset nowhere --video a.avi", "--video"),
        ("so101.replay", "--dataset nowhere --tape-margin inf", "--tape-margin"),
    ],
)
def test_bad_flags_of_the_others(small_run, monkeypatch, script, flags, words):
    monkeypatch.chdir(ROOT)
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    model = str(small_run / "final_model.pt")
    line = error_of(monkeypatch, script, *flags.replace("MODEL", model).split())
    assert words.replace("MODEL", model) in line and "\n" not in line


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = run_script("ppo_residual_so101.py", "--alpha", "1.1")
    assert done.stderr == "ppo_residual_so101.py: error: --alpha must be in [0.0, 1.0], got 1.1\n"
    assert done.returncode == 2 and done.stdout == ""
    assert_error(run_script("ppo_residual_so101.py", "--total-timestep", "5"), "--total-timestep")
    assert_error(run_script("ppo_residual_so101.py", "--num-envs", "two"), "--num-envs")
    video = tmp_path / "v.mp4"
    flags = ["--base-policy", "jacobian", "--video", str(video)]
    done = run_script("eval_so101.py", *flags, MUJOCO_GL="egl", PYOPENGL_PLATFORM="glx")
    assert_error(done, "--video", "EGL")
    assert not video.exists()
