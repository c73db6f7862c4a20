"""Locates the white sheet relative to the tape, or to tags, in pictures of a fixed camera that looks at the table.

The marks give the homography between picture and table. The sheet's edges then give its pose. Both are found even when
the arm, shadows or noise disturb the picture: hidden and misleading points count as outliers. `SheetLocator` raises
NotSeen in case of doubt; it never guesses. Needs OpenCV, the extra "arm".
"""

from __future__ import annotations

import numpy as np

from so101.camera import NotSeen, import_cv2, project, rectangle, sample_normals
from so101.tape import find_tape, is_tape, redness_of
from so101_env import SHEET_HALF_M, TAPE_CENTER_M, TAPE_MARGIN_M

SHEET_POINTS, MIN_SHEET_POINTS = 32, 8  # points on each side of the sheet: examined, and required on two sides
# A pose is accepted if at least this share of its outline agrees with the picture: SURE without a recent pose, ENOUGH
# with one. At 0.59 and above the pose was right to 5 mm; at 0.5 without a recent pose it could be wrong by 50 mm.
SURE, ENOUGH = 0.59, 0.5
MIN_USABLE = 0.5  # the share is computed relative to the usable part of the outline, but at least to this much of it
MIN_CONTRAST = 8.0  # between sheet and table, on the scale of `whiteness_of`
DARK = 100.0
SCALE = (255 * np.log1p(np.arange(256) / DARK) / np.log1p(255 / DARK)).astype(np.float32)
BLOOM_POINTS = 6.0
STARTS = 12  # number of rough poses that are refined


def whiteness_of(image: np.ndarray) -> np.ndarray:
    """Whiteness (H, W) float32, 0 to 255, of a picture (H, W, 3) uint8: the smallest channel, on a logarithmic scale.

    On this scale the step from table to sheet is as high in a shadow as in the light.
    """
    return SCALE[image.min(axis=2)]


