"""Training runs as a user starts, stops and resumes them: what they write and print."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PYTHON_PATH,
    SMALL,
    assert_equal_best_models,
    assert_equal_training_state,
    assert_same,
    command,
    environment,
    error_of,
    load,
    module_of,
    run_script,
    train,
)

from ppo_residual_so101 import Agent, Args, make_envs
from so101 import recorder
from so101.checkpoints import CHECKPOINT, load_checkpoint, save_tensors
from so101.cli import flat_settings
from so101.distributed import World
from so101.evaluation import VALIDATION_SEED, episode_mean, evaluate
from so101.files import disk_error
from so101.recorder import Recorder
from so101.run_dirs import open_curves, run_dir_of

# -- what a run leaves behind


def test_artefacts(small_run):
    summary = json.loads((small_run / "training_summary.json").read_text())
    assert summary["total_timesteps"] == 3000 and summary["interrupted"] is False
    assert summary["steps_per_second"] == pytest.approx(3000 / summary["wall_time_s"], rel=1e-6)
    assert Path(summary["best_checkpoint"]) == small_run / "best_model" / "best_model.pt"
    assert summary["best_eval_step"] in (1536, 3000) and 0.0 <= summary["best_eval_success_rate"] <= 1.0
    assert summary["ranks"] == 1
    config = json.loads((small_run / "config.json").read_text())
    settings = flat_settings(config["args"])
    assert settings["num_envs"] == 4 and settings["alpha"] == 0.7 and config["script"] == "ppo_residual_so101.py"
    assert config["versions"]["torch"] and config["machine"]["cpus"] >= 1 and set(config["git"]) == {"commit", "dirty"}
    names = sorted(path.name for path in (small_run / "checkpoints").iterdir())
    assert names == [f"ppo_residual_{step}_steps.pt" for step in (1024, 2048, 3000)]  # ends of rollouts
    lines = [json.loads(line) for line in (small_run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1536, 3000]
    final = load(small_run / "final_model.pt")
    assert final["global_step"] == 3000 and final["args"]["ppo"]["num_envs"] == 4
    assert not list(small_run.rglob("*.tmp*"))


def test_the_best_model_is_the_best_on_more_episodes_than_an_evaluation_has(small_run):
    summary = json.loads((small_run / "training_summary.json").read_text())
    envs, seeds = make_envs(Args(), 7, evaluation=True), [VALIDATION_SEED + i for i in range(7)]
    means = {}
    for step in (1536, 3000):  # they cannot be told from each other by three episodes
        path = small_run / "best_model" / f"ppo_residual_{step}_steps.pt"
        episodes = evaluate(load_checkpoint(path).agent(path).act, envs, seeds)
        means[step] = [episode_mean(episodes, key) for key in ("success", "return")]
    best = max(means, key=means.get)
    assert load(small_run / "best_model" / "best_model.pt")["global_step"] == best == summary["best_eval_step"]
    assert summary["best_eval_success_rate"] == pytest.approx(means[best][0]) and summary["best_eval_episodes"] == 7
    final = load(small_run / "final_model.pt")["recorder"]["finalists"]
    worst = min(means, key=means.get)
    lucky = [{"step": step, "success_rate": 0.9 - 0.6 * (step != worst), "mean_return": 0.0} for step in means]
    lucky.sort(key=lambda finalist: -finalist["success_rate"])
    # whatever their order; and no rival is ten episodes of 16 behind
    for finalists, episodes, expected in ((final[::-1], (3, 7), best), (lucky, (16, 64), worst)):
        args = Args()
        args.run.eval_episodes, args.run.final_eval_episodes = episodes
        agent = Agent(args)
        recorder = Recorder("ppo_residual_so101.py", CHECKPOINT, args, agent, envs, envs, checkpoint=dict)
        recorder.finalists = finalists
        for step in means:
            recorder.weights[step] = load(small_run / "best_model" / f"ppo_residual_{step}_steps.pt")["agent"]
        before = copy.deepcopy(agent.state_dict())
        assert recorder._choose_best()["step"] == expected
        assert_same(dict(before), dict(agent.state_dict()))  # the agent is still the last one


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
    assert [event.step for event in series["eval/success_rate"]] == [1536, 3000]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "ppo_residual_so101.py --log-dir" in texts["command/text_summary"]
    assert "|gamma|0.98|" in texts["hyperparameters/text_summary"]
    # the groups are in alphabetical order, capitals first: TensorBoard opens on success over steps
    assert min(series).startswith("Success/") and len(series["Success/training"]) > 3
    assert [event.value for event in series["Success/evaluation"]] == [e.value for e in series["eval/success_rate"]]


def test_what_is_printed_fits_80_columns_and_works_from_here(tmp_path):
    flags = ["--run-name", "mine", "--log-dir", "logs", *SMALL.split()]
    words = [*command("ppo_residual_so101.py"), *flags]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120}
    terminal, own_end = pty.openpty()
    fcntl.ioctl(own_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=own_end, text=True, cwd=tmp_path)
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
    assert first == "training for 3000 steps in 4 environments, base policy zero, seed 1"
    assert second.endswith("logs/mine")
    evaluate_command = last.removeprefix("evaluate: ") + " --episodes 1 --no-base"
    evaluated = subprocess.run(evaluate_command, shell=True, env=environment(PATH=PYTHON_PATH), **options)
    assert evaluated.returncode == 0 and "logs/mine/best_model/best_model.pt" in evaluated.stdout, evaluated.stderr


@pytest.mark.parametrize(
    "budget", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(1003, marks=pytest.mark.slow)]
)
def test_any_budget_runs_and_is_not_exceeded(tmp_path, budget):
    flags = ("--eval-episodes", "2", "--final-eval-episodes", "0")
    run_dir = train(tmp_path, "--total-timesteps", str(budget), *flags)
    steps = json.loads((run_dir / "training_summary.json").read_text())["total_timesteps"]
    assert budget - Args().ppo.num_envs < steps <= budget and steps >= 1


def test_same_seed_same_weights_whatever_the_threads(small_run, tmp_path):
    again = train(tmp_path / "a", *SMALL.split(), "--num-threads", "1")
    assert_equal_training_state(small_run / "final_model.pt", again / "final_model.pt")
    other = train(tmp_path / "b", *SMALL.split(), "--seed", "2", "--total-timesteps", "600", "--eval-every", "0")
    weights = [load(run / "final_model.pt")["agent"]["critic.0.weight"] for run in (small_run, other)]
    assert not torch.equal(*weights)


# -- stopping and going on


@pytest.mark.slow
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
    assert completed.returncode == 0 and "is finished; the resumed run gets" in completed.stdout, completed.stderr
    (last,) = set(again.iterdir()) - {again / "copy"}
    assert last.name == "copy_1"
    assert_equal_training_state(whole / "final_model.pt", last / "final_model.pt")


def interrupt(log_dir: Path, flags: list[str], when: Callable[[Path], bool], signum: int) -> tuple[Path, str]:
    """Train, send a signal when the run's directory is in a state, and return the directory and what was printed."""
    words = [*command("ppo_residual_so101.py"), "--log-dir", str(log_dir), *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not any(when(run) for run in log_dir.glob("*")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signum)
    if signum == signal.SIGHUP:  # system and shell both report that a terminal is closed
        time.sleep(0.02)
        process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signum and "Traceback" not in stderr, stderr
    (run,) = log_dir.glob("*")
    return run, stdout


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGTERM, signal.SIGHUP))]
)
def test_interrupted_run_resumes_exactly(tmp_path, signum):
    flags = [*SMALL.split(), "--total-timesteps", "6000", "--eval-every", "3000"]
    run, stdout = interrupt(tmp_path / "a", flags, lambda run: any((run / "checkpoints").glob("*.pt")), signum)
    model = run / "interrupted_model.pt"
    assert f"--resume {model}" in stdout
    assert 1000 < load(model)["global_step"] < 6000
    resumed, straight = train(tmp_path / "b", "--resume", str(model)), train(tmp_path / "c", *flags)
    assert_equal_training_state(resumed / "final_model.pt", straight / "final_model.pt")
    assert_equal_best_models(resumed, straight)


