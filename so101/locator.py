"""Locates the white sheet relative to the tape, or to tags, in pictures of a fixed camera that looks at the table.

The marks give the homography between picture and table. The sheet's edges then give its pose. Both are found even when
the arm, shadows or noise disturb the picture: hidden and misleading points count as outliers. `SheetLocator` raises
NotSeen in case of doubt; it never guesses. Needs OpenCV, the extra "arm".
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from so101.camera import NotSeen, import_cv2, project, rectangle, sample_normals, smallest_channel, whiteness_of
from so101.tags import find_tags
from so101.tape import Tape, find_tape, is_tape, near_line, redness_of
from so101_env import SHEET_HALF_M, TAPE_CENTER_M, TAPE_MARGIN_M

Marks = Literal["tape", "tags"]
SHEET_POINTS, MIN_SHEET_POINTS = 32, 8  # points on each side of the sheet: examined, and required on two sides
# A pose is accepted if at least this share of its outline agrees with the picture: SURE without a recent pose, ENOUGH
# with one. At 0.59 and above the pose was right to 5 mm; at 0.5 without a recent pose it could be wrong by 50 mm.
SURE, ENOUGH = 0.59, 0.5
MIN_USABLE = 0.5  # the share is computed relative to the usable part of the outline, but at least to this much of it
MIN_CONTRAST = 8.0  # between sheet and table, on the scale of `whiteness_of`
HIGH_CONTRAST = 20.0  # an edge this much higher counts fully in the search
SHARE_OF_CONTRAST = 0.25  # an edge must be at least this high, relative to the sheet's distinct edges
# Bright paper spills over its edges in the picture. All sides may appear this far outside; without evidence from
# opposite sides they appear in place, as if many points agreed.
MAX_SPILL_M, SPILL_POINTS = 0.003, 6
TAPE_EDGE_M = 0.006  # a sheet's edge on the tape, this far from the tape's own edges, is not one of these
STARTS = 12  # number of rough poses that are refined
RECENT_STEPS = 5  # a pose that was seen this many control steps ago still helps to find the sheet
# the sheet as a ruler: points required on a side; how much larger it appears by blur, and at most where it is clipped
MIN_RULER_POINTS, BLUR_M, CLIPPED, CLIPPED_BLUR_M = 14, 0.001, 250.0, 0.006
MAX_SCALE_ERROR, MAX_ASPECT_ERROR, MAX_SHEAR_RAD = 0.02, 0.025, np.deg2rad(1.5)
MAX_UNSURE_ERROR = 0.08


@dataclasses.dataclass
class Measurement:
    """What a picture tells about the rectangle that was laid."""

    sides_mm: np.ndarray  # (2,) inside the tape, along x and y; NaN if the sheet, which is the ruler, is not seen
    residual_mm: float  # root mean square distance of the marks from a rectangle of the known size


class SheetLocator:
    """Finds tape, or tags, and sheet in pictures of one camera. Raises SO101Error without OpenCV.

    Args:
        tape_margin: m between sheet and tape on the table.
        marks: what shows where the rectangle lies: red tape, or the four tags of so101/tags.py at its corners.
        turned: whether the camera stands on the arm's side. The rectangle of tape looks the same after half a turn, so
            a picture does not tell. With tags it does, and this is not used.
    """

    def __init__(self, tape_margin: float = TAPE_MARGIN_M, marks: Marks = "tape", turned: bool = False):
        import_cv2()
        self.opening_half_m, self.marks, self.turned = SHEET_HALF_M + tape_margin, marks, turned

    def find_tape(self, image: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels, by tape or tags. It remains valid until the camera moves.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            NotSeen: a side of the tape cannot be made out, other things are as red as the tape, or it is no rectangle
                of the known size; with tags: fewer than three are seen, or they do not lie where they should.
        """
        return self._find_marks(image)[0]

    def _find_marks(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """The homography (3, 3), and the residual, m; see `find_tape`."""
        if self.marks == "tags":
            return find_tags(image, self.opening_half_m)
        tape: Tape = find_tape(image, self.opening_half_m, self.turned)
        return tape.homography, tape.residual_m

    def measure_tape(self, image: np.ndarray) -> Measurement:
        """The size of the rectangle that was laid, with the sheet in it as ruler.

        The tape alone gives proportions, no size: a small rectangle looks like a large one seen from higher up.

        Args:
            image: (H, W, 3) uint8, RGB.

        Raises:
            NotSeen: see `find_tape`.
        """
        homography, residual_m = self._find_marks(image)
        pose, support = self._best(image, homography, None)
        sides_m = np.full(2, np.nan)
        if pose is not None and support >= ENOUGH:
            sides_m = 2 * self.opening_half_m / measure_sheet(image, homography, pose)[0]
        return Measurement(1000 * sides_m, 1000 * residual_m)

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
        pose, support = self._best(image, to_picture, last)
        if last is None and pose is not None and support > 0.3:
            self._check_size(image, to_picture, pose, sure=support >= SURE)
        if support >= (SURE if last is None else ENOUGH):
            return pose
        raise NotSeen(
            "the sheet cannot be made out: it must be white, on a darker table, and at least half of it in view"
        )

    def _best(
        self, image: np.ndarray, to_picture: np.ndarray, last: np.ndarray | None
    ) -> tuple[np.ndarray | None, float]:
        """The pose (3,) that agrees best with the picture, and the share of its outline that does; see `locate`."""
        whiteness = whiteness_of(image)
        tape, width_m = is_tape(redness_of(image), to_picture, self.opening_half_m)
        yaws, starts = np.arange(-0.78, 0.78, 0.06), []
        if last is not None:
            pose, support = self._refine(whiteness, tape, width_m, to_picture, last)
            if support >= SURE:
                return pose, support
            yaws, starts = last[2] + np.array([-0.12, -0.06, 0.0, 0.06, 0.12]), [last]
        starts += self._search(whiteness, to_picture, yaws)[: 4 if starts else STARTS]
        found = [self._refine(whiteness, tape, width_m, to_picture, start) for start in starts]
        return max(found, key=lambda each: each[1], default=(None, 0.0))

    def _check_size(self, image: np.ndarray, to_picture: np.ndarray, pose: np.ndarray, sure: bool) -> None:
        """Raise NotSeen if the sheet at pose (3,) shows that the rectangle was laid in the wrong size or shape.

        Unless it is sure that this is the sheet, both of its sides must be measured, and be near those of a sheet.
        """
        ratio, shear_rad = measure_sheet(image, to_picture, pose)
        name, measured = "red tape" if self.marks == "tape" else "tags", np.isfinite(ratio)
        if not measured.any() or not (sure or np.abs(ratio - 1).max() < MAX_UNSURE_ERROR):
            return
        a, b = 1000 * 2 * self.opening_half_m
        if measured.all() and (abs(ratio[1] / ratio[0] - 1) > MAX_ASPECT_ERROR or abs(shear_rad) > MAX_SHEAR_RAD):
            raise NotSeen(
                f"the rectangle of {name} is not {a:.0f} x {b:.0f} mm: seen through it, the A5 sheet measures "
                f"{148 * ratio[0]:.0f} x {210 * ratio[1]:.0f} mm, with angles of {90 - abs(np.rad2deg(shear_rad)):.0f} "
                "degrees; lay it again, with equal diagonals"
            )
        if abs((scale := ratio[measured].mean()) - 1) > MAX_SCALE_ERROR:
            x, y = (a, b) / np.where(measured, ratio, scale)
            margin_m = np.mean(np.array([x, y]) / 2000 - SHEET_HALF_M)
            raise NotSeen(
                f"the rectangle of {name} measures about {x:.0f} x {y:.0f} mm, not {a:.0f} x {b:.0f}: lay it again, or "
                f"pass --tape-margin {margin_m:.3f}"
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
                    edge = np.clip((sign * fall - MIN_CONTRAST / 2) / HIGH_CONTRAST, 0, 1)
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
        return [pose for support, pose in best if support > 0.15 * outline]

    def _refine(
        self, whiteness: np.ndarray, tape: np.ndarray, width_m: float, to_picture: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Fit the sheet's outline to the edges in the picture.

        Args:
            whiteness: (H, W) float32, the smallest channel of the picture.
            tape: (H, W) float32, and
            width_m: see `is_tape`.
            to_picture: homography (3, 3) from the table, m, to pixels.
            start: approximate pose (3,).

        Returns:
            The pose (3,), and the share of the outline that agrees with the picture; 0 unless two adjacent sides have
            enough points. Parts of the outline with red directly outside are not usable near the edges of the tape,
            because a bright table also ends there.
        """
        pose = start.copy()
        for reach_m in (0.020, 0.012, 0.008, 0.006):
            points, normals, distance, good = _find_edges(whiteness, to_picture, pose, reach_m)
            pose, inliers = _fit_rectangle(pose, points, normals, distance, good)
        corners = rectangle(SHEET_HALF_M, *pose)
        red, points, _ = sample_normals(tape, to_picture, corners, np.arange(0.003, 0.009, 0.001), SHEET_POINTS)
        on_tape_m = (np.abs(points - TAPE_CENTER_M) - self.opening_half_m).max(2)  # from the inner edge
        amid = (on_tape_m > TAPE_EDGE_M) & (on_tape_m < width_m - TAPE_EDGE_M)
        usable = (np.nan_to_num(red).mean(2) < 0.5) | amid
        inliers = inliers & usable
        counts = inliers.sum(1)
        across = min(max(counts[0], counts[2]), max(counts[1], counts[3]))
        pose[2] = (pose[2] + np.pi / 2) % np.pi - np.pi / 2  # a sheet looks the same after half a turn
        return pose, counts.sum() / max(usable.sum(), MIN_USABLE * usable.size) * (across >= MIN_SHEET_POINTS)


def _find_edges(
    whiteness: np.ndarray, to_picture: np.ndarray, pose: np.ndarray, reach_m: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The highest step from paper to table on each normal of the outline of a sheet at pose (3,).

    Returns:
        Feet (4, count, 2) of the normals, m; unit normals (4, 2); distances (4, count) of the steps, m, positive
        outwards; which of them are high enough and within reach, (4, count) bool.
    """
    step, near, far = 0.001, 3, 8  # mm on either side of an edge
    offsets = np.arange(-reach_m - 0.003, reach_m + 0.008 + step / 2, step)
    corners = rectangle(SHEET_HALF_M, *pose)
    values, points, normals = sample_normals(whiteness, to_picture, corners, offsets, SHEET_POINTS)
    sums = np.zeros((*values.shape[:2], len(offsets) + 1), np.float32)
    np.cumsum(np.nan_to_num(values, copy=False), axis=2, out=sums[..., 1:])
    inside, outside, beyond = (
        (sums[..., near + d : sums.shape[2] - far + d] - sums[..., near + c : sums.shape[2] - far + c]) / (d - c)
        for c, d in ((-near, 0), (0, near), (near + 1, far))
    )
    # print on the sheet is dark, too, but beyond it there is paper again
    drop = inside - np.maximum(outside, beyond)
    height = drop.max(2)
    # interpolate between samples with a parabola through three of them
    k = np.clip(drop.argmax(2), 1, drop.shape[2] - 2)
    side, normal = np.indices(k.shape, sparse=True)
    before, at, after = (drop[side, normal, k + d] for d in (-1, 0, 1))
    curve = before - 2 * at + after
    shift = np.where(curve < -1e-6, 0.5 * (before - after) / np.minimum(curve, -1e-6), 0.0)
    distance = offsets[0] + (k + near - 0.5 + np.clip(shift, -1, 1)) * step
    quartile = 3 * height.size // 4
    distinct = np.partition(height, quartile, axis=None)[quartile]
    good = (height > max(MIN_CONTRAST, SHARE_OF_CONTRAST * distinct)) & (np.abs(distance) < reach_m)
    return points, normals, distance, good


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
    rows = np.empty((*turning.shape, 4))
    rows[..., :2], rows[..., 2], rows[..., 3] = normals[:, None], turning, 1.0  # x, y, yaw, spill
    rows, flat, found = rows.reshape(-1, 4), distance.ravel(), good.ravel()
    change, inliers, nearest_m = np.zeros(4), found, 5e-4
    # the spill's prior; the others only keep what the edges do not tell, such as a shift along the only side in view
    prior = np.diag([1e-6, 1e-6, 1e-6, SPILL_POINTS / nearest_m])
    for tolerance_m in (0.012, 0.008, 0.005, 0.003, 0.003):
        left = np.abs(flat - rows @ change)
        inliers = found & (left < tolerance_m)
        if np.count_nonzero(inliers) < MIN_SHEET_POINTS:
            break
        weighted = rows.T * (inliers / np.maximum(left, nearest_m))
        change = np.linalg.solve(weighted @ rows + prior, weighted @ flat)
        change[3] = min(max(change[3], -MAX_SPILL_M), MAX_SPILL_M)
    return pose + change[:3], inliers.reshape(good.shape)


def measure_sheet(image: np.ndarray, to_picture: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, float]:
    """Measure the sheet through a homography.

    Args:
        image: (H, W, 3) uint8, RGB.
        to_picture: homography (3, 3) from the table, m, to pixels.
        pose: (3,) of the sheet.

    Returns:
        Its sides (2,), along its x and y, relative to those of an A5 sheet, NaN where two opposite sides are not in
        view; how far its corners are from right angles, rad, NaN unless half of each side is in view.
    """
    linear = smallest_channel(image).astype(np.float32)
    points, normals, distance, good = _find_edges(linear, to_picture, pose, 0.012)
    off_m, slope = np.full(4, np.nan), np.full(4, np.nan)
    for side, normal in enumerate(normals):
        if good[side].sum() < MIN_RULER_POINTS:
            continue
        found = points[side] - pose[:2] + distance[side, :, None] * normal
        straight = good[side] & near_line(found, good[side], normal, 0.0015)
        if straight.sum() >= MIN_RULER_POINTS:
            along = (found @ np.array([-normal[1], normal[0]]))[straight]
            slope[side], off_m[side] = np.polyfit(along, (found @ normal)[straight], 1)
            if np.ptp(along) < SHEET_HALF_M[side % 2]:  # too short for an angle
                slope[side] = np.nan
    for a, b in ((0, 2), (1, 3)):  # one of two sides that are not parallel is something else
        if abs(slope[a] - slope[b]) > MAX_SHEAR_RAD:
            off_m[[a, b]] = slope[[a, b]] = np.nan
    sides_m = np.array([off_m[1] + off_m[3], off_m[0] + off_m[2]])
    brightness = sample_normals(linear, to_picture, rectangle(SHEET_HALF_M, *pose), np.array([-0.008]), 8)[0]
    excess_m = sides_m - 2 * SHEET_HALF_M
    blur_m = np.clip(excess_m, 0.0, CLIPPED_BLUR_M) if np.nanmedian(brightness) >= CLIPPED else BLUR_M
    return (sides_m - blur_m) / (2 * SHEET_HALF_M), float((slope[0] + slope[2] - slope[1] - slope[3]) / 2)


def overlay(
    image: np.ndarray,
    to_picture: np.ndarray | None,
    pose: np.ndarray | None,
    tape_margin: float = TAPE_MARGIN_M,
    text: str = "",
    scale: int = 2,
) -> np.ndarray:
    """A picture for people, of what was located: rectangle (yellow), sheet (green), its axes, its pose, and text.

    Args:
        image: (H, W, 3) uint8, RGB.
        to_picture: homography (3, 3) from the table, m, to pixels of the image; None draws text only.
        pose: (3,) of the sheet; None or NaN if it is not known.
        tape_margin: m between sheet and tape on the table.
        text: lines to write below the pose, separated by line feeds.
        scale: how much the picture is enlarged.

    Returns:
        (scale H, scale W, 3) uint8.
    """
    cv2 = import_cv2()
    drawn = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    lines = []

    def polygon(points_m: np.ndarray, color: tuple[int, int, int], closed: bool = True) -> None:
        pixels = (project(to_picture, points_m) + 0.5) * scale - 0.5
        cv2.polylines(drawn, [np.round(pixels * 16).astype(np.int32)], closed, color, scale, cv2.LINE_AA, 4)

    if to_picture is not None:
        polygon(rectangle(SHEET_HALF_M + tape_margin, *TAPE_CENTER_M, 0.0), (255, 220, 0))
        if pose is not None and np.isfinite(pose).all():
            polygon(rectangle(SHEET_HALF_M, *pose), (0, 200, 0))
            c, s = np.cos(pose[2]), np.sin(pose[2])
            for axis, color in (((c, s), (220, 0, 0)), ((-s, c), (0, 90, 255))):
                polygon(pose[:2] + np.array([(0.0, 0.0), axis]) * 0.05, color, closed=False)
            lines.append(f"x {1000 * pose[0]:.0f} mm  y {1000 * pose[1]:.0f} mm  yaw {np.rad2deg(pose[2]):.1f} deg")
    for number, line in enumerate([*lines, *text.splitlines()]):
        place = (4 * scale, 11 * scale * (number + 1))
        for color, thickness in (((0, 0, 0), 2 * scale), ((255, 255, 255), scale)):
            cv2.putText(
                drawn, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.33 * scale, color, thickness // 2 + 1, cv2.LINE_AA
            )
    return drawn
