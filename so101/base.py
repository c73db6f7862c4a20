"""Base policies: what the residual corrects. Derive your own from `BasePolicy`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from so101_env import COMMAND, ENVIRONMENT, LOADS, MEASURED, OBS, RESIDUAL, STATE, load_model, make_observation
from so101_sim.control import ACT_DIM, FIRMWARE_P, valid_delta
from so101_sim.errors import SO101Error
from so101_sim.scene import camera_names as names_of_cameras
from so101_sim.vector import BaseObservation


class BasePolicy:
    """What the residual corrects. Derive from it; only `act` must be written.

    A policy that cannot act raises BasePolicyError; it never returns zeros instead.
    """

    cameras: tuple[str, ...] = ()  # cameras of the scene, "top" or "wrist", whose pictures it needs
    image_size: tuple[int, int] = (96, 96)  # height and width of those pictures, pixels
    fingerprint: str = ""  # hash of its weights: a residual only fits the base policy it was trained on
    memory: Mapping[str, np.ndarray] = MappingProxyType({})  # its state, arrays with a row per environment; is saved
    max_envs: int | None = None  # largest number of environments it can act in at once; a person can act in one
    # its estimate of the sheet's pose in the last step, x, y (m), yaw (rad), (N, 3); NaN where it has none
    estimate: np.ndarray | None = None
    sees: np.ndarray | None = None  # whether the last step's picture shows the sheet, (N,) bool; None: with an estimate
    firmware_p: int = FIRMWARE_P  # P coefficient of the servos; set by the environment, or by so101.drive on an arm
    trouble: str = ""  # why it rests in this step, if it does: what it cannot see
    quit: bool = False  # set when the user quits: the current episode is discarded and no further episode starts

    def reset(self, mask: np.ndarray) -> None:
        """Forget the episodes of the environments in mask, (N,) bool."""

    def act(self, obs: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad, (N, 6): by how much the commanded joint targets move in this control step.

        Called once per control step of the environments in mask, (N,) bool. Rows of other environments are ignored, and
        their memory must not change.

        Args:
            obs: see so101_env.base_observation: observation.state (N, 6), joint positions, rad;
                observation.environment_state (N, 19), see so101_env.ENVIRONMENT_NAMES; command (N, 6), the last
                commanded joint targets, rad; residual (N, 6), what the residual added to them in the last step, rad;
                load (N, 6), on the joints, rad, see Controller.load; observation.images.CAMERA (N, H, W, 3) uint8 for
                each of `cameras`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release the policy's resources."""


@functools.cache
def camera_names() -> tuple[str, ...]:
    """The cameras of the scene that policies can see through."""
    return names_of_cameras(load_model())


