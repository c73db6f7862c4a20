"""The plug-in for LeRobot, in its own environment: discovered, evaluated in, driven, and by LeRobot's commands."""

import functools
import json
import os
import subprocess

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT

PYTHON = os.environ.get("LEROBOT_PYTHON")
DISCOVER = """
import importlib.metadata, sys
try:
    importlib.metadata.distribution("lerobot_policy_so101_residual")
except importlib.metadata.PackageNotFoundError:
    sys.exit(77)
import gymnasium as gym
import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env
from lerobot.utils.import_utils import register_third_party_plugins

register_third_party_plugins()
from lerobot_env_so101_residual import GYM_ID

def environments(n_envs, **options):
    return make_env(EnvConfig.get_choice_class("so101_residual")(**options), n_envs=n_envs)["so101_residual"][0]

SMALL = {"cameras": ("top",), "observation_height": 16, "observation_width": 16}
"""
ENVIRONMENT = """
from lerobot.envs.utils import preprocess_observation

envs = environments(2, observation_height=48, observation_width=64)
obs, _ = envs.reset(seed=[1, 2])
start = obs["agent_pos"].copy()
goal = start + np.array([5.0, 0, 0, 0, 0, 10])
for _ in range(40):
    obs, reward, terminated, truncated, info = envs.step(goal.astype(np.float32))
np.testing.assert_allclose(obs["agent_pos"][:, [0, 5]], goal[:, [0, 5]], atol=0.5)
np.testing.assert_allclose(obs["agent_pos"], goal, atol=3.0)  # lift and elbow sag under gravity
batch = preprocess_observation(obs)
pictures = {key: tuple(value.shape) for key, value in batch.items() if "image" in key}
assert pictures == dict.fromkeys(["observation.images.top", "observation.images.wrist"], (2, 3, 48, 64)), pictures
assert batch["observation.state"].shape == (2, 6) and "tape" in envs.call("task_description")[0]
envs.close()
"""
LENGTHS = """
def length(env, shape):
    obs, _ = env.reset(seed=5)
    for step in range(1, 1000):
        _, _, terminated, truncated, _ = env.step(obs["agent_pos"].astype(np.float32))  # rests: cannot succeed
        if np.any(truncated):
            return step
        assert not np.any(terminated)

for asked, expected in ({}, 400), ({"max_episode_steps": 30}, 30), ({"max_episode_steps": 600}, 600):
    assert length(gym.make(GYM_ID, **SMALL, **asked), ()) == expected, asked
for asked, expected in ({}, 400), ({"episode_length": 30}, 30), ({"episode_length": 600}, 600):
    envs = environments(1, **SMALL, **asked)
    assert envs.call("_max_episode_steps")[0] == expected  # where lerobot-eval stops
    assert length(envs, (1,)) == expected, asked
"""
SEEDS = """
from gymnasium.vector import AutoresetMode
from so101.evaluation import evaluate
from so101.pusher import JacobianPolicy
from so101_env import SO101ResidualVectorEnv
from so101_sim.control import from_rad

seeds, length = [3, 1], {"max_episode_steps": 40}
ours = SO101ResidualVectorEnv(2, JacobianPolicy(), autoreset_mode=AutoresetMode.DISABLED, num_threads=1, **length)
episodes = evaluate(lambda obs: np.zeros((2, 6)), ours, seeds, trace=True)
assert [episode["success"] for episode in episodes] == [True, False]
env = gym.make(GYM_ID, **SMALL, **length)
for episode in [*episodes, episodes[0]]:  # the first one again: an episode depends on its seed only
    env.reset(seed=episode["seed"])
    for step, command in enumerate(episode["command"]):
        # the start is bit-identical; then the conversion to degrees rounds
        np.testing.assert_allclose(env.unwrapped._envs.qpos[0], episode["qpos"][step], rtol=0, atol=1e-9 * (step > 0))
        _, _, terminated, truncated, info = env.step(from_rad(command, "deg"))
    assert (terminated or truncated) and info["is_success"] == episode["success"]
"""
ROBOT_CODE = """
import time
from lerobot.robots import RobotConfig
from lerobot.robots.utils import make_robot_from_config

robot = make_robot_from_config(RobotConfig.get_choice_class("so101_residual_sim")(id="sim"))
robot.connect()
before = robot.get_observation()
assert set(before) == set(robot.observation_features) and before["top"].shape == (240, 320, 3)
turn = {name: 5.0 * (name == "shoulder_pan.pos") for name in robot.action_features}
moved, until = 0.0, time.monotonic() + 60.0
while not 3.0 < moved < 7.0 and time.monotonic() < until:
    robot.send_action({name: before[name] + turn[name] for name in turn})
    moved = robot.get_observation()["shoulder_pan.pos"] - before["shoulder_pan.pos"]
robot.disconnect()
assert 3.0 < moved < 7.0, moved
"""

