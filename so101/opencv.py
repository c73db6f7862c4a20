"""Where the sheet lies, by OpenCV: pictures of a fixed camera that looks at the table, as `top` of the scene does.

The inner rectangle of the red tape, whose size is known, gives the homography between picture and table; the white
sheet's edges give its pose. Both are found beside an arm, shadows and noise: what is hidden or misleading counts as an
outlier. `SheetLocator` raises NotSeen where it cannot tell; it never guesses.

`opencv:SPEC` as base policy is SPEC acting on such estimates. The other way to see is a student of distill_so101.py.
"""

from typing import Any

import cv2
import mujoco
import numpy as np
from scipy.optimize import least_squares

from so101_env import ACT_DIM, IMAGES, BaseObservation, SO101Error, Task
from so101_policies import BasePolicy, StackedPolicy, add_cameras, load_policy
from so101_scene import SHEET_HALF_M, TAPE_CENTER_M, TAPE_MARGIN_M, TAPE_WIDTH_M, load_model

CAMERA = "top"
TAPE_POINTS, MIN_TAPE_POINTS = 48, 6  # on each side of the tape: looked at, and needed
SHEET_POINTS, MIN_SHEET_POINTS = 32, 8  # on each side of the sheet; at least two sides need as many
# Share of the outline that a picture agrees with: below the first, the sheet may be elsewhere, and is not found where
# nobody knows where it was; below the second, it is not seen. Where 0.59 agreed, the pose was right to 5 mm; with 0.5
# it could be off by 50.
SURE, ENOUGH = 0.59, 0.5
MIN_TELLING = 0.5  # of the outline; the share is one of no less
MIN_CONTRAST = 12.0  # of 255, between sheet and table
MAX_UNSEEN_STEPS = 30  # a second
STARTS = 12  # places at which the sheet is looked for more closely


class NotSeen(SO101Error):
    """Tape or sheet cannot be made out in a picture; says which, and why."""


# ---------------------------------------------------------------------------------------------------------------------
# geometry


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) through a homography (3, 3)."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