class StackedPolicy(BasePolicy):
    """A frozen residual on a base policy of its own: residuals stack. A subclass writes `residual_rad`, or `act`.

    Args:
        base: its own base policy; None: it has none.
        cameras, image_size: its own, if it sees; its base policy's pictures may have another size.
    """

    def __init__(
        self, base: BasePolicy | None, cameras: tuple[str, ...] = (), image_size: tuple[int, int] | None = None
    ):  # fmt: skip
        self.base = base
        self.residual = np.zeros((0, ACT_DIM))  # its own residual in the last step, rad
        if base is not None:
            cameras, image_size = tuple(dict.fromkeys((*cameras, *base.cameras))), image_size or base.image_size
        self.cameras, self.image_size = cameras, image_size or BasePolicy.image_size

    def reset(self, mask: np.ndarray) -> None:
        """Forget the last residual, and reset its own base policy."""
        if len(self.residual) != len(mask):
            self.residual = np.zeros((len(mask), ACT_DIM))
        self.residual[mask] = 0.0
        if self.base is not None:
            self.base.reset(mask)

    @property
    def firmware_p(self) -> int:
        """P coefficient of the servos; passed on to its own base policy."""
        return FIRMWARE_P if self.base is None else self.base.firmware_p

    @firmware_p.setter
    def firmware_p(self, firmware_p: int) -> None:
        if self.base is not None:
            self.base.firmware_p = firmware_p

    @property
    def quit(self) -> bool:
        """Whether the user quits, at its own base policy."""
        return self.base is not None and self.base.quit

    @property
    def memory(self) -> Mapping[str, np.ndarray]:
        """Its own last residual, and the memory of its own base policy."""
        base = {} if self.base is None else self.base.memory
        return {"residual": self.residual, **{f"base.{name}": array for name, array in base.items()}}

    @memory.setter
    def memory(self, memory: Mapping[str, np.ndarray]) -> None:
        self.residual = memory["residual"]
        if self.base is not None:
            base = {name: array for name, array in memory.items() if name != "residual"}
            self.base.memory = {name.removeprefix("base."): array for name, array in base.items()}

    def base_delta(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6) of its own base policy, which sees the sum of both residuals."""
        if self.base is None:
            return np.zeros((len(mask), ACT_DIM))
        seen = obs.replace({RESIDUAL: obs[RESIDUAL] + self.residual})
        return valid_delta(self.base, self.base.act(seen.sized(self.base.image_size), mask), mask)

    def residual_rad(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Its residual (N, 6), rad, for the joint deltas (N, 6), rad, of its own base policy; zero outside mask."""
        raise NotImplementedError

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): those of its own base policy plus its residual."""
        base = self.base_delta(obs, mask)
        residual = self.residual_rad(obs, base, mask)
        self.residual[mask] = residual[mask]
        return base + residual

    def close(self) -> None:
        """Close its own base policy."""
        if self.base is not None:
            self.base.close()


def check_base(saved: dict[str, Any], spec: str, base_policy: BasePolicy | None, path: str | Path) -> None:
    """Raise SO101Error unless the base policy is the one that the residual in path was trained on."""
    now, then = base_policy.fingerprint if base_policy else "", saved["base_fingerprint"]
    if now != then:
        raise SO101Error(
            f"{path}: trained on base policy {spec} with weights {then[:12] or 'none'}, it now has "
            f"{now[:12] or 'none'}; put the old one back"
        )


def flat_observation(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inverse of base_observation: observations (N, 25)."""
    return np.concatenate([obs[STATE], obs[ENVIRONMENT]], axis=1)


def extend_observation(
    flat: np.ndarray, obs: Mapping[str, np.ndarray], observe_load: bool, base_delta: np.ndarray | None
) -> np.ndarray:
    """Observations (N, D) with what a residual may observe in addition, as so101_env.extra_parts orders it.

    Args:
        flat: (N, D).
        obs: as in BasePolicy.act.
        observe_load: append the load on the joints (N, 6), rad.
        base_delta: joint deltas (N, 6), rad, of its base policy, to append; None: it does not observe them.
    """
    parts = [flat, *([obs[LOADS]] if observe_load else [])]
    parts += [] if base_delta is None else [base_delta.astype(np.float32)]
    return np.concatenate(parts, axis=1)


def with_sheet(obs: BaseObservation, pose: np.ndarray) -> BaseObservation:
    """A copy in which the sheets lie at pose (N, 3), x and y (m), yaw (rad); nothing of the true poses is left."""
    known = flat_observation(obs)
    flat = make_observation(*(known[:, OBS[name]] for name in MEASURED), pose)
    return obs.replace({STATE: flat[:, :ACT_DIM], ENVIRONMENT: flat[:, ACT_DIM:]})


def new_chunks(num_envs: int, steps: int) -> dict[str, np.ndarray]:
    """Memory of a base policy that plans `steps` joint targets at once, see follow_chunks."""
    targets = np.zeros((num_envs, steps, ACT_DIM))
    return {"step": np.zeros(num_envs, np.int64), "targets": targets, "moved": np.zeros((num_envs, ACT_DIM))}


def follow_chunks(memory: dict[str, np.ndarray], obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
    """Joint deltas in rad (N, 6) that follow planned targets; moves on to the next step for the environments in mask.

    What the residual has moved the arm by since a plan was made also shifts the rest of the plan: a correction lasts
    until the base plans again. Otherwise the plan would undo it one step later, exploration noise would hardly move the
    arm, and PPO would learn less: see docs/results.md.

    Args:
        memory: step (N,), position in each plan, 0 where it is new; targets (N, steps, 6), rad, the plans; moved
            (N, 6), rad, the sum of residuals since.
        obs: with residual and command.
    """
    step, targets, moved = (memory[name] for name in ("step", "targets", "moved"))
    moved[mask] = (moved + obs[RESIDUAL])[mask] * (step[mask] > 0)[:, None]
    delta = targets[np.arange(len(step)), step] + moved - obs[COMMAND]
    step[mask] = (step[mask] + 1) % targets.shape[1]
    return delta