# a leader arm that nobody holds: its pan swings by 20 degrees
LEADER = """
import dataclasses, math, time
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from so101_sim.control import JOINTS

@TeleoperatorConfig.register_subclass("swinging_leader")
@dataclasses.dataclass
class SwingingLeaderConfig(TeleoperatorConfig):
    pass

class SwingingLeader(Teleoperator):
    config_class, name, is_connected, is_calibrated, feedback_features = None, "swinging_leader", False, True, {}
    action_features = {f"{joint}.pos": float for joint in JOINTS}

    def connect(self, calibrate=True):
        self.is_connected, self.began = True, time.time()

    def disconnect(self):
        self.is_connected = False

    def get_action(self):
        pan = 20 * math.sin(2 * (time.time() - self.began))
        return dict(zip(self.action_features, (pan, 15.0, -13.0, 76.0, 2.7, 0.0)))

    def calibrate(self):
        pass

    configure = send_feedback = calibrate
"""
ROBOT = ["--robot.type=so101_residual_sim", "--robot.id=sim", "--robot.height=96", "--robot.width=96"]
ACT = (
    "chunk_size=16 n_action_steps=16 use_vae=false n_encoder_layers=1 dim_model=64 n_heads=2 dim_feedforward=64".split()
)


needs_lerobot = pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no Python of an environment with LeRobot")


@functools.cache
def lerobots_version():
    """Version of LeRobot in the environment of LEROBOT_PYTHON, as numbers."""
    line = [PYTHON, "-c", "import importlib.metadata as m; print(m.version('lerobot'))"]
    version = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout
    return tuple(int(number) for number in version.split(".")[:2])


def with_path(folder):
    """PYTHONPATH with a directory in front."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


# LeRobot's modules also run from the folders that hold the plug-in's sources
@needs_lerobot
@pytest.mark.parametrize(
    "code, folder",
    [
        (ENVIRONMENT, None),
        (LENGTHS, None),
        (SEEDS, None),
        (ROBOT_CODE, None),
        ("", ROOT),
        ("", ROOT / "extras/lerobot_plugin"),
    ],
    ids=["environment", "lengths", "seeds", "robot", "from_root", "from_plugin"],
)
def test_the_plugin_in_lerobots_environment(tmp_path, code, folder):
    (tmp_path / "code.py").write_text(DISCOVER + code)
    run = f"if __name__ == '__main__':\n    exec(open({str(tmp_path / 'code.py')!r}).read())\n"
    (tmp_path / "check.py").write_text(run)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder or ""),
    }  # as python -m does, and no other source of the plug-in
    line = [PYTHON, str(tmp_path / "check.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, cwd=folder or tmp_path, env=environment)
    if done.returncode == 77:
        pytest.skip("the plug-in is not installed there, see extras/lerobot_plugin/pyproject.toml")
    assert done.returncode == 0 and "Could not import" not in done.stderr, done.stderr[-3000:]


HUB = """
import sys
from pathlib import Path
from lerobot.envs import factory

factory._download_hub_file.__globals__["hf_hub_download"] = lambda filename, **_: str(Path(sys.argv[1]) / filename)
try:
    factory.make_env("me/paper_in_square")
except RuntimeError as error:
    assert "trust_remote_code" in str(error)