class NominalCamera:
    """A camera of the scene where it should stand, for pictures of `size` (height, width).

    Its principal point is the picture's centre, its pixels are square: `homography` has seven numbers to find.
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
        """From the table, m, to pixels, for a change (7,): rotation (rad), position (m), log of the focal length."""
        focal, (x, y) = self.focal * np.exp(change[6]), self.center
        intrinsic = np.array([[focal, 0, -x], [0, -focal, -y], [0, 0, -1]])
        rotation = cv2.Rodrigues(change[:3])[0] @ self.rotation
        matrix = intrinsic @ np.column_stack([rotation[:, :2], -rotation @ (self.position_m + change[3:6])])
        return matrix / matrix[2, 2]


def rectangle(half_m: np.ndarray, x_m: float, y_m: float, yaw_rad: float) -> np.ndarray:
    """Corners (4, 2), m, of a rectangle, counterclockwise from the one at +x, +y."""
    corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * half_m
    c, s = np.cos(yaw_rad), np.sin(yaw_rad)
    return corners @ np.array([[c, s], [-s, c]]) + (x_m, y_m)


def sample_normals(
    image: np.ndarray, to_picture: np.ndarray, corners: np.ndarray, offsets_m: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a picture shows along the outward normals of a rectangle's sides.

    Args:
        image: (H, W) float32.
        to_picture: homography from the table, m.
        corners: of `rectangle`.
        offsets_m: where on each normal, (K,), outwards.
        count: points per side.

    Returns:
        Values (4, count, K), NaN outside of the picture; the points (4, count, 2) on the sides; the normals (4, 2).
    """
    ends = np.roll(corners, -1, axis=0)
    along = (np.arange(count) + 0.5) / count * 0.92 + 0.04  # not at the very corners
    points = corners[:, None] + along[:, None] * (ends - corners)[:, None]
    side = (ends - corners) / np.linalg.norm(ends - corners, axis=1, keepdims=True)
    normals = np.column_stack([side[:, 1], -side[:, 0]])  # outwards, of a counterclockwise rectangle
    places = points[:, :, None] + offsets_m[:, None] * normals[:, None, None]
    pixels = project(to_picture, places).astype(np.float32)
    flat = pixels.reshape(len(points), -1, 2)
    values = cv2.remap(
        image, flat[..., 0], flat[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=np.nan
    )
    return values.reshape(places.shape[:3]), points, normals


def redness_of(image: np.ndarray) -> np.ndarray:
    """How red a picture (H, W, 3) uint8 is, (H, W) float32."""
    rgb = image.astype(np.float32)
    return rgb[..., 0] - np.maximum(rgb[..., 1], rgb[..., 2])


def is_red(redness: np.ndarray) -> np.ndarray:
    """Where it is as red as the tape, (H, W) float32, 0 or 1."""
    return (redness > max(20.0, 0.4 * np.percentile(redness, 99.5))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# the locator


class SheetLocator:
    """Finds tape and sheet in pictures of one camera.

    Args:
        tape_margin: m between sheet and tape, as laid.
    """

    def __init__(self, tape_margin: float = TAPE_MARGIN_M):
        self.opening_half_m = SHEET_HALF_M + tape_margin

    def find_tape(self, image: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels, for a picture (H, W, 3) uint8, RGB.

        It holds until the camera is moved. Raises NotSeen.
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
        """Where the four longest sides of the hull of what is red meet, (4, 2), pixels; None if there are no four.

        In the order in which they are nearest to those expected.
        """
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
        # the hull runs one way round or the other, and starts anywhere
        orders = [np.roll(each, k, axis=0) for each in (quad, quad[::-1]) for k in range(4)]
        shift = [np.linalg.norm((order - order.mean(0)) - (expected - expected.mean(0))) for order in orders]
        return orders[int(np.argmin(shift))]

    def _refine_tape(self, redness: np.ndarray, camera: NominalCamera, start: np.ndarray) -> tuple[np.ndarray, int]:
        """The homography that puts the tape's inner edges where the picture has them, from one that nearly does.

        And how many points of them it agrees with. Raises NotSeen.
        """
        corners = rectangle(self.opening_half_m, *TAPE_CENTER_M, 0.0)
        change = start
        for reach_m in (0.030, 0.015, 0.008):
            step, homography = 0.001, camera.homography(change)
            offsets = np.arange(-reach_m, reach_m + TAPE_WIDTH_M, step)
            values, points, normals = sample_normals(redness, homography, corners, offsets, TAPE_POINTS)
            values = np.nan_to_num(values)  # nothing red is outside of the picture
            box = round(TAPE_WIDTH_M / step)
            sums = np.cumsum(np.pad(values, ((0, 0), (0, 0), (1, 0))), axis=2)
            means = (sums[..., box:] - sums[..., :-box]) / box  # of a tape that starts at each offset
            first = means.argmax(2)
            level = np.take_along_axis(means, first[..., None], 2)[..., 0]
            # all of the tape's width, not what the sheet leaves of it
            enough = np.maximum(15.0, 0.7 * np.percentile(level, 90, axis=1, keepdims=True))
            # from the middle of the tape inwards, to where it has lost half of its red
            middle = first + box // 2
            index = np.arange(len(offsets))
            faint = (values < 0.5 * level[..., None]) & (index < middle[..., None])
            edge = np.where(faint.any(2), len(offsets) - 1 - faint[..., ::-1].argmax(2), -1)
            seen = (level > enough) & (edge >= 0) & (edge < len(offsets) - 1)
            edge = np.clip(edge, 0, len(offsets) - 2)
            low, high = (np.take_along_axis(values, (edge + k)[..., None], 2)[..., 0] for k in (0, 1))
            share = np.clip((0.5 * level - low) / np.maximum(high - low, 1e-6), 0, 1)
            found = points + ((edge + share) * step - reach_m)[..., None] * normals[:, None]
            # a side's points that lie on one line
            good = np.zeros(seen.shape, bool)
            for side in range(4):
                if seen[side].sum() >= MIN_TAPE_POINTS:
                    good[side] = seen[side] & _near_line(found[side], seen[side], normals[side], 0.003)
            short = good.sum(1) < MIN_TAPE_POINTS
            if short.any():
                which = ("on the left", "near the arm", "on the right", "far from the arm")[
                    int(np.flatnonzero(short)[0])
                ]
                raise NotSeen(f"the side of the red tape {which} cannot be made out: all four must be in the picture")
            side, pixels = np.nonzero(good)[0], project(homography, found)[good]
            normal, level = normals[side], (corners * normals).sum(1)[side]

            def misses(
                change: np.ndarray, pixels: Any = pixels, normal: Any = normal, level: Any = level
            ) -> np.ndarray:
                points = project(np.linalg.inv(camera.homography(change)), pixels)
                return np.append(((points * normal).sum(1) - level) / 0.001, change[6] / 0.3)

            change = least_squares(misses, change, loss="soft_l1").x
        homography = camera.homography(change)
        # red along the middle of the tape, and as much farther out and farther in, where there should be none
        offsets = np.array([0.5, 1.5, -0.5]) * TAPE_WIDTH_M
        along = sample_normals(is_red(redness), homography, corners, offsets, TAPE_POINTS)[0]
        on, out, within = np.nan_to_num(along).sum(1).T
        if (on <= np.maximum(out, within)).any():
            raise NotSeen("the red tape cannot be told from other red things")
        return homography, int(good.sum())

    def locate(self, image: np.ndarray, to_picture: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
        """Pose (3,) of the sheet, x and y (m), yaw (rad, within a quarter turn to either side).

        Args:
            image: (H, W, 3) uint8, RGB.
            to_picture: what `find_tape` found.
            last: where the sheet was a moment ago, if it was seen: then it is looked for about this yaw, in a third of
                the time.

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
            "the sheet cannot be made out: it must be white, on a darker table, in the picture, and half in view"
        )

    def _search(self, whiteness: np.ndarray, to_picture: np.ndarray, yaws: np.ndarray) -> list[np.ndarray]:
        """Poses (3,) of these yaws at which the outline is brighter inside than outside, best first."""
        step, cells = 0.004, 75
        grid = np.arange(-cells, cells + 1) * step
        local = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
        (half_x, half_y), near = np.round(SHEET_HALF_M / step).astype(int), 2
        peaks = []
        for yaw in yaws:
            c, s = np.cos(yaw), np.sin(yaw)
            turn = np.array([[c, -s], [s, c]])  # from the axes of a sheet with this yaw
            places = project(to_picture, local @ turn.T + TAPE_CENTER_M).astype(np.float32)
            seen = cv2.remap(whiteness, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderValue=0)
            seen = cv2.blur(seen, (3, 3))
            score = np.zeros_like(seen)
            for axis, half, length in ((0, half_x, 2 * half_y + 1), (1, half_y, 2 * half_x + 1)):
                # how much brighter it is two cells before than two cells behind, along the axis
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
        """The pose (3,) that puts the sheet's outline where the picture has it, from one that nearly does.

        And which share of the outline agrees; none if two of its sides say nothing. Where red lies outside, nothing is
        said: a table ends there just as a sheet does.
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
            # what is printed on the sheet is dark, too, but the sheet goes on beyond it
            drop = inside - np.maximum(outside, beyond)
            where = drop.argmax(2)
            height = np.take_along_axis(drop, where[..., None], 2)[..., 0]
            # between samples, by the parabola through three
            k = np.clip(where, 1, drop.shape[2] - 2)
            before, at, after = (np.take_along_axis(drop, (k + d)[..., None], 2)[..., 0] for d in (-1, 0, 1))
            curve = before - 2 * at + after
            shift = np.where(curve < -1e-6, 0.5 * (before - after) / np.minimum(curve, -1e-6), 0.0)
            distance = offsets[0] + (k + near - 0.5 + np.clip(shift, -1, 1)) * step
            good = (height > max(MIN_CONTRAST, 0.4 * np.percentile(height, 75))) & (np.abs(distance) < reach_m)
            pose, inliers = _fit_rectangle(pose, points, normals, distance, good)
        corners = rectangle(SHEET_HALF_M, *pose)
        beside = sample_normals(tape, to_picture, corners, np.arange(0.003, 0.009, 0.001), SHEET_POINTS)[0]
        telling = np.nan_to_num(beside).mean(2) < 0.5
        inliers = inliers & telling
        counts = inliers.sum(1)
        across = min(max(counts[0], counts[2]), max(counts[1], counts[3]))
        pose[2] = (pose[2] + np.pi / 2) % np.pi - np.pi / 2  # a sheet looks alike after half a turn
        return pose, counts.sum() / max(telling.sum(), MIN_TELLING * telling.size) * (across >= MIN_SHEET_POINTS)


def _near_line(found: np.ndarray, seen: np.ndarray, normal: np.ndarray, tolerance_m: float) -> np.ndarray:
    """Which of the points (count, 2) lie near the line through most of those in seen, (count,) bool."""
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
    """The pose that moves a rectangle's sides by what was found; and which of what was found it agrees with."""
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
    """A policy that is told by OpenCV where the sheet lies, instead of by the simulation: `opencv:SPEC`.

    Where the sheet is hidden for a moment, it is taken to be where it was seen last. Until tape and sheet are seen, and
    after MAX_UNSEEN_STEPS without, the arm rests; `trouble` then says what cannot be seen.

    Args:
        base: the policy, or its spec string.
        tape_margin: m between sheet and tape, as laid; None: that of the policy's task.
    """

    own_cameras, own_size = (CAMERA,), (240, 320)

    def __init__(self, base: BasePolicy | str | None, tape_margin: float | None = None):
        super().__init__(load_policy(base) if isinstance(base, str) else base)
        self.cameras, self.image_size = add_cameras(self.base, self.own_cameras, self.own_size, "opencv")
        self.task = getattr(self.base, "task", Task())
        self.locator = SheetLocator(self.task.tape_margin if tape_margin is None else tape_margin)
        self.fingerprint = "" if self.base is None else self.base.fingerprint
        self.seen: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Look for the tape again: the camera may have been moved."""
        super().reset(mask)
        if not self.seen or len(self.seen["unseen_steps"]) != len(mask):
            shapes = {"to_picture": (len(mask), 3, 3), "pose": (len(mask), 3)}
            self.seen = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
            self.seen["unseen_steps"] = np.zeros(len(mask), np.int64)
        self.seen["to_picture"][mask], self.seen["pose"][mask] = np.nan, np.nan
        self.seen["unseen_steps"][mask] = MAX_UNSEEN_STEPS + 1  # nothing was seen yet

    @property
    def memory(self) -> dict[str, np.ndarray]:
        """What was seen last, and what its base policy remembers."""
        return {**super().memory, **{f"opencv.{name}": array for name, array in self.seen.items()}}

    @memory.setter
    def memory(self, memory: dict[str, np.ndarray]) -> None:
        own = {name: array for name, array in memory.items() if name.startswith("opencv.")}
        self.seen = {name.removeprefix("opencv."): array for name, array in own.items()}
        StackedPolicy.memory.fset(self, {name: array for name, array in memory.items() if name not in own})

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6) of its base policy, on estimates; zero in environments that cannot be seen."""
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
            delta[able] = self.base_delta(obs.with_sheet(np.where(known[:, None], pose, nowhere)), able)[able]
        return delta
