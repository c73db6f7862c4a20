"""The policy type so101_residual: a base policy plus a residual that sees the sheet through a camera.

A directory of this type has config.json, residual.onnx, which so101.onnx describes, and, if the base is a policy of
LeRobot, that policy's own directory base/ with its own pre- and postprocessors. eval_so101.py --export-lerobot writes
it. Observation and action are joints in the unit of the base, LeRobot's degrees unless its own data were otherwise.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.policies.pretrained import PreTrainedPolicy

from lerobot_policy_so101_residual.configuration_so101_residual import (
    IMAGES,
    STATE,
    SO101ResidualConfig,
)
from so101.camera import CAMERA
from so101.loop import POSE_ERROR_M, resize, way_from, way_up
from so101.onnx import OnnxPolicy
from so101.opencv import OpenCVPolicy
from so101.robot import RobotError
from so101.serve import LeRobotPolicy
from so101.server import ChunkPolicy
from so101.trust import Trust
from so101_env import (
    HOME_RAD,
    SUCCESS_STEPS,
    TAPE_CENTER_M,
    BaseObservation,
    base_observation,
    load_model,
    make_observation,
    sheet_inside,
)
from so101_sim.control import ACT_DIM, BACKLASH_RAD, GAIN_FLOOR, LATENCY_S, Calibration, Controller, from_rad, to_rad
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ

RESIDUAL, BASE = "residual.onnx", "base"
BEYOND_MODEL_RAD = float(np.deg2rad(20))  # a folded arm may be measured so far beyond the model's limits
NEAR_HOME_RAD = 0.2  # a joint so far from the start pose is moved there first
LOCATOR_HEIGHT, LOCATOR_ASPECT = 240, 4 / 3  # larger or wider pictures are scaled and cut, as so101.drive does

log = logging.getLogger(__name__)


class SeenResidual(OpenCVPolicy):
    """A residual that corrects its base where the sheet's pose is seen, and leaves the base alone where it is not."""

    def rest(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas (N, 6), rad, without a pose: the base's, if it sees through cameras of its own."""
        delta = np.zeros((len(mask), ACT_DIM))
        if self.base.base is not None and self.base.base.cameras:
            delta = self.base.base_delta(obs, mask)
        self.base.residual[mask] = 0.0
        return delta


class SO101ResidualPolicy(PreTrainedPolicy):
    """A base policy with its residual, as a policy of LeRobot.

    Args:
        config: its options.
        directory: where residual.onnx and base/ are.

    Raises:
        SO101Error: there is no directory, a file in it cannot be used, or the base is not the one that the residual was
            trained on.
    """

    config_class, name = SO101ResidualConfig, "so101_residual"

    def __init__(self, config: SO101ResidualConfig, directory: Path | None = None, **others: Any):
        super().__init__(config)
        if directory is None:
            config.get_optimizer_preset()  # says how such a policy is made
        config.validate_features()
        self.directory = Path(directory)
        residual = OnnxPolicy(str(self.directory / RESIDUAL), Trust((f"lerobot:{self.directory / BASE}",)))
        if config.device != "cpu" and isinstance(residual.base, ChunkPolicy):
            residual.base.client.policy = LeRobotPolicy(self.directory / BASE, config.device)
        self.task, self.units = residual.task, residual.metadata["server"].units or "deg"
        self.tape_margin = margin = self.task.tape_margin if config.tape_margin is None else config.tape_margin
        self.policy = SeenResidual(residual, margin, config.marks, config.camera_turned)
        self.policy.firmware_p = config.firmware_p or self.task.firmware_p
        self.names = {camera: name for name, camera in config.cameras.items()}
        if missing := [camera for camera in self.policy.cameras if camera not in self.names]:
            raise SO101Error(f"{self.directory}: cameras in its config.json lack {missing[0]}; export it again")
        self.model = load_model(margin)
        low, high = self.model.actuator_ctrlrange.T
        self.reachable = Calibration(low - BEYOND_MODEL_RAD, high + BEYOND_MODEL_RAD)
        self.reset()

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: SO101ResidualConfig | None = None,
        revision: str | None = None, **options: Any,
    ) -> "SO101ResidualPolicy":  # fmt: skip
        """The policy in a directory, or in a repository of the hub.

        Args:
            pretrained_name_or_path: directory, or name of the repository.
            config: its options; None: those in its config.json.
            revision: of the repository.
            options: for huggingface_hub.snapshot_download: force_download, token, cache_dir, local_files_only.
        """
        directory = Path(pretrained_name_or_path)
        if not directory.is_dir():
            names = ("force_download", "token", "cache_dir", "local_files_only")
            known = {name: options[name] for name in names if name in options}
            directory = Path(snapshot_download(str(pretrained_name_or_path), revision=revision, **known))
        config = config or SO101ResidualConfig.from_pretrained(directory)
        policy = cls(config, directory)
        policy.eval()
        return policy

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Any] | None = None) -> None:
        """Write the options, the residual and the base's directory."""
        self.config._save_pretrained(save_directory)
        shutil.copyfile(self.directory / RESIDUAL, save_directory / RESIDUAL)
        if (self.directory / BASE).is_dir():
            shutil.copytree(self.directory / BASE, save_directory / BASE)

    # -- acting

    def reset(self) -> None:
        """A new episode begins with the next observation."""
        self.controllers: list[Controller] = []

    def _begin(self, joints_rad: np.ndarray, images: dict[str, np.ndarray]) -> None:
        """Begin an episode of N arms, with joints (N, 6), rad, and pictures (N, H, W, 3) by camera."""
        config, gain = self.config, self.config.servo_gain
        height, width = images[CAMERA].shape[1:3]
        scale = min(1.0, LOCATOR_HEIGHT / height)
        self.policy.image_size = round(scale * height), round(scale * min(width, LOCATOR_ASPECT * height))
        self.policy.reset(np.ones(len(joints_rad), bool))
        self.step, self.ways, self.said = 0, [], ""
        self.streak = np.zeros(len(joints_rad), np.int64)  # steps in a row in which the sheet is seen inside the tape
        for joints in joints_rad:
            controller = Controller(
                self.model, self.policy.firmware_p, BACKLASH_RAD, LATENCY_S,
                gain_factor=gain or 1.0, gain_floor=1.0 if gain else GAIN_FLOOR, measured=self.reachable,
            )  # fmt: skip
            self.controllers.append(controller)
            far = config.start_at_home and np.abs(joints - HOME_RAD).max() > NEAR_HOME_RAD
            self.ways.append(way_from(controller) if far else None)
        if any(self.ways):
            log.info("the arm moves to the start pose first")

    @torch.no_grad()
    def select_action(self, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """The next joint targets (B, 6). One call is one control step, 1/30 s.

        Args:
            batch: observation.state (B, 6), and observation.images.NAME (B, 3, H, W) in [0, 1] for each camera.
            options: not used.
        """
        joints_rad = to_rad(batch[STATE].double().cpu().numpy(), self.units)
        images = {camera: _pixels(batch[IMAGES + name]) for camera, name in self.names.items()}
        if len(self.controllers) != len(joints_rad):
            self._begin(joints_rad, images)
        now = self.step / CONTROL_HZ
        for controller, joints in zip(self.controllers, joints_rad):
            controller.measure(joints, now)
        obs, delta = self._observe(images), np.zeros((len(joints_rad), ACT_DIM))
        for i, way in enumerate(self.ways):
            if way is not None:
                delta[i], self.ways[i] = self._next(way)
        acting = np.array([way is None for way in self.ways]) & (self.streak < SUCCESS_STEPS)
        if self.ways != [None] * len(acting):
            self.policy.look(obs, ~acting)
        if acting.any():
            delta[acting] = self.policy.act(obs, acting)[acting]
            self._judge(acting)
        target = [controller.move(each, now) for controller, each in zip(self.controllers, delta)]
        self.step += 1
        action = from_rad(np.array(target), self.units).astype(np.float32)
        return torch.from_numpy(action).to(batch[STATE].device)

    def _judge(self, acting: np.ndarray) -> None:
        """Let those of the acting arms, (N,) bool, rest whose sheet is seen inside the tape; say what is not seen."""
        pose, trouble = self.policy.estimate, self.policy.trouble
        inside = sheet_inside(pose[:, :2], pose[:, 2], self.tape_margin - POSE_ERROR_M)
        self.streak[acting] = (self.streak[acting] + 1) * inside[acting]
        for i in np.flatnonzero(acting & (self.streak >= SUCCESS_STEPS)):
            log.info("the sheet is seen inside the tape: the arm lifts, and rests until the next episode")
            self.ways[i] = way_up(self.controllers[i])
        if trouble and not self.said:
            log.warning("the base policy acts alone: %s", trouble)
        elif self.said and not trouble:
            log.info("the sheet is seen again: the residual acts, too")
        self.said = trouble

    def _next(self, way: Iterator[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray] | None]:
        """The next joint deltas (6,), rad, of a slow motion, and what is left of it; None at its end."""
        try:
            return next(way), way
        except StopIteration:
            return np.zeros(ACT_DIM), None
        except RobotError as error:
            log.warning("the arm goes on from where it is: %s", error)
            return np.zeros(ACT_DIM), None

    def _observe(self, images: dict[str, np.ndarray]) -> BaseObservation:
        """The observation of the controllers' measurements; the sheet's pose in it is a placeholder."""
        arms = self.controllers
        rows = [[getattr(c, name) for c in arms] for name in ("joints_rad", "velocity_rad_s", "tip_m", "command_rad")]
        joints, velocities, tips, command = map(np.array, rows)
        load = np.array([c.load(c.command_rad, c.joints_rad, c.velocity_rad_s, c.gravity_n_m) for c in arms])
        flat = make_observation(joints, velocities, tips, np.tile(np.append(TAPE_CENTER_M, 0.0), (len(arms), 1)))

        def render(camera: str, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
            return np.stack([resize(image, size) for image in images[camera][ids]])

        pictures = {"cameras": self.policy.cameras, "render": render, "size": self.policy.image_size}
        return base_observation(flat, command, load=load, **pictures)

    # -- what LeRobot asks of policies that it trains

    def predict_action_chunk(self, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """The next joint targets as a chunk of one step, (B, 1, 6): a residual acts on the present observation."""
        return self.select_action(batch)[:, None]

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        """Raises SO101Error: LeRobot does not train this policy."""
        return self.config.get_optimizer_preset()

    def get_optim_params(self) -> Any:
        """Raises SO101Error: LeRobot does not train this policy."""
        return self.config.get_optimizer_preset()


def _pixels(image: torch.Tensor) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 of a tensor (B, 3, H, W) in [0, 1]."""
    return (image.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
