"""The task and its two environments. What they inherit from so101_sim is tested in tests/so101_sim."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from conftest import assert_same_info, plain
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import so101_env
from so101.base import BasePolicy
from so101_env import (
    ACT_DIM,
    MAX_EPISODE_STEPS,
    OBS_DIM,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    BasePolicyError,
    DomainRandomization,
    PaperVisuals,
    SO101Error,
    SO101ResidualEnv,
    SO101ResidualVectorEnv,
    sheet_inside,
)

HOME_TIP_M = 0.0173  # height of the gripper tip at home


def place_sheet(envs: SO101ResidualVectorEnv, x: float, y: float, yaw: float = 0.0) -> None:
    """Put every sheet somewhere else in the middle of an episode."""
    state = envs.get_state()
    envs.arms.qpos[:, 6:8], envs.arms.qpos[:, 9] = (x, y), yaw
    state["arms"]["batch"] = envs.arms.batch.state.copy()
    envs.set_state(state)


# -- observation and action


def test_observation_against_mujoco():
    envs = SO101ResidualVectorEnv(3)
    envs.reset(seed=1)
    rng = np.random.default_rng(1)
    for _ in range(30):
        obs = envs.step(rng.uniform(-1, 1, (3, ACT_DIM)))[0]
    assert obs.dtype == np.float32
    for i in range(3):
        data = envs.arms.batch.get_data(i)
        mujoco.mj_forward(envs.model, data)
        expected = np.concatenate(
            [
                data.qpos[:6],
                data.qvel[:6],
                data.body("sheet").xpos,
                data.body("sheet").xquat,
                [0.27 - data.body("sheet").xpos[0], -data.body("sheet").xpos[1], 0.0],
                data.site("gripperframe").xpos,
            ]
        )
        np.testing.assert_allclose(obs[i], expected, atol=1e-6)


class ConstantPolicy(BasePolicy):
    """Moves the wrist roll by a fixed delta per step."""

    def __init__(self, delta_rad: float):
        self.delta_rad, self.resets = delta_rad, []

    def reset(self, mask):
        self.resets.append(mask.copy())

    def act(self, obs, mask):
        action = np.zeros((len(mask), ACT_DIM))
        action[:, 4] = self.delta_rad
        return action


def test_total_action_is_base_plus_scaled_clipped_residual():
    def roll_after(base, residual, **kwargs):
        envs = SO101ResidualVectorEnv(1, base_policy=base, **kwargs)
        start = envs.reset(seed=0)[0][0, 4]
        action = np.zeros((1, ACT_DIM))
        action[0, 4] = residual
        for _ in range(40):
            obs = envs.step(action)[0]
        for _ in range(30):  # let the servo arrive
            envs.base_policy = None
            obs = envs.step(np.zeros((1, ACT_DIM)))[0]
        return obs[0, 4] - start

    # dry friction holds the joint up to frictionloss / gain short of its target
    tolerance = dict(abs=0.052 / 17.8 + 1e-3)
    assert roll_after(None, 0.5) == pytest.approx(40 * 0.7 * 0.02 * 0.5, **tolerance)
    assert roll_after(None, 3.0) == roll_after(None, 1.0) > 40 * 0.7 * 0.02 * 0.95  # starting up, it meets the window
    assert roll_after(None, 0.5, alpha=0.3) == pytest.approx(40 * 0.3 * 0.02 * 0.5, **tolerance)
    assert roll_after(ConstantPolicy(0.006), -0.5, act_scale=0.01) == pytest.approx(40 * (0.006 - 0.0035), **tolerance)
    assert roll_after(ConstantPolicy(0.006), 1.0, alpha=0.0) == pytest.approx(40 * 0.006, **tolerance)


def test_base_policies_are_reset_and_their_invalid_actions_are_errors():
    policy = ConstantPolicy(0.0)
    envs = SO101ResidualVectorEnv(2, base_policy=policy, max_episode_steps=2)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(np.zeros((2, ACT_DIM)))
    assert [mask.tolist() for mask in policy.resets] == [[True, True], [True, True]]
    policy.delta_rad = np.nan
    with pytest.raises(BasePolicyError, match="ConstantPolicy"):
        envs.step(np.zeros((2, ACT_DIM)))
    policy.delta_rad = 7.0
    with pytest.raises(BasePolicyError, match="ConstantPolicy.*7.0 rad.*degrees"):
        envs.step(np.zeros((2, ACT_DIM)))
    policy.act = lambda obs, mask: np.zeros(ACT_DIM)
    with pytest.raises(BasePolicyError, match="ConstantPolicy"):
        envs.step(np.zeros((2, ACT_DIM)))
    with pytest.raises(ValueError, match="actions"):
        envs.step(np.full((2, ACT_DIM), np.nan))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"alpha": 1.5}, {"alpha": -0.1}, {"act_scale": 0.0}, {"act_scale": float("inf")}, {"tape_margin": 0.0},
        {"residual_penalty": -1.0}, {"residual_penalty": float("nan")}, {"firmware_p": 2},
        {"arrival_yaw_weight": -1.0}, {"shaping_gamma": 1.5}, {"observe": "images"}, {"observe_base": True},
        {"max_episode_steps": 0}, {"render_mode": "ascii"}, {"camera_name": "side"}, {"width": 4},
        {"full_randomization": True, "randomize": False},
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(kwargs):
    for environment_class in (SO101ResidualVectorEnv, SO101ResidualEnv):
        with pytest.raises(SO101Error, match=next(iter(kwargs)).replace("_", "[_-]")):
            environment_class(**kwargs)


def test_bad_numbers_and_unknown_arguments_are_named():
    for kwargs in ({"num_envs": 0}, {"num_threads": 0}):
        with pytest.raises(SO101Error, match=next(iter(kwargs))):
            SO101ResidualVectorEnv(**kwargs)
    with pytest.raises(TypeError, match="tape_margins"):
        SO101ResidualVectorEnv(tape_margins=0.02)


# -- the task


def test_sheet_inside_against_corners():
    rng = np.random.default_rng(0)
    xy = TAPE_CENTER_M + rng.uniform(-0.06, 0.06, (2000, 2))
    yaw = rng.uniform(-4.0, 4.0, 2000)
    yaw[::2] *= 0.1
    inside = sheet_inside(xy, yaw, 0.04)
    for i in range(2000):
        corners = [
            (
                xy[i, 0] + sx * SHEET_HALF_M[0] * np.cos(yaw[i]) - sy * SHEET_HALF_M[1] * np.sin(yaw[i]),
                xy[i, 1] + sx * SHEET_HALF_M[0] * np.sin(yaw[i]) + sy * SHEET_HALF_M[1] * np.cos(yaw[i]),
            )
            for sx in (-1, 1)
            for sy in (-1, 1)
        ]
        assert inside[i] == all(abs(x - 0.27) <= 0.114 and abs(y) <= 0.145 for x, y in corners)
    assert 0.05 < inside.mean() < 0.95


def test_the_tape_in_the_model_is_where_success_is_judged():
    for margin in (0.04, 0.02):
        model = so101_env.load_model(margin)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        front, left = model.geom("tape_front").id, model.geom("tape_left").id
        assert data.geom_xpos[front][0] - model.geom_size[front][0] == pytest.approx(0.27 + 0.074 + margin)
        assert data.geom_xpos[left][1] - model.geom_size[left][1] == pytest.approx(0.105 + margin)


def test_start_states():
    for margin in (0.04, 0.02):
        envs = SO101ResidualVectorEnv(400, tape_margin=margin)
        obs, _ = envs.reset(seed=0)
        distance = np.linalg.norm(obs[:, 19:21], axis=1)
        yaw = 2 * np.arctan2(obs[:, 18], obs[:, 15])
        assert 0.04 - 1e-6 <= distance.min() < 0.05 and 0.11 < distance.max() <= 0.12 + 1e-6
        assert 0.25 < np.abs(yaw).max() <= 0.3 + 1e-6 and abs(yaw.mean()) < 0.03
        assert not sheet_inside(envs.qpos[:, 6:8], envs.qpos[:, 9], margin).any()
        assert (np.sign(obs[:, 19]) == 1).mean() == pytest.approx(0.5, abs=0.1)  # from all around
        assert (np.sign(obs[:, 20]) == 1).mean() == pytest.approx(0.5, abs=0.1)
        assert obs.std(0)[[12, 13, 18, 19, 20]].min() > 0.02
    data = envs.arms.batch.get_data(0)
    mujoco.mj_forward(envs.model, data)
    for finger in ("fixed_finger_col", "moving_finger_col"):
        clearance = data.geom(finger).xpos[2] - 0.008 - 0.001
        assert 0.005 < clearance < 0.015
    touching = {envs.model.geom(g).name for c in data.contact[: data.ncon] for g in (c.geom1, c.geom2)}
    assert touching == {"table", "sheet_col"}
    assert data.site("gripperframe").xmat.reshape(3, 3)[2, 0] < -0.999  # the gripper's x axis points straight down


def test_success_takes_five_consecutive_steps_inside():
    envs = SO101ResidualVectorEnv(2)
    envs.reset(seed=0)
    zero = np.zeros((2, ACT_DIM))
    place_sheet(envs, 0.28, 0.01)
    for _ in range(4):
        _, _, terminated, _, info = envs.step(zero)
        assert not terminated.any() and (info["reward_terms"]["success"] == 0).all()
    place_sheet(envs, 0.35, 0.01)  # out for one step: the count starts again
    assert not envs.step(zero)[2].any()
    place_sheet(envs, 0.28, 0.01)
    for _ in range(4):
        assert not envs.step(zero)[2].any()
    _, _, terminated, truncated, info = envs.step(zero)
    final = info["final_info"]
    assert terminated.all() and not truncated.any() and final["is_success"].all()
    assert (final["reward_terms"]["success"] == 10).all() and final["episode_summary"]["length"].tolist() == [10, 10]
    assert not info["is_success"].any() and info["episode_summary"]["length"].tolist() == [0, 0]


def test_a_restored_environment_counts_on():
    """Three of five steps inside the tape before the state is saved, two after it is restored."""
    envs, other = SO101ResidualVectorEnv(1), SO101ResidualVectorEnv(1)
    for each in (envs, other):
        each.reset(seed=0)
    place_sheet(envs, 0.28, 0.01)
    for _ in range(3):
        envs.step(np.zeros((1, ACT_DIM)))
    other.set_state(envs.get_state())
    assert [bool(other.step(np.zeros((1, ACT_DIM)))[2][0]) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("change", [lambda a: a[:1], lambda a: a[:, None], lambda a: a.astype(complex), list])
def test_memory_that_is_not_the_base_policys_is_refused(change):
    envs = SO101ResidualVectorEnv(2, "jacobian")
    envs.reset(seed=0)
    state = envs.get_state()
    for name, array in state["base_memory"].items():
        with pytest.raises(SO101Error, match="base_memory is not that of the base policy"):
            envs.set_state({**state, "base_memory": {**state["base_memory"], name: change(array)}})
    envs.set_state(state)


def test_reward_terms_add_up_and_match_their_formulas():
    gamma = 0.9
    envs = SO101ResidualVectorEnv(1, shaping_gamma=gamma, max_episode_steps=50, autoreset_mode=AutoresetMode.DISABLED)
    obs, _ = envs.reset(seed=3)
    phi_start = float(envs._phi[0])
    rng = np.random.default_rng(3)
    unshaped = discounted_shaping = 0.0
    for t in range(50):
        action = rng.uniform(-2, 2, (1, ACT_DIM))
        obs, reward, _, truncated, info = envs.step(action)
        terms = {key: value[0] for key, value in info["reward_terms"].items()}
        assert set(terms) == {"distance", "yaw", "time", "residual", "success", "failure", "shaping"}
        assert sum(terms.values()) == pytest.approx(reward[0], abs=1e-12)
        assert terms["distance"] == pytest.approx(-2 * np.linalg.norm(obs[0, 19:21]), abs=1e-6)
        assert terms["yaw"] == pytest.approx(-0.1 * abs(2 * np.arctan2(obs[0, 18], obs[0, 15])), abs=1e-6)
        assert terms["time"] == -0.01
        assert terms["residual"] == pytest.approx(-0.001 * np.sum(np.clip(action, -1, 1) ** 2))
        unshaped += reward[0] - terms["shaping"]
        discounted_shaping += gamma**t * terms["shaping"]
    assert truncated[0]
    assert info["episode_summary"]["return"][0] == pytest.approx(unshaped)
    # shaping is harmless because its discounted sum is a difference of potentials, whatever was done in between
    assert discounted_shaping == pytest.approx(gamma**50 * float(envs._phi[0]) - phi_start)
    assert abs(discounted_shaping) > 0.1


def test_without_shaping_gamma_the_reward_is_unshaped():
    envs = gym.make_vec("SO101Residual-v0", num_envs=2)
    envs.reset(seed=0)
    _, reward, _, _, info = envs.step(np.ones((2, ACT_DIM)))
    assert (info["reward_terms"]["shaping"] == 0).all() and (np.abs(reward) < 1).all()


def test_a_sheet_out_of_reach_ends_the_episode_as_a_costly_failure():
    envs = SO101ResidualVectorEnv(2)
    envs.reset(seed=0)
    place_sheet(envs, 0.50, 0.0)  # its near edge at 0.426 m can still be touched
    assert not envs.step(np.zeros((2, ACT_DIM)))[2].any()
    place_sheet(envs, 0.55, 0.0)
    _, _, terminated, truncated, info = envs.step(np.zeros((2, ACT_DIM)))
    final = info["final_info"]
    assert terminated.all() and not truncated.any() and final["out_of_reach"].all() and not final["is_success"].any()
    # as expensive as waiting there for the time-out
    assert final["reward_terms"]["failure"] == pytest.approx(np.full(2, -398 * (2 * 0.28 + 0.01)), rel=1e-3)


def test_a_diverged_simulation_is_reported_and_its_numbers_are_finite():
    envs = SO101ResidualVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.arms.batch.bind("qvel")[1, 3] = np.inf
    obs, reward, terminated, _, info = envs.step(np.zeros((2, ACT_DIM)))
    assert terminated.tolist() == [False, True]
    assert info["non_finite"].tolist() == [False, True] and not info["is_success"].any()
    assert np.isfinite(obs).all() and np.isfinite(reward).all()


@pytest.mark.parametrize("n", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_zero_residual_never_succeeds_and_stays_put(n):
    envs = SO101ResidualVectorEnv(n, autoreset_mode=AutoresetMode.DISABLED)
    start = envs.reset(seed=0)[0]
    for step in range(MAX_EPISODE_STEPS):
        obs, _, terminated, truncated, _ = envs.step(np.zeros((n, ACT_DIM)))
        assert not terminated.any()
        assert truncated.all() == (step == MAX_EPISODE_STEPS - 1)
    assert np.abs(obs[:, :6] - start[:, :6]).max() < 2e-3  # the servos hold the arm against gravity
    assert np.abs(obs[:, 12:15] - start[:, 12:15]).max() < 1e-5


@pytest.mark.parametrize("n", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_random_residual_hardly_ever_succeeds(n):
    envs = SO101ResidualVectorEnv(n, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    rng, running, successes = np.random.default_rng(0), np.ones(n, bool), 0
    while running.any():
        _, _, terminated, truncated, info = envs.step(rng.uniform(-1, 1, (n, ACT_DIM)))
        successes += info["is_success"].sum()
        running &= ~(terminated | truncated)
    assert successes <= 0.02 * n


# -- domain randomisation


def friction(envs: SO101ResidualVectorEnv, name: str) -> np.ndarray:
    """Sliding friction of a contact pair in every environment."""
    pair = envs.model.pair(name).id
    return np.array([envs.arms.batch.get_model(i).pair_friction[pair, 0] for i in range(envs.num_envs)])


def test_friction_is_randomised_on_the_right_pairs():
    envs = SO101ResidualVectorEnv(200)
    envs.reset(seed=0)
    sheet_table, finger = friction(envs, "sheet_table"), friction(envs, "fixed_finger_sheet")
    assert 0.3 * 0.8 <= sheet_table.min() < 0.3 * 0.83 and 0.3 * 1.17 < sheet_table.max() <= 0.3 * 1.2
    assert 1.2 * 0.85 <= finger.min() < 1.2 * 0.88 and 1.2 * 1.12 < finger.max() <= 1.2 * 1.15
    np.testing.assert_array_equal(finger, friction(envs, "moving_finger_sheet"))
    assert abs(np.corrcoef(sheet_table, finger)[0, 1]) < 0.2
    envs.reset()
    assert not np.array_equal(sheet_table, friction(envs, "sheet_table"))  # resampled every episode


def test_nominal_physics_is_nominal_and_still_seeded():
    envs = SO101ResidualVectorEnv(20, randomize=False)
    first = envs.reset(seed=0)[0]
    assert set(friction(envs, "sheet_table")) == {0.3} and set(friction(envs, "fixed_finger_sheet")) == {1.2}
    assert len(np.unique(first[:, 12])) == 20
    np.testing.assert_array_equal(first, envs.reset(seed=0)[0])


def test_full_randomisation_ranges():
    envs = SO101ResidualVectorEnv(300, randomization=DomainRandomization.full())
    obs, _ = envs.reset(seed=0)
    models = [envs.arms.batch.get_model(i) for i in range(300)]
    nominal, sheet = envs.model, envs.model.body("sheet").id
    mass = np.array([m.body_mass[sheet] for m in models])
    assert 0.0045 <= mass.min() < 0.0046 and 0.0054 < mass.max() <= 0.0055
    for get, fraction in ((lambda m: m.actuator_gainprm[:, 0], 0.15), (lambda m: m.dof_damping[:6], 0.15)):
        ratio = np.array([get(m) for m in models]) / get(nominal)
        assert 1 - fraction <= ratio.min() < 1 - 0.9 * fraction and 1 + 0.9 * fraction < ratio.max() <= 1 + fraction
    assert all((m.actuator_biasprm[:, 1] == -m.actuator_gainprm[:, 0]).all() for m in models)
    assert set(envs.arms._latency) == {0, 1, 2}
    truth = envs.qpos
    error = obs[:, :6] - truth[:, :6]
    assert np.deg2rad(0.9) < np.abs(error).max() < np.deg2rad(1.0) + 5 * so101_env.NOISE_JOINT_RAD
    yaw_noise = 2 * np.arctan2(obs[:, 18], obs[:, 15]) - truth[:, 9]
    assert so101_env.NOISE_YAW_RAD * 0.8 < yaw_noise.std() < so101_env.NOISE_YAW_RAD * 1.2
    assert so101_env.NOISE_SHEET_M * 0.8 < (obs[:, 12] - truth[:, 6]).std() < so101_env.NOISE_SHEET_M * 1.2
    np.testing.assert_allclose(obs[:, 19], 0.27 - obs[:, 12], atol=1e-6)  # the goal follows from the noisy sheet


def test_ranges_of_arms_from_a_kit():
    envs = SO101ResidualVectorEnv(400, arm_randomization=True)
    obs, _ = envs.reset(seed=0)
    models = [envs.arms.batch.get_model(i) for i in range(400)]
    gain = np.array([m.actuator_gainprm[:, 0] for m in models]).mean(1) / 17.8
    assert 0.45 < gain.min() < 0.55 and 1.5 < gain.max() < 1.75
    off = np.rad2deg(obs[:, :6] - envs.qpos[:, :6])
    assert (2.7 < np.abs(off).max(0)).all() and np.abs(off).max() < 4
    finger, table = friction(envs, "fixed_finger_sheet"), friction(envs, "sheet_table")
    assert 0.33 < finger.min() < 0.42 and 1.15 < finger.max() < 1.4
    assert 0.19 < table.min() < 0.24 and 0.54 < table.max() < 0.65
    height = HOME_TIP_M - envs.arms.tip_m[:, 2]
    assert -0.0051 < height.min() < -0.0047 and 0.0047 < height.max() < 0.0051
    assert 0.03 < envs.arms._backlash.max() <= np.deg2rad(2.0)
    with pytest.raises(SO101Error, match="--arm-randomization contradicts --no-randomize"):
        SO101ResidualVectorEnv(1, arm_randomization=True, randomize=False)


def test_a_sheet_out_of_view_stays_where_it_was_seen_last():
    """For up to half a second; everything else is observed as ever, and an episode starts with a view."""
    envs = SO101ResidualVectorEnv(20, randomization=DomainRandomization(pose_dropout=0.05, observation_noise=1.0))
    obs, rng, held = [envs.reset(seed=0)[0]], np.random.default_rng(0), []
    for _ in range(149):
        obs.append(envs.step(rng.uniform(-1, 1, (20, ACT_DIM)))[0])
    obs = np.array(obs)
    same = (obs[1:] == obs[:-1])[:, :, [12, 13, 18, 19, 20]]  # x and y, yaw, and the way to the tape
    assert (same.all(2) | ~same.any(2)).all()  # the whole pose or nothing of it
    hidden = same.all(2)
    assert (obs[1:, :, :12] == obs[:-1, :, :12]).mean() < 1e-3
    for column in hidden.T:
        edges = np.flatnonzero(np.diff(np.r_[0, column.astype(int), 0]))
        held += (edges[1::2] - edges[::2]).tolist()
    assert np.percentile(held, 70) <= 15 and 14 <= max(held) < 50  # a view may be lost again at once
    assert 0.15 < hidden.mean() < 0.4


def test_the_load_is_the_torque_of_contacts():
    """Zero in the air, by MuJoCo's own torques on the table, and in motion by the formula, with what the arm knows."""
    envs = SO101ResidualVectorEnv(1, randomize=False, observe_load=True)
    obs, _ = envs.reset(seed=0)
    np.testing.assert_allclose(obs[0, 25:31], 0, atol=1e-9)
    for _ in range(60):
        obs = envs.step(np.array([[0, 0.5, 0, 0, 0, 0]]))[0]
    data = envs.arms.batch.get_data(0)
    mujoco.mj_forward(envs.model, data)
    carried = data.qfrc_actuator[:6] - data.qfrc_bias[:6] - 0.6 * data.qvel[:6]
    assert carried[1] > 0.15
    np.testing.assert_allclose(obs[0, 25:31], carried / 17.8, atol=1e-4)

    envs = SO101ResidualVectorEnv(3, "jacobian", arm_randomization=True, observe_load=True, observe_base=True)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        obs = envs.step(rng.uniform(-1, 1, (3, ACT_DIM)))[0]
    assert obs.shape == (3, 37) and list(envs.parts)[-2:] == ["load", "base_delta"]
    np.testing.assert_array_equal(obs[:, 31:], envs._base.astype(np.float32))
    for i in range(3):
        data = envs.arms.batch.get_data(i)
        known = envs.arms.controller.gain_factor[i, 0]
        read = data.qpos[:6] + envs.arms.joint_offset[i]
        expected = known * (envs.command[i] - read) - (data.qfrc_bias[:6] + 0.6 * data.qvel[:6]) / 17.8
        np.testing.assert_allclose(obs[i, 25:31], expected, atol=1e-5)


