"""The mathematics of PPO against independent versions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ppo_residual_so101 as ppo
from so101.distributed import World
from so101.networks import SHEET_TO_TIP, Features, contact, expected_yaw, sheet_to_tip
from so101_env import ACT_DIM, HOME_RAD, OBS_DIM, OBSERVATION, SHEET_HALF_M, SO101ResidualVectorEnv

SB3_GAE = Path(__file__).parent / "data" / "sb3_gae.npz"


def random_rollout(seed: int, num_steps: int = 40, n: int = 3) -> dict[str, np.ndarray]:
    """Made-up rewards and values with terminated and truncated episode ends."""
    rng = np.random.default_rng(seed)
    terminations = rng.random((num_steps, n)) < 0.08
    truncations = (rng.random((num_steps, n)) < 0.08) & ~terminations
    truncations[-1, 0], terminations[-1, 0], terminations[-1, 1], truncations[-1, 1] = True, False, True, False
    return {
        "rewards": rng.normal(size=(num_steps, n)).astype(np.float32),
        "values": rng.normal(size=(num_steps, n)).astype(np.float32),
        "real_next_values": rng.normal(size=(num_steps, n)).astype(np.float32),
        "terminations": terminations.astype(np.float32),
        "truncations": truncations.astype(np.float32),
    }


def our_gae(data: dict[str, np.ndarray], gamma: float, gae_lambda: float) -> np.ndarray:
    t = {key: torch.from_numpy(value) for key, value in data.items()}
    dones = torch.maximum(t["terminations"], t["truncations"])
    return ppo.compute_gae(
        t["rewards"], t["values"], t["real_next_values"], t["terminations"], dones, gamma, gae_lambda
    ).numpy()


def test_gae_against_its_definition():
    """The lambda-weighted sum of temporal differences, written out to the end of each episode."""
    data, gamma, lam = random_rollout(0), 0.97, 0.9
    num_steps, n = data["rewards"].shape
    expected = np.zeros((num_steps, n))
    for i in range(n):
        for t in range(num_steps):
            weight = 1.0
            for k in range(t, num_steps):
                bootstrap = 0.0 if data["terminations"][k, i] else gamma * data["real_next_values"][k, i]
                expected[t, i] += weight * (data["rewards"][k, i] + bootstrap - data["values"][k, i])
                if data["terminations"][k, i] or data["truncations"][k, i]:
                    break
                weight *= gamma * lam
    np.testing.assert_allclose(our_gae(data, gamma, lam), expected, atol=1e-5)


def sb3_gae(data: dict[str, np.ndarray], gamma: float, gae_lambda: float) -> np.ndarray:
    """stable-baselines3's advantages, truncation treated as its on-policy algorithms do."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    num_steps, n = data["rewards"].shape
    box = spaces.Box(-1, 1, (1,))
    buffer = RolloutBuffer(num_steps, box, box, "cpu", gae_lambda, gamma, n)
    starts = np.ones(n)
    for t in range(num_steps):
        rewards = data["rewards"][t] + gamma * data["truncations"][t] * data["real_next_values"][t]
        values, zeros = torch.from_numpy(data["values"][t]), np.zeros((n, 1))
        buffer.add(zeros, zeros, rewards, starts, values, torch.zeros(n))
        starts = np.maximum(data["terminations"][t], data["truncations"][t])
    buffer.compute_returns_and_advantage(torch.from_numpy(data["real_next_values"][-1]), starts)
    return buffer.advantages


def consistent_rollout() -> dict[str, np.ndarray]:
    """A rollout whose next values are the following step's values, but where an episode ends."""
    data = random_rollout(1)
    running = (data["terminations"][:-1] + data["truncations"][:-1]) == 0
    data["real_next_values"][:-1][running] = data["values"][1:][running]
    return data


def test_gae_against_stable_baselines3_numbers():
    """Advantages computed once by stable-baselines3 2.9.2 (the next test repeats that where it is installed)."""
    with np.load(SB3_GAE, allow_pickle=False) as stored:
        np.testing.assert_allclose(our_gae(consistent_rollout(), 0.98, 0.95), stored["advantages"], atol=1e-5)