class SheetLocator:
    """Finds tape and sheet in pictures of one camera. Raises SO101Error without OpenCV.

    Args:
        tape_margin: m between sheet and tape on the table.
    """

    def __init__(self, tape_margin: float = TAPE_MARGIN_M):
        import_cv2()
        self.opening_half_m = SHEET_HALF_M + tape_margin

    def find_tape(self, image: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels. It remains valid until the camera is moved.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            NotSeen: a side of the tape cannot be made out, or other things are as red as the tape.
        """
        return find_tape(image, self.opening_half_m).homography

    def locate(self, image: np.ndarray, to_picture: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
        """Pose (3,) of the sheet: x and y (m), yaw (rad, within a quarter turn to either side).

        Args:
            image: (H, W, 3) uint8, RGB.
            to_picture: the result of `find_tape`.
            last: pose of the sheet a moment ago, if it is known. The search is then limited to similar yaws, and takes
                a third of the time.

        Raises:
            NotSeen: the sheet cannot be made out.
        """
        whiteness = whiteness_of(image)
        tape = is_tape(redness_of(image), to_picture, self.opening_half_m)
        yaws, starts = np.arange(-0.78, 0.78, 0.06), []
        if last is not None:
            pose, support = self._refine(whiteness, tape, to_picture, last)
            if support >= SURE:
                return pose
            yaws, starts = last[2] + np.array([-0.12, -0.06, 0.0, 0.06, 0.12]), [last]
        starts += self._search(whiteness, to_picture, yaws)[: 4 if starts else STARTS]
        found = [self._refine(whiteness, tape, to_picture, start) for start in starts]
        pose, support = max(found, key=lambda each: each[1], default=(None, 0.0))
        if support >= (SURE if last is None else ENOUGH):
            return pose
        raise NotSeen(
            "the sheet cannot be made out: it must be white, on a darker table, and at least half of it in view"
        )

    def _search(self, whiteness: np.ndarray, to_picture: np.ndarray, yaws: np.ndarray) -> list[np.ndarray]:
        """Rough poses (3,) with one of these yaws whose outline is brighter inside than outside, best first."""
        cv2, step, cells = import_cv2(), 0.004, 75
        grid = np.arange(-cells, cells + 1) * step
        local = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
        (half_x, half_y), near = np.round(SHEET_HALF_M / step).astype(int), 2
        peaks = []
        for yaw in yaws:
            c, s = np.cos(yaw), np.sin(yaw)
            turn = np.array([[c, -s], [s, c]])  # from the axes of a sheet with this yaw to those of the table
            places = project(to_picture, local @ turn.T + TAPE_CENTER_M).astype(np.float32)
            seen = cv2.remap(whiteness, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderValue=0)
            seen = cv2.blur(seen, (3, 3))
            score = np.zeros_like(seen)
            for axis, half, length in ((0, half_x, 2 * half_y + 1), (1, half_y, 2 * half_x + 1)):
                # brightness two cells before minus brightness two cells behind, along the axis
                fall = np.roll(seen, near, axis) - np.roll(seen, -near, axis)
                for sign in (1, -1):
                    edge = np.clip(sign * fall / MIN_CONTRAST - 0.5, 0, 1)
                    wide = cv2.dilate(edge, np.ones((3, 1) if axis == 0 else (1, 3)))
                    along = (length, 1) if axis == 0 else (1, length)  # width and height of the filter
                    support = cv2.boxFilter(wide, cv2.CV_32F, along, normalize=False, borderType=cv2.BORDER_CONSTANT)
                    score += np.roll(support, -sign * half, axis)
            score[:half_x], score[-half_x:], score[:, :half_y], score[:, -half_y:] = 0, 0, 0, 0
            for _ in range(2):
                i, j = np.unravel_index(score.argmax(), score.shape)
                peaks.append((score[i, j], np.append(turn @ (grid[i], grid[j]) + TAPE_CENTER_M, yaw)))
                score[max(i - 5, 0) : i + 6, max(j - 5, 0) : j + 6] = 0
        outline = 4 * (half_x + half_y)
        best = sorted(peaks, key=lambda peak: -peak[0])[:STARTS]
        return [pose for support, pose in best if support > 0.3 * outline]

    def _refine(
        self, whiteness: np.ndarray, tape: np.ndarray, to_picture: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Fit the sheet's outline to the edges in the picture.

        Args:
            whiteness: (H, W) float32, the smallest channel of the picture.
            tape: (H, W) float32, see `is_tape`.
            to_picture: homography (3, 3) from the table, m, to pixels.
            start: approximate pose (3,).

        Returns:
            The pose (3,), and the share of the outline that agrees with the picture; 0 unless two adjacent sides have
            enough points. Parts of the outline with red directly outside are not usable, because a bright table also
            ends at the tape.
        """
        pose, step = start.copy(), 0.001
        for reach_m in (0.020, 0.012, 0.008, 0.006):
            offsets = np.arange(-reach_m - 0.003, reach_m + 0.008 + step / 2, step)
            corners = rectangle(SHEET_HALF_M, *pose)
            values, points, normals = sample_normals(whiteness, to_picture, corners, offsets, SHEET_POINTS)
            values = np.nan_to_num(values)
            sums = np.cumsum(np.pad(values, ((0, 0), (0, 0), (1, 0))), axis=2)
            near, far = 3, 8  # mm on either side of an edge
            inside, outside, beyond = (
                (sums[..., near + d : sums.shape[2] - far + d] - sums[..., near + c : sums.shape[2] - far + c])
                / (d - c)
                for c, d in ((-near, 0), (0, near), (near + 1, far))
            )
            # print on the sheet is dark, too, but beyond it there is paper again
            drop = inside - np.maximum(outside, beyond)
            where = drop.argmax(2)
            height = np.take_along_axis(drop, where[..., None], 2)[..., 0]
            # interpolate between samples with a parabola through three of them
            k = np.clip(where, 1, drop.shape[2] - 2)
            before, at, after = (np.take_along_axis(drop, (k + d)[..., None], 2)[..., 0] for d in (-1, 0, 1))
            curve = before - 2 * at + after
            shift = np.where(curve < -1e-6, 0.5 * (before - after) / np.minimum(curve, -1e-6), 0.0)
            distance = offsets[0] + (k + near - 0.5 + np.clip(shift, -1, 1)) * step
            good = (height > max(MIN_CONTRAST, 0.4 * np.percentile(height, 75))) & (np.abs(distance) < reach_m)
            pose, inliers = _fit_rectangle(pose, points, normals, distance, good)
        corners = rectangle(SHEET_HALF_M, *pose)
        outside_red = sample_normals(tape, to_picture, corners, np.arange(0.003, 0.009, 0.001), SHEET_POINTS)[0]
        usable = np.nan_to_num(outside_red).mean(2) < 0.5
        inliers = inliers & usable
        counts = inliers.sum(1)
        across = min(max(counts[0], counts[2]), max(counts[1], counts[3]))
        pose[2] = (pose[2] + np.pi / 2) % np.pi - np.pi / 2  # a sheet looks the same after half a turn
        return pose, counts.sum() / max(usable.sum(), MIN_USABLE * usable.size) * (across >= MIN_SHEET_POINTS)


def _fit_rectangle(
    pose: np.ndarray, points: np.ndarray, normals: np.ndarray, distance: np.ndarray, good: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a rectangle to edges found near its outline, by least absolute distances.

    Args:
        pose: (3,) before.
        points: (4, count, 2) on its sides, m.
        normals: (4, 2) of its sides, outwards.
        distance: (4, count) from the points to the edges, along the normals, m.
        good: (4, count) bool, where an edge was found.

    Returns:
        The fitted pose (3,), and which edges agree with it, (4, count) bool.
    """
    arm = points - pose[:2]
    turning = arm[..., 0] * normals[:, None, 1] - arm[..., 1] * normals[:, None, 0]
    growing = np.ones(turning.shape)
    rows = np.concatenate(
        [np.broadcast_to(normals[:, None], points.shape), turning[..., None], growing[..., None]], axis=-1
    )
    prior = np.array([[0, 0, 0, 1.0]])
    change, inliers = np.zeros(4), good
    for tolerance_m in (0.012, 0.008, 0.005, 0.003, 0.003):
        left = distance - rows @ change
        inliers = good & (np.abs(left) < tolerance_m)
        if inliers.sum() < MIN_SHEET_POINTS:
            break
        weight = np.sqrt(1.0 / np.maximum(np.abs(left[inliers]), 5e-4))[:, None]
        stiff = np.sqrt(BLOOM_POINTS / 5e-4)
        change = np.linalg.lstsq(
            np.vstack([rows[inliers] * weight, prior * stiff]),
            np.append(distance[inliers] * weight[:, 0], 0.0),
            rcond=None,
        )[0]
    return pose + change[:3], inliers
