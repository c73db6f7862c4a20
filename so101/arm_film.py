"""Films of an arm's camera: recorded with what the locator has seen, or given to the locator afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from so101.camera import NotSeen
from so101.extras import import_extra
from so101.files import write_atomic
from so101.locator import RECENT_STEPS, SheetLocator, overlay
from so101.video import decode
from so101_sim.scene import CONTROL_HZ

EVERY = 2  # control steps per picture of a film


class Frame(NamedTuple):
    """A picture with what was seen in it."""

    jpeg: np.ndarray  # (N,) uint8
    to_picture: np.ndarray | None  # homography (3, 3) from the table, m, to pixels; None: the tape is not known
    pose: np.ndarray | None  # (3,), x, y (m) and yaw (rad) of the sheet; None: not known
    text: str


class CameraFilm:
    """A film of an arm's camera with outlines of tape and sheet. Pictures are kept in memory until `save`.

    Args:
        path: ends in .mp4.
        tape_margin: m between sheet and tape on every side.
        outlines: draw what was seen; small pictures are then enlarged twice.
        every: keep every n-th picture.
        progress: show a progress bar while the film is written.
    """

    def __init__(
        self, path: str, tape_margin: float, outlines: bool = True, every: int = EVERY, progress: bool = True
    ):  # fmt: skip
        self.hide = None if progress else True
        self.path, self.tape_margin, self.outlines, self.every = Path(path), tape_margin, outlines, every
        self.cv2 = import_extra("cv2", "arm", "--video")
        self.frames: list[Frame] = []
        self._count = 0

    def add(self, image: np.ndarray, to_picture: np.ndarray | None, pose: np.ndarray | None, text: str) -> None:
        """Keep a picture (H, W, 3) uint8, RGB, and what was seen in it."""
        self._count += 1
        if self._count % self.every == 0:
            jpeg = self.cv2.imencode(".jpg", image[..., ::-1])[1]
            seen = [None if each is None or np.isnan(each).any() else each.copy() for each in (to_picture, pose)]
            self.frames.append(Frame(jpeg, *seen, text))

    def save(self) -> None:
        """Write the film, if there are pictures."""
        if not self.frames:
            return
        imageio = import_extra("imageio.v2", "arm", "--video")

        def write(temporary: Path) -> None:
            options = {"fps": CONTROL_HZ / self.every, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
            with imageio.get_writer(temporary, **options) as writer:
                for frame in tqdm(
                    self.frames, f"writing {self.path.name}", unit="frame", disable=self.hide, leave=False
                ):
                    image = np.ascontiguousarray(self.cv2.imdecode(frame.jpeg, self.cv2.IMREAD_COLOR)[..., ::-1])
                    image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]  # H.264 wants even sides
                    if self.outlines:
                        scale = 2 if image.shape[1] < 480 else 1
                        image = overlay(image, frame.to_picture, frame.pose, self.tape_margin, frame.text, scale)
                    writer.append_data(image)

        write_atomic(self.path, write)


def replay_film(path: str, locator: SheetLocator, video: CameraFilm | None = None) -> dict[str, Any]:
    """Run the locator over a recorded film, in the film's own size. OpenCVPolicy follows a sheet the same way.

    Args:
        path: the film.
        locator: finds the table in it.
        video: also film what it has seen.

    Returns:
        frames; tape_seen_at, the first frame with the whole tape (None: never); sheet_seen, the share of the frames
        after it in which the sheet was seen; poses, of each frame x, y (m), yaw (rad), or None; reasons, why not, by
        how often.

    Raises:
        VideoError: the film cannot be read.
    """
    to_picture, pose, unseen = None, None, 0
    poses: list[list[float] | None] = []
    reasons: dict[str, int] = {}
    tape_seen_at = None
    for image in decode(Path(path)):
        text, found = "", None
        try:
            if to_picture is None:
                to_picture = locator.find_tape(image)
                tape_seen_at = len(poses)
            found = locator.locate(image, to_picture, pose if unseen <= RECENT_STEPS else None)
            pose, unseen = found, 0
        except NotSeen as error:
            text, unseen = str(error), unseen + 1
            reasons[text] = reasons.get(text, 0) + 1
        poses.append(None if found is None else found.tolist())
        if video is not None:
            video.add(image, to_picture, found, text)
    after = poses[tape_seen_at:] if tape_seen_at is not None else []
    return {
        "frames": len(poses), "tape_seen_at": tape_seen_at,
        "sheet_seen": sum(each is not None for each in after) / len(after) if after else 0.0,
        "poses": poses, "reasons": reasons,
    }  # fmt: skip


def print_replay(result: dict[str, Any]) -> None:
    """Print what `replay_film` returned."""
    print(f"{result['frames']} pictures")
    if result["tape_seen_at"] is None:
        print("the tape is in none of them")
    else:
        print(f"the tape is seen first in picture {result['tape_seen_at'] + 1}")
        print(f"the sheet is seen in {result['sheet_seen']:.1%} of those that follow")
    for reason, count in sorted(result["reasons"].items(), key=lambda item: -item[1])[:5]:
        print(f"{count:5d} x {reason}")