def test_stored_numbers_are_stable_baselines3s():
    pytest.importorskip("stable_baselines3")
    with np.load(SB3_GAE, allow_pickle=False) as stored:
        np.testing.assert_allclose(sb3_gae(consistent_rollout(), 0.98, 0.95), stored["advantages"], atol=1e-6)


def opinionated(agent: ppo.Agent) -> ppo.Agent:
    """The agent with other weights than those it starts with, whose mean action is nearly zero."""
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent


def noise_of(num_steps: int) -> np.ndarray:
    """Exploration noise for the environments of `setup`."""
    return np.random.default_rng(0).normal(size=(num_steps, 4, ACT_DIM)).astype(np.float32)


@pytest.fixture
def setup():
    torch.manual_seed(0)
    args = ppo.Args()
    envs = SO101ResidualVectorEnv(4, max_episode_steps=20)
    agent = opinionated(ppo.Agent(args))
    obs, _ = envs.reset(seed=0)
    return args, agent, envs, obs


def test_rollout_keeps_final_observations_and_unclipped_actions(setup):
    _, agent, envs, obs = setup
    buffers, next_obs, episodes = ppo.rollout(agent, envs, obs, noise_of(50))
    ends = np.flatnonzero(buffers["dones"].numpy().all(1))
    assert ends.tolist() == [19, 39] and len(episodes) == 8 and buffers["terminations"].sum() == 0
    following = torch.cat([buffers["obs"][1:], torch.from_numpy(next_obs)[None]])
    for t in range(50):
        same = torch.equal(buffers["real_next_obs"][t], following[t])
        assert same == (t not in ends)
    # the final observation is of the episode that timed out: the sheet has not jumped to a new start
    moved = (buffers["real_next_obs"][19] - buffers["obs"][19])[:, 12:14].norm(dim=1)
    jumped = (following[19] - buffers["obs"][19])[:, 12:14].norm(dim=1)
    assert moved.max() < 0.02 < jumped.min()
    assert buffers["actions"].abs().max() > 1.5
    assert all(episode["length"] == 20 for episode in episodes)


@pytest.mark.parametrize("symmetry, expected_views", [(True, [0, 1] * 4), (False, [0] * 8)])
def test_first_minibatch_has_ratio_one(setup, monkeypatch, symmetry, expected_views):
    args, agent, envs, obs = setup
    if not symmetry:
        args.networks.symmetry = False
        agent = opinionated(ppo.Agent(args))
    buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(64))
    ratios, views, original = [], [], ppo.ppo_loss

    def spy(agent, mb_x, view, mb_actions, mb_logprobs, *rest, **named):
        with torch.no_grad():
            # density of the unclipped action, by the textbook
            mean, logstd = agent.get_gaussian(mb_x)
            std = logstd.exp()
            density = torch.exp(-0.5 * ((mb_actions - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
            ratios.append(density.prod(-1) / mb_logprobs.exp())
        views.append(view)
        return original(agent, mb_x, view, mb_actions, mb_logprobs, *rest, **named)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator().manual_seed(0), World())
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), atol=2e-4, rtol=0)  # float32 products of six
    assert (ratios[-1] - 1).abs().max() > 1e-2
    assert views == expected_views  # the critic's, one minibatch an epoch


