"""Finds the rectangle of red tape: the camera's homography, the width of the tape, and how well it was laid.

The inner edges of the tape are the border of the opening, whose size is known. The tape may be 10 to 50 mm wide.
Redness is judged relative to brightness, so that shade and exposure change it little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from so101.camera import NominalCamera, NotSeen, import_cv2, project, rectangle, sample_normals
from so101_env import TAPE_CENTER_M

SIDES = ("on the left", "near the arm", "on the right", "far from the arm")  # in the order of `rectangle`
TAPE_POINTS, MIN_TAPE_POINTS = 48, 6  # points on each side of the tape: examined, and required
WIDTHS_M = np.arange(0.008, 0.055, 0.002)  # widths of tape that are tried
MAX_RESIDUAL_M = 0.002  # root mean square distance of the tape's inner edges from a rectangle of the known size
DARK = 24.0  # in 1/255: below this brightness a hue means little
MIN_REDNESS = 0.10  # least difference in redness between the tape and what lies next to it
STEP_M, FLANK_M = 0.001, 0.006  # between samples across the tape; of the strips next to it that must not be red


@dataclasses.dataclass
class Tape:
    """The tape as found in a picture."""

    homography: np.ndarray  # (3, 3) from the table, m, to pixels
    sides_m: np.ndarray  # (2,) of the opening, along x and y, if the camera stands where the homography says
    residual_m: float  # root mean square distance of the inner edges from the fitted rectangle
    points: int  # on the edges, on which the fit is based


def red_excess(image: np.ndarray) -> np.ndarray:
    """Red minus the larger of green and blue, (H, W) float32 in 1/255, of a picture (H, W, 3) uint8."""
    rgb = image.astype(np.float32)
    return rgb[..., 0] - np.maximum(rgb[..., 1], rgb[..., 2])


def redness_of(image: np.ndarray) -> np.ndarray:
    """Redness (H, W) float32 of a picture (H, W, 3) uint8: the share of red light that is not white, below 1.

    Shade and exposure change it little, because they change numerator and denominator alike.
    """
    return np.maximum(red_excess(image), 0) / (image[..., 0] + np.float32(DARK))


def is_red(redness: np.ndarray) -> np.ndarray:
    """Pixels that may be tape before it is found: (H, W) float32, 1 or 0."""
    table, tape = np.percentile(redness, (50, 98.5))
    return (redness > max(MIN_REDNESS, 0.6 * tape, 0.5 * (table + tape))).astype(np.float32)


def is_tape(redness: np.ndarray, to_picture: np.ndarray, opening_half_m: np.ndarray) -> tuple[np.ndarray, float]:
    """Pixels that are as red as the tape, rather than as red as the table inside it, and the width of the tape.

    Args:
        redness: (H, W) float32, see `redness_of`.
        to_picture: homography (3, 3) from the table, m, to pixels.
        opening_half_m: half the sides (2,) of the rectangle inside the tape.

    Returns:
        (H, W) float32, 1 or 0; the width, m, 0 if there is no tape, as with tags.
    """
    corners = rectangle(opening_half_m, *TAPE_CENTER_M, 0.0)
    beside = np.nan_to_num(sample_normals(redness, to_picture, corners, np.array([0.005, -0.006]), 24)[0])
    tape, table = np.percentile(beside, 70, axis=(0, 1))  # parts of both are hidden, usually by things less red
    if tape - table < MIN_REDNESS:
        return np.zeros_like(redness), 0.0
    red = (redness > 0.5 * (tape + table)).astype(np.float32)
    offsets = np.arange(0.0, WIDTHS_M[-1], 0.002)
    across = np.nan_to_num(sample_normals(red, to_picture, corners, offsets, 12)[0]).mean((0, 1))
    return red, float(offsets[across > 0.5 * across.max()].max())


def find_tape(image: np.ndarray, opening_half_m: np.ndarray, turned: bool = False) -> Tape:
    """Find the tape.

    Args:
        image: (H, W, 3) uint8, RGB.
        opening_half_m: half the sides (2,) of the rectangle inside the tape.
        turned: whether the camera stands on the arm's side: half a turn about the tape's centre from the nominal place.

    Raises:
        NotSeen: a side of the tape cannot be made out, other things are as red as the tape, or the tape is no rectangle
            of the known size.
    """
    redness, excess, camera = redness_of(image), red_excess(image), NominalCamera(image.shape[:2])
    both, reasons, best = np.dstack([redness, excess]), [], None
    for start in _starts(redness, camera, opening_half_m):
        try:
            tape = _refine(both, camera, opening_half_m, start, SIDES[2:] + SIDES[:2] if turned else SIDES)
        except NotSeen as error:
            reasons.append(error)
            continue
        if best is None or tape.points > best.points:
            best = tape
        if best.points > 0.6 * 4 * TAPE_POINTS and best.residual_m < 0.5 * MAX_RESIDUAL_M:
            break
    if best is None:
        raise reasons[0]
    if best.residual_m > MAX_RESIDUAL_M:
        (x, y), (a, b) = 1000 * best.sides_m, 2000 * opening_half_m
        raise NotSeen(
            f"the rectangle of red tape measures about {x:.0f} x {y:.0f} mm, not {a:.0f} x {b:.0f}, and its edges miss "
            f"that by {1000 * best.residual_m:.1f} mm (root mean square): lay it again, or pass --tape-margin"
        )
    if turned:
        best.homography = best.homography @ half_turn()
    return best


def half_turn() -> np.ndarray:
    """Half a turn of the table about the tape's centre, (3, 3)."""
    return np.array([[-1, 0, 2 * TAPE_CENTER_M[0]], [0, -1, 2 * TAPE_CENTER_M[1]], [0, 0, 1]])


