"""Training in several ranks, started by torchrun as a user does."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    assert_equal_best_models,
    assert_equal_training_state,
    environment,
    error_of,
    load,
    run_script,
)

import ppo_residual_so101 as ppo
from so101 import cli
from so101.distributed import World
from so101.torchrun import is_launched, is_main
from so101_env import ACT_DIM, SO101Error

TRAINER = str(ROOT / "ppo_residual_so101.py")

# does one update of an agent on its rank's rollout, and writes gradients, weights and metrics
WORKER = f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "so101")!r}]
from test_distributed import learn
from so101.distributed import World
world = World()
learn(sys.argv[1], world, world.rank)
"""


def torchrun(*command: str, cwd: Path | None = None, ranks: int = 2) -> subprocess.Popen:
    """Start a script in several ranks on this machine."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*words, *command], cwd=cwd, env=environment(OMP_NUM_THREADS="1"), **pipes)


def learn(directory: str, world: World, rollout: int) -> dict:
    """One update on directory/rollout_N.pt by plain gradient descent; writes rank_N_of_SIZE.pt."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = ppo.Args()
    args.ppo.minibatch_size, args.ppo.ent_coef = 16 * world.size, 0.01
    args.ppo.max_grad_norm = 1e6  # gradients as they are
    agent, gradients = ppo.Agent(args), []

    class Spy(torch.optim.SGD):
        def step(self, *rest):
            gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
            super().step(*rest)

    optimizer, generator = Spy(agent.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    metrics = ppo.update(agent, optimizer, load(Path(directory) / f"rollout_{rollout}.pt"), args.ppo, generator, world)
    result = {"agent": agent.state_dict(), "gradients": torch.stack(gradients), "metrics": metrics}
    torch.save(result, Path(directory) / f"rank_{rollout}_of_{world.size}.pt")
    return result


def test_shares_must_be_whole():
    world = World()
    world.size = 3
    assert world.share(96, "--num-envs") == 32
    with pytest.raises(SO101Error, match="--num-envs 32: must be divisible by the number of ranks, 3"):
        world.share(32, "--num-envs")


@pytest.mark.parametrize("size", ["4", pytest.param("", marks=pytest.mark.slow)])
def test_variables_of_a_cluster_without_torchrun_are_ignored(tmp_path, size):
    """As Slurm, or a shell profile, leaves them: no waiting for ranks that nobody has started."""
    flags = ["--total-timesteps", "64", "--num-steps", "16", "--minibatch-size", "64", "--eval-every", "0"]
    variables = {"WORLD_SIZE": size, "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    done = run_script("ppo_residual_so101.py", *flags, "--log-dir", str(tmp_path), **variables)
    assert done.returncode == 0 and len(list(tmp_path.glob("*/final_model.pt"))) == 1, done.stderr
    assert done.stdout.count("WORLD_SIZE is ignored") == bool(size)


@pytest.mark.parametrize(
    "change",
    [
        {"WORLD_SIZE": ""}, {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": None}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "2.0"},
        {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "\u0662"}, {"RANK": ""}, {"RANK": "abc"}, {"RANK": None}, {"RANK": "2"},
        {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": None}, {"MASTER_PORT": "x"}, {"MASTER_PORT": "70000"},
        {"MASTER_PORT": None}, {"MASTER_ADDR": ""}, {"MASTER_ADDR": None},
    ],
    ids=str,
)  # fmt: skip
def test_variables_that_are_not_torchruns_are_named(monkeypatch, change):
    good = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", **good, **change}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert not is_launched() and is_main()  # so that this process prints the error
    line = error_of(monkeypatch, "ppo_residual_so101.py")
    assert "unset TORCHELASTIC_RUN_ID" in line and "\n" not in line


def test_a_frozen_layer_has_no_gradient_to_average(monkeypatch):
    world = World()
    world.size = 2
    monkeypatch.setattr(world, "_call", lambda function, flat: flat.mul_(3.0))  # the other rank's are twice as large
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    layers[0].requires_grad_(False)
    layers(torch.ones(1, 2)).sum().backward()
    alone = [parameter.grad.clone() for parameter in layers[1].parameters()]
    world.average_gradients(layers.parameters())
    assert all(parameter.grad is None for parameter in layers[0].parameters())
    for parameter, gradient in zip(layers[1].parameters(), alone):
        torch.testing.assert_close(parameter.grad, 1.5 * gradient)


def test_two_ranks_average_their_gradients(tmp_path):
    """The first gradient is the mean of those that each rank's rollout gives alone, and the weights stay the same."""
    args = ppo.Args()
    envs = ppo.make_envs(args, 4)
    obs, _ = envs.reset(seed=0)
    for rank in (0, 1):
        noise = np.random.default_rng(rank).normal(size=(12, 4, ACT_DIM)).astype(np.float32)
        buffers, obs, _ = ppo.rollout(ppo.Agent(args), envs, obs, noise)
        torch.save(buffers, tmp_path / f"rollout_{rank}.pt")
    alone = [learn(str(tmp_path), World(), rank) for rank in (0, 1)]
    (tmp_path / "worker.py").write_text(WORKER)
    started = torchrun(str(tmp_path / "worker.py"), str(tmp_path))
    assert started.wait(100) == 0, started.stderr.read()
    first, second = (load(tmp_path / f"rank_{rank}_of_2.pt") for rank in (0, 1))
    for key, value in first["agent"].items():
        assert torch.equal(value, second["agent"][key]), key
    assert torch.equal(first["gradients"], second["gradients"])
    assert len(first["gradients"]) == len(alone[0]["gradients"]) == 8 * 3
    mean = (alone[0]["gradients"][0] + alone[1]["gradients"][0]) / 2
    assert not torch.allclose(alone[0]["gradients"][0], alone[1]["gradients"][0], atol=1e-3)
    torch.testing.assert_close(first["gradients"][0], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (TRAINER, "--num-envs 5", "--num-envs 5: must be divisible"),
        pytest.param(TRAINER, "--gamma 3", "--gamma must be", marks=pytest.mark.slow),
        pytest.param("-m so101.distill", "", "start it without torchrun", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(tmp_path, script, flags, words):
    if script == TRAINER:
        flags += f" --minibatch-size 8 --log-dir {tmp_path / 'logs'}"
    started = torchrun(*script.split(), *flags.split(), cwd=ROOT)
    stdout, stderr = started.communicate(timeout=100)
    assert started.returncode != 0 and stderr.count("error:") == stderr.count(words) == 1, stderr
    assert not (tmp_path / "logs").exists()


def test_an_error_that_rank_0_does_not_report_is_printed_later(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(cli, "is_main", lambda: False)
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    handler = signal.getsignal(signal.SIGINT)

    def main():
        raise SO101Error("only this machine lacks the file")

    try:
        assert cli.run_script(main) == 2
    finally:
        signal.signal(signal.SIGINT, handler)
    assert waits == [cli.RANK_0_S] and "error: only this machine lacks the file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_of_all_ranks_is_printed_once():
    started = torchrun(TRAINER, "--help")
    stdout, stderr = started.communicate(timeout=100)
    assert started.returncode == 0 and stdout.count("usage: ") == 1, stderr


@pytest.mark.slow
def test_one_rank_is_a_plain_run(small_run, tmp_path):
    """One process under torchrun is bit-identical to a plain run."""
    started = torchrun(TRAINER, *SMALL.split(), "--log-dir", str(tmp_path), ranks=1)
    assert started.wait(100) == 0, started.stderr.read()
    (run,) = tmp_path.iterdir()
    assert_equal_training_state(small_run / "final_model.pt", run / "final_model.pt")


@pytest.mark.slow
def test_two_ranks_are_interrupted_and_resumed(tmp_path):
    """By two ranks exactly as if never stopped, best model included; another number of ranks is an error."""
    flags = [*SMALL.split(), "--total-timesteps", "15000", "--train-episode-steps", "40"]
    whole = torchrun(TRAINER, *flags, "--log-dir", str(tmp_path / "whole"))
    assert whole.wait(200) == 0, whole.stderr.read()
    stopped = torchrun(TRAINER, *flags, "--log-dir", str(tmp_path / "stopped"))
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("stopped/*/checkpoints/*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    stdout, stderr = stopped.communicate(timeout=100)
    assert list(tmp_path.glob("stopped/*/interrupted_model.pt")), stdout + stderr
    (model,) = tmp_path.glob("stopped/*/interrupted_model.pt")
    assert 0 < load(model)["global_step"] < 14_000 and "resume:" in stdout and stdout.count("steps in") == 2, stdout
    alone = run_script("ppo_residual_so101.py", "--resume", str(model))
    assert alone.returncode == 2 and "it was written by 2 ranks, and 1 resume it" in alone.stderr
    resumed = torchrun(TRAINER, "--resume", str(model))
    assert resumed.wait(200) == 0, resumed.stderr.read()
    runs = [next((tmp_path / name).iterdir()) for name in ("whole", "stopped")]
    assert_equal_training_state(*(run / "final_model.pt" for run in runs))
    assert_equal_best_models(*runs)
    states = load(runs[0] / "final_model.pt")["ranks"]
    assert len(states) == 2 and not torch.equal(states[0]["envs"]["_obs"], states[1]["envs"]["_obs"])
    assert json.loads((runs[0] / "training_summary.json").read_text())["ranks"] == 2


# rests, until it fails, in rank 1 only
FAILING_BASE = """
import os, signal
from so101_env import BasePolicyError
from so101.base import BasePolicy

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
def test_a_lost_rank_ends_all_with_one_line_each(tmp_path, how):
    """And the run can be resumed from before the iteration in which it was lost."""
    (tmp_path / "failing.py").write_text(FAILING_BASE)
    flags = [*SMALL.split(), "--log-dir", "logs", "--base-policy", f"failing:Failing:{how}", "--eval-every", "0"]
    started = torchrun(TRAINER, *flags, cwd=tmp_path)
    stdout, stderr = started.communicate(timeout=100)
    lines = [line for line in stderr.split("\n") if "ppo_residual_so101.py: error:" in line]
    assert started.returncode != 0, stderr
    own = [line for line in lines if "rank 1: --base-policy failing:Failing:fails: out of paper" in line]
    lost = [line for line in lines if "a rank of this run was lost" in line]
    assert len(own) == (how == "fails") and len(lost) <= 1 and len(lines) == len(own) + len(lost), stderr
    if lost:  # torchrun may end rank 0 before it notices
        (model,) = tmp_path.glob("logs/*/interrupted_model.pt")
        assert f"--resume {model.relative_to(tmp_path)}" in lost[0]
        # call 1 is that of reset, so call 200 is step 199, in the fourth rollout of 64 steps of 2 environments a rank
        assert load(model)["global_step"] == 3 * 64 * 4
