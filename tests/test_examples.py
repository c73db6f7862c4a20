"""examples/push_cube_env.py; tests/test_forks.py trains on it as docs/own_task.md describes."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from examples.push_cube_env import HOME_RAD, SPOT_M, SUCCESS_STEPS, PushCubeVectorEnv, Task
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.vector import ArmEnv, slices


class PushCubeEnv(ArmEnv):
    vector_env = PushCubeVectorEnv


WHERE = slices(PushCubeVectorEnv.parts)
RAISED_RAD = HOME_RAD + [0.0, -0.4, 0.0, 0.0, 0.0, 0.0]  # the fingers 10 cm above the table


def start(x_m: float, y_m: float, joints_rad: np.ndarray = HOME_RAD) -> PushCubeVectorEnv:
    """One environment with arm and cube at rest."""
    envs = PushCubeVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0, options={"qpos": np.array([[*joints_rad, x_m, y_m, SPOT_M[2], 1.0, 0.0, 0.0, 0.0]])})
    return envs


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_gymnasium_check_env():
    check_env(PushCubeEnv(), skip_render_check=True)


def test_an_arm_that_rests_moves_nothing_and_never_succeeds():
    envs = PushCubeVectorEnv(20, max_episode_steps=100, shaping_gamma=0.98, autoreset_mode=AutoresetMode.DISABLED)
    first, info = envs.reset(seed=0)
    assert len(np.unique(first[:, WHERE["cube"]][:, 0])) == 20 and not info["is_success"].any()
    for _ in range(100):
        obs, reward, terminated, truncated, info = envs.step(np.zeros((20, ACT_DIM)))
        assert not terminated.any()
        np.testing.assert_allclose(reward, sum(info["reward_terms"].values()), atol=1e-12)
    assert truncated.all() and info["episode_summary"]["length"].tolist() == [100] * 20
    assert np.abs(obs[:, :6] - first[:, :6]).max() < 3e-3
    assert np.abs((obs - first)[:, WHERE["cube"]]).max() < 1e-3


def test_success_takes_consecutive_steps_at_the_spot():
    envs = start(SPOT_M[0] + 0.005, SPOT_M[1] - 0.005, RAISED_RAD)
    for _ in range(SUCCESS_STEPS - 1):
        assert not envs.step(np.zeros((1, ACT_DIM)))[2].any()
    _, _, terminated, _, info = envs.step(np.zeros((1, ACT_DIM)))
    assert terminated[0] and info["is_success"][0] and info["reward_terms"]["success"][0] == 10


def test_a_cube_out_of_reach_is_a_costly_failure():
    envs = start(0.43, 0.0)
    _, _, terminated, _, info = envs.step(np.zeros((1, ACT_DIM)))
    assert terminated[0] and info["out_of_reach"][0] and not info["is_success"][0]
    assert info["reward_terms"]["failure"][0] < -100


def test_the_arm_pushes_the_cube():
    """The shoulder turns, and the fingers push a cube that lies to their left."""
    envs = start(SPOT_M[0], 0.05)
    for _ in range(40):
        envs.step(np.array([[-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    moved = envs.qpos[0, 6:9] - [SPOT_M[0], 0.05, SPOT_M[2]]
    assert moved[1] > 0.02 and abs(moved[2]) < 1e-3


def test_observation_against_mujoco():
    envs = start(SPOT_M[0], 0.05)
    for _ in range(40):
        obs = envs.step(np.array([[-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))[0][0]
    data = envs.arms.batch.get_data(0)
    cube, tips = data.qpos[6:9], [data.geom(name).xpos for name in ("fixed_finger_col", "moving_finger_col")]
    parts = {name: obs[where] for name, where in WHERE.items()}
    np.testing.assert_allclose(parts["joint_pos"], data.qpos[:6], atol=1e-6)
    np.testing.assert_allclose(parts["joint_vel"], data.qvel[:6], atol=1e-6)
    np.testing.assert_allclose(parts["cube"], cube, atol=1e-6)
    np.testing.assert_allclose(parts["spot_minus_cube"], (SPOT_M - cube)[:2], atol=1e-6)
    np.testing.assert_allclose(parts["tip"], np.mean(tips, axis=0), atol=1e-6)


def test_friction_is_randomised_unless_it_is_switched_off():
    for randomize, count in ((True, 12), (False, 1)):
        envs = PushCubeVectorEnv(12, task=Task(randomize=randomize))
        envs.reset(seed=0)
        assert len(np.unique(envs.arms.fields["pair_friction"][:, :, 0], axis=0)) == count


def test_bad_settings_are_errors():
    with pytest.raises(SO101Error, match="step_rad"):
        PushCubeVectorEnv(task=Task(step_rad=0.0))
    with pytest.raises(SO101Error, match="base_policy"):
        PushCubeVectorEnv(base_policy=object())
