"""Paper in square for LeRobot: an environment for lerobot-eval, and a robot for record, replay and teleoperate.

    lerobot-eval --env.type=so101_residual --policy.path=... --eval.n_episodes=50
    lerobot-record --robot.type=so101_residual_sim --robot.id=sim ...

The environment's action is absolute joint targets in LeRobot's degrees (gripper 0 to 100): the output of policies that
were trained on recordings of this project. The robot is the simulated arm of so101.drive, in real time.
"""

import dataclasses
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.robots import Robot, RobotConfig

from so101.base import BasePolicy
from so101.robot import LEROBOT_P
from so101.simulated_arm import SimulatedRobot
from so101_env import COMMAND, MAX_EPISODE_STEPS, TASK_TEXT, SO101ResidualVectorEnv, Task
from so101_sim.control import ACT_DIM, JOINTS, from_rad, to_rad
from so101_sim.scene import CONTROL_HZ
from so101_sim.vector import BaseObservation, episode_steps

GYM_ID = "lerobot_env_so101_residual/PaperInSquare-v0"
ANSWER_S = 30.0  # longest wait for the simulated arm: LeRobot's commands import for so long beside it


class Targets(BasePolicy):
    """A base policy that commands the joint targets in goal_rad."""

    goal_rad: np.ndarray  # (6,)

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas (1, 6), rad, from the last commanded targets to goal_rad."""
        return self.goal_rad - obs[COMMAND]


class PaperInSquareEnv(gym.Env):
    """One arm at the task, as LeRobot expects an environment.

    Action: absolute joint targets (6,) in degrees, the gripper in 0 to 100.
    Observation: pixels, a dict with a picture (H, W, 3) uint8 for each camera; agent_pos, joint positions (6,) in the
    unit of the action.

    Args:
        cameras: names of the cameras, "top" and "wrist".
        observation_height, observation_width: size of the pictures, pixels.
        render_mode: "rgb_array"; other modes are not supported.
        max_episode_steps: control steps until truncation; that of gym.make wins.
        settings: fields of so101_env.Task.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    task_description = task = TASK_TEXT

    def __init__(
        self,
        cameras: tuple[str, ...] = ("top", "wrist"),
        observation_height: int = 96,
        observation_width: int = 96,
        render_mode: str | None = "rgb_array",
        max_episode_steps: int = MAX_EPISODE_STEPS,
        **settings: Any,
    ):
        self.cameras, self.size, self.render_mode = tuple(cameras), (observation_height, observation_width), render_mode
        self._targets, self._own_steps = Targets(), max_episode_steps
        self._envs = SO101ResidualVectorEnv(
            1, self._targets, autoreset_mode=AutoresetMode.DISABLED, render_mode="rgb_array", num_threads=1, **settings
        )
        picture = gym.spaces.Box(0, 255, (*self.size, 3), np.uint8)
        joints = gym.spaces.Box(-360.0, 360.0, (ACT_DIM,), np.float32)
        pixels = gym.spaces.Dict(dict.fromkeys(self.cameras, picture))
        self.observation_space = gym.spaces.Dict({"pixels": pixels, "agent_pos": joints})
        self.action_space = joints

    def _observe(self, steps: int) -> dict[str, Any]:
        """The observation after so many control steps."""
        envs = self._envs
        look = (envs.look_seed, np.array([steps]))
        pixels = {camera: envs.camera_images(envs.qpos, camera, self.size, *look)[0] for camera in self.cameras}
        joints = from_rad(envs.full_observation[0, :ACT_DIM].astype(np.float64), "deg")
        return {"pixels": pixels, "agent_pos": joints.astype(np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; returns the observation and info, which has is_success."""
        super().reset(seed=seed)
        self._envs.max_episode_steps = episode_steps(self, self._own_steps)
        self._envs.reset(seed=seed)
        return self._observe(0), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One control step, 1/30 s, towards joint targets (6,), degrees."""
        self._targets.goal_rad = to_rad(np.asarray(action, np.float64), "deg")
        _, reward, terminated, truncated, info = self._envs.step(np.zeros((1, ACT_DIM)))
        steps = int(info["episode_summary"]["length"][0])
        success = {"is_success": bool(info["is_success"][0])}
        return self._observe(steps), float(reward[0]), bool(terminated[0]), bool(truncated[0]), success

    def render(self) -> np.ndarray:
        """An RGB frame (480, 640, 3) uint8 of the scene, for people."""
        return self._envs.render()[0]

    def close(self) -> None:
        """Close the simulation."""
        self._envs.close()


gym.register(GYM_ID, entry_point=PaperInSquareEnv, max_episode_steps=MAX_EPISODE_STEPS)


@EnvConfig.register_subclass("so101_residual")
@dataclasses.dataclass
class PaperInSquareConfig(EnvConfig):
    """Options of --env.type=so101_residual."""

    task: str | None = TASK_TEXT
    fps: int = CONTROL_HZ
    cameras: list[str] = dataclasses.field(default_factory=lambda: ["top", "wrist"])
    observation_height: int = 96
    observation_width: int = 96
    episode_length: int = MAX_EPISODE_STEPS
    firmware_p: int = Task.firmware_p
    tape_margin: float = Task.tape_margin
    full_randomization: bool = False
    visual_randomization: bool = False

    def __post_init__(self) -> None:
        self.features = {"action": PolicyFeature(FeatureType.ACTION, (ACT_DIM,))}
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (ACT_DIM,))
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for camera in self.cameras:
            key = f"pixels/{camera}"
            self.features[key] = PolicyFeature(FeatureType.VISUAL, (self.observation_height, self.observation_width, 3))
            self.features_map[key] = f"observation.images.{camera}"

    @property
    def gym_id(self) -> str:
        """Name of the environment in Gymnasium's registry."""
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of gym.make."""
        names = ("observation_height", "observation_width", "firmware_p", "tape_margin")
        given = {name: getattr(self, name) for name in (*names, "full_randomization", "visual_randomization")}
        return {"cameras": tuple(self.cameras), "max_episode_steps": self.episode_length, **given}


@RobotConfig.register_subclass("so101_residual_sim")
@dataclasses.dataclass(kw_only=True)
class SO101ResidualSimConfig(RobotConfig):
    """Options of --robot.type=so101_residual_sim."""

    seed: int = 0  # determines the start of the sheet, the arm's imperfections, and the look of the scene
    firmware_p: int = LEROBOT_P
    tape_margin: float = Task.tape_margin
    visual_randomization: bool = True
    height: int = 240
    width: int = 320


class SO101ResidualSim(Robot):
    """The simulated arm, with its camera `top`. Every `connect` starts a new episode, with another seed."""

    config_class, name = SO101ResidualSimConfig, "so101_residual_sim"

    def __init__(self, config: SO101ResidualSimConfig):
        super().__init__(config)
        self.config, self.robot, self.episode = config, None, 0
        self.cameras = {"top": None}  # LeRobot uses the number of cameras only

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        """Joint positions by LeRobot's names, in degrees (gripper 0 to 100), and a picture."""
        return {**self.action_features, "top": (self.config.height, self.config.width, 3)}

    @cached_property
    def action_features(self) -> dict[str, type]:
        """Joint targets by LeRobot's names, in degrees (gripper 0 to 100)."""
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def is_connected(self) -> bool:
        """Whether the simulation runs."""
        return self.robot is not None

    @property
    def is_calibrated(self) -> bool:
        """Always true: a simulation needs no calibration."""
        return True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulation, in its own process."""
        c = self.config
        task = Task(tape_margin=c.tape_margin, firmware_p=c.firmware_p)
        self.robot = SimulatedRobot(task, c.visual_randomization, (c.height, c.width), ANSWER_S)
        self.robot.reset(c.seed + self.episode)
        self.episode += 1

    def get_observation(self) -> dict[str, Any]:
        """The present joint positions and picture."""
        degrees = from_rad(self.robot.read()[0], "deg")
        return {**dict(zip(self.action_features, degrees.tolist())), "top": self.robot.picture().image}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Send joint targets unchanged, without the limits of so101.drive."""
        self.robot.write(to_rad(np.array([action[name] for name in self.action_features]), "deg"))
        return {name: action[name] for name in self.action_features}

    def disconnect(self) -> None:
        """End the simulation."""
        if self.robot is not None:
            self.robot.close()
            self.robot = None