def test_loss_against_numpy(setup):
    args, agent, _, _ = setup
    args.ppo.ent_coef = 0.01
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 0.1, (32, OBS_DIM)).astype(np.float32)
    actions = torch.tensor(rng.normal(0, 1, (32, ACT_DIM)), dtype=torch.float32)
    with torch.no_grad():
        x = agent.features(obs)
        mean, value = agent.get_gaussian(x)[0].double().numpy(), agent.critic(x[:, 1])[:, 0].double().numpy()
        logstd = agent.actor_logstd.double().numpy()
    z = (actions.double().numpy() - mean) / np.exp(logstd)
    logprob = (-0.5 * z**2 - logstd - 0.5 * np.log(2 * np.pi)).sum(1)
    old_logprob, advantages, returns = logprob + rng.normal(0, 0.3, 32), rng.normal(2, 3, 32), rng.normal(0, 1, 32)
    ratio = np.exp(logprob - old_logprob)
    pg_loss = -np.minimum(advantages * ratio, advantages * np.clip(ratio, 0.7, 1.3)).mean()
    v_loss = 0.5 * np.mean((value - returns) ** 2)
    entropy = (0.5 + 0.5 * np.log(2 * np.pi) + logstd).sum()
    as_tensor = [torch.tensor(x, dtype=torch.float32) for x in (old_logprob, advantages, returns)]
    loss, metrics = ppo.ppo_loss(agent, x, 1, actions, *as_tensor, args.ppo)  # 1: the critic sees the mirror image
    assert loss.item() == pytest.approx(pg_loss - 0.01 * entropy + 0.5 * v_loss, abs=1e-4)
    assert metrics["approx_kl"].item() == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), abs=1e-4)
    assert metrics["clip_fraction"].item() == pytest.approx(np.mean(np.abs(ratio - 1) > 0.3))
    assert metrics["entropy_loss"].item() == pytest.approx(-entropy, abs=1e-4)


def test_agent_initialisation_and_state_dict():
    agent = ppo.Agent(ppo.Args())
    hidden, head = agent.actor_mean[0].weight, agent.actor_mean[-1].weight
    torch.testing.assert_close(
        hidden.T @ hidden, 2 * torch.eye(OBS_DIM + 2 + 8), atol=1e-5, rtol=0
    )  # orthogonal, gain sqrt 2
    torch.testing.assert_close(head @ head.T, 1e-4 * torch.eye(ACT_DIM), atol=1e-9, rtol=0)
    assert all((layer.bias == 0).all() for layer in agent.modules() if isinstance(layer, nn.Linear))
    # the normalisation is saved with the weights
    assert {"features.obs_mean", "features.obs_scale"} <= set(agent.state_dict())
    np.testing.assert_allclose(agent.features.obs_mean[:ACT_DIM], HOME_RAD, atol=1e-6)
    agent.features.obs_scale.mul_(3.0)
    other = ppo.Agent(ppo.Args())
    other.load_state_dict(agent.state_dict())
    obs = np.random.default_rng(0).normal(size=(5, OBS_DIM)).astype(np.float32)
    assert np.array_equal(agent.act(obs), other.act(obs)) and not np.array_equal(
        agent.act(obs), ppo.Agent(ppo.Args()).act(obs)
    )


@pytest.mark.parametrize(
    "arrival_yaw_weight, observe_load, observe_base", [(0.0, False, False), (0.0, True, False), (0.8, True, True)]
)
def test_agent_is_mirror_symmetric(arrival_yaw_weight, observe_load, observe_base):
    args = ppo.Args()
    args.task = dataclasses.replace(args.task, arrival_yaw_weight=arrival_yaw_weight, observe_load=observe_load)
    args.base = ppo.Base("jacobian", observe_base)
    envs = ppo.make_envs(args, 40)
    obs, _ = envs.reset(seed=0)
    obs[::2, 24] = 0.008  # some fingertips press
    agent = opinionated(ppo.Agent(args))
    mirrored = obs.copy()
    for i in (0, 6, 10, 13, 18, 20, 23):  # pan; pan and roll velocity; sheet y; quaternion z; goal y; tip y
        mirrored[:, i] *= -1
    mirrored[:, 4] = 2 * HOME_RAD[4] - mirrored[:, 4]  # roll, about the angle that puts the jaws into the mirror plane
    if observe_load:
        obs[:, 25:31] = mirrored[:, 25:31] = np.random.default_rng(0).normal(0, 0.02, (40, 6))
        mirrored[:, [25, 29]] *= -1  # pan and roll are loaded the other way
    if observe_base:
        base = mirrored[:, -6:]
        base[:, [0, 4]] *= -1  # the base moves pan and roll the other way
        assert (base[:, 0] != 0).any()
    x, mirrored_x = agent.features(obs), agent.features(mirrored)
    # some tips start beside the sheet, some press on it: no derived feature is zero everywhere
    assert (x[:, 0, obs.shape[1] :] != 0).any(0).all()
    (action, _), (other, _) = agent.get_gaussian(x), agent.get_gaussian(mirrored_x)
    flip = torch.tensor([-1.0, 1, 1, 1, -1, 1])
    torch.testing.assert_close(other, action * flip, atol=1e-5, rtol=0)
    torch.testing.assert_close(agent.get_value(x), agent.get_value(mirrored_x), atol=1e-5, rtol=0)
    assert action[:, [0, 4]].abs().max() > 1e-3
    plain = ppo.Agent(dataclasses.replace(args, networks=ppo.Networks(symmetry=False)))
    own = {key: plain.state_dict()[key] for key in ("features.signs", "features.action_signs")}
    plain.load_state_dict(agent.state_dict() | own)
    action, other = (plain.get_gaussian(plain.features(o))[0] for o in (obs, mirrored))
    assert (other - action * flip).abs().max() > 1e-3


