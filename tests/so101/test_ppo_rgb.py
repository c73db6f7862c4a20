"""PPO from pixels."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, error_of, load, run_script, train
from gymnasium.vector import AutoresetMode

import ppo_residual_so101 as state_trainer
from so101 import ppo_rgb as rgb
from so101.evaluation import evaluate, no_residual
from so101.networks import POSE_SCALE, scaled_measurements
from so101.policies import load_policy
from so101_env import TAPE_CENTER_M, SO101ResidualVectorEnv, sheet_pose
from so101_sim.control import ACT_DIM

SCRIPT = "so101.ppo_rgb"
TINY = (
    "--base-policy jacobian --total-timesteps 1000 --num-envs 8 --num-steps 32 --minibatch-size 65 --update-epochs 2 "
    "--train-episode-steps 60 --checkpoint-every 256 --eval-every 512 --eval-episodes 2 --final-eval-episodes 0 "
    "--actor-image-size 32 --hidden-size 32 --finder-size 32 --finder-epochs 2 --visual-randomization"
).split()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The directory of a finished tiny run, as a user starts it."""
    log_dir = tmp_path_factory.mktemp("rgb")
    done = run_script(SCRIPT, "--log-dir", str(log_dir), *TINY)
    assert done.returncode == 0, done.stderr
    return next(log_dir.iterdir())


@pytest.fixture
def small():
    """An agent, its environments, and what a rollout of it gives."""
    torch.manual_seed(0)
    args = rgb.Args()
    args.ppo.num_envs, args.ppo.train_episode_steps, args.ppo.minibatch_size = 4, 10, 48
    args.networks.actor_image_size = args.networks.finder_size = args.networks.hidden_size = 32
    agent, envs = rgb.Agent(args), rgb.make_envs(args, 4)
    obs, _ = envs.reset(seed=0)
    noise = torch.randn(24, 4, ACT_DIM, generator=torch.Generator().manual_seed(0)).numpy()
    buffers, next_obs, _ = rgb.rollout(agent, envs, obs, noise)
    yield args, agent, envs, buffers, next_obs, noise
    envs.close()


def test_rollout_keeps_what_each_side_sees(small):
    _, agent, envs, buffers, next_obs, noise = small
    true, after, seen = (buffers[name].numpy() for name in ("obs", "real_next_obs", "seen"))
    measured = [*range(12), 22, 23, 24]
    np.testing.assert_array_equal(buffers["state"].numpy(), true[..., measured])
    np.testing.assert_array_equal(seen[..., measured], true[..., measured])
    done = buffers["dones"].numpy().astype(bool)
    assert done.sum() == 8 and done[9].all() and not buffers["terminations"].any()  # time-outs after 10 steps
    np.testing.assert_array_equal(after[:-1][~done[:-1]], true[1:][~done[:-1]])
    assert np.abs(after[:-1][done[:-1]] - true[1:][done[:-1]]).max() > 0.01  # the final one, not the next episode's
    np.testing.assert_array_equal(after[-1], envs.full_observation)
    np.testing.assert_array_equal(next_obs["pixels_top"], envs.observation["pixels_top"])
    # the actor's sheet is where the finder has found it in the picture of the step
    flat = {name: buffers[name].flatten(0, 1) for name in ("pixels_top", "state", "seen", "actions")}
    with torch.no_grad():
        _, pose = agent.finder([flat["pixels_top"]], scaled_measurements(flat["state"].numpy()))
        mean, logstd = agent.get_gaussian(agent.features(flat["seen"].numpy()))
        logprob, _ = agent.get_logprob(agent.features(flat["seen"].numpy()), flat["actions"])
    xy, yaw = sheet_pose(flat["seen"].numpy())
    found = pose.numpy() * POSE_SCALE
    np.testing.assert_allclose(xy, found[:, :2] + TAPE_CENTER_M, atol=1e-5)
    np.testing.assert_allclose(yaw, found[:, 2], atol=1e-5)
    torch.testing.assert_close(
        flat["actions"], mean + torch.from_numpy(noise).flatten(0, 1) * logstd.exp(), atol=1e-4, rtol=1e-4
    )
    normal = torch.distributions.Normal(mean, logstd.exp()).log_prob(flat["actions"]).sum(1)
    torch.testing.assert_close(logprob, normal, atol=1e-4, rtol=1e-4)


