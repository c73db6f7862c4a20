"""Demonstrations on an arm: a LeRobotDataset with a camera, seen as practice sees its own episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from so101.dataset import (
    DatasetError,
    check_video,
    find_videos,
    joints_rad,
    read_dataset,
    read_frames,
    read_info,
)
from so101.loop import Loop, count_inside
from so101.practising import PractisingPolicy
from so101.robot import Picture
from so101_env import ACTION, STATE, SUCCESS_STEPS
from so101_sim.control import Calibration
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ


class Demos(NamedTuple):
    """A LeRobotDataset of which the joints have been read, but no pictures."""

    path: Path
    info: dict[str, Any]  # see read_info
    episodes: dict[int, dict[str, np.ndarray]]  # see read_dataset
    videos: dict[int, tuple[Path, float]]  # see find_videos
    units: str | None  # see so101.dataset.joints_rad

    @property
    def steps(self) -> int:
        """Control steps of all episodes."""
        return sum(len(episode[STATE]) for episode in self.episodes.values())

    def joints_rad(self, number: int, ranges: Calibration | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Joint positions and joint targets (T, 6) of an episode, rad, see so101.dataset.joints_rad."""
        name = f"{self.path}: episode {number}"
        return joints_rad(self.info, self.episodes[number], self.units, name, ranges, "--demos-units")


def read_demos(path: Path, camera: str, units: str | None) -> Demos:
    """Read a dataset.

    Args:
        path: directory of the LeRobotDataset.
        camera: name of its camera that looks at the table.
        units: unit of the joints, for a dataset that does not contain it, see so101.dataset.unit_of.

    Raises:
        DatasetError: it cannot be used, as far as that shows without its pictures.
    """
    keys = (STATE, ACTION)
    info = read_info(path, keys)
    demos = Demos(path, info, read_dataset(path, info, keys), find_videos(path, info, camera), units)
    for number in demos.episodes:
        demos.joints_rad(number)
        if number not in demos.videos:
            raise DatasetError(f"{path}: meta/ names no video of episode {number}; load the dataset again, completely")
    frames: dict[Path, int] = {}  # that each video must have
    for number, episode in demos.episodes.items():
        file, begin_s = demos.videos[number]
        frames[file] = max(frames.get(file, 0), round(begin_s * CONTROL_HZ) + len(episode[STATE]))
    for file, count in frames.items():
        check_video(file, count)
    return demos


def watch(
    demos: Demos, number: int, loop: Loop, tape_margin: float
) -> tuple[np.ndarray, np.ndarray, bool] | None:  # fmt: skip
    """Observations and residuals of a demonstration, as if it were an episode of practice. The arm does not move.

    The episode begins when the camera first sees tape and sheet, and ends by success, or when they have been out of
    view for a second.

    Args:
        demos: the dataset.
        number: the episode, its episode_index.
        loop: of the arm, which has been measured, with an OpenCVPolicy on a PractisingPolicy. The joints' load is
            seen with the servo gain that its controller knows.
        tape_margin: m between sheet and tape.

    Returns:
        Observations (T + 1, D); residuals (T, 6), which can be larger than 1; and whether the episode succeeds, as the
        camera sees it. None: the camera sees tape and sheet in fewer than two pictures.

    Raises:
        SO101Error: its joints or pictures cannot be used.
    """
    policy, controller, mask = loop.policy, loop.controller, np.ones(1, bool)
    residual: PractisingPolicy = policy.base
    own = controller.get_state()
    joints, targets = (each - loop.offset_rad for each in demos.joints_rad(number, loop.robot.ranges))
    frames = read_frames(*demos.videos[number], len(joints))
    success, streak = False, np.zeros(1, np.int64)
    controller.reset()
    controller.gain_factor, controller.gain_floor = float(own["gain_factor"]), float(own["gain_floor"])
    policy.reset(mask)
    try:
        for step, image in enumerate(frames):
            time_s = step / CONTROL_HZ
            try:
                controller.measure(joints[step], time_s)
            except SO101Error as error:
                raise DatasetError(f"{demos.path}: episode {number}: {error}, or check --demos-units") from error
            if step:  # what was sent, also where practice would not have sent it
                controller.command_rad = targets[step - 1]
            residual.demonstrated_rad = targets[step] - controller.command_rad
            policy.act(loop.observe(Picture(image, time_s)), mask)
            loop.robot.watch()
            if policy.trouble and residual.rows:
                break
            if len(residual.rows) > 1:  # as in practice, where the first picture does not count
                streak = count_inside(streak, policy, tape_margin)
            if success := bool(streak[0] >= SUCCESS_STEPS):
                break
    finally:
        residual.demonstrated_rad = None
        controller.set_state(own)
        frames.close()
    if len(residual.rows) < 2:
        return None
    return *residual.steps(len(residual.rows) - 1, complete=True), success
