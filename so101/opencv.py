"""Finds the sheet with OpenCV, in pictures of a fixed camera that looks at the table, such as `top` of the scene.

The inner rectangle of the red tape has a known size, so it gives the homography between picture and table. The white
sheet's edges then give its pose. Both are found even when the arm, shadows or noise disturb the picture: hidden and
misleading points count as outliers. `SheetLocator` raises NotSeen in case of doubt; it never guesses. Needs OpenCV,
the extra "arm".

`opencv:SPEC` as base policy is SPEC acting on such estimates. so101/distill.py has the other way to see: students.
"""

from __future__ import annotations

import types
from typing import Any

import mujoco
import numpy as np
from scipy.optimize import least_squares

from so101.base import BasePolicy, StackedPolicy, add_cameras, with_sheet
from so101.extras import import_extra
from so101_env import (
    ACT_DIM,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    TAPE_MARGIN_M,
    TAPE_WIDTH_M,
    BaseObservation,
    SO101Error,
    Task,
    load_model,
)
from so101_sim.vector import IMAGES

CAMERA = "top"
SIDES = ("on the left", "near the arm", "on the right", "far from the arm")  # in the order of `rectangle`
TAPE_POINTS, MIN_TAPE_POINTS = 48, 6  # points on each side of the tape: examined, and required
SHEET_POINTS, MIN_SHEET_POINTS = 32, 8  # points on each side of the sheet: examined, and required on two sides
# A pose is accepted if at least this share of its outline agrees with the picture: SURE without a recent pose, ENOUGH
# with one. At 0.59 and above the pose was right to 5 mm; at 0.5 without a recent pose it could be wrong by 50 mm.
SURE, ENOUGH = 0.59, 0.5
MIN_USABLE = 0.5  # the share is computed relative to the usable part of the outline, but at least to this much of it
MIN_CONTRAST = 12.0  # between sheet and table, in 1/255
MAX_UNSEEN_STEPS = 30  # one second
STARTS = 12  # number of rough poses that are refined


class NotSeen(SO101Error):
    """Tape or sheet cannot be made out in a picture. The message names which, and why."""


def _cv2() -> types.ModuleType:
    """OpenCV. Raises SO101Error if it is not installed."""
    return import_extra("cv2", "arm", "locating the sheet")


# ---------------------------------------------------------------------------------------------------------------------
# geometry


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) mapped by a homography (3, 3)."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


