"""Replay the actions of a recorded episode in the simulation, and compare the states with the recorded ones.

    python -m so101.replay --dataset demos --episode 3 --video replay.mp4

Any LeRobotDataset v3.0 or v2.1 of an SO-101 at 30 fps works, and all its recorded steps are replayed. Only datasets of
this project contain the sheet's pose (observation.environment_state). For others the sheet starts inside the tape, and
success is not judged. The physics are nominal.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from so101.base import BasePolicy
from so101.cli import check_flags, check_output, check_rendering, parse, run_script
from so101.dataset import joints_rad, read_dataset, read_info
from so101.evaluation import evaluate, no_residual
from so101.files import write_json
from so101.films import write_video
from so101_env import (
    ACTION,
    COMMAND,
    ENVIRONMENT,
    ENVIRONMENT_NAMES,
    OBS,
    SHEET_HALF_THICKNESS_M,
    STATE,
    TAPE_CENTER_M,
    TAPE_MARGIN_M,
    Scene,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
)
from so101_sim.control import JOINTS


@dataclasses.dataclass
class Args:
    dataset: str
    """directory of the LeRobotDataset"""
    episode: int = 0
    """number of the episode, its episode_index"""
    units: str | None = None
    """unit of the joints, deg, deg-old, norm or rad, for a dataset that does not contain it"""
    tape_margin: float = TAPE_MARGIN_M
    """m between sheet and tape on every side"""
    video: str | None = None
    """film the replay as this MP4 or GIF file"""
    json: str | None = None
    """write the deviations to this file"""


class Replay(BasePolicy):
    """A base policy that commands recorded joint targets (T, 6), rad, one after the other."""

    def __init__(self, targets_rad: np.ndarray):
        self.targets, self.memory = targets_rad, {"step": np.zeros(1, np.int64)}

    def reset(self, mask: np.ndarray) -> None:
        """Start again with the first target."""
        self.memory["step"][mask] = 0

    def act(self, obs: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Joint deltas (1, 6), rad, to the next target."""
        delta = self.targets[self.memory["step"]] - obs[COMMAND]
        self.memory["step"][mask] += 1
        return delta


class EndlessEnv(SO101ResidualVectorEnv):
    """The task, judged but not ended by success or failure: an episode has as many steps as are asked for."""

    def judge(
        self, scene: Scene, action: np.ndarray, active: np.ndarray, broken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """As the task's, but only a simulation that diverged terminates an episode."""
        reward, terminated, results = super().judge(scene, action, active, broken)
        return reward, terminated & broken, results


def replay(
    state_rad: np.ndarray, action_rad: np.ndarray, environment: np.ndarray | None, tape_margin: float
) -> dict[str, Any]:
    """Replay an episode.

    Args:
        state_rad: recorded joint positions (T, 6), rad; the first are the start.
        action_rad: recorded joint targets (T, 6), rad.
        environment: recorded observation.environment_state (T, 19) with the start of the sheet; None: inside the tape.
        tape_margin: m between sheet and tape.

    Returns:
        The traced episode, see so101.evaluation.evaluate. Its success is whether the sheet lies in the tape at the end,
        and None without environment.

    Raises:
        SO101Error: the simulation diverged, or a target is out of reach.
    """
    sheet = [*TAPE_CENTER_M, SHEET_HALF_THICKNESS_M, 0.0]
    if environment is not None:
        sheet = [*environment[0, 6:9], 2.0 * np.arctan2(environment[0, 12], environment[0, 9])]
    envs = EndlessEnv(
        1, Replay(action_rad), randomize=False, tape_margin=tape_margin, autoreset_mode=AutoresetMode.DISABLED,
        max_episode_steps=len(action_rad), num_threads=1,
    )  # fmt: skip
    (episode,) = evaluate(no_residual, envs, [0], trace=True, qpos=np.array([[*state_rad[0], *sheet]]))
    envs.close()
    if episode["length"] < len(action_rad):
        raise SO101Error(f"the simulation diverged at step {episode['length']} of {len(action_rad)} recorded ones")
    return episode if environment is not None else {**episode, "success": None, "failure": ""}


def _spans(numbers: list[int]) -> str:
    """Sorted numbers in words: "0 to 4, 7" for 0, 1, 2, 3, 4 and 7."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{start} to {end}" if end > start else f"{start}" for start, end in zip(starts, ends))


def main() -> int:
    """Replay, and print the deviations; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"episode": (0, 10**9), "tape_margin": Task.RANGES["tape_margin"]})
    check_output("--video", args.video, (".mp4", ".gif"), args.dataset)
    check_output("--json", args.json, (".json",), args.dataset)
    path = Path(args.dataset)
    info = read_info(path, (STATE, ACTION))
    keys = (STATE, ACTION)
    feature = info["features"].get(ENVIRONMENT)
    if (
        isinstance(feature, dict) and feature.get("names") == ENVIRONMENT_NAMES
    ):  # a dataset of this project, with the sheet's pose
        keys += (ENVIRONMENT,)
        info = read_info(path, keys)
    episodes = read_dataset(path, info, keys)
    if args.episode not in episodes:
        raise SO101Error(f"--episode {args.episode}: the dataset has the episodes {_spans([*episodes])}")
    episode = episodes[args.episode]
    state, action = joints_rad(info, episode, args.units, f"{path}: episode {args.episode}")

    environment = episode.get(ENVIRONMENT)
    replayed = replay(state, action, environment, args.tape_margin)
    observations, length, success = replayed["obs"], replayed["length"], replayed["success"]
    deviation = np.rad2deg(np.abs(observations[:, :6] - state[:length]))
    verdict = {True: ", success in the simulation", False: ", no success in the simulation", None: ""}[success]
    print(f"{args.dataset}, episode {args.episode}: {len(state)} steps recorded, {length} replayed{verdict}")
    print(f"{'deviation from the recorded states (degrees)':46}{'mean':>8}{'largest':>9}{'at the end':>12}")
    for joint, column in zip(JOINTS, deviation.T):
        print(f"{joint:46}{column.mean():8.3f}{column.max():9.3f}{column[-1]:12.3f}")
    result = {
        "steps_recorded": len(state), "steps_replayed": length, "success": success,
        "mean_joint_deviation_deg": dict(zip(JOINTS, deviation.mean(0).tolist())),
        "max_joint_deviation_deg": dict(zip(JOINTS, deviation.max(0).tolist())),
    }  # fmt: skip
    if environment is not None:
        sheet = 1000 * np.linalg.norm(observations[:, OBS["sheet_pos"]][:, :2] - environment[:length, 6:8], axis=1)
        print(f"{'sheet (mm)':46}{sheet.mean():8.3f}{sheet.max():9.3f}{sheet[-1]:12.3f}")
        result |= {"mean_sheet_deviation_mm": float(sheet.mean()), "max_sheet_deviation_mm": float(sheet.max())}
    if args.json:
        write_json(Path(args.json), result)
    if args.video:
        envs = SO101ResidualVectorEnv(1, tape_margin=args.tape_margin, num_threads=1)
        check_rendering(envs, "--video")
        write_video(envs, {"replay": [replayed]}, Path(args.video))
        envs.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