def test_a_signal_that_comes_while_the_ranks_ask_each_other_is_not_lost(tmp_path):
    """It is not in the answers that they exchange this time, but in those of the next time."""

    class SlowWorld(World):
        during_the_exchange = None

        def gather(self, value):
            values = super().gather(value)
            if self.during_the_exchange:
                signal.raise_signal(self.during_the_exchange)
                self.during_the_exchange = None
            return values

    args, world = Args(), SlowWorld()
    args.run.log_dir, args.run.eval_every = str(tmp_path), 0
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    envs = [make_envs(args, 1), make_envs(args, 1, evaluation=True)]
    try:
        with Recorder("ppo_residual_so101.py", CHECKPOINT, args, Agent(args), *envs, dict, world=world) as recorder:
            world.during_the_exchange = signal.SIGINT
            assert [recorder.stopped() for _ in range(3)] == [False, True, True]
            assert recorder.finish() == 128 + signal.SIGINT
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert list(tmp_path.glob("*/interrupted_model.pt"))


@pytest.mark.slow
def test_a_resumed_run_continues_in_its_directory(tmp_path):
    """Where it stopped: one series of curves and evaluations, and the same name; elsewhere it says why not."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*SMALL.replace("--total-timesteps 3000", "--total-timesteps 9000").split(), "--run-name", "mine"]
    run, _ = interrupt(tmp_path / "a", flags, lambda run: any((run / "checkpoints").glob("*2048*.pt")), signal.SIGTERM)
    stopped = load(run / "interrupted_model.pt")["global_step"]
    (first,) = [path for path in run.glob("checkpoints/*_1024_steps.pt")]
    done = run_script("ppo_residual_so101.py", "--resume", str(first))
    assert f"the run in {run} went further than step 1024; the resumed run gets a directory" in done.stdout
    assert load(tmp_path / "a" / "mine_1" / "final_model.pt")["global_step"] == 9000
    done = run_script("ppo_residual_so101.py", "--resume", str(run / "interrupted_model.pt"))
    assert done.returncode == 0 and f"continuing in {run}" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"mine", "mine_1"}
    assert_equal_training_state(run / "final_model.pt", tmp_path / "a" / "mine_1" / "final_model.pt")
    assert_equal_best_models(run, tmp_path / "a" / "mine_1")
    lines = [json.loads(line)["step"] for line in (run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) and lines[0] == 1536 and lines[-1] == 9000
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/value_loss")]
    assert steps == [*range(256, 9000, 256), 9000] and stopped in steps


@pytest.mark.parametrize("beside", ["nothing", "another score", "another step", "other weights"])
def test_a_lone_checkpoint_can_be_resumed(small_run, tmp_path, beside):
    """Its best models are missing, or those of another run are there, which is printed; training itself is exact."""
    lone = tmp_path / "lone.pt"
    shutil.copy(small_run / "checkpoints" / "ppo_residual_2048_steps.pt", lone)
    if beside != "nothing":
        (own,) = load(lone)["recorder"]["finalists"]
        name = f"ppo_residual_{own['step']}_steps.pt"
        saved = load(small_run / "best_model" / name)
        other = {"finalists": [{**own, "mean_return": own["mean_return"] - 1.0}]}
        saved |= {
            "another score": {"recorder": saved["recorder"] | other},
            "another step": {"global_step": own["step"] + 64},
            "other weights": {"agent": {}},
        }[beside]
        (tmp_path / "best_model").mkdir()
        save_tensors(tmp_path / "best_model" / name, saved)
    done = run_script("ppo_residual_so101.py", "--resume", str(lone), "--log-dir", str(tmp_path / "logs"))
    assert done.returncode == 0 and done.stdout.count("; the best model is chosen without\n") == 1, done.stderr
    (run,) = (tmp_path / "logs").iterdir()
    assert {each["step"] for each in load(run / "final_model.pt")["recorder"]["finalists"]} == {3000}
    states = [load(each / "final_model.pt") for each in (run, small_run)]
    for key in ("agent", "optimizer", "ranks"):
        assert_same(states[0][key], states[1][key], key)


def test_a_lone_checkpoint_goes_on_where_runs_go(small_run, tmp_path, monkeypatch):
    shutil.copy(small_run / "checkpoints" / "ppo_residual_3000_steps.pt", tmp_path / "lone.pt")
    monkeypatch.chdir(tmp_path)
    done = run_script("ppo_residual_so101.py", "--resume", "lone.pt")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "logs").iterdir()
    assert run.name.startswith("ppo_residual_") and {path.name for path in tmp_path.iterdir()} == {"lone.pt", "logs"}


@pytest.mark.parametrize(
    "directory, checkpoint, expected",
    [
        (".", "logs/run/final_model.pt", "logs/run"),
        (".", "logs/run/checkpoints/x.pt", "logs/run"),
        ("logs/run", "interrupted_model.pt", "{root}/logs/run"),
        ("logs/run/checkpoints", "x.pt", "{root}/logs/run"),
        ("logs/run/checkpoints", "../interrupted_model.pt", "{root}/logs/run"),
        ("logs", "run/best_model/x.pt", "run"),
        ("logs", "link.pt", "run"),
        ("logs", "../x.pt", "{root}"),
        ("logs", "other/checkpoints/x.pt", "other"),
    ],
)
def test_the_run_of_a_checkpoint_is_found_from_anywhere(tmp_path, monkeypatch, directory, checkpoint, expected):
    run = tmp_path / "logs" / "run"
    for each in ("checkpoints", "best_model"):
        (run / each).mkdir(parents=True)
        (run / each / "x.pt").touch()
    (tmp_path / "logs" / "link.pt").symlink_to(run / "checkpoints" / "x.pt")
    (other := tmp_path / "logs" / "other").mkdir()
    (other / "checkpoints").symlink_to(tmp_path)  # on another disk
    for each in (run, other):
        (each / "config.json").touch()
    monkeypatch.chdir(tmp_path / directory)
    assert str(run_dir_of(checkpoint)) == expected.format(root=tmp_path)


def test_an_evaluation_that_a_full_disk_ends_is_repeated(small_run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    saving = recorder.save_tensors

    def full(path, content):
        if path.name == "ppo_residual_1536_steps.pt":
            raise disk_error(path, OSError(errno.ENOSPC, "No space left on device"))
        saving(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "save_tensors", full)
        flags = ["--log-dir", str(tmp_path), "--run-name", "run", *SMALL.split()]
        line = error_of(patch, "ppo_residual_so101.py", *flags)
    model = tmp_path / "run" / "interrupted_model.pt"
    assert "No space left" in line and line.endswith(f"resume 1536 steps with --resume {model}")
    done = run_script("ppo_residual_so101.py", "--resume", str(model))
    assert done.returncode == 0 and f"continuing in {model.parent}" in done.stdout, done.stderr
    assert_equal_best_models(tmp_path / "run", small_run)
    assert "missing in" not in done.stdout
    for run in (tmp_path / "run", small_run):
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("Success/evaluation")] == [1536, 3000], run
    evaluations = [run / "eval_results" / "evaluations.jsonl" for run in (tmp_path / "run", small_run)]
    assert evaluations[0].read_text() == evaluations[1].read_text()


def test_the_best_model_of_a_killed_run_is_that_of_the_summary(small_run, tmp_path, monkeypatch):
    """An evaluation after the last checkpoint has made another one the best; the resumed run is stopped before it."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "final_model.pt").unlink()
    first = run / "checkpoints" / "ppo_residual_2048_steps.pt"
    (own,) = load(first)["recorder"]["finalists"]
    for path in (run / "checkpoints" / "ppo_residual_3000_steps.pt", run / "best_model" / "ppo_residual_3000_steps.pt"):
        path.unlink()
    (run / "best_model" / "best_model.pt").write_bytes((small_run / "final_model.pt").read_bytes())
    monkeypatch.setattr(recorder.Recorder, "stopped", lambda self: bool(setattr(self, "stop_signum", 2) or True))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["ppo_residual_so101.py", "--resume", str(first)])
    assert module_of("ppo_residual_so101.py").main() == 130
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["best_eval_step"] == own["step"] == load(run / "best_model" / "best_model.pt")["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("file, step", [("config.json", 0), ("eval_results/evaluations.jsonl", 6400)])
def test_a_run_interrupted_in_its_first_evaluation_or_last_rollout(tmp_path, file, step):
    """The evaluation of a base policy at step 0, and the only rollout with the evaluation after it."""
    flags = (
        "--total-timesteps 6400 --num-steps 200 --eval-every 10000 --eval-episodes 60 --base-policy jacobian".split()
    )

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


@pytest.mark.slow
@pytest.mark.parametrize("last_word, trained", [(b"/", False), (b"success", True)])
def test_a_closed_terminal_stops_the_run_where_it_can_be_resumed(tmp_path, last_word, trained):
    """As `2>&1 | head -c 1` does."""
    words = [*command("ppo_residual_so101.py"), "--log-dir", str(tmp_path)]
    flags = SMALL.replace("--total-timesteps 3000", "--total-timesteps 60000").split()
    flags += ["--base-policy", "jacobian"]  # is evaluated before it trains
    process = subprocess.Popen([*words, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = b""
    while last_word not in seen:
        seen += process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    (model,) = tmp_path.glob("*/interrupted_model.pt")
    steps = load_checkpoint(model).saved["global_step"]
    assert steps < 60000 and (steps > 0) == trained


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("state", ["closed", "full"])
def test_an_output_that_does_not_exist_or_is_full_loses_nothing(tmp_path, stream, state):
    """As `>&-` and `2>&-`, after which the run goes on, and `> /dev/full`, which stops it where it can be resumed."""
    words = shlex.join([*command("ppo_residual_so101.py"), "--log-dir", str(tmp_path), *SMALL.split()])
    number, target = {"stdout": 1, "stderr": 2}[stream], {"closed": "&-", "full": "/dev/full"}[state]
    done = subprocess.run(f"{words} {number}>{target}", shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    name, code = {"closed": ("final_model", 0), "full": ("interrupted_model", 128 + signal.SIGPIPE)}[state]
    assert done.returncode == code and len(list(tmp_path.glob(f"*/{name}.pt"))) == 1


@pytest.mark.slow
def test_a_directory_that_is_removed_meanwhile_is_one_line_and_the_state_is_kept(tmp_path):
    flags = SMALL.replace("--total-timesteps 3000", "--total-timesteps 60000").split()
    words = [*command("ppo_residual_so101.py"), "--log-dir", str(tmp_path), "--run-name", "run", *flags]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("run/checkpoints/*_steps.pt")):  # a temporary file would go while it is removed
        assert process.poll() is None
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "run")
    error = process.communicate(timeout=120)[1].splitlines()
    model = tmp_path / "run" / "interrupted_model.pt"
    assert process.returncode == 2 and "Traceback" not in "".join(error), error
    assert "cannot be written" in error[-1] and f"--resume {model}" in error[-1]
    assert f"resume {load_checkpoint(model).saved['global_step']} steps" in error[-1]


def test_curves_whose_directory_is_gone_raise_only_where_they_are_written(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    writer = open_curves(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError) as error:
        for step in range(100):
            writer.add_scalar("loss", 0.0, step)
            writer.flush()
    assert str(disk_error(error.value.filename, error.value)).startswith(str(tmp_path / "run" / "tensorboard"))
    assert not printed  # by the thread that writes


def test_printed_commands_work_with_any_path(tmp_path, monkeypatch, capsys):
    train(tmp_path / "my runs; $x", "--total-timesteps", "64", "--num-envs", "2", "--minibatch-size", "32")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert Path(words[words.index("--model") + 1]).is_file()


def test_an_output_that_is_full_costs_no_file(tmp_path):
    flags = ["--base-policy", "jacobian", "--episodes", "2", "--plot", "p.png", "--json", "r.json"]
    words = f"{shlex.join([*command('eval_so101.py'), *flags])} > /dev/full"
    env = environment(PYTHONUNBUFFERED="1")
    done = subprocess.run(words, shell=True, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert done.returncode == 2 and "standard output: cannot be written" in done.stderr and "Trace" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"p.png", "r.json"}


def test_half_a_line_of_evaluations_does_not_stop_a_resumed_run(small_run, tmp_path):
    """As a power failure leaves it; another damaged line is named."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "final_model.pt").unlink()
    lines = (run / "eval_results" / "evaluations.jsonl").read_text().splitlines()
    model = max((run / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for damaged, code in ((lines + [lines[-1][:20]], 0), ([lines[0][:20], *lines[1:]], 2)):
        (run / "eval_results" / "evaluations.jsonl").write_text("\n".join(damaged))
        (run / "final_model.pt").unlink(missing_ok=True)
        done = run_script("ppo_residual_so101.py", "--resume", str(model))
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert "evaluations.jsonl: damaged" in done.stderr


@pytest.mark.parametrize("key, value", [("success_rate", None), ("reference_success_rate", 2.0), ("step", "1"), (0, 0)])
def test_an_evaluation_that_cannot_be_is_named(small_run, tmp_path, monkeypatch, key, value):
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / "final_model.pt").unlink()
    model = max((run / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    path = run / "eval_results" / "evaluations.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_bytes(b"\xff\n" if key == 0 else json.dumps({**first, key: value}).encode() + b"\n")
    line = error_of(monkeypatch, "ppo_residual_so101.py", "--resume", str(model))
    assert line.startswith(f"{path}: damaged") and "\n" not in line


SLOW_POLICY = """
import pathlib
from so101.pusher import JacobianPolicy
from so101_env import BasePolicyError

class Slow(JacobianPolicy):
    max_envs, steps = 1, 0

    def act(self, obs, mask):
        self.steps += 1
        if self.steps == 300:
            pathlib.Path("far").touch()
        return super().act(obs, mask)

class Dies(JacobianPolicy):
    steps = 0

    def act(self, obs, mask):
        self.steps += 1
        if self.steps > 70:
            raise BasePolicyError("the server is gone")
        return super().act(obs, mask)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, piped", [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, False)]
)
def test_a_recording_that_is_stopped_keeps_its_complete_episodes(tmp_path, monkeypatch, signum, piped):
    """Also with `| tee log`: Ctrl+C ends tee as well, and nobody reads the output any more."""
    pytest.importorskip("pyarrow")
    (tmp_path / "own_policy.py").write_text(SLOW_POLICY)
    monkeypatch.chdir(tmp_path)
    words = [*command("so101.record"), "--base-policy", "own_policy:Slow", "--dataset", "demos", "--episodes", "100000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)
    while not (tmp_path / "far").exists():
        assert process.poll() is None
        time.sleep(0.01)
    if piped:
        process.stdout.close()
        process.stdout = None
    process.send_signal(signum)
    if signum == signal.SIGHUP:
        time.sleep(0.02)
        process.send_signal(signum)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and not error, error
    info = json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())
    assert info["total_episodes"] >= 1
    assert piped or signum == signal.SIGHUP or f"{info['total_episodes']} complete episodes" in output


def test_a_recording_whose_policy_dies_keeps_its_complete_episodes(tmp_path, monkeypatch):
    """Of the fifty that run at once, those that were over."""
    pytest.importorskip("pyarrow")
    (tmp_path / "own_policy.py").write_text(SLOW_POLICY)
    monkeypatch.chdir(tmp_path)
    done = run_script("so101.record", "--base-policy", "own_policy:Dies", "--dataset", "demos", "--episodes", "200")
    info = json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())
    assert done.returncode == 2 and 1 <= info["total_episodes"] < 50
    words = f"the server is gone; the {info['total_episodes']} complete episodes are in demos"
    assert words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "script",
    ["so101.replay", *(pytest.param(f"{name}_so101.py", marks=pytest.mark.slow) for name in ("ppo_residual", "eval"))],
)
def test_help_into_a_closed_pipe(script):
    words = [*command(script), "--help"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_ctrl_c_while_importing_leaves_no_traceback():
    words = [*command("eval_so101.py"), "--base-policy", "jacobian"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.4)  # NumPy, MuJoCo and PyTorch take longer than that
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """A limit on the size of files stands for the disk: both end a write with an error of the system."""

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    demos, result = tmp_path / "demos", tmp_path / "result.json"
    cases = [
        (
            ["ppo_residual_so101.py", "--log-dir", str(tmp_path / "logs"), *SMALL.split(), "--eval-every", "0"],
            50_000,
            "steps.pt",
        ),
        (["eval_so101.py", "--base-policy", "jacobian", "--episodes", "4", "--json", str(result)], 500, str(result)),
        (["so101.record", "--base-policy", "jacobian", "--episodes", "3", "--dataset", str(demos)], 3000, str(demos)),
    ]
    for (script, *flags), size, word in cases:
        words, options = [*command(script), *flags], {"env": environment(), "preexec_fn": limit(size)}
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, **options)
        error = [line for line in done.stderr.splitlines() if "error" in line]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(error) == 1 and word in error[0] and "File too large" in error[0], done.stderr
        assert ("success rate" in done.stdout) == (script == "eval_so101.py")  # what was measured is shown first
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
    assert not demos.exists() and not result.exists()


@pytest.mark.slow
def test_kill_leaves_only_loadable_checkpoints(tmp_path):
    flags = "--total-timesteps 100000 --num-envs 2 --num-steps 32 --minibatch-size 32 --checkpoint-every 64 "
    flags += "--update-epochs 1 --eval-every 0"
    words = [*command("ppo_residual_so101.py"), "--log-dir", str(tmp_path), *flags.split()]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def complete() -> list[Path]:
        return [path for path in tmp_path.rglob("*.pt") if ".tmp" not in path.name]

    while len(complete()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(complete()) >= 20
    assert all(load(file)["global_step"] > 0 for file in complete())


# -- films


@pytest.mark.slow
def test_capture_video_films_every_evaluation(tmp_path):
    import imageio.v3 as iio

    # an agent that hardly learns: the pusher's short episodes
    flags = "--capture-video --total-timesteps 512 --base-policy jacobian --learning-rate 1e-6 --tape-margin 0.1"
    run = train(tmp_path, *SMALL.split(), *flags.split())
    videos = sorted((run / "eval_results").glob("*.mp4"))
    assert [video.name for video in videos] == ["step_0.mp4", "step_512.mp4"]
    assert all(iio.imread(video).shape[1:] == (480, 640, 3) for video in videos)