class NominalCamera:
    """A camera of the scene in its nominal place. `homography` describes a camera that deviates from it.

    The principal point is the centre of the picture, and pixels are square. Seven numbers remain to be found.

    Args:
        size: height and width of the pictures, pixels.
        camera: name of the camera.
    """

    def __init__(self, size: tuple[int, int], camera: str = CAMERA):
        model = load_model()
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        number, (height, width) = model.camera(camera).id, size
        self.focal = height / 2 / np.tan(np.deg2rad(model.cam_fovy[number]) / 2)  # pixels
        self.center = np.array([(width - 1) / 2, (height - 1) / 2])
        # MuJoCo's cameras look along -z, with y up
        self.rotation, self.position_m = data.cam_xmat[number].reshape(3, 3).T, data.cam_xpos[number]

    def homography(self, change: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels, for a deviation (7,) from the nominal camera.

        The deviation is a rotation vector (3, rad), a translation (3, m), and the log ratio of the focal lengths.
        """
        focal, (x, y) = self.focal * np.exp(change[6]), self.center
        intrinsic = np.array([[focal, 0, -x], [0, -focal, -y], [0, 0, -1]])
        rotation = _cv2().Rodrigues(change[:3])[0] @ self.rotation
        matrix = intrinsic @ np.column_stack([rotation[:, :2], -rotation @ (self.position_m + change[3:6])])
        return matrix / matrix[2, 2]


def rectangle(half_m: np.ndarray, x_m: float, y_m: float, yaw_rad: float) -> np.ndarray:
    """Corners (4, 2), m, of a rectangle with half sides half_m (2,), counterclockwise from the corner at +x, +y."""
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half_m
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return corners @ np.array([[c, s], [-s, c]]) + (x_m, y_m)


def sample_normals(
    image: np.ndarray, to_picture: np.ndarray, corners: np.ndarray, offsets_m: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample a picture along the outward normals of a rectangle's sides.

    Args:
        image: (H, W) float32.
        to_picture: homography (3, 3) from the table, m, to pixels.
        corners: (4, 2), m, the result of `rectangle`.
        offsets_m: distances (K,) from the side at which each normal is sampled, positive outwards.
        count: number of normals per side.

    Returns:
        Values (4, count, K), NaN outside the picture; feet (4, count, 2) of the normals, m; unit normals (4, 2).
    """
    ends = np.roll(corners, -1, axis=0)
    along = (np.arange(count) + 0.5) / count * 0.92 + 0.04  # leave out the corners themselves
    points = corners[:, None] + along[:, None] * (ends - corners)[:, None]
    side = (ends - corners) / np.linalg.norm(ends - corners, axis=1, keepdims=True)
    normals = np.column_stack([side[:, 1], -side[:, 0]])  # outwards, since the corners run counterclockwise
    places = points[:, :, None] + offsets_m[:, None] * normals[:, None, None]
    pixels = project(to_picture, places).astype(np.float32)
    flat = pixels.reshape(len(points), -1, 2)
    cv2 = _cv2()
    values = cv2.remap(
        image, flat[..., 0], flat[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=np.nan
    )
    return values.reshape(places.shape[:3]), points, normals


def redness_of(image: np.ndarray) -> np.ndarray:
    """Redness (H, W) float32 of a picture (H, W, 3) uint8: red minus the larger of green and blue, in 1/255."""
    rgb = image.astype(np.float32)
    return rgb[..., 0] - np.maximum(rgb[..., 1], rgb[..., 2])


def is_red(redness: np.ndarray) -> np.ndarray:
    """Pixels that are as red as the tape: (H, W) float32, 1 or 0."""
    return (redness > max(20.0, 0.4 * np.percentile(redness, 99.5))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# the locator


class SheetLocator:
    """Finds tape and sheet in pictures of one camera. Raises SO101Error without OpenCV.

    Args:
        tape_margin: m between sheet and tape on the table.
    """

    def __init__(self, tape_margin: float = TAPE_MARGIN_M):
        _cv2()
        self.opening_half_m = SHEET_HALF_M + tape_margin

    def find_tape(self, image: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels. It remains valid until the camera is moved.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            NotSeen: a side of the tape cannot be made out, or other things are as red as the tape.
        """
        redness, camera = redness_of(image), NominalCamera(image.shape[:2])
        outer = rectangle(self.opening_half_m + TAPE_WIDTH_M, *TAPE_CENTER_M, 0.0)
        nominal, starts = np.zeros(7), [np.zeros(7)]
        if (quad := self._outer_corners(redness, project(camera.homography(nominal), outer))) is not None:
            fit = least_squares(lambda change: (project(camera.homography(change), outer) - quad).ravel(), nominal)
            starts.insert(0, fit.x)
        found, reasons = [], []
        for start in starts:
            try:
                found.append(self._refine_tape(redness, camera, start))
            except NotSeen as error:
                reasons.append(error)
        if not found:
            raise reasons[-1]
        return max(found, key=lambda each: each[1])[0]

    def _outer_corners(self, redness: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
        """Corners of the red region's convex hull, (4, 2), pixels: where its four longest sides meet.

        They come in the order of the expected corners (4, 2), pixels. None if the hull has fewer than four sides, or
        two of them are parallel.
        """
        cv2 = _cv2()
        contours, _ = cv2.findContours(is_red(redness).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        contours = [contour for contour in contours if len(contour) > 0.05 * max(redness.shape)]
        if not contours:
            return None
        hull = cv2.convexHull(np.concatenate(contours))
        corners = cv2.approxPolyDP(hull, 0.01 * cv2.arcLength(hull, True), True)[:, 0].astype(np.float64)
        if len(corners) < 4:
            return None
        ends = np.roll(corners, -1, axis=0)
        longest = np.sort(np.argsort(-np.linalg.norm(ends - corners, axis=1))[:4])
        lines = [np.cross(np.append(corners[i], 1.0), np.append(ends[i], 1.0)) for i in longest]
        meets = np.array([np.cross(lines[i - 1], lines[i]) for i in range(4)])
        if (np.abs(meets[:, 2]) < 1e-9).any():
            return None
        quad = meets[:, :2] / meets[:, 2:]
        # the hull may run in either direction and start at any corner
        orders = [np.roll(each, k, axis=0) for each in (quad, quad[::-1]) for k in range(4)]
        shift = [np.linalg.norm((order - order.mean(0)) - (expected - expected.mean(0))) for order in orders]
        return orders[int(np.argmin(shift))]

    def _refine_tape(self, redness: np.ndarray, camera: NominalCamera, start: np.ndarray) -> tuple[np.ndarray, int]:
        """Fit the camera to the tape's inner edges in the picture.

        Args:
            redness: (H, W) float32, see `redness_of`.
            camera: the nominal camera.
            start: approximate deviation (7,), see `NominalCamera.homography`.

        Returns:
            The homography (3, 3), and the number of points on the edges that were used.

        Raises:
            NotSeen: see `find_tape`.
        """
        corners = rectangle(self.opening_half_m, *TAPE_CENTER_M, 0.0)
        change = start
        for reach_m in (0.030, 0.015, 0.008):
            step, homography = 0.001, camera.homography(change)
            offsets = np.arange(-reach_m, reach_m + TAPE_WIDTH_M, step)
            values, points, normals = sample_normals(redness, homography, corners, offsets, TAPE_POINTS)
            values = np.nan_to_num(values)  # outside the picture counts as not red
            box = round(TAPE_WIDTH_M / step)
            sums = np.cumsum(np.pad(values, ((0, 0), (0, 0), (1, 0))), axis=2)
            means = (sums[..., box:] - sums[..., :-box]) / box  # mean redness of a tape that starts at each offset
            first = means.argmax(2)
            level = np.take_along_axis(means, first[..., None], 2)[..., 0]
            # demand the full width of the tape, not the strip that a sheet on it leaves visible
            enough = np.maximum(15.0, 0.7 * np.percentile(level, 90, axis=1, keepdims=True))
            # from the middle of the tape inwards, to where its redness has fallen to half
            middle = first + box // 2
            index = np.arange(len(offsets))
            faint = (values < 0.5 * level[..., None]) & (index < middle[..., None])
            edge = np.where(faint.any(2), len(offsets) - 1 - faint[..., ::-1].argmax(2), -1)
            seen = (level > enough) & (edge >= 0) & (edge < len(offsets) - 1)
            edge = np.clip(edge, 0, len(offsets) - 2)
            low, high = (np.take_along_axis(values, (edge + k)[..., None], 2)[..., 0] for k in (0, 1))
            share = np.clip((0.5 * level - low) / np.maximum(high - low, 1e-6), 0, 1)
            found = points + ((edge + share) * step - reach_m)[..., None] * normals[:, None]
            # keep each side's points that lie on one line
            good = np.zeros(seen.shape, bool)
            for side in range(4):
                if seen[side].sum() >= MIN_TAPE_POINTS:
                    good[side] = seen[side] & _near_line(found[side], seen[side], normals[side], 0.003)
            short = good.sum(1) < MIN_TAPE_POINTS
            if short.any():
                where = SIDES[np.flatnonzero(short)[0]]
                raise NotSeen(f"the side of the red tape {where} cannot be made out: all four must be in the picture")
            side, pixels = np.nonzero(good)[0], project(homography, found)[good]
            normal, level = normals[side], (corners * normals).sum(1)[side]

            def misses(
                change: np.ndarray, pixels: Any = pixels, normal: Any = normal, level: Any = level
            ) -> np.ndarray:
                """Distances of the points from the edges, in mm, and a weak prior on the focal length."""
                points = project(np.linalg.inv(camera.homography(change)), pixels)
                return np.append(((points * normal).sum(1) - level) / 0.001, change[6] / 0.3)

            change = least_squares(misses, change, loss="soft_l1").x
        homography = camera.homography(change)
        # red pixels along the middle of the tape, and a tape width farther out and farther in, where none should be
        offsets = np.array([0.5, 1.5, -0.5]) * TAPE_WIDTH_M
        along = sample_normals(is_red(redness), homography, corners, offsets, TAPE_POINTS)[0]
        on, out, within = np.nan_to_num(along).sum(1).T
        if (on <= np.maximum(out, within)).any():
            raise NotSeen("the red tape cannot be distinguished from other red things")
        return homography, int(good.sum())

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
        whiteness, tape = image.min(axis=2).astype(np.float32), is_red(redness_of(image))
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
        cv2, step, cells = _cv2(), 0.004, 75
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
            tape: (H, W) float32, see `is_red`.
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


def _near_line(found: np.ndarray, seen: np.ndarray, normal: np.ndarray, tolerance_m: float) -> np.ndarray:
    """Which of the points found (count, 2), m, lie near the line through most of those in seen, (count,) bool."""
    along, across = found @ np.array([-normal[1], normal[0]]), found @ normal
    a, d = along[seen], across[seen]
    i, j = np.triu_indices(len(a), max(1, len(a) // 4))
    slope = (d[j] - d[i]) / (a[j] - a[i])
    slope = np.median(slope)
    offset = np.median(d - slope * a)
    return np.abs(across - slope * along - offset) < tolerance_m


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
    rows = np.concatenate([np.broadcast_to(normals[:, None], points.shape), turning[..., None]], axis=-1)
    change, inliers = np.zeros(3), good
    for tolerance_m in (0.012, 0.008, 0.005, 0.003, 0.003):
        left = distance - rows @ change
        inliers = good & (np.abs(left) < tolerance_m)
        if inliers.sum() < MIN_SHEET_POINTS:
            break
        weight = np.sqrt(1.0 / np.maximum(np.abs(left[inliers]), 5e-4))[:, None]
        change = np.linalg.lstsq(rows[inliers] * weight, distance[inliers] * weight[:, 0], rcond=None)[0]
    return pose + change, inliers


# ---------------------------------------------------------------------------------------------------------------------
# as base policy


class OpenCVPolicy(StackedPolicy):
    """A policy that gets the sheet's pose from OpenCV instead of from the simulation: `opencv:SPEC`.

    While the sheet is hidden for a moment, its last pose is used. Before tape and sheet are first seen, and after
    MAX_UNSEEN_STEPS without a view, the arm rests; `trouble` is then the reason.

    Args:
        base: the policy; None rests.
        tape_margin: m between sheet and tape on the table; None: that of the policy's task.

    Raises:
        SO101Error: OpenCV is not installed, or the policy's pictures have another size.
    """

    own_cameras, own_size = (CAMERA,), (240, 320)

    def __init__(self, base: BasePolicy | None, tape_margin: float | None = None):
        super().__init__(base)
        self.cameras, self.image_size = add_cameras(self.base, self.own_cameras, self.own_size, "opencv")
        self.task = getattr(self.base, "task", Task())
        self.locator = SheetLocator(self.task.tape_margin if tape_margin is None else tape_margin)
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

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6) of its base policy, on estimated poses; zero in environments without a view."""
        images, trouble = obs.rows(mask)[IMAGES + CAMERA], ""
        to_picture, pose, unseen = (self.seen[name] for name in ("to_picture", "pose", "unseen_steps"))
        for i, image in zip(np.flatnonzero(mask), images):
            try:
                if np.isnan(to_picture[i]).any():
                    to_picture[i] = self.locator.find_tape(image)
                last = None if np.isnan(pose[i]).any() or unseen[i] > 5 else pose[i]
                pose[i], unseen[i] = self.locator.locate(image, to_picture[i], last), 0
            except NotSeen as error:
                unseen[i], trouble = unseen[i] + 1, str(error)
        known = unseen <= MAX_UNSEEN_STEPS
        self.trouble = trouble if (mask & ~known).any() else ""
        nowhere = np.append(TAPE_CENTER_M, 0.0)
        self.estimate = np.where(known[:, None], pose, np.nan)
        delta, able = np.zeros((len(mask), ACT_DIM)), mask & known
        if able.any():
            delta[able] = self.base_delta(with_sheet(obs, np.where(known[:, None], pose, nowhere)), able)[able]
        return delta
