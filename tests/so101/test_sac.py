"""SAC: its buffer, its losses against the formulas, exact resume, and residuals on a base policy."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, error_of, load, run_script, train

from so101 import sac
from so101_sim.control import ACT_DIM, JOINT_MIRROR

SCRIPT = "so101.sac"
TINY = (
    "--total-timesteps 700 --num-envs 2 --learning-starts 100 --batch-size 32 --hidden-size 16 --updates-per-step 2 "
    "--train-episode-steps 40 --checkpoint-every 256 --eval-every 384 --eval-episodes 2 "
    "--final-eval-episodes 0"
).split()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The directory of a finished tiny run on a base policy, as a user starts it; its buffer overflows."""
    log_dir = tmp_path_factory.mktemp("sac")
    flags = ["--base-policy", "jacobian", "--observe-base", "--buffer-size", "1000", "--total-timesteps", "1300"]
    done = run_script(SCRIPT, "--log-dir", str(log_dir), *TINY, *flags)
    assert done.returncode == 0, done.stderr
    return next(log_dir.iterdir())


def filled(rows: int, capacity: int, seed: int = 0) -> tuple[sac.ReplayBuffer, list[dict[str, torch.Tensor]]]:
    """A buffer of two environments, and every row that was added. x counts the steps of an environment."""
    rng, buffer, added = torch.Generator().manual_seed(seed), sac.ReplayBuffer(capacity, 2, 1), []
    for number in range(rows):
        x = torch.tensor([[number], [number + 1000]], dtype=torch.float32)
        dones = torch.rand(2, generator=rng) < 0.2
        row = {"x": x, "next_x": x + 0.5, "actions": x.expand(2, ACT_DIM) / 1e4, "dones": dones}
        row |= {"rewards": torch.rand(2, generator=rng), "terminations": dones & (torch.rand(2, generator=rng) < 0.5)}
        buffer.add(**row)
        added.append(row)
    return buffer, added


@pytest.mark.parametrize("capacity", [40, 17])
def test_n_step_returns_equal_those_of_a_loop(capacity):
    buffer, added = filled(30, capacity)
    batch = buffer.sample(4000, 3, 0.9, torch.Generator().manual_seed(1))
    oldest, seen = 30 - min(30, capacity), set()
    for i in range(4000):
        column, number = divmod(int(batch["x"][i]), 1000)
        seen.add((column, number))
        expected, weight = 0.0, 1.0
        for at in range(number, min(number + 3, 30)):
            expected, weight, row = expected + weight * float(added[at]["rewards"][column]), 0.9 * weight, added[at]
            if row["dones"][column]:
                break
        assert float(batch["rewards"][i]) == pytest.approx(expected, abs=1e-5)
        assert float(batch["next_x"][i]) == float(row["next_x"][column])
        assert float(batch["discounts"][i]) == pytest.approx(weight * (not row["terminations"][column]), abs=1e-6)
        torch.testing.assert_close(batch["actions"][i], added[number]["actions"][column])
    assert seen == {(column, number) for column in (0, 1) for number in range(oldest, 30)}


def test_a_share_of_the_samples_comes_from_the_first_rows_while_they_are_kept():
    for capacity, share in ((40, 0.5), (25, 0.5), (12, 0.0)):
        buffer, _ = filled(30, capacity)
        x = buffer.sample(8000, 1, 0.9, torch.Generator().manual_seed(2), first_rows=10, share=0.5)["x"] % 1000
        assert float((x < 10).float().mean()) == pytest.approx(share, abs=0.03)


def test_a_restored_buffer_gives_the_same_samples():
    for capacity in (40, 17):
        buffer, _ = filled(30, capacity)
        other = sac.ReplayBuffer(capacity + 5 if capacity == 40 else capacity, 2, 1)
        other.load_state_dict(buffer.newest(buffer.size), buffer.rows)
        ours, theirs = (each.sample(64, 3, 0.9, torch.Generator().manual_seed(3), 10, 0.5) for each in (buffer, other))
        assert_same(ours, theirs)
    with pytest.raises(ValueError, match="incomplete"):
        other.load_state_dict(buffer.newest(5), buffer.rows)


@pytest.fixture
def small():
    """An agent with weights that are not those of the start, its settings, and a buffer of its own steps."""
    torch.manual_seed(0)
    args = sac.Args()
    args.networks.hidden_size, args.sac.learning_starts, args.sac.batch_size = 32, 40, 24
    args.base.base_policy, args.base.observe_base = "jacobian", True
    agent = sac.Agent(args)
    for parameter in agent.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    envs = sac.make_envs(args, 2)
    buffer = sac.ReplayBuffer(60, 2, agent.features.dim)
    obs, _ = envs.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    args.sac.updates_per_step = 1
    optimizers = {name: torch.optim.SGD(group, lr=0.0) for name, group in groups_of(agent).items()}
    sac.iterate(agent, optimizers, envs, obs, buffer, args, 60, generator)
    yield args, agent, buffer
    envs.close()