def test_joint_offsets_are_carried_to_the_tip():
    """The observed tip is where the arm would be if the encoder readings were true."""
    envs = SO101ResidualVectorEnv(20, randomization=DomainRandomization(joint_offset_rad=float(np.deg2rad(1.0))))
    obs, _ = envs.reset(seed=0)
    data, moved = mujoco.MjData(envs.model), []
    for i in range(20):
        data.qpos[:] = envs.qpos[i]
        mujoco.mj_forward(envs.model, data)
        truth = data.site("gripperframe").xpos.copy()
        data.qpos[:6] = obs[i, :6]
        mujoco.mj_forward(envs.model, data)
        believed = data.site("gripperframe").xpos
        np.testing.assert_allclose(obs[i, 22:25], believed, atol=3e-4)  # to first order in the offsets
        moved.append(np.linalg.norm(believed - truth))
    assert np.median(moved) > 2e-3


def test_starts_that_all_lie_inside_the_tape_are_an_error():
    envs = SO101ResidualVectorEnv(1, tape_margin=0.1, randomization=DomainRandomization(sheet_distance_m=(0.0, 0.02)))
    with pytest.raises(ValueError, match="sheet_distance_m"):
        envs.reset(seed=0)


# -- Gymnasium


def test_registered():
    env = gym.make("SO101Residual-v0", tape_margin=0.02)
    assert isinstance(env.unwrapped, SO101ResidualEnv)
    assert env.reset(seed=0)[0].shape == (OBS_DIM,)
    envs = gym.make_vec("SO101Residual-v0", num_envs=3, tape_margin=0.02)
    assert isinstance(envs, SO101ResidualVectorEnv) and envs.task.tape_margin == 0.02
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert envs.observation_space.shape == (3, OBS_DIM) and envs.action_space.shape == (3, ACT_DIM)
    assert envs.reset(seed=0)[0] in envs.observation_space


