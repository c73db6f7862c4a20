"""The policy type so101_residual: a base policy plus a residual that sees the sheet through a camera.

A directory of this type has config.json, residual.onnx, which so101.onnx describes, and, if the base is a policy of
LeRobot, that policy's own directory base/ with its own pre- and postprocessors. eval_so101.py --export-lerobot writes
it. Observation and action are joints in the unit of the base, LeRobot's degrees unless its own data were otherwise.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from lerobot_policy_so101_residual.configuration_so101_residual import IMAGES, STATE, SO101ResidualConfig
from so101.onnx import OnnxPolicy
from so101.residual_arms import ResidualArms, SeenResidual
from so101.serve import LeRobotPolicy
from so101.server import ChunkPolicy
from so101.trust import Trust
from so101_sim.control import from_rad, to_rad
from so101_sim.errors import SO101Error

RESIDUAL, BASE = "residual.onnx", "base"


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
        self.units = residual.metadata["server"].units or "deg"
        margin = residual.task.tape_margin if config.tape_margin is None else config.tape_margin
        policy = SeenResidual(residual, margin, config.marks, config.camera_turned)
        policy.firmware_p = config.firmware_p or residual.task.firmware_p
        self.names = {camera: name for name, camera in config.cameras.items()}
        if missing := [camera for camera in policy.cameras if camera not in self.names]:
            raise SO101Error(f"{self.directory}: cameras in its config.json lack {missing[0]}; export it again")
        self.arms = ResidualArms(policy, margin, config.servo_gain, config.start_at_home)

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
            revision: the repository's branch, tag or commit.
            options: for huggingface_hub.snapshot_download: force_download, token, cache_dir, local_files_only.
        """
        directory = Path(pretrained_name_or_path)
        if not directory.is_dir():
            names = ("force_download", "token", "cache_dir", "local_files_only")
            known = {name: options[name] for name in names if name in options}
            directory = Path(snapshot_download(str(pretrained_name_or_path), revision=revision, **known))
        config = config or PreTrainedConfig.from_pretrained(directory)
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
        self.arms.reset()

    @torch.no_grad()
    def select_action(self, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """The next joint targets (B, 6). One call is one control step, 1/30 s.

        Args:
            batch: observation.state (B, 6), and observation.images.NAME (B, 3, H, W) in [0, 1] for each camera.
            options: not used.

        Raises:
            SO101Error: a camera is missing, or joint positions that no calibrated arm has.
        """
        if missing := [name for name in self.names.values() if IMAGES + name not in batch]:
            raise SO101Error(f"the policy needs the camera {missing[0]}: name a camera of the robot so, or rename it")
        joints_rad = to_rad(batch[STATE].double().cpu().numpy(), self.units)
        images = {camera: _pixels(batch[IMAGES + name]) for camera, name in self.names.items()}
        target_rad = self.arms.step(joints_rad, images)
        action = from_rad(target_rad, self.units).astype(np.float32)
        return torch.from_numpy(action).to(batch[STATE].device)

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
