"""The environment classes on a task of their own: Gymnasium's API, autoreset, pixels, saving, errors."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest
from conftest import assert_same_info, environment, plain
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_task import HOME_QPOS, SmallEnv, SmallVectorEnv

from so101_sim.batch import ArmRandomization
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.scene import VisualRandomization

RANGES = ArmRandomization(0.15, 0.15, 2, 0.02, (0.0, 0.02))
PIXELS = {"observe_pixels": True, "cameras": ("wrist", "top"), "image_size": (20, 24), "visuals": VisualRandomization()}


def arrays(obs):
    """The arrays of an observation, by name if it has pixels."""
    return obs if isinstance(obs, dict) else {"": obs}


# -- Gymnasium


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
@pytest.mark.parametrize("kwargs", [{}, {"ranges": RANGES}, PIXELS], ids=["state", "ranges", "pixels"])
def test_gymnasium_check_env(kwargs):
    check_env(SmallEnv(**kwargs), skip_render_check=True)


@pytest.mark.parametrize(
    "n, steps, kwargs", [(4, 80, {"ranges": RANGES}), (2, 32, {**PIXELS, "cameras": ("top",)})], ids=["state", "pixels"]
)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_batch_equals_gymnasiums_vector_of_single_environments(mode, n, steps, kwargs):
    """Observations, rewards, ends and infos are equal across autoresets, for one thread and for two."""
    envs, one_thread = (SmallVectorEnv(n, num_threads=k, autoreset_mode=mode, **kwargs) for k in (2, 1))
    reference = SyncVectorEnv([lambda: SmallEnv(**kwargs)] * n, autoreset_mode=mode)
    everyone, ends = np.ones(n, bool), set()
    results = [each.reset(seed=10) for each in (envs, one_thread, reference)]
    rng = np.random.default_rng(1)
    for _ in range(steps):
        (*ours, info), (*same, _), (*gymnasiums, expected_info) = results
        for a, b, c in zip(ours, same, gymnasiums):
            for key in arrays(a):
                np.testing.assert_array_equal(arrays(a)[key], arrays(b)[key])
                np.testing.assert_array_equal(arrays(a)[key], arrays(c)[key])
        assert_same_info(info, expected_info, everyone)
        if len(ours) == 4:
            ends |= {(bool(a), bool(b)) for a, b in zip(*ours[2:]) if a or b}
            if mode == AutoresetMode.DISABLED and (done := ours[2] | ours[3]).any():
                results = [each.reset(options={"reset_mask": done.copy()}) for each in (envs, one_thread, reference)]
        actions = rng.uniform(-0.6, 0.6, (n, ACT_DIM))
        actions[0, 1] -= 0.4  # environment 0 raises its tip
        results = [each.step(actions) for each in (envs, one_thread, reference)]
    assert ends == {(True, False), (False, True)}  # successes and time-outs
    for each in (envs, one_thread, reference):
        each.close()


def test_same_seed_same_episode_and_other_seeds_differ():
    envs = SmallVectorEnv(4)
    first = envs.reset(seed=5)[0]
    envs.step(np.ones((4, ACT_DIM)))
    again = envs.reset(seed=5)[0]
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first[:, 6])) == 4
    assert not np.shares_memory(first, again)
    moved = envs.step(np.ones((4, ACT_DIM)))[0]
    assert not np.shares_memory(moved, envs.step(np.ones((4, ACT_DIM)))[0])
    np.testing.assert_array_equal(envs.reset(seed=[8, 7, 6, 5])[0], first[::-1])


def test_disabled_autoreset_lets_finished_environments_rest():
    envs = SmallVectorEnv(2, max_episode_steps=3, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=0)
    envs.step(np.zeros((2, ACT_DIM)))
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(np.zeros((2, ACT_DIM)))
    obs, _, _, truncated, info = envs.step(np.ones((2, ACT_DIM)))
    assert truncated.tolist() == [True, False] and info["summary"]["length"].tolist() == [3, 2]
    later = envs.step(np.ones((2, ACT_DIM)))
    np.testing.assert_array_equal(later[0][0], obs[0])
    assert later[1][0] == 0.0 and later[3].tolist() == [False, True]
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(np.zeros((2, ACT_DIM)))


@pytest.mark.parametrize("kwargs", [{"ranges": RANGES}, PIXELS], ids=["state", "pixels"])
def test_a_restored_state_continues_bit_identically(kwargs):
    envs, other = SmallVectorEnv(3, **kwargs), SmallVectorEnv(3, **kwargs)
    envs.reset(seed=0)
    other.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 3, ACT_DIM))
    for t in range(35):
        envs.step(actions[t])
    other.set_state(envs.get_state())
    np.testing.assert_equal(other.observation, envs.observation)
    for t in range(35, 60):
        np.testing.assert_equal(*([plain(item) for item in each.step(actions[t])] for each in (envs, other)))
    for each in (envs, other):
        each.close()


def test_a_finished_environment_rests_after_restoring_too():
    envs, other = (SmallVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED, max_episode_steps=3) for _ in range(2))
    envs.reset(seed=0)
    other.reset(seed=1)
    envs.step(np.zeros((2, ACT_DIM)))
    envs.reset(options={"reset_mask": np.array([False, True])})
    for _ in range(2):
        obs = envs.step(np.zeros((2, ACT_DIM)))[0]
    other.set_state(envs.get_state())
    later = other.step(np.ones((2, ACT_DIM)))
    np.testing.assert_array_equal(later[0][0], obs[0])
    assert later[3].tolist() == [False, True]


def test_a_state_that_does_not_fit_changes_nothing():
    """Each part of a state is damaged once; the environment then continues as if nothing had happened."""
    envs, untouched = SmallVectorEnv(3, RANGES), SmallVectorEnv(3, RANGES)
    for each in (envs, untouched):
        each.reset(seed=0)
    state = SmallVectorEnv(3, RANGES)
    state.reset(seed=1)
    state.step(np.ones((3, ACT_DIM)))
    state = state.get_state()
    arms = state["arms"]
    damaged = [
        {**state, "_steps": state["_steps"][:2]}, {**state, "_obs": state["_obs"].astype(float)},
        {**state, "rngs": state["rngs"][:2]}, {**state, "rngs": ["hello"] * 3},
        {**state, "arms": {**arms, "batch": arms["batch"][:, :-1]}}, {**state, "arms": {**arms, "fields": {}}},
        {key: value for key, value in state.items() if key != "arms"}, {**state, "arms": {**arms, "latency": None}},
    ]  # fmt: skip
    for each in damaged:
        with pytest.raises(SO101Error, match="state of the environments"):
            envs.set_state(each)
    for _ in range(30):
        results = [each.step(np.full((3, ACT_DIM), 0.3))[0] for each in (envs, untouched)]
        np.testing.assert_array_equal(*results)


# -- observations and arguments


def test_pixel_observations_have_cameras_and_measured_parts():
    """The puck is moved: the pictures change, and state does not, because an arm cannot measure the puck."""
    options = {**PIXELS, "visuals": None}
    envs = SmallVectorEnv(2, **options)
    assert set(envs.single_observation_space) == {"pixels_wrist", "pixels_top", "state"}
    qpos = np.tile(HOME_QPOS, (2, 1))
    qpos[1, 6:] = 0.27, 0.0
    obs, info = envs.reset(seed=0, options={"qpos": qpos})
    assert obs in envs.observation_space and obs["pixels_top"].shape == (2, 20, 24, 3) and obs["state"].shape == (2, 7)
    np.testing.assert_array_equal(obs["state"][0], obs["state"][1])
    for camera in envs.cameras:
        assert np.abs(obs[f"pixels_{camera}"][0].astype(int) - obs[f"pixels_{camera}"][1]).max() > 50
    np.testing.assert_array_equal(info["full_observation"], envs.full_observation)
    np.testing.assert_allclose(info["full_observation"][:, 6:8], qpos[:, 6:], atol=1e-7)
    np.testing.assert_array_equal(obs["state"], info["full_observation"][:, [0, 1, 2, 3, 4, 5, 8]])
    before = obs["pixels_top"].copy()
    later, *_ = envs.step(np.ones((2, ACT_DIM)))
    assert not np.array_equal(later["pixels_top"], before) and np.array_equal(obs["pixels_top"], before)
    with pytest.raises(SO101Error, match="side.*top and wrist"):
        envs.camera_images(qpos, "side", (20, 24))
    envs.close()


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"max_episode_steps": steps} for steps in (0, -1, 2.5, "600", None, True, np.nan)),
        {"render_mode": "ascii"}, {"camera_name": "side"}, {"width": 4}, {"height": 5000},
        {"cameras": ()}, {"cameras": ("top", "top")}, {"cameras": ("side",)}, {"image_size": (4, 32)},
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(kwargs):
    for environment_class in (SmallVectorEnv, SmallEnv):
        with pytest.raises(SO101Error, match=next(iter(kwargs))):
            environment_class(**kwargs)
    with pytest.raises(SO101Error, match="num_envs"):
        SmallEnv(num_envs=3)


def test_bad_calls_are_named():
    envs = SmallVectorEnv(2)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(np.zeros((2, ACT_DIM)))
    with pytest.raises(ValueError, match="3 seeds for 2"):
        envs.reset(seed=[1, 2, 3])
    for mask in ([True, False, True], [1, 0], [False, False]):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(seed=0, options={"reset_mask": np.array(mask)})
    envs.reset(seed=0)
    for actions in (np.zeros(ACT_DIM), np.zeros((2, 5)), np.full((2, ACT_DIM), np.nan)):
        with pytest.raises(ValueError, match="actions"):
            envs.step(actions)


def test_an_observation_of_another_size_than_parts_is_named():
    class Wrong(SmallVectorEnv):
        def observe(self, mask, scene):
            return super().observe(mask, scene)[:, :-1]

    with pytest.raises(ValueError, match=r"observe\(\) must return \(2, 9\).*\(2, 8\)"):
        Wrong(2).reset(seed=0)


def test_model_and_data_are_mujocos():
    env = SmallEnv()
    env.reset(seed=0)
    obs = env.step(np.ones(ACT_DIM))[0]
    model, data = env.model, env.data
    np.testing.assert_allclose(obs[8], data.site("gripperframe").xpos[2], atol=1e-6)
    mujoco.mj_step(model, data)  # of a copy
    assert env.data.time == pytest.approx(1 / 30) and env.data is data
    obs, _ = env.reset(options={"qpos": data.qpos})
    np.testing.assert_allclose(obs[:6], data.qpos[:6], atol=1e-6)


# -- rendering


def test_frames_for_people():
    """Red pixels are the puck, from the side by default."""
    for options in ({"width": 160, "height": 120}, {"width": 320, "height": 200, "camera_name": "top"}):
        env = SmallEnv(render_mode="rgb_array", **options)
        env.reset(seed=0)
        frame = env.render()
        env.close()
        r, g, b = (frame[..., channel].astype(int) for channel in range(3))
        assert frame.shape == (options["height"], options["width"], 3) and frame.dtype == np.uint8
        assert 20 < ((r > 120) & (g < 80) & (b < 80)).sum() < 0.1 * r.size
    assert SmallEnv().render() is None
    envs = SmallVectorEnv(2, render_mode="rgb_array", width=64, height=48)
    envs.reset(seed=0)
    assert [frame.shape for frame in envs.render()] == [(48, 64, 3)] * 2
    envs.close()


@pytest.mark.parametrize("display", [None, ":123"])
def test_human_mode_without_a_display_is_an_error(display):
    """In a process of its own: GLFW would hang it or end it."""
    code = (
        "from small_task import SmallEnv\ntry: SmallEnv(render_mode='human')\n"
        "except ValueError as error: print('error:', error)"
    )
    variables = environment(DISPLAY=display, WAYLAND_DISPLAY=None)
    variables["PYTHONPATH"] += os.pathsep + os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)
    assert done.returncode == 0 and "error: there is no display" in done.stdout, done.stderr