def test_network_settings():
    """Each changes what it names, and the layers stay the same."""
    layers = ["Linear", "ReLU", "Linear", "LayerNorm", "ReLU", "Linear"]
    for networks, hidden, dim, views in (
        (ppo.Networks(), 128, OBS_DIM + 2 + 8, 2),
        (ppo.Networks(hidden_size=7, log_std_init=-2.0, symmetry=False, sheet_feature=False), 7, OBS_DIM, 1),
    ):
        agent = ppo.Agent(ppo.Args(networks=networks))
        for network in (agent.actor_mean, agent.critic):
            assert [type(module).__name__ for module in network] == layers
            assert network[0].weight.shape == (hidden, dim)
        assert agent.actor_logstd.tolist() == [[pytest.approx(networks.log_std_init)] * ACT_DIM]
        obs = np.random.default_rng(0).normal(size=(3, OBS_DIM)).astype(np.float32)
        assert agent.features(obs).shape == (3, views, dim) and agent.act(obs).shape == (3, ACT_DIM)


def test_a_residual_on_a_base_policy_starts_at_zero():
    obs = np.random.default_rng(0).normal(size=(3, OBS_DIM)).astype(np.float32)
    assert (ppo.Agent(ppo.Args(base=ppo.Base("jacobian"))).act(obs) == 0).all()
    assert 0 < np.abs(ppo.Agent(ppo.Args()).act(obs)).max() < 0.2


def test_gradients_are_clipped(setup):
    args, agent, envs, obs = setup
    buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(64))
    args.ppo.max_grad_norm, norms = 1e-3, []

    class Spy(torch.optim.SGD):
        def step(self, *rest):
            grads = [p.grad.flatten() for p in agent.parameters()]
            norms.append(float(torch.cat(grads).norm()))

    generator = torch.Generator().manual_seed(0)
    ppo.update(agent, Spy(agent.parameters(), lr=0.1), buffers, args.ppo, generator, World())
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)


def test_expected_yaw_against_its_formula():
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 0.05, (20, OBS_DIM)).astype(np.float32)
    yaw = rng.uniform(-0.5, 0.5, 20)
    obs[:, 15], obs[:, 18] = np.cos(yaw / 2), np.sin(yaw / 2)
    obs[:, 19:21] = np.array([0.27, 0.0]) - obs[:, 12:14]
    lever = obs[:, 22:24] - obs[:, 12:14]
    end = yaw + 39 * np.array([np.cross([*a, 0], [*b, 0])[2] for a, b in zip(lever, obs[:, 19:21])])
    expected = np.column_stack([end / 0.1, end * obs[:, 19] / 0.01, end * obs[:, 20] / 0.01])
    np.testing.assert_allclose(expected_yaw(obs), expected, rtol=1e-3, atol=1e-4)