def test_the_policy_is_that_of_the_sibling(small):
    """With the sheet where it truly is, and the same weights, actor and critic are those of ppo_residual_so101.py."""
    _, agent, _, buffers, *_ = small
    args = state_trainer.Args()
    args.networks.hidden_size = 32
    sibling = state_trainer.Agent(args)
    sibling.load_state_dict({name: value for name, value in agent.state_dict().items() if "finder" not in name})
    obs = buffers["obs"].flatten(0, 1).numpy()
    with torch.no_grad():
        x, theirs = agent.features(obs), sibling.features(obs)
        assert torch.equal(agent.get_gaussian(x)[0], sibling.get_gaussian(theirs)[0])
        assert torch.equal(agent.get_value(x), sibling.get_value(theirs))


def test_first_update_against_the_formulas(small):
    """One minibatch of everything, where every ratio is 1: gradients by hand, and the sibling's own advantages."""
    args, agent, _, buffers, *_ = small
    args.ppo.update_epochs, args.ppo.minibatch_size, args.ppo.max_grad_norm = 1, 96, 1e9
    parameters = [*agent.actor_mean.parameters(), agent.actor_logstd, *agent.critic.parameters()]
    metrics = rgb.update(
        agent, torch.optim.SGD(parameters, lr=0.0), buffers, args.ppo, torch.Generator().manual_seed(0)
    )
    got = [parameter.grad.clone() for parameter in parameters]
    seen, x, next_x = (agent.features(buffers[name].flatten(0, 1).numpy()) for name in ("seen", "obs", "real_next_obs"))
    with torch.no_grad():
        values, next_values = (agent.get_value(each).view(24, 4) for each in (x, next_x))
    advantages = state_trainer.compute_gae(
        buffers["rewards"], values, next_values, buffers["terminations"], buffers["dones"], args.ppo.gamma,
        args.ppo.gae_lambda,
    ).flatten()  # fmt: skip
    returns = advantages + values.flatten()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logprob, _ = agent.get_logprob(seen, buffers["actions"].flatten(0, 1))
    loss = -(advantages * logprob).mean()  # at a ratio of 1 the gradient of PPO's loss is the policy gradient
    loss = loss + 0.5 * args.ppo.vf_coef * (agent.get_value(x[:, :1]) - returns).square().mean()
    for ours, expected in zip(got, torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-5)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6) and metrics["clip_fraction"] == 0


def test_the_finder_learns_the_true_pose(small):
    """The gradient of both halves together is that of the whole minibatch; and it gets better."""
    args, agent, _, buffers, *_ = small
    args.ppo.finder_epochs, args.ppo.minibatch_size, args.ppo.max_grad_norm = 1, 96, 1e9
    xy, yaw = sheet_pose(buffers["obs"].flatten(0, 1).numpy())
    true = torch.tensor(np.column_stack([xy - TAPE_CENTER_M, yaw]) / POSE_SCALE, dtype=torch.float32)
    measured = scaled_measurements(buffers["state"].flatten(0, 1).numpy())
    parameters = list(agent.finder.parameters())
    _, pose = agent.finder([buffers["pixels_top"].flatten(0, 1)], measured)
    expected = torch.autograd.grad((pose - true).abs().mean(), parameters)
    generator = torch.Generator().manual_seed(0)
    with ThreadPoolExecutor(2) as pool:
        learn = [agent, torch.optim.SGD(parameters, lr=0.0), buffers, args.ppo, generator, pool]
        first = rgb.learn_to_see(*learn)
        for parameter, by_hand in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad, by_hand, rtol=2e-3, atol=2e-5)
        learn[1] = torch.optim.Adam(parameters, lr=3e-3)
        last = [rgb.learn_to_see(*learn) for _ in range(30)][-1]
    off = (pose - true).detach().numpy() * POSE_SCALE
    assert first["position_error_m"] == pytest.approx(np.linalg.norm(off[:, :2], axis=1).mean(), rel=1e-3)
    assert first["yaw_error_rad"] == pytest.approx(np.abs(off[:, 2]).mean(), rel=1e-3)
    assert last["position_error_m"] < 0.5 * first["position_error_m"]


