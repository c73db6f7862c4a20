"""Several processes that train as one, started by torchrun as a user does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, assert_equal_best_models, assert_equal_training_state, load, run_script, train

import ppo_residual_so101 as ppo
from so101_env import ACT_DIM
from so101_runs import Processes

TRAINER = str(ROOT / "ppo_residual_so101.py")
NUM_ENVS = 5  # does not share out evenly

# does one update of an agent on its share of a rollout, and writes gradients, weights and metrics
WORKER = f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_processes import learn
learn(sys.argv[1])
"""


def torchrun(*command: str, cwd: Path | None = None, processes: int = 2) -> subprocess.Popen:
    """Start a script in several processes on this machine."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*words, *command], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def learn(directory: str) -> dict:
    """One update on this process's share of directory/rollout.pt, by plain gradient descent."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args, processes = ppo.Args(), Processes()
    args.ppo.minibatch_size, args.ppo.ent_coef = 4, 0.01  # so small that a process has no part in some minibatches
    processes.split(NUM_ENVS)
    agent, gradients = ppo.Agent(args), []
    buffers = {key: value[:, processes.own] for key, value in load(Path(directory) / "rollout.pt").items()}

    class Spy(torch.optim.SGD):
        def step(self, *rest):
            gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
            super().step(*rest)

    optimizer = Spy(agent.parameters(), lr=1e-2)
    metrics = ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator().manual_seed(0), processes)
    result = {"agent": agent.state_dict(), "gradients": torch.stack(gradients), "metrics": metrics}
    torch.save(result, Path(directory) / f"rank_{processes.rank}_of_{processes.count}.pt")
    return result


