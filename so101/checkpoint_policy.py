"""Base policies with networks of this project: `checkpoint:PATH` and `bc:PATH`. They need torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from so101.base import BasePolicy, StackedPolicy, check_base, extend_observation, flat_observation
from so101.checkpoints import CHECKPOINT, CLONE, STUDENT, hash_weights, load_checkpoint, load_file, load_script
from so101.policies import load_policy
from so101.trust import Trust
from so101_env import MEASURED, OBS, BaseObservation
from so101_sim.control import ACT_DIM
from so101_sim.vector import IMAGES


class CheckpointPolicy(StackedPolicy):
    """A frozen policy of a training script, with its own base policy."""

    def __init__(self, path: str, saved: dict[str, Any] | None = None, trust: Trust | None = None):
        checkpoint = load_checkpoint(path, saved, trust)
        self.args = args = checkpoint.args
        self.task = args.task
        self.agent = checkpoint.agent(path)
        self.own_cameras = tuple(getattr(self.agent, "cameras", ()))
        size = self.agent.image_size if self.own_cameras else None
        super().__init__(load_policy(args.base.base_policy, args.base.server), self.own_cameras, size)
        check_base(checkpoint.saved, args.base.base_policy, self.base, path)
        self.observe_base = getattr(args.base, "observe_base", self.base is not None)  # a camera policy always does
        self.scale_rad = args.task.alpha * args.task.act_scale
        also = f"{checkpoint.saved['base_fingerprint']} {self.scale_rad}"
        self.fingerprint = hash_weights(checkpoint.saved["agent"], also)

    def agent_residual(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The agent's residual (N, 6) in [-1, 1] for its base's deltas (N, 6), rad; zero outside mask."""
        flat, residual = flat_observation(obs), np.zeros((len(mask), ACT_DIM), np.float32)
        if self.own_cameras:
            flat = np.concatenate([flat[:, OBS[name]] for name in MEASURED], axis=1)
        load = getattr(self.task, "observe_load", False)  # the task of another script may have no such setting
        flat = extend_observation(flat, obs, load, base_delta if self.observe_base else None)[mask]
        seen = obs.rows(mask).sized(self.image_size)
        pixels = {f"pixels_{camera}": seen[IMAGES + camera] for camera in self.own_cameras}
        residual[mask] = self.agent.act(pixels | {"state": flat} if pixels else flat)
        return residual

    def residual_rad(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See StackedPolicy."""
        return self.scale_rad * self.agent_residual(obs, base_delta, mask).astype(np.float64)


def load_checkpoint_policy(path: str, trust: Trust) -> BasePolicy:
    """The policy in a checkpoint, or in a student's file; raises SO101Error for a file that cannot be used."""
    saved = load_file(path, CHECKPOINT, STUDENT)
    if saved["format"] == STUDENT:
        return load_script(saved["script"], path, trust).load_student(saved, path, trust)
    return CheckpointPolicy(path, saved, trust)


def load_clone(path: str, trust: Trust) -> BasePolicy:
    """The policy in a file of so101.clone; raises SO101Error for a file that cannot be used."""
    saved = load_file(path, CLONE)
    return load_script(saved["script"], path, trust).ClonePolicy(saved, path)