@pytest.mark.slow
def test_every_resume_equals_the_uninterrupted_run_whatever_the_threads(run, tmp_path):
    again = train(tmp_path, "--num-threads", "1", *TINY, script=SCRIPT)
    keys = ("agent", "optimizer", "ranks", "global_step", "recorder")
    whole = load(run / "final_model.pt")
    assert_same({key: load(again / "final_model.pt")[key] for key in keys}, {key: whole[key] for key in keys})
    copy = tmp_path / "copy"
    shutil.copytree(run, copy / "run")
    model = copy / "run" / "checkpoints" / "ppo_rgb_512_steps.pt"
    resumed = train(copy, "--resume", str(model), "--num-threads", "1", script=SCRIPT)
    assert_same({key: load(resumed / "final_model.pt")[key] for key in keys}, {key: whole[key] for key in keys})
    assert_same(
        load(resumed / "best_model" / "best_model.pt")["agent"], load(run / "best_model" / "best_model.pt")["agent"]
    )


@pytest.mark.slow
def test_an_agent_that_sees_is_evaluated_filmed_and_can_be_corrected(run, tmp_path):
    """As a base policy it does what it does as an agent."""
    model, result = str(run / "final_model.pt"), tmp_path / "result.json"
    film = ["--video", str(tmp_path / "film.gif"), "--video-episodes", "1", "--size", "96", "96"]
    done = run_script("eval_so101.py", "--model", model, "--episodes", "3", "--json", str(result), *film)
    assert done.returncode == 0, done.stderr
    agent = json.loads(result.read_text())["episode_list"]
    assert (
        json.loads(result.read_text())["task"]["visual_randomization"] and (tmp_path / "film.gif").stat().st_size > 1000
    )
    task = rgb.Task(visual_randomization=True)
    seeds = [episode["seed"] for episode in agent]
    base = load_policy(f"checkpoint:{model}")
    assert base.cameras == ("top",) and base.image_size == (32, 32)
    envs = SO101ResidualVectorEnv(3, base, task, autoreset_mode=AutoresetMode.DISABLED)
    for ours, theirs in zip(evaluate(no_residual, envs, seeds), agent):
        assert ours["length"] == theirs["length"] and ours["success"] == theirs["success"]
        # base and residual are added up in another order, and contacts enlarge the difference
        assert ours["final_distance_m"] == pytest.approx(theirs["final_distance_m"], abs=1e-6)
    student = run_script(
        "so101.distill", "--model", model, "--log-dir", str(tmp_path / "logs"), "--total-timesteps", "64",
        "--num-envs", "4", "--num-steps", "16", "--updates", "1", "--image-size", "32", "--eval-episodes", "2",
    )  # fmt: skip
    assert student.returncode == 0, student.stderr
    assert ", teacher " in student.stdout


def test_untrained_residual_leaves_every_episode_to_the_base(small):
    args, *_ = small
    args.base.base_policy = "jacobian"
    agent = rgb.Agent(args)
    envs = rgb.make_envs(args, 2)
    obs, _ = envs.reset(seed=0)
    assert obs["state"].shape == (2, 21) and np.abs(obs["state"][:, 15:]).max() > 0
    np.testing.assert_array_equal(agent.act(obs), np.zeros((2, ACT_DIM)))
    envs.close()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--actor-cameras roof", "--actor-cameras roof: give one or more of top and wrist"),
        ("--actor-image-size 4", "--actor-image-size"),
        ("--finder-epochs 0", "--finder-epochs"),
        ("--finder-learning-rate 0", "--finder-learning-rate"),
        pytest.param(
            "--resume MODEL --finder-epochs 5", "--finder-epochs 5: MODEL was trained with 2", marks=pytest.mark.slow
        ),
    ],
)
def test_bad_flags_are_refused(request, tmp_path, monkeypatch, flags, words):
    model = str(request.getfixturevalue("run") / "final_model.pt") if "MODEL" in flags else ""
    line = error_of(
        monkeypatch,
        "so101.ppo_rgb",
        "--log-dir",
        str(tmp_path / "logs"),
        *flags.replace("MODEL", model).split(),
    )
    assert words.replace("MODEL", model) in line and "\n" not in line and not (tmp_path / "logs").exists()