envs = factory.make_env("me/paper_in_square", n_envs=2, trust_remote_code=True)["so101_residual"][0]
observation, _ = envs.reset(seed=[1, 2])
assert observation["agent_pos"].shape == (2, 6) and observation["pixels"]["top"].shape == (2, 96, 96, 3)
observation, reward, *_ = envs.step(observation["agent_pos"])
assert reward.shape == (2,)
envs.close()
print("loaded from the hub")
"""


@needs_lerobot
def test_the_environment_hub(tmp_path):
    """LeRobot's own loader takes extras/env_hub as the repository that it would download."""
    script = tmp_path / "check.py"
    script.write_text(HUB)
    words = [PYTHON, str(script), str(ROOT / "extras" / "env_hub")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    if "dependency 'lerobot_env_so101_residual'" in done.stderr:
        pytest.skip("the plug-in is not installed there, see extras/lerobot_plugin/pyproject.toml")
    assert done.returncode == 0 and "loaded from the hub" in done.stdout, done.stderr[-3000:]


@needs_lerobot
def test_lerobots_commands(tmp_path):
    """Teleoperated and recorded, replayed, a policy trained on that, evaluated and run: as a user types it."""
    package = tmp_path / "lerobot_teleoperator_swinging-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot_teleoperator_swinging\nVersion: 0\n")
    (tmp_path / "lerobot_teleoperator_swinging.py").write_text(LEADER)
    environment = {**os.environ, "PYTHONPATH": with_path(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    new = lerobots_version() >= (0, 6)

    def lerobot(command, *flags):
        line = [PYTHON, "-m", f"lerobot.scripts.lerobot_{command}", *flags]
        done = subprocess.run(line, capture_output=True, text=True, timeout=250, cwd=tmp_path, env=environment)
        if "No module named 'rerun'" in done.stderr or "No package metadata" in done.stderr:
            pytest.skip("LeRobot is not installed whole there")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def record(command, name, *flags):
        lerobot(
            command, *ROBOT, *flags, f"--dataset.repo_id=local/{name}", f"--dataset.root={tmp_path / name}",
            "--dataset.single_task=slide", "--dataset.num_episodes=1", "--dataset.episode_time_s=3",
            "--dataset.reset_time_s=0", "--dataset.push_to_hub=false", "--play_sounds=false",
        )  # fmt: skip
        table = pyarrow.parquet.read_table(next((tmp_path / name / "data").rglob("*.parquet")))
        return (np.array(table[key].to_pylist()) for key in ("action", "observation.state"))

    demos = [f"--dataset.root={tmp_path / 'demos'}", "--dataset.repo_id=local/demos"]
    leader = ["--teleop.type=swinging_leader", "--teleop.id=nobody"]
    asked, joints = record("record", "demos", *leader)
    assert len(asked) > 15 and np.ptp(asked[:, 0]) > 30
    delays = range(10)  # of the arm, control steps
    off = [np.abs(asked[: len(asked) - delay, 0] - joints[delay:, 0]).mean() for delay in delays]
    assert min(off) < 3, off  # degrees: it follows
    lerobot("replay", *ROBOT, *demos, "--dataset.episode=0", "--play_sounds=false")
    assert "30 Hz" in lerobot("teleoperate", *ROBOT, *leader, "--fps=30", "--teleop_time_s=2")

    # in training, the environment evaluates the policy
    env = ["--env.type=so101_residual", "--env.cameras=[top]", "--env.episode_length=20"]
    lerobot(
        "train", *demos, *env, "--output_dir=act", "--steps=2", "--save_freq=2", "--batch_size=2", "--num_workers=0",
        "--env_eval_freq=2" if new else "--eval_freq=2", "--eval.n_episodes=1", "--eval.batch_size=1",
        "--wandb.enable=false", "--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false",
        "--policy.pretrained_backbone_weights=null", *(f"--policy.{flag}" for flag in ACT),
    )  # fmt: skip
    assert list((tmp_path / "act/eval").rglob("*.mp4"))
    policy = ["--policy.path=act/checkpoints/last/pretrained_model", "--policy.device=cpu"]
    lerobot("eval", *policy, *env, "--eval.n_episodes=2", "--eval.batch_size=2", "--output_dir=evaluated")
    assert json.loads((tmp_path / "evaluated/eval_info.json").read_text())["overall"]["n_episodes"] == 2
    if new:
        lerobot("rollout", *ROBOT, *policy, "--strategy.type=base", "--task=slide", "--duration=2")
        asked, _ = record("rollout", "rollout_act", *policy, "--strategy.type=episodic")
    else:
        asked, _ = record("record", "eval_act", *policy)
    assert len(asked) > 5 and np.isfinite(asked).all()
