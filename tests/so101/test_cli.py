"""Command lines: every user error is one line with exit code 2."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, run_script, train

from so101 import cli
from so101.cli import parse
from so101.files import write_json
from so101.recorder import Run
from so101.server import Server
from so101_env import SO101Error


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
        ("--run-name \udcff", "--run-name '\\udcff': is not UTF-8"),
        ("--total-timesteps 1e5", "--total-timesteps: invalid literal for int() with base 10: '1e5'"),
        ("--total-timesteps=", "--total-timesteps: invalid literal"),
        ("--learning-rate 0x1p-8", "--learning-rate"),
        ("--seed 1 2", "2"),
        ("--units degrees --base-policy jacobian", "--units"),
        ("--gamma", "--gamma"),
        ("--base-policy ..x:Y", "'..x' is not the name of a module"),
        ("--base-policy :x", "is not the name of a module"),
        ("--base-policy so101.pusher:JacobianPolicy:3", "does not fit its constructor"),
        ("--base-policy onnx:/dev/stdin", "/dev/stdin: is not a file"),
        ("--base-policy server:127.0.0.1:\N{SUPERSCRIPT TWO} --units deg", "give server:HOST:PORT"),
        ("--base-policy server:a..b:1 --units deg --allow-remote", "nothing answers there"),
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
        ("eval_so101.py", "--export-lerobot new --base-policy jacobian", "--export-lerobot needs --model"),
        ("eval_so101.py", "--export-lerobot new --model MODEL --export p.onnx", "and no --export"),
        ("eval_so101.py", "--export-lerobot tests --model MODEL", "--export-lerobot tests: exists already"),
        ("eval_so101.py", "--export-lerobot nowhere/new --model MODEL", "--export-lerobot nowhere/new"),
        ("eval_so101.py", "--base-policy lerobot:nowhere --units deg", "lerobot:nowhere: has no config.json"),
        ("eval_so101.py", "--base-policy lerobot:nowhere", "pass --units"),
        ("eval_so101.py", "--base-policy lerobot:", "unknown base policy"),
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


@pytest.mark.parametrize(
    "script, flags, flag",
    [
        ("ppo_residual_so101.py", "--wandb-project-name p", "--wandb-project-name: needs --track"),
        ("ppo_residual_so101.py", "--capture-video --eval-every 0", "--capture-video"),
        ("ppo_residual_so101.py", "--no-sheet-feature --contact-gain 1", "--contact-gain"),
        ("ppo_residual_so101.py", "--arm-randomization --full-randomization", "--full-randomization contradicts"),
        ("ppo_residual_so101.py", "--units deg", "--units"),
        ("so101.sac", "--base-policy opencv:jacobian --chunk-steps 4", "--chunk-steps"),
        ("so101.ppo_rgb", "--base-policy lerobot:x --units deg --server-timeout 3", "--server-timeout"),
        ("so101.sac", "--base-batch 0.3", "--base-batch: needs a base policy"),
        ("so101.sac", "--no-sheet-feature --contact-gain 1", "--contact-gain"),
        ("so101.distill", "--capture-video --eval-every 0", "--capture-video"),
        ("eval_so101.py", "--base-policy jacobian --video-episodes 2", "--video-episodes: needs --video"),
        ("eval_so101.py", "--base-policy jacobian --size 64 64", "--size: needs --video"),
        ("eval_so101.py", "--base-policy jacobian --image-size 32", "--image-size"),
        ("eval_so101.py", "--model assets/pretrained.pt --export new.onnx --episodes 3", "--episodes: --export"),
        ("eval_so101.py", "--model assets/pretrained.pt --export new.onnx --json new.json", "--json: --export"),
        ("eval_so101.py", "--model assets/pretrained.pt --export new.onnx --no-base", "--no-base: --export"),
        ("eval_so101.py", "--model assets/pretrained.pt --export new.onnx --tape-margin 0.02", "--tape-margin"),
        ("eval_so101.py", "--model assets/pretrained.pt --server-timeout 3", "--server-timeout"),
        ("so101.record", "--base-policy jacobian --dataset new --environment-state", "--environment-state: needs"),
        ("so101.record", "--base-policy jacobian --dataset new --image-size 32", "--image-size: needs --cameras"),
        ("so101.record", "--base-policy jacobian --dataset new --units deg", "--units"),
        ("so101.drive", "--servo-gain 1", "--servo-gain: only a real arm"),
        ("so101.drive", "--no-outlines", "--no-outlines: needs --video"),
        ("so101.drive", "--robot lerobot:PORT --no-visual-randomization", "--no-visual-randomization: only the sim"),
        ("so101.drive", "--robot lerobot:PORT --check --episodes 3", "--episodes: --check"),
        ("so101.drive", "--replay README.md --episodes 2", "--episodes: --replay"),
        ("so101.drive", "--replay README.md --video new.mp4 --no-outlines", "--no-outlines: --replay"),
        ("so101.drive", "--units deg", "--units"),
        ("so101.practice", "--robot-id x", "--robot-id: only a real arm"),
        ("so101.practice", "--base-policy jacobian --cameras top", "--cameras"),
        ("so101.virtual_arm", "--port new --camera-size 96 96", "--camera-size: needs --camera"),
        ("so101.virtual_arm", "--port new --camera-turned", "--camera-turned: needs --camera"),
    ],
)
def test_a_flag_that_would_do_nothing_is_an_error(tmp_path, monkeypatch, script, flags, flag):
    monkeypatch.chdir(ROOT)
    logs = ["--log-dir", str(tmp_path)] if script.startswith(("ppo", "so101.sac", "so101.ppo", "so101.dis")) else []
    line = error_of(monkeypatch, script, *flags.split(), *logs)
    assert line.startswith(flag) and "drop" in line and "\n" not in line
    assert not list(tmp_path.iterdir()) and not list(ROOT.glob("new*"))


@pytest.mark.parametrize(
    "name",
    ["..", ".", "a/..", "a/../..", "/tmp/a", "./a", "a/", "a\nb", "a\tb", "\x1b[2J", "\0", " a", "a ", "-a", 201 * "a"],
)
def test_a_name_is_that_of_one_file_in_any_directory(name):
    with pytest.raises(SO101Error) as error:
        Run(run_name=name).check_name()
    assert str(error.value).startswith(f"--run-name {name!r:.80}") and str(error.value).isprintable()


@pytest.mark.parametrize(
    "script, flags",
    [
        *((script, "--run-name=..") for script in ("ppo_residual_so101.py", "so101.sac", "so101.ppo_rgb")),
        *((script, "--run-name=..") for script in ("so101.distill", "so101.practice")),
        ("so101.drive", "--robot lerobot:x --robot-id=.."),
    ],
)
def test_scripts_check_the_names_they_are_given(monkeypatch, script, flags):
    assert "'..': must be a plain name" in error_of(monkeypatch, script, *flags.split())


def test_an_export_to_lerobot_says_what_is_missing(monkeypatch, small_run, tmp_path):
    monkeypatch.setitem(sys.modules, "lerobot_policy_so101_residual.export", None)
    flags = ["--model", str(small_run / "final_model.pt"), "--export-lerobot", str(tmp_path / "new")]
    assert "install LeRobot and extras/lerobot_plugin" in error_of(monkeypatch, "eval_so101.py", *flags)
    assert not list(tmp_path.iterdir())


def test_an_output_replaces_nothing_but_an_older_output(tmp_path, monkeypatch):
    """Neither the model nor a pipe, not even through links; and this is known before any work."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "assets" / "pretrained.pt", "model.json")
    shutil.copy("model.json", "model.pt")
    os.mkfifo("pipe.json")
    links = {"to_model": "model.pt", "to_pipe": "pipe.json", "loop": "loop.json", "also": "model.json"}
    for name, target in links.items():
        os.symlink(target, f"{name}.json")
    before = {path: path.lstat().st_ino for path in tmp_path.iterdir()}
    for name, words in (
        ("model", "is or lies in model.json"), ("also", "is or lies in model.json"), ("to_model", "must end in .json"),
        ("to_pipe", "is not a file"), ("loop", "is not a file"), ("pipe", "is not a file"),
    ):  # fmt: skip
        flags = ["--model", "model.json", "--json", f"{name}.json"]
        assert words in error_of(monkeypatch, "eval_so101.py", *flags)
    for path in ("to_pipe.json", "loop.json", "pipe.json"):  # nor by a function that does not check first
        with pytest.raises(SO101Error, match="is not a file"):
            write_json(Path(path), {})
    assert {path: path.lstat().st_ino for path in tmp_path.iterdir()} == before
    assert Path("model.json").read_bytes() == Path("model.pt").read_bytes()