def test_sheet_to_tip_is_the_vector_from_the_nearest_point_of_the_sheet():
    """Against a dense grid of points on a turned sheet; also as the columns of Features."""
    features = Features(OBSERVATION, (SHEET_TO_TIP,))
    rng = np.random.default_rng(0)
    obs = np.zeros((50, OBS_DIM), np.float32)
    yaw = rng.uniform(-3, 3, 50)
    obs[:, 15], obs[:, 18] = np.cos(yaw / 2), np.sin(yaw / 2)
    obs[:, 12:14], obs[:, 22:24] = rng.uniform(-0.1, 0.1, (2, 50, 2))
    feature = 0.03 * features(obs)[:, 0, OBS_DIM : OBS_DIM + 2].numpy()
    np.testing.assert_allclose(feature, 0.03 * sheet_to_tip(obs), atol=1e-6)
    half = SHEET_HALF_M - 0.01
    grid = np.stack(np.meshgrid(*[np.linspace(-h, h, 401) for h in half]), -1).reshape(-1, 2)
    for i in range(50):
        rotation = np.array([[np.cos(yaw[i]), -np.sin(yaw[i])], [np.sin(yaw[i]), np.cos(yaw[i])]])
        points = obs[i, 12:14] + grid @ rotation.T
        nearest = points[np.argmin(np.linalg.norm(points - obs[i, 22:24], axis=1))]
        in_sheet_axes = rotation.T @ (obs[i, 22:24] - nearest)
        np.testing.assert_allclose(feature[i], in_sheet_axes, atol=4e-4)  # half a cell of the grid


def test_contact_one_number_at_a_time():
    """By hand: the tip over and beside a sheet that is turned by 30 degrees, high and pressed."""
    obs = np.zeros((4, OBS_DIM), np.float32)
    angle, half_length = np.deg2rad(30.0), SHEET_HALF_M[0]
    obs[:, 15], obs[:, 18] = np.cos(angle / 2), np.sin(angle / 2)
    obs[:, 12:14], obs[:, 19:21] = (0.3, -0.05), (-0.03, 0.04)  # a drag of 50 mm, to the left and back
    long_side, short_side = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    obs[0, 22:24], obs[0, 24] = (0.3, -0.05), 0.0073  # pressed on its centre
    obs[1, 22:24], obs[1, 24] = (0.3, -0.05), 0.0173  # 10 mm above it
    # 20 and 5 mm beyond the ends of what counts as over it, which is 10 mm inside the sheet's edges
    obs[2, 22:24], obs[2, 24] = (0.3, -0.05) + (half_length - 0.01 + 0.02) * long_side, 0.0073
    obs[3, 22:24], obs[3, 24] = (0.3, -0.05) + (SHEET_HALF_M[1] - 0.01 + 0.005) * short_side, 0.0098
    np.testing.assert_allclose(
        contact(obs),
        [
            # beside, height, pressed beside, pressed on, to the sheet, drag
            [0, 0, 0, 1, 0, 0, -0.6, 0.8],
            [0, 2, 0, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, *-long_side, 0, 0],
            [0.5, 0.5, 0.25, 0.25, *-0.5 * short_side, -0.6 * 0.25, 0.8 * 0.25],
        ],
        atol=1e-4,  # float32 of positions
    )
    np.testing.assert_array_equal(contact(obs, 3.0), contact(obs) * np.float32([3, 1, 3, 3, 3, 3, 3, 3]))


def test_advantages_are_normalized_in_each_minibatch(setup, monkeypatch):
    a = np.random.default_rng(0).normal(3, 2, 10).astype(np.float32)
    np.testing.assert_allclose(ppo.normalize(torch.from_numpy(a)), (a - a.mean()) / a.std(), atol=1e-5)
    assert ppo.normalize(torch.tensor([3.0])).tolist() == [3.0]  # one sample alone has no scale
    assert ppo.normalize(torch.full((4,), 3.0)).abs().max() < 1e-3
    # in an update: minibatches of 64 of 256 samples, in each pass
    args, agent, envs, obs = setup
    args.ppo.minibatch_size, args.ppo.update_epochs = 64, 2
    buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(64))
    given, original = [], ppo.ppo_loss

    def spy(agent, mb_x, view, mb_actions, mb_logprobs, mb_advantages, *rest):
        given.append(mb_advantages)
        return original(agent, mb_x, view, mb_actions, mb_logprobs, mb_advantages, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator().manual_seed(0), World())
    assert [len(each) for each in given] == [64] * 8
    for each in given:
        assert abs(each.mean()) < 1e-4 and each.std(correction=0) == pytest.approx(1.0, abs=1e-3)