MADE = {
    "make": lambda n: gym.make("SO101Residual-v0", max_episode_steps=n),
    "spec": lambda n: gym.make(gym.make("SO101Residual-v0", max_episode_steps=n).spec),
    "json": lambda n: gym.make(EnvSpec.from_json(gym.make("SO101Residual-v0", max_episode_steps=n).spec.to_json())),
    "wrapped": lambda n: gym.wrappers.TimeLimit(gym.wrappers.RecordEpisodeStatistics(SO101ResidualEnv()), n),
    "class": lambda n: SO101ResidualEnv(max_episode_steps=n),
    "sync": lambda n: gym.make_vec("SO101Residual-v0", 1, vectorization_mode="sync", max_episode_steps=n),
    "vector": lambda n: gym.make_vec("SO101Residual-v0", 1, max_episode_steps=n),
    "vector spec": lambda n: gym.make_vec(gym.make_vec("SO101Residual-v0", 1, max_episode_steps=n).spec),
}


@pytest.mark.parametrize("steps", [3, 600])
@pytest.mark.parametrize("how", MADE)
def test_the_time_limit_is_that_of_whoever_made_the_environment(how, steps):
    """Where episodes are truncated, what a failure costs, and what spec says."""
    env = MADE[how](steps)
    env.reset(seed=0)
    inner = env.envs[0].unwrapped if how == "sync" else env.unwrapped
    envs = getattr(inner, "_envs", inner)
    for _ in range(2):
        _, _, _, truncated, _ = env.step(np.zeros(env.action_space.shape))
        assert not np.any(truncated)
    place_sheet(envs, 0.55, 0.0)
    failed = envs.step(np.zeros((1, ACT_DIM)))[4]
    waiting = -(steps - 3) * (2 * 0.28 + 0.01)
    assert failed.get("final_info", failed)["reward_terms"]["failure"][0] == pytest.approx(waiting, rel=1e-3)
    env.reset(seed=0)
    envs._steps[:] = steps - 2
    inner_wrapper = env.envs[0] if how == "sync" else env
    while inner_wrapper is not inner:  # the wrappers count by themselves
        if isinstance(inner_wrapper, gym.wrappers.TimeLimit):
            inner_wrapper._elapsed_steps = steps - 2
        inner_wrapper = inner_wrapper.env
    ends = [bool(np.any(env.step(np.zeros(env.action_space.shape))[3])) for _ in range(2)]
    assert ends == [False, True]
    assert how in ("class", "wrapped", "sync") or env.spec.max_episode_steps == steps
    env.close()