@pytest.mark.parametrize(
    "script, flags, text",
    [
        ("eval_so101.py", "--model", ""), ("eval_so101.py", "--model", " "), ("ppo_residual_so101.py", "--resume", ""),
        ("ppo_residual_so101.py", "--cameras top", ""), ("ppo_residual_so101.py", "--wandb-project-name", ""),
        ("so101.distill", "--cameras", ""), ("so101.drive", "--camera", ""), ("so101.record", "--dataset", ""),
        ("so101.sac", "--base-policy", ""), ("so101.report", "--results", ""), ("so101.practice", "--resume", ""),
    ],
)  # fmt: skip
def test_an_empty_text_is_an_error(monkeypatch, script, flags, text):
    line = error_of(monkeypatch, script, *flags.split(), text)
    assert line == f"{flags.split()[0]} is empty: give it a value, or drop it for the default"


def test_an_empty_instruction_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--instruction", ""])
    assert parse(Server, "").instruction == ""


@pytest.mark.parametrize(
    "script, flags, need",
    [
        ("so101.distill", "--total-timesteps 10000000", "193.5 GB"),
        ("so101.distill", "--total-timesteps 1000000 --image-size 512 --cameras top wrist", "1101.0 GB"),
    ],
)
def test_what_does_not_fit_into_memory_is_said_before(monkeypatch, script, flags, need):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}
    monkeypatch.setattr("so101.cli.os.sysconf", sizes.__getitem__)
    line = error_of(monkeypatch, script, *flags.split())
    assert f"needs {need} of memory, and this machine has 17.2 GB: lower --total-timesteps" in line


