"""The scripts as a user runs them: what they write, print and refuse."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_script, train

from ppo_residual_so101 import TEST_SEED, VALIDATION_SEED, Args


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal_training_state(one: Path, other: Path) -> None:
    """Everything training depends on is equal to the bit: weights, optimiser, generators, environments."""

    def compare(a, b, where):
        assert type(a) is type(b), where
        if isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b)):
                compare(x, y, f"{where}[{i}]")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        else:
            assert a == b, where

    one, other = load(one), load(other)
    for key in ("agent", "optimizer", "generator", "envs", "next_obs", "global_step", "recent_episodes", "best"):
        if key == "best":  # its checkpoint names the run's log_dir
            compare(one[key]["checkpoint"]["agent"], other[key]["checkpoint"]["agent"], "best")
            assert one[key]["step"] == other[key]["step"]
        else:
            compare(one[key], other[key], key)


# -- what a run leaves behind


def test_artefacts(small_run):
    summary = json.loads((small_run / "training_summary.json").read_text())
    assert summary["total_timesteps"] == 3000 and summary["interrupted"] is False
    assert summary["steps_per_second"] == pytest.approx(3000 / summary["wall_time_s"], rel=1e-6)
    assert Path(summary["best_checkpoint"]) == small_run / "best_model" / "best_model.pt"
    assert summary["best_eval_success_rate"] >= summary["final_eval_success_rate"] >= 0.0
    config = json.loads((small_run / "config.json").read_text())
    assert config["args"]["num_envs"] == 4 and config["args"]["alpha"] == 0.7
    assert config["versions"]["torch"] and config["machine"]["cpus"] >= 1 and set(config["git"]) == {"commit", "dirty"}
    names = sorted(path.name for path in (small_run / "checkpoints").iterdir())
    assert names == [f"ppo_residual_{step}_steps.pt" for step in (1024, 2048, 3000)]  # ends of rollouts
    lines = [json.loads(line) for line in (small_run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1536, 3000]
    best = max(lines, key=lambda line: (line["success_rate"], line["mean_reward"]))
    assert load(small_run / "best_model" / "best_model.pt")["global_step"] == best["step"] == summary["best_eval_step"]
    final = load(small_run / "final_model.pt")
    assert final["global_step"] == 3000 and final["args"]["num_envs"] == 4
    assert not list(small_run.rglob("*.tmp"))


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


@pytest.mark.parametrize("budget", [1, 7, 1003])
def test_any_budget_runs_and_is_not_exceeded(tmp_path, budget):
    run_dir = train(tmp_path, "--total-timesteps", str(budget), "--eval-episodes", "2")
    steps = json.loads((run_dir / "training_summary.json").read_text())["total_timesteps"]
    assert budget - Args().num_envs < steps <= budget and steps >= 1


def test_same_seed_same_weights_whatever_the_threads(small_run, tmp_path):
    again = train(tmp_path / "a", *SMALL.split(), "--num-threads", "1")
    assert_equal_training_state(small_run / "final_model.pt", again / "final_model.pt")
    other = train(tmp_path / "b", *SMALL.split(), "--seed", "2")
    weights = [load(run / "final_model.pt")["agent"]["critic.0.weight"] for run in (small_run, other)]
    assert not torch.equal(*weights)


# -- stopping and going on


def test_resumed_checkpoint_equals_the_uninterrupted_run(small_run, tmp_path):
    checkpoint = small_run / "checkpoints" / "ppo_residual_1024_steps.pt"
    resumed = train(tmp_path, "--resume", str(checkpoint))
    assert_equal_training_state(small_run / "final_model.pt", resumed / "final_model.pt")
    summary = json.loads((resumed / "training_summary.json").read_text())
    assert summary["steps_per_second"] * summary["wall_time_s"] == pytest.approx(3000 - 1024)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_resumes_to_the_bit(tmp_path, signum, code):
    flags = SMALL.replace("--total-timesteps 3000", "--total-timesteps 9000").split()
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), "--log-dir", str(tmp_path / "a"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not list(tmp_path.glob("a/*/checkpoints/*.pt")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    (model,) = tmp_path.glob("a/*/interrupted_model.pt")
    assert f"--resume {model}" in stdout
    assert 1000 < load(model)["global_step"] < 9000
    resumed = train(tmp_path / "b", "--resume", str(model))
    straight = train(tmp_path / "c", *flags)
    assert_equal_training_state(resumed / "final_model.pt", straight / "final_model.pt")
    best = [load(run / "best_model" / "best_model.pt")["agent"]["critic.0.weight"] for run in (resumed, straight)]
    assert torch.equal(*best)


def test_kill_leaves_only_loadable_checkpoints(tmp_path):
    flags = "--total-timesteps 100000 --num-envs 2 --num-steps 32 --minibatch-size 32 --checkpoint-every 64 "
    flags += "--update-epochs 1 --eval-every 0"
    command = [sys.executable, str(ROOT / "ppo_residual_so101.py"), "--log-dir", str(tmp_path), *flags.split()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("*/checkpoints/*.pt"))) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    files = list(tmp_path.rglob("*.pt"))
    assert len(files) >= 20
    assert all(load(file)["global_step"] > 0 for file in files)


# -- evaluation


def test_evaluation_json_and_table(small_run, tmp_path):
    model = str(small_run / "final_model.pt")
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
    assert result["base_success_rate"] == 0.0 and result["base"]["mean_residual_magnitude"] == 0.0
    assert "base alone (zero)" in done.stdout and f"{result['mean_return']:.2f}" in done.stdout
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
    assert frames.shape == (length + 1, 480, 640, 3)
    assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).mean() > 0.1
    assert iio.imread(picture).std() > 10


# -- errors a user can make


def bad_checkpoint(tmp_path: Path, small_run: Path, kind: str) -> str:
    path = tmp_path / "bad.pt"
    if kind == "truncated":
        path.write_bytes((small_run / "final_model.pt").read_bytes()[:5000])
    elif kind == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "other size":
        torch.save({**load(small_run / "final_model.pt"), "obs_dim": 31}, path)
    return str(path)


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--total-timestep 5", "--total-timestep"),
        ("--total-timesteps 0", "--total-timesteps"),
        ("--num-envs -1", "--num-envs"),
        ("--num-envs two", "--num-envs"),
        ("--update-epochs 0", "--update-epochs"),
        ("--minibatch-size 4096", "--minibatch-size"),
        ("--alpha 1.1", "--alpha"),
        ("--base-policy magic", "--base-policy"),
        ("--gamma 2", "--gamma"),
        ("--tape-margin 0.5", "--tape-margin"),
        ("--seed -3", "--seed"),
        ("--no-randomize --full-randomization", "--no-randomize"),
        ("--track", "--track"),
    ],
)
def test_bad_flags(tmp_path, flags, word):
    if word == "--track":
        (tmp_path / "wandb.py").write_text("raise ImportError('not installed')")
    done = run_script(
        "ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), *flags.split(), PYTHONPATH=str(tmp_path)
    )
    assert_refused(done, word)
    if word == "--alpha":
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "logs").rglob("*.pt"))


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "text", "other size"])
def test_bad_checkpoints(small_run, tmp_path, kind):
    path = bad_checkpoint(tmp_path, small_run, kind)
    assert_refused(run_script("eval_so101.py", "--model", path), "--model", path)
    assert_refused(run_script("ppo_residual_so101.py", "--log-dir", str(tmp_path), "--resume", path), "--resume", path)


def test_resume_refuses_another_task_and_a_spent_budget(small_run, tmp_path):
    model = str(small_run / "final_model.pt")
    flags = ["--resume", model, "--log-dir", str(tmp_path / "logs")]
    assert_refused(run_script("ppo_residual_so101.py", *flags, "--tape-margin", "0.02"), "--tape-margin", "0.04")
    assert_refused(run_script("ppo_residual_so101.py", *flags), "--total-timesteps")
    assert not (tmp_path / "logs").exists()


def test_unwritable_log_dir(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "file", tmp_path / "file" / "logs"):
        done = run_script("ppo_residual_so101.py", "--log-dir", str(path), "--total-timesteps", "8")
        assert_refused(done, "--log-dir", str(path))
    assert (tmp_path / "file").read_text() == "not a directory"


def test_evaluation_refuses_what_cannot_work(small_run, tmp_path):
    model = ["--model", str(small_run / "final_model.pt")]
    assert_refused(run_script("eval_so101.py", *model, "--episodes", "0"), "--episodes")
    assert_refused(run_script("eval_so101.py", *model, "--json", str(tmp_path / "no" / "r.json")), "--json")
    assert_refused(run_script("eval_so101.py", *model, "--video", str(tmp_path / "v.avi")), "--video", ".mp4")
    done = run_script("eval_so101.py", *model, "--render-mode", "human", DISPLAY=None, WAYLAND_DISPLAY=None)
    assert_refused(done, "--render-mode human", "--video")
    video = str(tmp_path / "v.mp4")
    done = run_script("eval_so101.py", *model, "--video", video, MUJOCO_GL="egl", PYOPENGL_PLATFORM="glx")
    assert_refused(done, "--video", "EGL")
    assert not os.path.exists(video)