def test_the_registered_time_limit():
    assert gym.spec("SO101Residual-v0").max_episode_steps == MAX_EPISODE_STEPS
    for env in (gym.make("SO101Residual-v0"), gym.make("SO101Residual-v0", max_episode_steps=-1)):
        env.reset(seed=0)
        assert env.unwrapped._envs.max_episode_steps == MAX_EPISODE_STEPS
    env = gym.make("SO101Residual-v0", max_episode_steps=7)
    env.reset(seed=0)
    env.unwrapped.reset(seed=0)  # without its wrapper
    assert env.unwrapped._envs.max_episode_steps == MAX_EPISODE_STEPS


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"full_randomization": True},
        {"observe": "pixels", "cameras": ("wrist", "top"), "visual_randomization": True},
    ],
)
def test_gymnasium_check_env(kwargs):
    check_env(SO101ResidualEnv(**kwargs), skip_render_check=True)


def test_a_finished_environment_rests_until_it_is_reset():
    envs = SO101ResidualVectorEnv(2, max_episode_steps=3, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.step(np.zeros((2, ACT_DIM)))
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(np.zeros((2, ACT_DIM)))
    obs, _, _, truncated, info = envs.step(np.ones((2, ACT_DIM)))
    assert truncated.tolist() == [True, False] and info["episode_summary"]["length"][0] == 3
    later = envs.step(np.ones((2, ACT_DIM)))
    np.testing.assert_array_equal(later[0][0], obs[0])
    assert later[1][0] == 0.0 and later[3].tolist() == [False, True]
    for key in ("return", "length", "residual_magnitude"):
        assert later[-1]["episode_summary"][key][0] == info["episode_summary"][key][0]


PIXELS = {"observe": "pixels", "image_size": (20, 24), "visual_randomization": True, "observe_base": True}


@pytest.mark.parametrize(
    "more",
    [
        {"base_policy": "jacobian", "observe_base": True},
        {"randomization": DomainRandomization.arm(), "observe_load": True},
        PIXELS | {"observe_base": False},
    ],
    ids=["state", "arm", "pixels"],
)
def test_a_restored_state_continues_bit_identically(more):
    kwargs = {"max_episode_steps": 20, "shaping_gamma": 0.98, "randomization": DomainRandomization.full(), **more}
    envs, other = SO101ResidualVectorEnv(3, **kwargs), SO101ResidualVectorEnv(3, **kwargs)
    envs.reset(seed=0)
    other.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 3, ACT_DIM))
    for t in range(25):
        envs.step(actions[t])
    other.set_state(envs.get_state())
    np.testing.assert_equal(other.observation, envs.observation)
    for t in range(25, 60):
        np.testing.assert_equal(*([plain(item) for item in each.step(actions[t])] for each in (envs, other)))
    for each in (envs, other):
        each.close()