def groups_of(agent: sac.Agent) -> dict[str, list]:
    optimizers = sac.make_optimizers(agent, sac.SAC())
    return {name: optimizer.param_groups[0]["params"] for name, optimizer in optimizers.items()}


def test_the_base_acts_alone_until_learning_starts(small):
    args, agent, buffer = small
    rows = buffer.newest(60)
    assert rows["actions"][:20].abs().max() == 0 and rows["actions"][20:].abs().min() > 0
    assert not torch.equal(rows["x"][1:30], rows["x"][:29])  # the pusher moves the arm
    going_on = ~rows["dones"][:-1]
    torch.testing.assert_close(rows["x"][1:][going_on], rows["next_x"][:-1][going_on])


def test_random_actions_before_learning_are_held():
    """Each for ten steps, also where the curves get an entry within them."""
    args = sac.Args()
    args.networks.hidden_size, args.sac.learning_starts = 16, 90
    agent, envs, generator = sac.Agent(args), sac.make_envs(args, 2), torch.Generator().manual_seed(0)
    buffer, obs = sac.ReplayBuffer(45, 2, agent.features.dim), envs.reset(seed=0)[0]
    for steps in (15, 30):
        obs, *_ = sac.iterate(agent, {}, envs, obs, buffer, args, steps, generator)
    envs.close()
    actions = buffer.newest(45)["actions"]
    assert [row for row in range(1, 45) if not torch.equal(actions[row], actions[row - 1])] == [10, 20, 30, 40]
    assert actions.abs().max() > 0.9 and not torch.equal(actions[:, 0], actions[:, 1])


