"""examples/push_cube_env.py; tests/test_forks.py trains on it as docs/own_task.md describes."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from examples.push_cube_env import HOME_RAD, SPOT_M, SUCCESS_STEPS, PushCubeVectorEnv, Task
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.vector import ArmEnv


class PushCubeEnv(ArmEnv):
    vector_env = PushCubeVectorEnv


def start(x_m: float, y_m: float, n: int = 1, **options) -> PushCubeVectorEnv:
    """Environments with their cubes at rest at one place."""
    envs = PushCubeVectorEnv(n, autoreset_mode=AutoresetMode.DISABLED, **options)
    envs.reset(seed=0, options={"qpos": np.tile([*HOME_RAD, x_m, y_m, SPOT_M[2], 1.0, 0.0, 0.0, 0.0], (n, 1))})
    return envs


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_gymnasium_check_env():
    check_env(PushCubeEnv(), skip_render_check=True)


def test_an_arm_that_rests_moves_nothing_and_never_succeeds():
    envs = PushCubeVectorEnv(20, max_episode_steps=100, shaping_gamma=0.98, autoreset_mode=AutoresetMode.DISABLED)
    first, info = envs.reset(seed=0)
    assert len(np.unique(first[:, envs_slice("cube")][:, 0])) == 20 and not info["is_success"].any()
    for _ in range(100):
        obs, reward, terminated, truncated, info = envs.step(np.zeros((20, ACT_DIM)))
        assert not terminated.any()
        np.testing.assert_allclose(reward, sum(info["reward_terms"].values()), atol=1e-12)
    assert truncated.all() and info["episode_summary"]["length"].tolist() == [100] * 20
    assert np.abs(obs[:, :6] - first[:, :6]).max() < 3e-3
    assert np.abs((obs - first)[:, envs_slice("cube")]).max() < 1e-3


def envs_slice(part: str) -> slice:
    from so101_sim.vector import slices

    return slices(PushCubeVectorEnv.parts)[part]


def test_success_takes_consecutive_steps_at_the_spot():
    envs = start(SPOT_M[0] + 0.005, SPOT_M[1] - 0.005)
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
    """Shoulder and elbow sweep the closed gripper against a cube to the left of it."""
    envs = start(SPOT_M[0], 0.05)
    action = np.zeros((1, ACT_DIM))
    action[0, 1], action[0, 0] = 0.15, 1.0
    before = envs.qpos[0, 6:8].copy()
    for _ in range(40):
        envs.step(action)
    assert np.linalg.norm(envs.qpos[0, 6:8] - before) > 0.01


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
