"""The scripts as a user runs them: what they write, print and refuse."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    PYTHON_PATH,
    ROOT,
    SMALL,
    assert_equal_best_models,
    assert_equal_training_state,
    load,
    refusal,
    run_script,
    train,
)

from ppo_residual_so101 import Args, choose_best, make_envs
from so101_env import SO101Error
from so101_policies import CHECKPOINT, SCHEMAS, load_checkpoint
from so101_runs import TEST_SEED, VALIDATION_SEED, episode_mean, evaluate, flat_settings

# -- what a run leaves behind


def test_artefacts(small_run):
    summary = json.loads((small_run / "training_summary.json").read_text())
    assert summary["total_timesteps"] == 3000 and summary["interrupted"] is False
    assert summary["steps_per_second"] == pytest.approx(3000 / summary["wall_time_s"], rel=1e-6)
    assert Path(summary["best_checkpoint"]) == small_run / "best_model" / "best_model.pt"
    assert summary["best_eval_step"] in (0, 1536, 3000) and 0.0 <= summary["best_eval_success_rate"] <= 1.0
    assert summary["processes"] == 1
    config = json.loads((small_run / "config.json").read_text())
    settings = flat_settings(config["args"])
    assert settings["num_envs"] == 4 and settings["alpha"] == 0.7 and config["script"] == "ppo_residual_so101.py"
    assert config["versions"]["torch"] and config["machine"]["cpus"] >= 1 and set(config["git"]) == {"commit", "dirty"}
    names = sorted(path.name for path in (small_run / "checkpoints").iterdir())
    assert names == [f"ppo_residual_{step}_steps.pt" for step in (1024, 2048, 3000)]  # ends of rollouts
    lines = [json.loads(line) for line in (small_run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1536, 3000]
    final = load(small_run / "final_model.pt")
    assert final["global_step"] == 3000 and final["args"]["ppo"]["num_envs"] == 4
    assert not list(small_run.rglob("*.tmp*"))


def test_the_best_model_is_the_best_on_more_episodes_than_an_evaluation_has(small_run):
    summary = json.loads((small_run / "training_summary.json").read_text())
    envs, seeds = make_envs(Args(), 7, evaluation=True), [VALIDATION_SEED + i for i in range(7)]
    means = {}
    for step in (0, 1536, 3000):  # none can be told from the others by three episodes
        path = small_run / "best_model" / f"ppo_residual_{step}_steps.pt"
        episodes = evaluate(load_checkpoint(path).agent(path).act, envs, seeds)
        means[step] = [episode_mean(episodes, key) for key in ("success", "return")]
    best = max(means, key=means.get)
    assert load(small_run / "best_model" / "best_model.pt")["global_step"] == best == summary["best_eval_step"]
    assert summary["best_eval_success_rate"] == pytest.approx(means[best][0]) and summary["best_eval_episodes"] == 7
    settings = dataclasses.replace(Args().run, eval_episodes=3, final_eval_episodes=7)
    finalists = load(small_run / "final_model.pt")["finalists"]
    assert choose_best(finalists[::-1], small_run, envs, settings)["step"] == best  # whatever their order
    worst = min(means, key=means.get)
    lucky = [{"step": step, "success_rate": 0.9 - 0.6 * (step != worst), "mean_return": 0.0} for step in means]
    lucky.sort(key=lambda finalist: -finalist["success_rate"])
    assert choose_best(lucky, small_run, envs, Args().run)["step"] == worst  # ten episodes of 16 ahead: no rival


def test_tensorboard_tags_and_values(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(small_run / "tensorboard")).Reload()
    expected = (
        "rollout/success_rate_100 rollout/ep_reward rollout/ep_length train/approx_kl train/clip_fraction "
        "train/entropy_loss train/policy_gradient_loss train/value_loss train/explained_variance "
        "train/residual_magnitude train/learning_rate time/fps eval/success_rate eval/mean_reward eval/mean_ep_length "
        "eval/residual_magnitude"
    )
    assert set(expected.split()) <= set(events.Tags()["scalars"])
    series = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert [event.step for event in series["train/value_loss"]] == [*range(256, 3000, 256), 3000]
    rate = [event.value for event in series["train/learning_rate"]]
    steps = np.array([0, *range(256, 3000, 256)])
    np.testing.assert_allclose(rate, rate[0] * (1 - steps / 3000), rtol=1e-5)
    assert all(0.5 < event.value < 6**0.5 for event in series["train/residual_magnitude"])
    assert all(0 <= event.value <= 1 for event in series["rollout/success_rate_100"])
    # the return is the unshaped sum over an episode: no more than ten for a success, about -0.2 a step
    assert all(-150 < event.value < 10 for event in series["rollout/ep_reward"])
    assert all(1e-6 < event.value < 1 for event in series["train/approx_kl"])
    assert [event.step for event in series["eval/success_rate"]] == [0, 1536, 3000]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "ppo_residual_so101.py --log-dir" in texts["command/text_summary"]
    assert "|gamma|0.98|" in texts["hyperparameters/text_summary"] and "best/success_rate" in series


def test_what_is_printed_fits_80_columns_and_works_from_here(tmp_path):
    flags = ["--run-name", "mine", "--log-dir", "logs", *SMALL.split()]
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), *flags]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120}
    terminal, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=own_end, text=True, cwd=tmp_path)
    os.close(own_end)
    stderr = b""
    with contextlib.suppress(OSError):  # how a terminal tells that nobody will write to it any more
        while piece := os.read(terminal, 2**16):
            stderr += piece
    stdout, _ = process.communicate(timeout=120)
    bars = [line.strip() for line in re.split(r"[\r\n]", stderr.decode()) if line.strip()]
    assert any(bar.startswith("success 0.") and "3000/3000" in bar for bar in bars)
    assert {"evaluating", "choosing the best model"} <= {bar.split(":")[0] for bar in bars}
    assert max(map(len, bars)) <= 80
    first, second, *_, last = stdout.splitlines()
    assert first.startswith("training for 3000 steps in 4 environments") and "base policy zero" in first
    assert second.endswith("logs/mine")
    evaluate_command = last.removeprefix("evaluate: ") + " --episodes 1 --no-base"
    environment = {**os.environ, "PATH": PYTHON_PATH}
    evaluated = subprocess.run(evaluate_command, shell=True, env=environment, **options)
    assert evaluated.returncode == 0 and "logs/mine/best_model/best_model.pt" in evaluated.stdout, evaluated.stderr


@pytest.mark.parametrize("budget", [1, 7, 1003])
def test_any_budget_runs_and_is_not_exceeded(tmp_path, budget):
    run_dir = train(tmp_path, "--total-timesteps", str(budget), "--eval-episodes", "2")
    steps = json.loads((run_dir / "training_summary.json").read_text())["total_timesteps"]
    assert budget - Args().ppo.num_envs < steps <= budget and steps >= 1


def test_same_seed_same_weights_whatever_the_threads(small_run, tmp_path):
    again = train(tmp_path / "a", *SMALL.split(), "--num-threads", "1")
    assert_equal_training_state(small_run / "final_model.pt", again / "final_model.pt")
    other = train(tmp_path / "b", *SMALL.split(), "--seed", "2")
    weights = [load(run / "final_model.pt")["agent"]["critic.0.weight"] for run in (small_run, other)]
    assert not torch.equal(*weights)


# -- stopping and going on


@pytest.mark.parametrize("base_policy", ["zero", "jacobian"])
def test_every_resume_equals_the_uninterrupted_run(small_run, tmp_path, base_policy):
    """From every checkpoint there is, the best model and those of an evaluation's own step included."""
    whole = small_run if base_policy == "zero" else train(tmp_path, *SMALL.split(), "--base-policy", base_policy)
    models = sorted((whole / "checkpoints").iterdir()) + sorted((whole / "best_model").iterdir())
    assert len(models) >= 5
    done = [whole.parent / path.name for path in whole.parent.iterdir()]
    for model in models if base_policy == "zero" else models[:1]:
        resumed = train(whole.parent, "--resume", str(model))
        assert resumed not in done
        assert_equal_training_state(whole / "final_model.pt", resumed / "final_model.pt")
        assert_equal_best_models(whole, resumed)
        summary = json.loads((resumed / "training_summary.json").read_text())
        steps = load(model)["global_step"]
        assert summary["steps_per_second"] * summary["wall_time_s"] == pytest.approx(3000 - steps)
    # a resume of a resume; without --log-dir, it lies beside the run that it resumes
    again = tmp_path / "again"
    shutil.copytree(resumed, again / "copy")
    resume = ("--resume", str(again / "copy" / "best_model" / "best_model.pt"))
    completed = run_script("ppo_residual_so101.py", *resume)
    assert completed.returncode == 0, completed.stderr
    (last,) = set(again.iterdir()) - {again / "copy"}
    assert_equal_training_state(whole / "final_model.pt", last / "final_model.pt")