@pytest.mark.parametrize(
    "use",
    [lambda: torch.empty(2**60), lambda: np.empty(2**56), lambda: bytearray(2**62)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_runs_out_is_one_line(capsys, use):
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert cli.run_script(use) == 2
    finally:
        signal.signal(signal.SIGINT, handler)
    error = capsys.readouterr().err
    assert "error: out of memory: lower the numbers of" in error and error.count("\n") == 1


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch, ignored):
    monkeypatch.setattr(cli, "silence_output", lambda: None)  # it would silence the tests
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with contextlib.nullcontext() if ignored else pytest.raises(cli.Stop), cli.Stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    for name in ("a" * 250 + ".json", "\N{CJK UNIFIED IDEOGRAPH-5F35}" * 83 + ".json"):
        write_json(tmp_path / name, {"a": 1})
        assert json.loads((tmp_path / name).read_text()) == {"a": 1}


class UsageError(Exception):
    """wandb.errors.UsageError, which derives from wandb.errors.Error."""


@pytest.mark.parametrize(
    "error, words",
    [
        (UsageError("No API key configured. Use `wandb login` to log in."), "--track: No API key configured."),
        (ValueError("1 validation error for Settings\nmode\n  Input should be 'online'"), "Settings mode Input should"),
    ],
    ids=["key", "mode"],
)
def test_tracking_that_fails_writes_nothing(tmp_path, monkeypatch, error, words):
    def init(**_):
        raise error

    errors = types.SimpleNamespace(Error=UsageError)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, errors=errors))
    line = error_of(monkeypatch, "ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), "--track")
    assert line.startswith("--track: ") and words in line and "\n" not in line
    assert line.endswith("Run `wandb login`, or set WANDB_MODE=offline") and not (tmp_path / "logs").exists()


def test_a_tracked_run_has_the_name_of_its_directory(tmp_path, monkeypatch):
    run, given = types.SimpleNamespace(name="random-words-1"), []
    wandb = types.SimpleNamespace(init=lambda **settings: given.append(settings), run=run, errors=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = (
        "--total-timesteps 64 --num-envs 2 --num-steps 16 --minibatch-size 32 --eval-every 0 --run-name mine --track"
    )
    train(tmp_path, *flags.split())
    assert run.name == "mine" and given[0]["project"] == "ppo-residual-so101" and given[0]["config"]["num_envs"] == 2


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