def test_two_processes_learn_what_one_does(tmp_path):
    """On the union of their environments' data: the same gradients, weights and metrics."""
    args = ppo.Args()
    envs = ppo.make_envs(args, NUM_ENVS)
    noise = np.random.default_rng(0).normal(size=(12, NUM_ENVS, ACT_DIM)).astype(np.float32)
    torch.save(ppo.rollout(ppo.Agent(args), envs, envs.reset(seed=0)[0], noise)[0], tmp_path / "rollout.pt")
    one = learn(str(tmp_path))
    (tmp_path / "worker.py").write_text(WORKER)
    started = torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    assert started.wait(100) == 0, started.stderr.read()
    first, second = (load(tmp_path / f"rank_{rank}_of_2.pt") for rank in (0, 1))
    for key, value in first["agent"].items():
        assert torch.equal(value, second["agent"][key]), key
        torch.testing.assert_close(value, one["agent"][key], atol=1e-5, rtol=0)  # a hundred and twenty steps
    assert len(first["gradients"]) == len(one["gradients"]) == 8 * 15
    torch.testing.assert_close(first["gradients"][0], one["gradients"][0], atol=1e-6, rtol=0)
    assert one["gradients"][0].abs().max() > 1e-2
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(one["metrics"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_are_interrupted_and_resumed(tmp_path):
    """By two, to the bit as if never stopped, best model included; by one, to the same end but for rounding."""
    flags = [*SMALL.replace("--num-envs 4", "--num-envs 33").split(), "--total-timesteps", "15000"]
    flags += ["--train-episode-steps", "40"]
    whole = torchrun(TRAINER, *flags, "--log-dir", str(tmp_path / "whole"))
    assert whole.wait(200) == 0, whole.stderr.read()
    # in their first rollout the environments of two processes do what those of one do: same starts, same noise
    one = load(train(tmp_path / "one", *flags, "--total-timesteps", "2112") / "final_model.pt")
    two = load(next(tmp_path.glob("whole/*/checkpoints/*_2112_steps.pt")))
    assert one["envs"]["rngs"] == two["envs"]["rngs"]
    torch.testing.assert_close(one["next_obs"], two["next_obs"], atol=1e-2, rtol=0)  # networks round by batch size
    stopped = torchrun(TRAINER, *flags, "--log-dir", str(tmp_path / "stopped"))
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("stopped/*/checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    stdout, stderr = stopped.communicate(timeout=100)
    assert list(tmp_path.glob("stopped/*/interrupted_model.pt")), stdout + stderr
    (model,) = tmp_path.glob("stopped/*/interrupted_model.pt")
    assert 0 < load(model)["global_step"] < 14_000 and "resume:" in stdout and stdout.count("steps in") == 2, stdout
    resumed = torchrun(TRAINER, "--resume", str(model), "--log-dir", str(tmp_path / "resumed"))
    assert resumed.wait(200) == 0, resumed.stderr.read()
    runs = [next((tmp_path / name).iterdir()) for name in ("whole", "resumed")]
    assert_equal_training_state(*(run / "final_model.pt" for run in runs))
    assert_equal_best_models(*runs)
    alone = load(train(tmp_path / "alone", "--resume", str(model)) / "final_model.pt")
    last = load(runs[0] / "final_model.pt")
    assert alone["global_step"] == last["global_step"] and alone["next_obs"].shape == last["next_obs"].shape
    assert torch.equal(alone["generator"], last["generator"])


# rests, until it fails, in the second process only
FAILING_BASE = """
import os, signal
from so101_env import BasePolicyError
from so101_policies import BasePolicy

class Failing(BasePolicy):
    calls = 0

    def __init__(self, how):
        self.how = how

    def act(self, obs, mask):
        self.calls += 1
        if self.calls == 200 and os.environ["RANK"] == "1":
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise BasePolicyError("out of paper")
        return 0.0 * obs["command"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "killed"])
def test_what_ends_one_process_ends_all_with_one_line(tmp_path, how):
    (tmp_path / "failing.py").write_text(FAILING_BASE)
    flags = [*SMALL.split(), "--log-dir", "logs", "--base-policy", f"failing:Failing:{how}", "--eval-every", "0"]
    flags += ["--checkpoint-every", "300"]
    started = torchrun(TRAINER, *flags, cwd=tmp_path)
    stdout, stderr = started.communicate(timeout=100)
    lines = [line for line in stderr.split("\n") if "ppo_residual_so101.py: error:" in line]
    assert started.returncode != 0 and len(lines) == 1, stderr
    if how == "fails":
        (model,) = tmp_path.glob("logs/*/interrupted_model.pt")
        assert "out of paper" in lines[0] and f"--resume {model.relative_to(tmp_path)}" in lines[0]
        # call 1 is that of reset, so call 200 is step 199, in the fourth rollout of 64 steps of 4 environments
        assert load(model)["global_step"] == 3 * 64 * 4
    else:
        assert "another process of this run was lost" in lines[0] and "--resume" in lines[0]
        steps = [load(path)["global_step"] for path in tmp_path.glob("logs/*/checkpoints/*.pt")]
        assert sorted(steps) == [512, 768]


def test_a_refusal_is_said_once(tmp_path):
    for flags, words in ((["--gamma", "3"], "--gamma must be"), (["--num-envs", "1"], "1 environments are too few")):
        flags = [*flags, "--minibatch-size", "8", "--log-dir", str(tmp_path / "logs")]
        started = torchrun(TRAINER, *flags)
        stdout, stderr = started.communicate(timeout=100)
        assert started.returncode != 0 and stderr.count("error:") == stderr.count(words) == 1, stderr
    started = torchrun(TRAINER, "--help")
    stdout, stderr = started.communicate(timeout=100)
    assert started.returncode == 0 and stdout.count("usage: ") == 1, stderr
    assert not (tmp_path / "logs").exists()


def test_one_process_needs_no_torchrun(small_run, tmp_path):
    """One process under torchrun: to the bit what a plain run does."""
    started = torchrun(TRAINER, *SMALL.split(), "--log-dir", str(tmp_path), processes=1)
    assert started.wait(100) == 0, started.stderr.read()
    (run,) = tmp_path.iterdir()
    assert_equal_training_state(small_run / "final_model.pt", run / "final_model.pt")
    assert run_script("eval_so101.py", "--model", str(run / "final_model.pt"), "--episodes", "2").returncode == 0