@pytest.mark.parametrize(
    "more",
    [
        {"full_randomization": True, "observe_base": True},
        pytest.param({"arm_randomization": True, "observe_load": True, "tape_margin": 0.08}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(PIXELS, marks=pytest.mark.slow),
    ],
    ids=["full", "arm", "default", "pixels"],
)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_batch_equals_gymnasiums_vector_of_single_environments(mode, more):
    """Observations, rewards, ends and infos are equal across autoresets, for one thread and for two."""
    kwargs = {"base_policy": "jacobian", "max_episode_steps": 90, "shaping_gamma": 0.98, **more}
    one_thread = SO101ResidualVectorEnv(4, num_threads=1, autoreset_mode=mode, **kwargs)
    envs = SO101ResidualVectorEnv(4, num_threads=2, autoreset_mode=mode, **kwargs)
    reference = SyncVectorEnv([lambda: SO101ResidualEnv(**kwargs)] * 4, autoreset_mode=mode)
    everyone, ends = np.ones(4, bool), []
    results = [each.reset(seed=10) for each in (envs, one_thread, reference)]
    rng = np.random.default_rng(0)
    for _ in range(190):
        (*ours, info), (*same, _), (*gymnasiums, expected_info) = results
        for a, b, c in zip(ours, same, gymnasiums):
            for key in a if isinstance(a, dict) else (...,):  # with pixels: a picture for each camera, and the state
                np.testing.assert_array_equal(a[key], b[key])
                np.testing.assert_array_equal(a[key], c[key])
        assert_same_info(info, expected_info, everyone)
        if len(ours) == 4:
            ends += [(bool(a), bool(b)) for a, b in zip(*ours[2:]) if a or b]
            if mode == AutoresetMode.DISABLED and (done := ours[2] | ours[3]).any():
                results = [each.reset(options={"reset_mask": done.copy()}) for each in (envs, one_thread, reference)]
                if "observe" not in more:
                    np.testing.assert_array_equal(results[0][0], results[2][0])
        actions = rng.uniform(-0.6, 0.6, (4, ACT_DIM))
        results = [each.step(actions) for each in (envs, one_thread, reference)]
    assert set(ends) == {(True, False), (False, True)}  # successes and time-outs


# -- pixels and rendering


def test_pixel_observations_have_only_what_a_real_arm_measures():
    """The sheet is moved: the pictures change, and state does not. info has the full observation."""
    kwargs = {"cameras": ("top", "wrist"), "image_size": (24, 32), "randomize": False}
    envs = SO101ResidualVectorEnv(2, observe="pixels", **kwargs)
    assert list(envs.single_observation_space) == ["pixels_top", "pixels_wrist", "state"]
    qpos = np.tile(envs.arms.home["qpos"], (2, 1))
    qpos[1, 7], qpos[1, 9] = 0.03, 0.2
    obs, info = envs.reset(seed=0, options={"qpos": qpos})
    assert obs in envs.observation_space and obs["pixels_top"].shape == (2, 24, 32, 3) and obs["state"].shape == (2, 15)
    np.testing.assert_array_equal(obs["state"][0], obs["state"][1])
    for camera in ("pixels_top", "pixels_wrist"):
        assert np.abs(obs[camera][0].astype(int) - obs[camera][1]).max() > 50
    blind = SO101ResidualVectorEnv(2, randomize=False)
    full = blind.reset(seed=0, options={"qpos": qpos})[0]
    np.testing.assert_array_equal(info["full_observation"], full)
    np.testing.assert_array_equal(obs["state"], full[:, [*range(12), 22, 23, 24]])
    before = obs["pixels_top"].copy()
    later, *_ = envs.step(np.ones((2, ACT_DIM)))
    assert not np.array_equal(later["pixels_top"], before) and np.array_equal(obs["pixels_top"], before)
    for one in (envs, blind):
        one.close()


def test_looks_are_seeded_and_do_not_change_the_physics():
    kwargs = {"observe": "pixels", "image_size": (48, 48), "max_episode_steps": 5}
    plain, envs = (SO101ResidualVectorEnv(8, visual_randomization=on, **kwargs) for on in (False, True))
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 8, ACT_DIM))

    def play(envs):
        results = [envs.reset(seed=3), *(envs.step(action) for action in actions)]
        pixels, full = [obs["pixels_top"] for obs, *_ in results], [info["full_observation"] for *_, info in results]
        return {"pixels_top": np.array(pixels), "state": np.array(full)}, envs.look_seed

    (nominal, _), (first, seeds), (again, _) = play(plain), play(envs), play(envs)
    np.testing.assert_array_equal(first["state"], nominal["state"])  # episodes are the same, autoresets included
    np.testing.assert_array_equal(first["pixels_top"], again["pixels_top"])
    assert len(set(seeds)) == 8
    means = first["pixels_top"].astype(float).mean((2, 3, 4))
    assert np.std(means[0]) > 10 > 5 > np.std(nominal["pixels_top"].astype(float).mean((2, 3, 4))[0])
    assert np.abs(np.diff(means[:5], axis=0)).max() < 5 < np.abs(means[4] - means[5]).mean()  # one look per episode
    still = envs.camera_images(envs.qpos[:1].repeat(2, 0), "top", (48, 48), seeds[:1].repeat(2), np.arange(2))
    assert 0 < np.abs(still[0].astype(int) - still[1]).mean() < 10  # the noise differs from step to step
    for one in (plain, envs):
        one.close()