def test_losses_and_gradients_against_the_formulas(small):
    """One update with a learning rate of zero: its gradients, by torch.distributions and sums over samples."""
    args, agent, buffer = small
    groups = groups_of(agent)
    optimizers = {name: torch.optim.SGD(group, lr=0.0) for name, group in groups.items()}
    target_critics = copy.deepcopy(agent.target_critics)
    metrics = sac.update(agent, optimizers, buffer, args.sac, 1, 20, torch.Generator().manual_seed(5))
    got = {name: [parameter.grad.clone() for parameter in group] for name, group in groups.items()}

    generator, size = torch.Generator().manual_seed(5), args.sac.batch_size
    batch = buffer.sample(size, args.sac.n_step, args.sac.gamma, generator, 20, args.sac.base_batch)
    view = torch.randint(2, (size,), generator=generator)
    assert 0 < view.sum() < size
    noise = torch.randn(2, size, ACT_DIM, generator=generator)
    mirror = torch.where(view[:, None] == 1, torch.tensor(np.array(JOINT_MIRROR), dtype=torch.float32), 1.0)
    signs = agent.features.signs[view]
    x, next_x, actions = batch["x"] * signs, batch["next_x"] * signs, batch["actions"] * mirror

    def draw(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logstd = agent.get_gaussian(agent.actor, x)
        raw = (mean + noise * logstd.exp()).double()
        logprob = torch.distributions.Normal(mean.double(), logstd.exp().double()).log_prob(raw)
        logprob = (logprob - torch.log(1 - torch.tanh(raw) ** 2)).sum(-1)  # change of variables
        return torch.tanh(raw).float(), logprob.float()

    def q(critics, x, action):
        return [critic(torch.cat([x, action], 1))[:, 0] for critic in critics]

    alpha = math.exp(float(agent.log_alpha.detach()))
    with torch.no_grad():
        next_action, next_logprob = draw(next_x, noise[0])
        values = torch.minimum(*q(target_critics, next_x, next_action)) - alpha * next_logprob
        target = args.sac.reward_scale * batch["rewards"] + batch["discounts"] * values
    loss = sum(((value - target) ** 2).mean() / 2 for value in q(agent.critics, x, actions))
    expected = torch.autograd.grad(loss, groups["critics"])
    torch.testing.assert_close(got["critics"], list(expected), rtol=1e-3, atol=1e-5)
    assert metrics["critic_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    action, logprob = draw(x, noise[1])
    policy_loss = (alpha * logprob - torch.minimum(*q(agent.critics, x, action))).mean()
    expected = torch.autograd.grad(policy_loss, [*agent.actor.parameters()])
    torch.testing.assert_close(got["actor"][:-1], list(expected), rtol=1e-3, atol=1e-5)
    # the weight falls where the entropy is above its target
    assert float(got["actor"][-1]) == pytest.approx(metrics["entropy"] - args.sac.target_entropy, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(-float(logprob.detach().mean()), rel=1e-4)


def test_target_critics_and_mean_actor_follow_as_in_single_steps(small):
    args, agent, buffer = small
    optimizers = {name: torch.optim.SGD(group, lr=0.0) for name, group in groups_of(agent).items()}
    for follower, leader, tau in (("target_critics", "critics", args.sac.tau), ("mean_actor", "actor", 0.01)):
        follower, leader = getattr(agent, follower), getattr(agent, leader)
        for parameter in leader.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        before = [parameter.clone() for parameter in follower.parameters()]
        sac.update(agent, optimizers, buffer, args.sac, 3, 0, torch.Generator().manual_seed(0))
        for old, new, followed in zip(before, follower.parameters(), leader.parameters()):
            for _ in range(3):
                old = old + tau * (followed - old)
            torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-4)


def test_the_mean_actor_acts_and_the_actor_explores(small):
    _, agent, _ = small
    obs = np.random.default_rng(0).uniform(-0.3, 0.3, (3, len(agent.features.obs_mean))).astype(np.float32)
    acts, explores = agent.act(obs), agent.explore(obs, torch.zeros(3, ACT_DIM))
    for parameter in agent.actor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    np.testing.assert_array_equal(agent.act(obs), acts)
    assert np.abs(agent.explore(obs, torch.zeros(3, ACT_DIM)) - explores).min() > 0
    agent.mean_actor.load_state_dict(agent.actor.state_dict())
    np.testing.assert_allclose(agent.act(obs), agent.explore(obs, torch.zeros(3, ACT_DIM)), atol=1e-6)


def test_the_mirror_image_of_a_scene_gets_the_mirror_image_of_the_action():
    torch.manual_seed(0)
    args = sac.Args()
    agent = sac.Agent(args)
    x = torch.randn(5, 1, agent.features.dim) * agent.features.signs
    flipped = x.flip(1)
    torch.testing.assert_close(
        agent.get_action(flipped), agent.get_action(x) * agent.features.action_signs[1], atol=1e-6, rtol=0
    )
    assert agent.get_action(x).abs().max() > 0


def test_untrained_residual_leaves_every_episode_to_the_base():
    args = sac.Args()
    args.base.base_policy = "jacobian"
    agent, envs = sac.Agent(args), sac.make_envs(args, 2)
    np.testing.assert_array_equal(agent.act(envs.reset(seed=0)[0]), np.zeros((2, ACT_DIM)))
    envs.close()


@pytest.mark.slow
def test_every_resume_equals_the_uninterrupted_run_whatever_the_threads(run, tmp_path):
    """Also with a buffer that has lost its oldest steps."""
    keys, whole = ("agent", "optimizer", "ranks", "global_step", "recorder"), load(run / "final_model.pt")
    for steps in (600, 1100):  # before and after the buffer is full
        folder = tmp_path / str(steps)
        shutil.copytree(run, folder / "run")
        model = folder / "run" / "checkpoints" / f"sac_{steps}_steps.pt"
        resumed = train(folder, "--resume", str(model), "--num-threads", "1", script=SCRIPT)
        assert_same({key: load(resumed / "final_model.pt")[key] for key in keys}, {key: whole[key] for key in keys})


@pytest.mark.slow
def test_an_agent_is_evaluated_exported_and_can_be_corrected(run, tmp_path):
    model, files = str(run / "final_model.pt"), [tmp_path / f"{name}.json" for name in ("agent", "onnx", "base")]
    policy = str(tmp_path / "policy.onnx")
    done = run_script("eval_so101.py", "--model", model, "--export", policy)
    assert done.returncode == 0, done.stderr
    for flags, file in zip((("--model", model), ("--model", policy), ("--base-policy", f"checkpoint:{model}")), files):
        done = run_script("eval_so101.py", *flags, "--episodes", "4", "--no-base", "--json", str(file))
        assert done.returncode == 0, done.stderr
    agent, onnx, base = (json.loads(file.read_text())["episode_list"] for file in files)
    assert [episode["length"] for episode in base] == [episode["length"] for episode in agent]
    for exported, own in zip(onnx, agent, strict=True):  # ONNX Runtime rounds differently, by 1e-7 in each step
        assert exported["success"] == own["success"] and abs(exported["length"] - own["length"]) <= 2
        assert exported["final_distance_m"] == pytest.approx(own["final_distance_m"], abs=1e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--observe-base", "--observe-base needs a base policy"),
        ("--tau 0", "--tau"),
        ("--n-step 0", "--n-step"),
        ("--buffer-size 10", "--buffer-size"),
        ("--base-batch 1", "--base-batch"),
        ("--total-timesteps 500", "--learning-starts 500: nothing is learned within 500 steps"),
        ("--total-timesteps 1000000000 --buffer-size 900000000", "--buffer-size"),
        ("--update-epochs 3", "--update-epochs: there is no such flag"),
        pytest.param("--resume MODEL --gamma 0.9", "--gamma 0.9: MODEL was trained with", marks=pytest.mark.slow),
    ],
)
def test_bad_flags_are_refused(request, tmp_path, monkeypatch, flags, words):
    model = str(request.getfixturevalue("run") / "final_model.pt") if "MODEL" in flags else ""
    words = words.replace("MODEL", model)
    line = error_of(monkeypatch, SCRIPT, "--log-dir", str(tmp_path / "logs"), *flags.replace("MODEL", model).split())
    assert words in line and "\n" not in line and not (tmp_path / "logs").exists()