def test_minibatches_cover_a_rollout_once_per_pass(setup, monkeypatch):
    """Also a shortened rollout, which leaves no tiny minibatch; the metrics are means over all minibatches."""
    args, agent, envs, obs = setup
    args.ppo.minibatch_size, args.ppo.update_epochs = 60, 3
    buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(16))  # 64 samples: two minibatches of 32
    given, losses, original = [], [], ppo.ppo_loss

    def spy(agent, mb_x, view, mb_actions, *rest):
        loss, metrics = original(agent, mb_x, view, mb_actions, *rest)
        given.append(mb_actions)
        losses.append(float(metrics["value_loss"]))
        return loss, metrics

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    metrics = ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator().manual_seed(0), World())
    assert [len(each) for each in given] == [32] * 6
    everything = buffers["actions"].flatten(0, 1)[:, 0].sort().values
    for epoch in range(3):
        torch.testing.assert_close(torch.cat(given[2 * epoch : 2 * epoch + 2])[:, 0].sort().values, everything)
    assert not torch.equal(given[0], given[2])  # shuffled anew
    assert metrics["value_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["learning_rate"] == 1e-3
    magnitude = buffers["actions"].clamp(-1, 1).norm(dim=-1).mean()
    assert metrics["residual_magnitude"] == pytest.approx(float(magnitude), rel=1e-5)


@pytest.mark.parametrize("recompute_adv", [True, False])
def test_advantages_follow_the_critic_from_pass_to_pass(setup, monkeypatch, recompute_adv):
    """The critic's targets in a pass: the returns computed from its values at the start of that pass."""
    args, agent, envs, obs = setup
    args.ppo.recompute_adv, args.ppo.update_epochs = recompute_adv, 3
    buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(64))
    targets, expected, original = [], [], ppo.ppo_loss

    def spy(agent, mb_x, view, mb_actions, mb_logprobs, mb_advantages, mb_returns, *rest):
        targets.append(mb_returns.sort().values)
        with torch.no_grad():
            values, next_values = (
                agent.critic(agent.features(buffers[name].flatten(0, 1).numpy()).flatten(0, 1)).view(64, 4, 2).mean(2)
                for name in ("obs", "real_next_obs")
            )
        data = {key: buffers[key].numpy() for key in ("rewards", "terminations", "dones")}
        data |= {"values": values.numpy(), "real_next_values": next_values.numpy()}
        data["truncations"] = data.pop("dones") - data["terminations"]
        expected.append(torch.from_numpy(our_gae(data, args.ppo.gamma, args.ppo.gae_lambda) + data["values"]))
        return original(agent, mb_x, view, mb_actions, mb_logprobs, mb_advantages, mb_returns, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator().manual_seed(0), World())
    for number in range(3):
        by = number if recompute_adv else 0
        torch.testing.assert_close(targets[number], expected[by].flatten().sort().values, atol=1e-4, rtol=0)
    assert (expected[2] - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("culprit", ["rewards", "loss", "gradient", "weights"])
def test_non_finite_numbers_name_the_culprit(setup, culprit):
    args, agent, envs, obs = setup
    if culprit == "rewards":
        envs.task = dataclasses.replace(envs.task, residual_penalty=np.nan)
    with pytest.raises(FloatingPointError, match=culprit):
        buffers, _, _ = ppo.rollout(agent, envs, obs, noise_of(32))
        if culprit == "loss":
            buffers["rewards"][0, 0] = np.nan
        if culprit == "gradient":
            agent.actor_logstd.register_hook(lambda grad: grad * np.inf)
        optimizer = torch.optim.Adam(agent.parameters())
        if culprit == "weights":  # the last step of the last epoch diverges: no later gradient shows it
            args.ppo.update_epochs, args.ppo.minibatch_size = 1, 128
            optimizer.register_step_post_hook(lambda *_: agent.actor_logstd.data.fill_(np.inf))
        ppo.update(agent, optimizer, buffers, args.ppo, torch.Generator(), World())