def _starts(redness: np.ndarray, camera: NominalCamera, half_m: np.ndarray) -> Iterator[np.ndarray]:
    """Rough deviations (7,) of the camera, see `NominalCamera.homography`, the most promising first."""
    from scipy.optimize import least_squares

    nominal, width_m = np.zeros(7), 0.025
    inner, outer = (rectangle(half_m + w, *TAPE_CENTER_M, 0.0) for w in (0.0, width_m))
    red = is_red(redness)

    def fit(corners: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """The deviation with which these corners of the table appear at these pixels."""
        scale = np.array([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.1])
        return least_squares(
            lambda change: np.append((project(camera.homography(change), corners) - pixels).ravel(), change / scale),
            nominal,
        ).x

    if (quad := _outer_corners(red, project(camera.homography(nominal), outer))) is not None:
        start = fit(outer, quad)
        # the tape's width was a guess: measure it, and correct the guess
        width_m, _ = _width(redness, camera.homography(start), half_m, 0.035)
        yield fit(rectangle(half_m + width_m, *TAPE_CENTER_M, 0.0), quad)
    # rings of tape at other places in the picture, and seen from nearer or farther
    cv2 = import_cv2()
    small = cv2.resize(redness, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    size, margin, found = np.array(small.shape[::-1]), 40, []
    small = cv2.copyMakeBorder(small, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
    pixels = project(camera.homography(nominal), inner)
    for scale in (0.86, 1.0, 1.16):
        for width in (0.014, 0.035):
            rings = (
                project(camera.homography(nominal), rectangle(half_m + w, *TAPE_CENTER_M, 0.0)) for w in (width, 0)
            )
            quads = [(each - camera.center) * scale * 0.5 for each in rings]
            low = quads[0].min(0)
            ring = np.zeros(np.ceil(np.ptp(quads[0], axis=0) + 3).astype(int)[::-1], np.uint8)
            for quad, value in zip(quads, (255, 0)):
                cv2.fillConvexPoly(ring, np.round((quad - low + 1) * 16).astype(np.int32), value, cv2.LINE_AA, 4)
            if (np.array(ring.shape) > np.array(small.shape)).any():
                continue
            pattern = ring / np.float32(ring.std() * np.sqrt(ring.size))
            match = cv2.matchTemplate(small, pattern, cv2.TM_CCOEFF)
            _, score, _, place = cv2.minMaxLoc(match)
            shift = (np.array(place) + 1 - margin - low - size / 2) * 2
            found.append((score, (pixels - camera.center) * scale + camera.center + shift))
    for _, quad in sorted(found, key=lambda each: -each[0])[:2]:
        yield fit(inner, quad)
    yield nominal


def _outer_corners(red: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """Corners of the red region's convex hull, (4, 2), pixels: where its four longest sides meet.

    They come in the order of the expected corners (4, 2), pixels. None if the hull has fewer than four sides, or two of
    them are parallel.
    """
    cv2 = import_cv2()
    contours, _ = cv2.findContours(red.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contours = [contour for contour in contours if len(contour) > 0.05 * max(red.shape)]
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


def _contrast(sums: np.ndarray, width: int) -> np.ndarray:
    """How much redder a strip of tape is than the strips on both sides of it, for each place where it may start.

    Args:
        sums: (..., K + 1), cumulated redness across the tape.
        width: width of the tape, in samples.

    Returns:
        (..., K - width - 2 * flank + 1), with flank = FLANK_M / STEP_M.
    """
    flank, gap = round(FLANK_M / STEP_M), 1
    last = sums.shape[-1] - width - flank  # exclusive: the strip starts at flank, ..., last - 1
    start = np.arange(flank, last)
    inside = (sums[..., start + width] - sums[..., start]) / width
    before = (sums[..., start - gap] - sums[..., start - flank]) / (flank - gap)
    after = (sums[..., start + width + flank] - sums[..., start + width + gap]) / (flank - gap)
    return inside - np.maximum(before, after)


def _width(redness: np.ndarray, homography: np.ndarray, half_m: np.ndarray, reach_m: float) -> tuple[float, float]:
    """The width of the tape, m, that explains all four sides best, and its contrast.

    Args:
        reach_m: how far the inner edges may be from where the homography puts them.
    """
    corners = rectangle(half_m, *TAPE_CENTER_M, 0.0)
    offsets = np.arange(-reach_m - FLANK_M, reach_m + WIDTHS_M[-1] + FLANK_M, STEP_M)
    values = np.nan_to_num(sample_normals(redness, homography, corners, offsets, TAPE_POINTS // 2)[0])
    sums = np.cumsum(np.pad(values, ((0, 0), (0, 0), (1, 0))), axis=2)
    scores, places = [], round(2 * reach_m / STEP_M)
    for width_m in WIDTHS_M:
        contrast = _contrast(sums, round(width_m / STEP_M))[..., :places].max(2)
        scores.append(np.sort(contrast, axis=1)[:, TAPE_POINTS // 4 :].mean())  # some points are hidden
    best = int(np.argmax(scores))
    return float(WIDTHS_M[best]), float(scores[best])


def _mean_between(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Mean of values (..., K) from sample first (...) up to, but without, sample last (...)."""
    sums = np.cumsum(np.pad(values, ((0, 0), (0, 0), (1, 0))), axis=-1)
    total = np.take_along_axis(sums, last[..., None], -1) - np.take_along_axis(sums, first[..., None], -1)
    return total[..., 0] / np.maximum(last - first, 1)


def _crossing(values: np.ndarray, half: np.ndarray, middle: np.ndarray, outwards: bool) -> np.ndarray:
    """Where values (..., K) fall below half (...) on the way from sample middle (...): a sample, with fraction.

    NaN where they never do.
    """
    count = values.shape[-1]
    if not outwards:  # the same in the mirror
        return count - 1 - _crossing(values[..., ::-1], half, count - 1 - middle, True)
    faint = (values < half[..., None]) & (np.arange(count) > middle[..., None])
    edge = np.maximum(faint.argmax(-1), 1)
    low, high = (np.take_along_axis(values, (edge - k)[..., None], -1)[..., 0] for k in (0, 1))
    return np.where(faint.any(-1), edge - np.clip((half - low) / np.maximum(high - low, 1e-6), 0, 1), np.nan)


def _edges(values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner and outer edge of the tape on each normal.

    Args:
        values: (4, count, K, 2), redness and red excess along the normals.
        width: width of the tape, in samples.

    Returns:
        Both edges, samples with fractions, and how much redder the tape is than what lies next to it: (4, count) each.
        NaN where the picture shows no edge.
    """
    flank = round(FLANK_M / STEP_M)
    contrast = _contrast(np.cumsum(np.pad(values[..., 0], ((0, 0), (0, 0), (1, 0))), axis=2), width)
    first = contrast.argmax(2)
    height = np.take_along_axis(contrast, first[..., None], 2)[..., 0]
    first, excess = first + flank, values[..., 1]
    middle = first + width // 2
    level = _mean_between(excess, middle - width // 4, middle + width // 4 + 1)
    edges = []
    for outwards in (False, True):
        # from the middle of the tape, to where red has fallen half way to what lies next to it
        beside = (first + width + 1, first + width + flank) if outwards else (first - flank, first - 1)
        floor = np.clip(_mean_between(excess, *beside), 0, 0.5 * level)
        edges.append(_crossing(excess, 0.5 * (level + floor), middle, outwards))
    return *edges, height


def _outer_edges(values: np.ndarray, width: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The outer edge of the tape on each normal, also where a sheet hides the inner one.

    Args:
        values: (4, count, K, 2), redness and red excess along the normals.
        width: width of the tape, in samples.
        first: the sample at which the tape is expected to begin.

    Returns:
        The edges, samples with fractions, NaN where there is none; which of them are distinct, (4, count) bool.
    """
    strip, flank = 6, round(FLANK_M / STEP_M)  # samples inside and outside the edge
    places = np.arange(first + width - flank, first + width + flank + 1)
    sums = np.cumsum(np.pad(values[..., 0], ((0, 0), (0, 0), (1, 0))), axis=2)
    inside = (sums[..., places] - sums[..., places - strip]) / strip
    outside = (sums[..., places + flank] - sums[..., places + 1]) / (flank - 1)
    drop = inside - outside
    edge, excess = places[drop.argmax(2)], values[..., 1]
    level = _mean_between(excess, edge - strip, edge - 2)
    floor = np.clip(_mean_between(excess, edge + 2, edge + flank), 0, 0.5 * level)
    height = drop.max(2)
    distinct = height > np.maximum(MIN_REDNESS, 0.6 * np.percentile(height, 85, axis=1, keepdims=True))
    found = _crossing(excess, 0.5 * (level + floor), edge - strip // 2, True)
    return found, distinct & (np.abs(found - edge) <= flank)


def _refine(
    both: np.ndarray, camera: NominalCamera, half_m: np.ndarray, start: np.ndarray, names: tuple[str, ...]
) -> Tape:
    """Fit the camera to the tape's inner edges in the picture.

    Args:
        both: (H, W, 2) float32, see `redness_of` and `red_excess`.
        camera: the nominal camera.
        half_m: half the sides (2,) of the opening.
        start: approximate deviation (7,), see `NominalCamera.homography`.
        names: names of the four sides, in the order of `rectangle`.

    Raises:
        NotSeen: see `find_tape`.
    """
    redness = np.ascontiguousarray(both[..., 0])
    corners, change, flank = rectangle(half_m, *TAPE_CENTER_M, 0.0), start, round(FLANK_M / STEP_M)
    width_m = _width(redness, camera.homography(change), half_m, 0.040)[0]
    for reach_m in (0.040, 0.020, 0.008):
        homography = camera.homography(change)
        offsets = np.arange(-reach_m - FLANK_M, reach_m + width_m + 2 * FLANK_M, STEP_M)
        values, points, normals = sample_normals(both, homography, corners, offsets, TAPE_POINTS)
        values = np.nan_to_num(values)  # outside the picture counts as not red
        inner, outer, height = _edges(values[:, :, :-flank], round(width_m / STEP_M))
        # demand the full width of the tape, not the strip that a sheet on it leaves visible
        enough = np.maximum(MIN_REDNESS, 0.6 * np.percentile(height, 85, axis=1, keepdims=True))
        widths_m = (outer - inner) * STEP_M
        seen = (height > enough) & np.isfinite(inner)
        seen &= np.isnan(outer) | (np.abs(widths_m - width_m) < max(0.004, 0.25 * width_m))
        found = points + np.nan_to_num(offsets[0] + inner * STEP_M)[..., None] * normals[:, None]
        good = _on_lines(found, seen, normals)
        short = good.sum(1) < MIN_TAPE_POINTS
        if short.any():
            where = names[np.flatnonzero(short)[0]]
            raise NotSeen(f"the side of the red tape {where} cannot be made out: all four must be in the picture")
        if np.isfinite(outer[good]).any():
            width_m = float(np.clip(np.nanmedian(widths_m[good]), WIDTHS_M[0], WIDTHS_M[-1]))
        pixels = project(homography, found)
        if reach_m > 0.010:
            change, width_m, left_m = _fit_camera(camera, change, corners, normals, pixels, good, width_m)
            continue
        # the outer edges, too: they are in view where a sheet hides the inner ones
        expected = round((reach_m + FLANK_M) / STEP_M)
        outer, distinct = _outer_edges(values, round(width_m / STEP_M), expected)
        found = points + np.nan_to_num(offsets[0] + outer * STEP_M)[..., None] * normals[:, None]
        both_pixels = np.concatenate([pixels, project(homography, found)], axis=1)
        both_good = np.concatenate([good, _on_lines(found, distinct, normals)], axis=1)
        change, width_m, left_m = _fit_camera(camera, change, corners, normals, both_pixels, both_good, width_m)
    homography = camera.homography(change)
    # red pixels along the middle of the tape, and next to it, where none should be
    beside_m = max(width_m / 2, FLANK_M)
    offsets = np.array([width_m / 2, width_m + beside_m, -beside_m])
    along = sample_normals(is_tape(redness, homography, half_m)[0], homography, corners, offsets, TAPE_POINTS)[0]
    on, out, within = np.nan_to_num(along).sum(1).T
    if (on <= np.maximum(out, within)).any():
        raise NotSeen("the red tape cannot be distinguished from other red things")
    inner_m = [left_m[side, :TAPE_POINTS][good[side]] for side in range(4)]
    off_m = [np.median(each) for each in inner_m]
    sides_m = 2 * half_m + (off_m[1] + off_m[3], off_m[0] + off_m[2])
    residual_m = float(np.sqrt(np.mean(np.concatenate(inner_m) ** 2)))
    return Tape(homography, sides_m, residual_m, int(good.sum()))


def _fit_camera(
    camera: NominalCamera,
    start: np.ndarray,
    corners: np.ndarray,
    normals: np.ndarray,
    pixels: np.ndarray,
    good: np.ndarray,
    width_m: float,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Fit the camera to points on a rectangle's sides, and on their parallels a tape's width farther out.

    Args:
        camera: the nominal camera.
        start: approximate deviation (7,), see `NominalCamera.homography`.
        corners: (4, 2) of the rectangle, m.
        normals: (4, 2) of its sides, outwards.
        pixels: (4, TAPE_POINTS, 2), where its sides appear, or (4, 2 * TAPE_POINTS, 2), with the parallels last.
        good: (4, TAPE_POINTS) or (4, 2 * TAPE_POINTS) bool, which of these to use.
        width_m: approximate width of the tape.

    Returns:
        The deviation (7,); the width, m; how far outside its line each point then lies, m, in the shape of `good`.
    """
    from scipy.optimize import least_squares

    side, point = np.nonzero(good)
    normal, level, outer = normals[side], (corners * normals).sum(1)[side], point >= TAPE_POINTS

    def misses_m(fit: np.ndarray) -> np.ndarray:
        points = project(np.linalg.inv(camera.homography(fit[:7])), pixels[good])
        return (points * normal).sum(1) - level - outer * fit[7]

    # in mm, with weak priors on focal length and width
    fit = least_squares(
        lambda fit: np.append(1000 * misses_m(fit), [fit[6] / 0.3, (fit[7] - width_m) / 0.01]),
        np.append(start, width_m),
        loss="soft_l1",
    ).x
    left_m = np.zeros(good.shape)
    left_m[good] = misses_m(fit)
    return fit[:7], float(np.clip(fit[7], WIDTHS_M[0], WIDTHS_M[-1])), left_m


def _on_lines(found: np.ndarray, seen: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Points found (4, count, 2), m, that are in seen and lie on one line on each side: (4, count) bool."""
    good = np.zeros(seen.shape, bool)
    for side in range(4):
        if seen[side].sum() >= MIN_TAPE_POINTS:
            good[side] = seen[side] & near_line(found[side], seen[side], normals[side], 0.003)
    return good


def near_line(found: np.ndarray, seen: np.ndarray, normal: np.ndarray, tolerance_m: float) -> np.ndarray:
    """Which of the points found (count, 2), m, lie near the line through most of those in seen, (count,) bool."""
    along, across = found @ np.array([-normal[1], normal[0]]), found @ normal
    a, d = along[seen], across[seen]
    i, j = np.triu_indices(len(a), max(1, len(a) // 4))
    slope = np.median((d[j] - d[i]) / (a[j] - a[i]))
    offset = np.median(d - slope * a)
    return np.abs(across - slope * along - offset) < tolerance_m