def test_colours_of_sheet_and_tape_vary_within_their_ranges():
    model = so101_env.load_model()
    looks = [PaperVisuals().draw(model, seed) for seed in range(300)]
    colours = {
        name: np.array([look.fields["mat_rgba"][model.material(name).id, :3] for look in looks])
        for name in ("paper", "heading", "lines", "tape")
    }
    assert 0.85 * 0.95 <= colours["paper"].min() < 0.83 and 0.97 < colours["paper"].max() <= 1.0
    assert 0.5 <= colours["tape"][:, 0].min() < 0.51 and 0.94 < colours["tape"][:, 0].max() <= 0.95
    assert 0.02 <= colours["tape"][:, 1:].min() < 0.025 and 0.195 < colours["tape"][:, 1:].max() <= 0.2
    for lines in ("heading", "lines"):
        plain = (colours[lines] == colours["paper"]).all(1)
        assert 0.2 < plain.mean() < 0.4 and colours[lines][~plain].min() < 0.05 and colours[lines].max() > 0.95


def test_rgb_array_shows_the_sheet_and_the_tape():
    frames = []
    for kwargs in ({}, {"width": 320, "height": 200, "camera_name": "top"}):
        env = gym.make("SO101Residual-v0", render_mode="rgb_array", **kwargs)
        env.reset(seed=0)
        frames.append(env.render())
        env.close()
    assert [frame.shape for frame in frames] == [(480, 640, 3), (200, 320, 3)]
    for frame in frames:
        r, g, b = (frame[..., channel].astype(int) for channel in range(3))
        assert frame.dtype == np.uint8
        assert ((r > 120) & (g < 80) & (b < 80)).sum() > 300  # red tape
        assert ((r > 200) & (g > 200) & (b > 200)).sum() > 1000  # white paper