def interrupt(log_dir: Path, flags: list[str], when: Callable[[Path], bool], signum: int) -> tuple[Path, str]:
    """Train, send a signal when the run's directory is in a state, and return the directory and what was printed."""
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), "--log-dir", str(log_dir), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not any(when(run) for run in log_dir.glob("*")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signum and "Traceback" not in stderr, stderr
    (run,) = log_dir.glob("*")
    return run, stdout


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_resumes_to_the_bit(tmp_path, signum):
    flags = SMALL.replace("--total-timesteps 3000", "--total-timesteps 9000").split()
    run, stdout = interrupt(tmp_path / "a", flags, lambda run: any((run / "checkpoints").glob("*.pt")), signum)
    model = run / "interrupted_model.pt"
    assert f"--resume {model}" in stdout
    assert 1000 < load(model)["global_step"] < 9000
    resumed, straight = train(tmp_path / "b", "--resume", str(model)), train(tmp_path / "c", *flags)
    assert_equal_training_state(resumed / "final_model.pt", straight / "final_model.pt")
    assert_equal_best_models(resumed, straight)


@pytest.mark.parametrize("file, step", [("config.json", 0), ("eval_results/evaluations.jsonl", 6400)])
def test_a_run_interrupted_in_its_first_evaluation_or_last_rollout(tmp_path, file, step):
    """The evaluation at step 0, and the only rollout with the evaluation after it, take seconds each."""
    flags = "--total-timesteps 6400 --num-steps 200 --eval-every 10000 --eval-episodes 60".split()

    def started(run: Path) -> bool:
        time.sleep(0.2)
        return (run / file).exists() and time.time() > (run / file).stat().st_mtime + 0.3

    run, stdout = interrupt(tmp_path / "a", flags, started, signal.SIGINT)
    model = run / "interrupted_model.pt"
    assert load(model)["global_step"] == step and f"--resume {model}" in stdout
    resumed, straight = train(tmp_path / "b", "--resume", str(model)), train(tmp_path / "c", *flags)
    assert_equal_training_state(resumed / "final_model.pt", straight / "final_model.pt")
    assert_equal_best_models(resumed, straight)
    results = [(run / "eval_results" / "evaluations.jsonl").read_text().splitlines()[-1] for run in (resumed, straight)]
    assert results[0] == results[1]


@pytest.mark.parametrize("last_word, trained", [(b"/", False), (b"success", True)])
def test_a_closed_terminal_stops_the_run_where_it_can_be_resumed(tmp_path, last_word, trained):
    """As `2>&1 | head -c 1` does."""
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), "--log-dir", str(tmp_path)]
    flags = SMALL.replace("--total-timesteps 3000", "--total-timesteps 60000").split()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = b""
    while last_word not in seen:
        seen += process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    (model,) = tmp_path.glob("*/interrupted_model.pt")
    steps = load_checkpoint(model).saved["global_step"]
    assert steps < 60000 and (steps > 0) == trained


