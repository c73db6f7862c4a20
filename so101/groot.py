"""Policies that predict chunks of actions, as GR00T's servers describe and ask them: names, requests, checks.

so101.serve and so101/wire.py use this file in LeRobot's environment, so it imports nothing of the project.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

JOINT_GROUPS = {"single_arm": slice(0, 5), "gripper": slice(5, 6)}  # in state and action, in the order of the joints
KINDS = ("video", "state", "action", "language")


class PolicyError(RuntimeError):
    """A policy cannot be used or has failed. The text is one line."""


class Modality(NamedTuple):
    """The policy's inputs or outputs of one kind: video, state, action or language."""

    keys: list[str]  # without the prefixes of n1.5
    deltas: list[int]  # time steps in control steps relative to now: 0 is now, -1 the previous step


def make_request(
    modalities: Mapping[str, Modality], video: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], text: str
) -> dict[str, Any]:
    """The data of a request for actions: "observation", and "options" with the seed of the noise that policies draw.

    The seed is a function of the joint positions. so101.serve uses it, GR00T's servers do not.

    Args:
        modalities: the policy's, by kind.
        video: pictures (B, T, H, W, 3) uint8 by camera.
        state: joint positions (B, T, D) by joint group, in the policy's unit.
        text: instruction for the policy.
    """
    batch = len(next(iter([*state.values(), *video.values()])))
    languages = {key: [[text]] * batch for key in modalities["language"].keys}
    state = {key: array.astype(np.float32) for key, array in state.items()}
    seed = zlib.crc32(b"".join(array.tobytes() for array in state.values()))
    return {"observation": {"video": dict(video), "state": state, "language": languages}, "options": {"seed": seed}}


def identity_of(dialect: str, config: str, weights: str, answer: str) -> str:
    """SHA-256 of what identifies a policy.

    Args:
        dialect: dialect of the server that describes it, see so101/wire.py.
        config: its description, as JSON with sorted keys.
        weights: hash of its weights, or "".
        answer: hash of its answer to a fixed request, if there is no hash of the weights, or "".
    """
    return hashlib.sha256("\n".join([dialect, config, weights, answer]).encode()).hexdigest()


def check_action(action: Mapping[str, np.ndarray], key: str, batch: int, steps: int, width: int) -> np.ndarray:
    """The first `steps` of the action `key`, (batch, steps, width) float64. Raises PolicyError for anything else."""
    if key not in action:
        raise PolicyError(f"get_action: the answer lacks {key}, it has {', '.join(action)[:200] or 'nothing'}")
    array = action[key]
    if array.ndim != 3 or array.shape[0] != batch or array.shape[1] < steps or array.shape[2] != width:
        wanted = f"({batch}, {steps} or more, {width})"
        raise PolicyError(f"get_action: {key} has shape {array.shape} instead of {wanted}")
    array = array[:, :steps].astype(np.float64)
    if not math.isfinite(array.sum()):
        raise PolicyError(f"get_action: {key} has numbers that are not finite")
    return array
