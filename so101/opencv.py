"""The base policy `opencv:SPEC`: SPEC acting on poses of the sheet that OpenCV finds in the picture of `top`.

so101/locator.py finds the sheet; so101/distill.py has the other way to see: students.
"""

from __future__ import annotations

import numpy as np

from so101.base import BasePolicy, StackedPolicy, with_sheet
from so101.camera import CAMERA, NotSeen
from so101.locator import RECENT_STEPS, Marks, SheetLocator
from so101_env import ACT_DIM, TAPE_CENTER_M, BaseObservation, Task
from so101_sim.vector import IMAGES

MAX_UNSEEN_STEPS = 30  # one second


class OpenCVPolicy(StackedPolicy):
    """A policy that gets the sheet's pose from OpenCV instead of from the simulation: `opencv:SPEC`.

    While the sheet is hidden for a moment, its last pose is used. Before tape and sheet are first seen, and after
    MAX_UNSEEN_STEPS without a view, the arm rests; `trouble` is then the reason.

    Args:
        base: the policy; None rests.
        tape_margin: m between sheet and tape on the table; None: that of the policy's task.
        marks: tape or tags, see `SheetLocator`.
        turned: whether the camera stands on the arm's side, see `SheetLocator`. It may be set later, as
            `policy.locator.turned`; `reset` then makes the policy find the tape again.

    Raises:
        SO101Error: OpenCV is not installed.
    """

    own_cameras, own_size = (CAMERA,), (240, 320)

    def __init__(
        self,
        base: BasePolicy | None,
        tape_margin: float | None = None,
        marks: Marks = "tape",
        turned: bool = False,
    ):
        super().__init__(base, self.own_cameras, self.own_size)
        self.task = getattr(self.base, "task", Task())
        self.locator = SheetLocator(self.task.tape_margin if tape_margin is None else tape_margin, marks, turned)
        self.fingerprint = "" if self.base is None else self.base.fingerprint
        self.seen: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Forget tape and sheet of the environments in mask, (N,) bool: the camera may have been moved."""
        super().reset(mask)
        if not self.seen or len(self.seen["unseen_steps"]) != len(mask):
            shapes = {"to_picture": (len(mask), 3, 3), "pose": (len(mask), 3)}
            self.seen = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
            self.seen["unseen_steps"] = np.zeros(len(mask), np.int64)
        self.seen["to_picture"][mask], self.seen["pose"][mask] = np.nan, np.nan
        self.seen["unseen_steps"][mask] = MAX_UNSEEN_STEPS + 1  # there was no view yet

    @property
    def memory(self) -> dict[str, np.ndarray]:
        """The last homographies and poses, and the memory of its own base policy."""
        return {**super().memory, **{f"opencv.{name}": array for name, array in self.seen.items()}}

    @memory.setter
    def memory(self, memory: dict[str, np.ndarray]) -> None:
        own = {name: array for name, array in memory.items() if name.startswith("opencv.")}
        self.seen = {name.removeprefix("opencv."): array for name, array in own.items()}
        StackedPolicy.memory.fset(self, {name: array for name, array in memory.items() if name not in own})

    def look(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Find the sheets of the environments in mask, (N,) bool; sets `estimate` and `trouble`.

        Returns whether the pose in each of the N environments is known.
        """
        images, trouble = obs.rows(mask)[IMAGES + CAMERA], ""
        to_picture, pose, unseen = (self.seen[name] for name in ("to_picture", "pose", "unseen_steps"))
        for i, image in zip(np.flatnonzero(mask), images):
            try:
                if np.isnan(to_picture[i]).any():
                    to_picture[i] = self.locator.find_tape(image)
                last = None if np.isnan(pose[i]).any() or unseen[i] > RECENT_STEPS else pose[i]
                pose[i], unseen[i] = self.locator.locate(image, to_picture[i], last), 0
            except NotSeen as error:
                unseen[i], trouble = unseen[i] + 1, str(error)
        known = unseen <= MAX_UNSEEN_STEPS
        self.trouble = trouble if (mask & ~known).any() else ""
        self.estimate, self.sees = np.where(known[:, None], pose, np.nan), unseen == 0
        return known

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6) of its base policy, on estimated poses; those of `rest` where there is no view."""
        known, delta = self.look(obs, mask), np.zeros((len(mask), ACT_DIM))
        able, blind = mask & known, mask & ~known
        if able.any():
            pose = np.where(known[:, None], self.estimate, np.append(TAPE_CENTER_M, 0.0))
            delta[able] = self.base_delta(with_sheet(obs, pose), able)[able]
        if blind.any():
            delta[blind] = self.rest(obs, blind)[blind]
        return delta

    def rest(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas (N, 6), rad, in the environments in mask, (N,) bool, which have no view: none."""
        return np.zeros((len(mask), ACT_DIM))
