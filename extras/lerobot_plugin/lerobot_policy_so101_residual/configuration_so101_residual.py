"""Options of the policy type so101_residual, in the file and under the name by which LeRobot finds them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from so101_env import Task
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error, check_ranges

STATE, IMAGES, ACTION = "observation.state", "observation.images.", "action"


@PreTrainedConfig.register_subclass("so101_residual")
@dataclasses.dataclass
class SO101ResidualConfig(PreTrainedConfig):
    """Options of a base policy with its residual, as --policy.NAME of LeRobot's commands."""

    firmware_p: int | None = None  # P coefficient that the servos are set to; None: what the residual was trained with
    # gain of the servos as a factor of the 12 V STS3215's at the same P; None: estimated on the way home
    servo_gain: float | None = None
    tape_margin: float | None = None  # m between sheet and tape on every side; None: what it was trained with
    marks: str = "tape"  # what shows the camera where the rectangle lies: tape, or tags
    camera_turned: bool = False  # whether the camera stands on the arm's side instead of opposite it
    start_at_home: bool = True  # move slowly to the task's start pose first, if the arm is elsewhere
    cameras: dict[str, str] = dataclasses.field(default_factory=dict)  # cameras of the scene, by their names in LeRobot
    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {**Task.RANGES, "servo_gain": (0.2, 3.0)})
        if self.marks not in ("tape", "tags"):
            raise SO101Error(f"marks {self.marks!r}: give tape or tags")

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config.json without the device, and without what is None: there LeRobot's versions differ."""
        super()._save_pretrained(save_directory)
        path = save_directory / "config.json"
        options = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in options.items() if value is not None and name != "device"}
        path.write_text(json.dumps(kept, indent=4) + "\n", encoding="utf-8")

    def validate_features(self) -> None:
        """Raise SO101Error unless the policy gets six joints and the camera at the table, and returns six joints."""
        shapes = {key: tuple(feature.shape) for key, feature in {**self.input_features, **self.output_features}.items()}
        needed = {STATE: (ACT_DIM,), ACTION: (ACT_DIM,)}
        if wrong := [key for key, shape in needed.items() if shapes.get(key) != shape]:
            raise SO101Error(f"{wrong[0]} has shape {shapes.get(wrong[0])}; an SO-101 has {(ACT_DIM,)}")
        if missing := [name for name in self.cameras if IMAGES + name not in shapes]:
            raise SO101Error(f"{IMAGES}{missing[0]}: the policy needs this camera")

    @property
    def observation_delta_indices(self) -> None:
        """Only the present observation."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """One action at a time."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return None

    def get_optimizer_preset(self) -> Any:
        """Raises SO101Error: LeRobot does not train this policy."""
        raise SO101Error(
            "so101_residual is not trained by lerobot-train: train the base with it, the residual with "
            "ppo_residual_so101.py, and join them with eval_so101.py --export-lerobot DIR"
        )

    def get_scheduler_preset(self) -> None:
        """None: LeRobot does not train this policy."""
        return None
