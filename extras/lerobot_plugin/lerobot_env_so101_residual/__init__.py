"""Paper in square for LeRobot: an environment for lerobot-eval, and a robot for record, replay and teleoperate.

    lerobot-eval --env.type=so101_residual --policy.path=... --eval.n_episodes=50
    lerobot-record --robot.type=so101_residual_sim --robot.id=sim ...

The environment takes absolute joint targets in LeRobot's degrees (gripper 0 to 100), as policies give them that were
trained on recordings of this project. The robot is the simulated arm of run_so101.py, in real time.
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

from so101_control import JOINTS, from_rad, to_rad
from so101_env import ACT_DIM, COMMAND, MAX_EPISODE_STEPS, TASK_TEXT, BaseObservation, SO101ResidualVectorEnv, Task
from so101_policies import BasePolicy
from so101_robot import LEROBOT_P, SimulatedRobot

GYM_ID = "lerobot_env_so101_residual/PaperInSquare-v0"


class Targets(BasePolicy):
    """A base policy that asks for joint targets (6,), rad, that were set."""

    goal_rad: np.ndarray

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas (1, 6), rad, to the targets."""
        return self.goal_rad - obs[COMMAND]


class PaperInSquareEnv(gym.Env):
    """One arm; action: joint targets (6,) in degrees, gripper 0 to 100. Observation: pixels by camera, and agent_pos.

    Args:
        cameras: "top", "wrist".
        image_size: side of the pictures, pixels.
        settings: fields of so101_env.Task.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 30}
    task_description = task = TASK_TEXT

    def __init__(
        self,
        cameras: tuple[str, ...] = ("top",),
        image_size: int = 96,
        render_mode: str | None = "rgb_array",
        **settings: Any,
    ):
        self.cameras, self.size, self.render_mode = tuple(cameras), (image_size, image_size), render_mode
        self._targets = Targets()
        self._envs = SO101ResidualVectorEnv(
            1, self._targets, autoreset_mode=AutoresetMode.DISABLED, render_mode="rgb_array", num_threads=1, **settings
        )
        picture = gym.spaces.Box(0, 255, (*self.size, 3), np.uint8)
        joints = gym.spaces.Box(-360.0, 360.0, (ACT_DIM,), np.float32)
        pixels = gym.spaces.Dict(dict.fromkeys(self.cameras, picture))
        self.observation_space = gym.spaces.Dict({"pixels": pixels, "agent_pos": joints})
        self.action_space = joints

    def _observe(self, steps: int) -> dict[str, Any]:
        envs = self._envs
        look = (envs.look_seed, np.array([steps]))
        pixels = {camera: envs.camera_images(envs.qpos, camera, self.size, *look)[0] for camera in self.cameras}
        joints = from_rad(envs.full_observation[0, :ACT_DIM].astype(np.float64), "deg")
        return {"pixels": pixels, "agent_pos": joints.astype(np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self._envs.reset(seed=seed)
        return self._observe(0), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A control step, 1/30 s, towards joint targets (6,)."""
        self._targets.goal_rad = to_rad(np.asarray(action, np.float64), "deg")
        _, reward, terminated, truncated, info = self._envs.step(np.zeros((1, ACT_DIM)))
        steps = int(info["episode_summary"]["length"][0])
        success = {"is_success": bool(info["is_success"][0])}
        return self._observe(steps), float(reward[0]), bool(terminated[0]), bool(truncated[0]), success

    def render(self) -> np.ndarray:
        """The scene, for people, (480, 640, 3) uint8."""
        return self._envs.render()[0]

    def close(self) -> None:
        """Close the simulation."""
        self._envs.close()


gym.register(GYM_ID, entry_point=PaperInSquareEnv, max_episode_steps=MAX_EPISODE_STEPS)


@EnvConfig.register_subclass("so101_residual")
@dataclasses.dataclass
class PaperInSquareConfig(EnvConfig):
    """--env.type=so101_residual."""

    task: str | None = TASK_TEXT
    fps: int = 30
    cameras: list[str] = dataclasses.field(default_factory=lambda: ["top"])
    image_size: int = 96
    episode_length: int = MAX_EPISODE_STEPS
    tape_margin: float = Task.tape_margin
    full_randomization: bool = False
    visual_randomization: bool = False

    def __post_init__(self) -> None:
        self.features = {"action": PolicyFeature(FeatureType.ACTION, (ACT_DIM,))}
        self.features["agent_pos"] = PolicyFeature(FeatureType.STATE, (ACT_DIM,))
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for camera in self.cameras:
            key = f"pixels/{camera}"
            self.features[key] = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
            self.features_map[key] = f"observation.images.{camera}"

    @property
    def gym_id(self) -> str:
        """Where Gymnasium has it."""
        return GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """What gym.make gets."""
        names = ("image_size", "tape_margin", "full_randomization", "visual_randomization")
        given = {name: getattr(self, name) for name in names}
        return {"cameras": tuple(self.cameras), "max_episode_steps": self.episode_length, **given}


@RobotConfig.register_subclass("so101_residual_sim")
@dataclasses.dataclass(kw_only=True)
class SO101ResidualSimConfig(RobotConfig):
    """--robot.type=so101_residual_sim."""

    seed: int = 0  # of where the sheet lies, of the arm, and of how the scene looks
    firmware_p: int = LEROBOT_P
    tape_margin: float = Task.tape_margin
    visual_randomization: bool = True
    height: int = 240
    width: int = 320


class SO101ResidualSim(Robot):
    """The simulated arm, with its camera `top`. `connect` starts it anew: another sheet each time."""

    config_class, name = SO101ResidualSimConfig, "so101_residual_sim"

    def __init__(self, config: SO101ResidualSimConfig):
        super().__init__(config)
        self.config, self.robot, self.episode = config, None, 0
        self.cameras = {"top": None}  # LeRobot counts them

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        """Joints by LeRobot's names, in degrees, and a picture."""
        return {**self.action_features, "top": (self.config.height, self.config.width, 3)}

    @cached_property
    def action_features(self) -> dict[str, type]:
        """Joint targets by LeRobot's names, degrees."""
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def is_connected(self) -> bool:
        """Whether the simulation runs."""
        return self.robot is not None

    @property
    def is_calibrated(self) -> bool:
        """A simulation is."""
        return True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulation, in a process of its own."""
        c = self.config
        task = Task(tape_margin=c.tape_margin, firmware_p=c.firmware_p)
        self.robot = SimulatedRobot(task, c.visual_randomization, (c.height, c.width))
        self.robot.reset(c.seed + self.episode)
        self.episode += 1

    def get_observation(self) -> dict[str, Any]:
        """What it measures and sees now."""
        degrees = from_rad(self.robot.read()[0], "deg")
        return {**dict(zip(self.action_features, degrees.tolist())), "top": self.robot.picture().image}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Joint targets, as they are: without the limits of run_so101.py."""
        self.robot.write(to_rad(np.array([action[name] for name in self.action_features]), "deg"))
        return {name: action[name] for name in self.action_features}

    def disconnect(self) -> None:
        """End the simulation."""
        if self.robot is not None:
            self.robot.close()
            self.robot = None