def test_help_into_a_closed_pipe():
    for script in ("ppo_residual_so101.py", "eval_so101.py", "bc_so101.py", "replay_so101.py"):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read() and process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_ctrl_c_while_importing_leaves_no_traceback():
    command = [sys.executable, str(ROOT / "eval_so101.py"), "--base-policy", "jacobian"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.4)  # NumPy, MuJoCo and PyTorch take longer than that
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the disk: both end a write with an error of the system."""

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    demos, result = tmp_path / "demos", tmp_path / "result.json"
    cases = [
        (["ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), *SMALL.split()], 50_000, "steps.pt"),
        (["eval_so101.py", "--base-policy", "jacobian", "--episodes", "20", "--json", str(result)], 500, str(result)),
        (["eval_so101.py", "--base-policy", "jacobian", "--episodes", "3", "--record", str(demos)], 3000, str(demos)),
    ]
    for (script, *flags), size, word in cases:
        command = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit(size), timeout=120)
        error = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(error) == 1 and word in error[0] and "File too large" in error[0], done.stderr
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    assert not demos.exists() and not result.exists()


def test_kill_leaves_only_loadable_checkpoints(tmp_path):
    flags = "--total-timesteps 100000 --num-envs 2 --num-steps 32 --minibatch-size 32 --checkpoint-every 64 "
    flags += "--update-epochs 1 --eval-every 0"
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), "--log-dir", str(tmp_path), *flags.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def complete() -> list[Path]:
        return [path for path in tmp_path.rglob("*.pt") if ".tmp" not in path.name]

    while len(complete()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(complete()) >= 20
    assert all(load(file)["global_step"] > 0 for file in complete())


# -- evaluation


def test_evaluation_json_and_table(tmp_path):
    """On a residual over the pusher, which succeeds in some of the precise episodes and fails in others."""
    run = train(tmp_path / "logs", *SMALL.split(), "--base-policy", "jacobian", "--tape-margin", "0.02")
    model = str(run / "final_model.pt")
    done = run_script("eval_so101.py", "--model", model, "--episodes", "12", "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    episodes = result["episode_list"]
    assert result["episodes"] == len(episodes) == 12
    assert [episode["seed"] for episode in episodes] == [TEST_SEED + i for i in range(12)]
    assert TEST_SEED > VALIDATION_SEED + 10**6
    assert result["success_rate"] == sum(episode["success"] for episode in episodes) / 12
    assert result["mean_return"] == pytest.approx(np.mean([episode["return"] for episode in episodes]))
    assert result["mean_length"] == pytest.approx(np.mean([episode["length"] for episode in episodes]))
    k, n, z = sum(episode["success"] for episode in episodes), 12, 1.959964
    centre, root = (k + z**2 / 2) / (n + z**2), z * np.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)  # Wilson
    np.testing.assert_allclose(result["success_ci95"], [centre - root, centre + root], atol=1e-6)
    assert 0 < k < 12 and 0 < result["base_success_rate"] < 1 and result["base"]["mean_residual_magnitude"] == 0.0
    assert "base alone (jacobian)" in done.stdout and f"{result['mean_return']:.2f}" in done.stdout
    again = run_script(
        "eval_so101.py", "--model", model, "--episodes", "12", "--json", str(tmp_path / "b.json"), "--num-threads", "1"
    )
    assert again.stdout == done.stdout
    assert json.loads((tmp_path / "b.json").read_text()) == result


def test_evaluation_video_and_plot(small_run, tmp_path):
    import imageio.v3 as iio

    video, picture = tmp_path / "v.mp4", tmp_path / "p.png"
    flags = ["--episodes", "3", "--video", str(video), "--video-episodes", "1", "--plot", str(picture)]
    flags += ["--json", str(tmp_path / "r.json")]
    done = run_script("eval_so101.py", "--model", str(small_run / "final_model.pt"), *flags)
    assert done.returncode == 0, done.stderr
    assert iio.immeta(video)["fps"] == 30
    length = json.loads((tmp_path / "r.json").read_text())["episode_list"][0]["length"]
    frames = iio.imread(video)
    assert frames.shape == (length + 1 + 15, 480, 640, 3)  # and half a second of the last one
    assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).mean() > 0.1
    assert iio.imread(picture).std() > 10
    # a GIF shows every third frame, smaller, three times as long
    gif = tmp_path / "v.gif"
    done = run_script("eval_so101.py", "--base-policy", "jacobian", "--episodes", "1", "--video", str(gif))
    assert done.returncode == 0, done.stderr
    frames = iio.imread(gif)
    assert frames.shape[1:] == (360, 480, 3) and len(frames) > 5 and iio.immeta(gif)["duration"] == 100


def test_capture_video_films_every_evaluation(tmp_path):
    import imageio.v3 as iio

    # an agent that hardly learns: the pusher's short episodes
    flags = "--capture-video --total-timesteps 512 --base-policy jacobian --learning-rate 1e-6 --tape-margin 0.1"
    run = train(tmp_path, *SMALL.split(), *flags.split())
    videos = sorted((run / "eval_results").glob("*.mp4"))
    assert [video.name for video in videos] == ["step_0.mp4", "step_512.mp4"]
    assert all(iio.imread(video).shape[1:] == (480, 640, 3) for video in videos)


# -- errors a user can make


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
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
    line = refusal(monkeypatch, "ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), *flags.split())
    assert words in line and "\n" not in line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("eval_so101.py", "--base-policy magic", "known are zero, jacobian"),
        ("eval_so101.py", "--base-policy jacobian --tape-margin 3", "--tape-margin"),
        ("eval_so101.py", "--base-policy jacobian --episodes 0", "--episodes"),
        ("eval_so101.py", "--base-policy jacobian --episodes 1000000000", "--episodes"),
        ("eval_so101.py", "--base-policy jacobian --record demos --action-noise nan", "--action-noise"),
        ("eval_so101.py", "--base-policy jacobian --action-noise 0.3", "--record"),
        ("eval_so101.py", "--base-policy jacobian --record=", "--record"),
        ("eval_so101.py", "--base-policy jacobian --record tests", "exists"),
        ("eval_so101.py", "--base-policy jacobian --json nowhere/r.json", "--json"),
        ("eval_so101.py", "--base-policy jacobian --json tests", "--json tests"),
        ("eval_so101.py", "--base-policy jacobian --video v.avi", ".mp4"),
        ("eval_so101.py", "--base-policy bc:README.md", "README.md"),
        ("eval_so101.py", "--base-policy checkpoint:README.md", "not a readable checkpoint"),
        ("eval_so101.py", "--base-policy jacobian --render-mode human", "--video"),
        ("eval_so101.py", "--model MODEL --tape-margin 0.02", "--tape-margin"),
        (
            "ppo_residual_so101.py",
            "--resume MODEL --tape-margin 0.02",
            "--tape-margin 0.02: MODEL was trained with 0.04",
        ),
        ("ppo_residual_so101.py", "--resume MODEL --total-timesteps 2999", "--total-timesteps"),
        ("bc_so101.py", "--demos nowhere", "meta/info.json"),
        ("bc_so101.py", "--demos nowhere --train-steps 0", "--train-steps"),
        ("bc_so101.py", "--demos nowhere --chunk-size 0", "--chunk-size"),
        ("bc_so101.py", "--demos nowhere --learning-rate nan", "--learning-rate"),
        ("bc_so101.py", "--demos nowhere --hidden-size 1000000", "--hidden-size"),
        ("replay_so101.py", "--dataset nowhere", "nowhere"),
        ("replay_so101.py", "--dataset nowhere --video a.avi", "--video"),
        ("replay_so101.py", "--dataset nowhere --tape-margin inf", "--tape-margin"),
    ],
)
def test_bad_flags_of_the_others(small_run, monkeypatch, script, flags, words):
    monkeypatch.chdir(ROOT)
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    model = str(small_run / "final_model.pt")
    line = refusal(monkeypatch, script, *flags.replace("MODEL", model).split())
    assert words.replace("MODEL", model) in line and "\n" not in line


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    done = run_script("ppo_residual_so101.py", "--alpha", "1.1")
    assert done.stderr == "ppo_residual_so101.py: error: --alpha must be in [0.0, 1.0], got 1.1\n"
    assert done.returncode == 2 and done.stdout == ""
    assert_refused(run_script("ppo_residual_so101.py", "--total-timestep", "5"), "--total-timestep")
    assert_refused(run_script("ppo_residual_so101.py", "--num-envs", "two"), "--num-envs")
    video = tmp_path / "v.mp4"
    flags = ["--base-policy", "jacobian", "--video", str(video)]
    done = run_script("eval_so101.py", *flags, MUJOCO_GL="egl", PYOPENGL_PLATFORM="glx")
    assert_refused(done, "--video", "EGL")
    assert not video.exists()


# -- damaged files


def test_flipped_bits_are_noticed(small_run, tmp_path):
    """A flip is refused, or lies where nothing is kept: then what is read equals the original."""
    content = (small_run / "final_model.pt").read_bytes()
    original, path, refused = load(small_run / "final_model.pt"), tmp_path / "flipped.pt", 0
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            saved = load_checkpoint(path).saved
        except SO101Error as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert all(torch.equal(saved["agent"][key], original["agent"][key]) for key in original["agent"])
            assert torch.equal(saved["envs"]["batch"], original["envs"]["batch"])
    assert refused > 40


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


def changed(mapping: dict, *path: str, to: Any) -> dict:
    key, *rest = path
    return {**mapping, key: changed(mapping[key], *rest, to=to) if rest else to}


WEIGHT = "actor_mean.0.weight"
DAMAGE = {
    "no format": lambda s: without(s, "format"),
    "old format": lambda s: {**s, "format": "ppo_residual_so101 checkpoint 5"},
    "foreign": lambda s: {"model": torch.zeros(3)},
    "a list": lambda s: [1, 2],
    **{f"no {key}": lambda s, key=key: without(s, key) for key in SCHEMAS[CHECKPOINT]},
    "agent is a number": lambda s: {**s, "agent": 3},
    "a weight is text": lambda s: changed(s, "agent", WEIGHT, to="hello"),
    "a weight is NaN": lambda s: changed(s, "agent", WEIGHT, to=s["agent"][WEIGHT] * torch.nan),
    "a weight is missing": lambda s: {**s, "agent": without(s["agent"], WEIGHT)},
    "a weight has another shape": lambda s: changed(s, "agent", WEIGHT, to=torch.zeros(3, 3)),
    "unknown flag": lambda s: changed(s, "args", "ppo", to={**s["args"]["ppo"], "magic": 1}),
    "missing flag": lambda s: changed(s, "args", "ppo", to=without(s["args"]["ppo"], "gamma")),
    "missing group": lambda s: {**s, "args": without(s["args"], "task")},
    "absurd flag": lambda s: changed(s, "args", "networks", "hidden_size", to=10**9),
    "flag of another type": lambda s: changed(s, "args", "networks", "activation", to=["relu"]),
    "no such activation": lambda s: changed(s, "args", "networks", "activation", to="gelu"),
    "another script": lambda s: {**s, "script": "no_such_script.py"},
    "a path as script": lambda s: {**s, "script": "../ppo_residual_so101.py"},
    "a script that is no trainer": lambda s: {**s, "script": "so101_env.py"},
    "missing base": lambda s: changed(s, "args", "base", "base_policy", to="bc:nowhere.pt"),
}
DAMAGE_FOR_RESUME = {
    "another number of environments": lambda s: {**s, "num_envs": 3},
    "no environments": lambda s: {**s, "envs": {}},
    "no fields": lambda s: changed(s, "envs", "fields", to={}),
    "ragged states": lambda s: changed(s, "envs", "batch", to=s["envs"]["batch"][:2]),
    "states of text": lambda s: changed(s, "envs", "_steps", to="hello"),
    "generators of text": lambda s: changed(s, "envs", "rngs", to=["hello"] * 4),
    "an empty optimiser": lambda s: {**s, "optimizer": {}},
    "moments of another shape": lambda s: changed(s, "optimizer", "state", 1, "exp_avg", to=torch.zeros(2)),
    "a short generator": lambda s: {**s, "generator": s["generator"][:8]},
    "an observation of another size": lambda s: {**s, "next_obs": torch.zeros(4, 31)},
    "episodes of another kind": lambda s: {**s, "recent_episodes": [{"success": 1.0}]},
    "a best model without steps": lambda s: {**s, "finalists": [{"success_rate": 1.0}]},
    "a best model that is not there": lambda s: {**s, "finalists": [{**s["finalists"][0], "step": 7}]},
    "more steps than the budget": lambda s: {**s, "global_step": 10**7},
}


@pytest.mark.parametrize("kind", [*DAMAGE, *DAMAGE_FOR_RESUME])
def test_damaged_checkpoints_end_with_one_line(small_run, monkeypatch, kind):
    path = small_run / "checkpoints" / "damaged.pt"
    torch.save((DAMAGE | DAMAGE_FOR_RESUME)[kind](load(small_run / "final_model.pt")), path)
    logs = ["--log-dir", str(small_run / "refused")]
    try:
        line = refusal(monkeypatch, "ppo_residual_so101.py", "--resume", str(path), *logs)
        assert (str(path) in line or "nowhere.pt" in line) and "\n" not in line
        if kind in DAMAGE:
            line = refusal(monkeypatch, "eval_so101.py", "--model", str(path), "--episodes", "1")
            assert (str(path) in line or "nowhere.pt" in line) and "\n" not in line
    finally:
        path.unlink()
        shutil.rmtree(small_run / "refused", ignore_errors=True)


def test_truncated_and_missing_files(small_run, tmp_path, monkeypatch):
    path = tmp_path / "bad.pt"
    for content in (None, b"", b"hello", (small_run / "final_model.pt").read_bytes()[:5000]):
        if content is not None:
            path.write_bytes(content)
        for script, flag in (("eval_so101.py", "--model"), ("ppo_residual_so101.py", "--resume")):
            assert str(path) in refusal(monkeypatch, script, flag, str(path))
