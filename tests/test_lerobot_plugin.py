"""The plug-in for LeRobot, in LeRobot's own environment: discovered, evaluated in, driven."""

import os
import subprocess

import pytest

PYTHON = os.environ.get("LEROBOT_PYTHON")
CODE = """
import importlib.metadata, sys
try:
    importlib.metadata.distribution("lerobot_robot_so101_residual")
except importlib.metadata.PackageNotFoundError:
    sys.exit(77)
import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import preprocess_observation
from lerobot.robots import RobotConfig
from lerobot.robots.utils import make_robot_from_config
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()
config = EnvConfig.get_choice_class("so101_residual")(image_size=64)
envs = make_env(config, n_envs=2)["so101_residual"][0]
obs, _ = envs.reset(seed=[1, 2])
start = obs["agent_pos"].copy()
goal = start + np.array([5.0, 0, 0, 0, 0, 10])
for _ in range(40):
    obs, reward, terminated, truncated, info = envs.step(goal.astype(np.float32))
np.testing.assert_allclose(obs["agent_pos"][:, [0, 5]], goal[:, [0, 5]], atol=0.5)
np.testing.assert_allclose(obs["agent_pos"], goal, atol=3.0)  # lift and elbow sag under gravity
batch = preprocess_observation(obs)
assert batch["observation.images.top"].shape == (2, 3, 64, 64) and batch["observation.state"].shape == (2, 6)
assert envs.call("_max_episode_steps")[0] == 400 and "tape" in envs.call("task_description")[0]

robot = make_robot_from_config(RobotConfig.get_choice_class("so101_residual_sim")(id="sim"))
import so101_robot
so101_robot.ANSWER_S = 30.0
robot.connect()
before = robot.get_observation()
assert set(before) == set(robot.observation_features) and before["top"].shape == (240, 320, 3)
import time
for step in range(30):
    turn = {name: 5.0 * (name == "shoulder_pan.pos") for name in robot.action_features}
    robot.send_action({name: before[name] + turn[name] for name in turn})
    time.sleep(1 / 30)
after = robot.get_observation()
robot.disconnect()
assert 3.0 < after["shoulder_pan.pos"] - before["shoulder_pan.pos"] < 7.0
print("discovered, evaluated, driven")
"""


@pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no Python of an environment with LeRobot")
def test_the_plugin_in_lerobots_environment(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({CODE!r})\n")
    done = subprocess.run([PYTHON, str(script)], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    if done.returncode == 77:
        pytest.skip("the plug-in is not installed there, see lerobot_env_so101_residual/pyproject.toml")
    assert done.returncode == 0 and "discovered, evaluated, driven" in done.stdout, done.stderr[-3000:]
