"""Locate the sheet on composed photographs of tables: right, wrong and accepted, or refused, by condition.

    python benchmark/tables.py

MuJoCo draws no textured tables, hard shadows, overexposure or crooked tape, and real tables have all of them. Here the
table top is composed of procedural textures, tape, a printed sheet and clutter. A camera that deviates from the nominal
one, with lens distortion, looks at it; the arm is rendered by MuJoCo in front of it. Every scene is a function of its
number and condition, and its true pose is known. The first pictures can be written for people with --pictures.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import mujoco
import numpy as np

from so101.camera import CAMERA, NominalCamera, NotSeen, project, rectangle
from so101.cli import check_flags, check_output, parse, run_script
from so101.files import write_json
from so101.locator import SheetLocator, overlay
from so101.tags import CARD_M, CELLS, cells_of, tag_corners
from so101_env import HOME_RAD, SHEET_HALF_M, TAPE_CENTER_M, TAPE_MARGIN_M, SO101Error, load_model
from so101_sim.geometry import wrap_angle
from so101_sim.scene import Renderer, nominal_look

SIZE, SEEN_SIZE = (480, 640), (240, 320)  # height and width, pixels, of the camera's pictures, and after scaling
DRAWN_SIZE = (720, 960)  # as drawn, before averaging
CANVAS_MM, CANVAS_ORIGIN_M = 0.8, np.array([-0.20, -0.60])  # the table top that is drawn: mm per pixel, its corner
CANVAS_SIZE = (1200, 1500)  # its rows run along x, its columns along y
RIGHT_MM, RIGHT_DEG = 5.0, 3.0


@dataclasses.dataclass(frozen=True)
class Condition:
    """What one condition changes. Ranges are uniform, (lowest, highest)."""

    tape_mm: tuple[float, float] = (19.0, 25.0)
    """width of the tape"""
    gain: tuple[float, float] = (0.85, 1.0)
    """exposure: 1 shows a white surface as white"""
    dark_red: bool = False
    """tape that reflects half as much"""
    shadow: bool = False
    """a shadow with a sharp edge, which leaves 0.3 to 0.5 of the light"""
    smaller_mm: float = 0.0
    """how much shorter all sides of the rectangle are laid"""
    skewed_mm: float = 0.0
    """how far the far side of the rectangle is laid to the right, which leaves no right angle"""
    tags: bool = False
    """ArUco tags at the corners, instead of tape"""


CONDITIONS = {
    "normal": Condition(),
    "dim": Condition(gain=(0.22, 0.28)),
    "hard shadow": Condition(shadow=True),
    "overexposed": Condition(gain=(1.5, 2.2)),
    "dark red": Condition(dark_red=True),
    "tape 10 mm": Condition(tape_mm=(10, 10)),
    "tape 19 mm": Condition(tape_mm=(19, 19)),
    "tape 30 mm": Condition(tape_mm=(30, 30)),
    "tape 38 mm": Condition(tape_mm=(38, 38)),
    "tape 48 mm": Condition(tape_mm=(48, 48)),
    "8 mm too small": Condition(smaller_mm=8.0),
    "16 mm skewed": Condition(skewed_mm=16.0),
    "tags": Condition(tags=True),
    "tags, dim": Condition(tags=True, gain=(0.22, 0.28)),
    "tags, hard shadow": Condition(tags=True, shadow=True),
    "tags, overexposed": Condition(tags=True, gain=(1.5, 2.2)),
}


@dataclasses.dataclass
class Args:
    """Locate the sheet on composed photographs."""

    scenes: int = 40
    """number of scenes in every condition"""
    first: int = 5000
    """number of the first scene"""
    conditions: tuple[str, ...] = ()
    """only these (default: all)"""
    pictures: str | None = None
    """write the first scene of every condition, with what was found, to this directory"""
    json: str | None = None
    """write the results to this file"""


# ---------------------------------------------------------------------------------------------------------------------
# the table top, drawn in its own plane; colours are RGB in 0 to 1


def noise(rng: np.random.Generator, size: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    """Smooth noise (H, W) with standard deviation 1; sigma in pixels, along rows and columns."""
    coarse = [max(1, int(min(s, 32) / 2)) for s in sigma]  # drawn coarsely, since it is smooth
    grid = rng.standard_normal((size[0] // coarse[0] + 2, size[1] // coarse[1] + 2)).astype(np.float32)
    grid = cv2.GaussianBlur(grid, (0, 0), sigmaX=max(sigma[1] / coarse[1], 0.3), sigmaY=max(sigma[0] / coarse[0], 0.3))
    field = cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / field.std()


def turned(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """A field, turned about its middle by a random angle."""
    height, width = field.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(0, 360), 1.0)
    return cv2.warpAffine(field, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def wood(rng: np.random.Generator) -> np.ndarray:
    """Boards with grain, from pine to walnut, some reddish."""
    tones = np.array([[0.74, 0.58, 0.4], [0.6, 0.44, 0.29], [0.42, 0.27, 0.16], [0.28, 0.19, 0.13], [0.46, 0.25, 0.16]])
    grain = noise(rng, CANVAS_SIZE, (2.0, 120.0)) + noise(rng, CANVAS_SIZE, (9.0, 200.0))
    rings = np.sin(6 * noise(rng, CANVAS_SIZE, (60.0, 400.0)) + 0.5 * grain)
    boards = np.repeat(rng.standard_normal(40), rng.integers(70, 200))[: CANVAS_SIZE[0]]
    boards = np.pad(boards, (0, max(0, CANVAS_SIZE[0] - len(boards))))[:, None]
    shade = turned(rng, (0.06 * grain + 0.05 * rings + 0.05 * boards).astype(np.float32))
    return tones[rng.integers(len(tones))] * (1 + shade[..., None])


def cloth(rng: np.random.Generator) -> np.ndarray:
    """Woven cloth with folds, plain or chequered."""
    rows, columns = np.mgrid[0 : CANVAS_SIZE[0], 0 : CANVAS_SIZE[1]].astype(np.float32)
    thread = rng.uniform(2.5, 5)
    shade = 0.10 * np.sin(2 * np.pi * rows / thread) * np.sin(2 * np.pi * columns / thread)
    shade += 0.07 * turned(rng, noise(rng, CANVAS_SIZE, (25.0, 160.0)))
    base = rng.uniform(0.15, 0.55) * rng.uniform([0.75, 0.85, 0.85], [1.05, 1.15, 1.25])
    if rng.random() < 0.4:
        period = rng.uniform(50, 120)
        bands = (rows % period < period / 2) * 1.0 + (columns % period < period / 2)
        shade += 0.12 * (turned(rng, bands.astype(np.float32)) - 1)
    return base * (1 + shade[..., None])


def stone(rng: np.random.Generator) -> np.ndarray:
    """Marble with veins, or granite with grains."""
    base = rng.uniform(0.15, 0.6) * rng.uniform(0.92, 1.08, 3)
    if rng.random() < 0.5:
        field = noise(rng, CANVAS_SIZE, (60.0, 60.0)) + 0.5 * noise(rng, CANVAS_SIZE, (15.0, 15.0))
        shade = 0.05 * noise(rng, CANVAS_SIZE, (40.0, 40.0)) - 0.35 * np.exp(-((field / 0.05) ** 2))
        shade *= np.sign(rng.random() - 0.3)
    else:
        shade = 0.15 * noise(rng, CANVAS_SIZE, (2.0, 2.0)) + 0.08 * noise(rng, CANVAS_SIZE, (5.0, 5.0))
    return base * np.clip(1 + shade[..., None], 0.3, 1.7)


def plain(rng: np.random.Generator) -> np.ndarray:
    """Plastic or lacquer with stains and scratches."""
    shade = 0.02 * noise(rng, CANVAS_SIZE, (1.0, 1.0)) + 0.04 * noise(rng, CANVAS_SIZE, (80.0, 80.0))
    for _ in range(rng.integers(12)):
        a, b = rng.integers(0, CANVAS_SIZE[0], (2, 2))
        cv2.line(shade, a.tolist(), b.tolist(), float(rng.uniform(-0.25, 0.25)), int(rng.integers(1, 3)), cv2.LINE_AA)
    return rng.uniform(0.08, 0.6) * rng.uniform(0.85, 1.15, 3) * (1 + shade[..., None])


TABLES = (wood, wood, cloth, stone, plain)


def to_canvas(points_m: np.ndarray) -> np.ndarray:
    """Pixels (..., 2), column and row, of points of the table, m."""
    return (((points_m - CANVAS_ORIGIN_M) * 1000 / CANVAS_MM) - 0.5)[..., ::-1]


def mask_of(polygon_m: np.ndarray, soft_mm: float = 0.0) -> tuple[tuple[slice, slice], np.ndarray]:
    """Coverage of the canvas by a polygon (n, 2), m: the part of the canvas around it, and (h, w) float32 in 0 to 1."""
    pixels, shift = to_canvas(polygon_m), 4
    soft = soft_mm / CANVAS_MM
    margin = int(np.ceil(4 * soft)) + 2
    low = np.clip(np.floor(pixels.min(0)) - margin, 0, np.array(CANVAS_SIZE[::-1]) - 1).astype(int)
    high = np.clip(np.ceil(pixels.max(0)) + margin, low + 1, CANVAS_SIZE[::-1]).astype(int)
    mask = np.zeros((high - low)[::-1], np.uint8)
    cv2.fillPoly(mask, [np.round((pixels - low) * 2**shift).astype(np.int32)], 255, cv2.LINE_AA, shift)
    mask = mask.astype(np.float32) / 255
    return (slice(low[1], high[1]), slice(low[0], high[0])), cv2.GaussianBlur(mask, (0, 0), soft) if soft else mask


def lay(canvas: np.ndarray, polygon_m: np.ndarray, color: np.ndarray, soft_mm: float = 0.0, share: float = 1.0) -> None:
    """Put a colour, (3,) or (H, W, 3), on a polygon of the canvas (H, W, 3), in place."""
    part, mask = mask_of(polygon_m, soft_mm)
    color = color[part] if np.ndim(color) == 3 else color
    canvas[part] += share * mask[..., None] * (color - canvas[part])


def darken(canvas: np.ndarray, polygon_m: np.ndarray, share: float, soft_mm: float) -> None:
    """Take a share of the light from a polygon of the canvas, in place."""
    part, mask = mask_of(polygon_m, soft_mm)
    canvas[part] *= 1 - share * mask.reshape(mask.shape + (1,) * (canvas.ndim - 2))


def lay_tape(canvas: np.ndarray, rng: np.random.Generator, condition: Condition) -> None:
    """Four strips of tape, each a little crooked, with sheen, wrinkles and curled ends."""
    width, half = rng.uniform(*condition.tape_mm) / 1000, SHEET_HALF_M + TAPE_MARGIN_M - condition.smaller_mm / 2000
    if condition.dark_red:
        color = rng.uniform([0.36, 0.03, 0.05], [0.48, 0.08, 0.11])
    else:
        color = rng.uniform([0.68, 0.04, 0.05], [0.92, 0.16, 0.16])
    sheen = 1 + 0.06 * noise(rng, CANVAS_SIZE, (3.0, 3.0)) + 0.05 * noise(rng, CANVAS_SIZE, (30.0, 30.0))
    shine = rng.uniform(0, 0.12) * np.clip(noise(rng, CANVAS_SIZE, (40.0, 40.0)), 0, 1.5)
    surface = (color * sheen[..., None] + shine[..., None]).astype(np.float32)
    inner = rectangle(half, *TAPE_CENTER_M, 0.0)
    inner[(0, 3), 1] -= condition.skewed_mm / 1000  # the two corners that are far from the arm
    for i in rng.permutation(4):
        start, end = inner[i], inner[(i + 1) % 4]
        along = (end - start) / np.linalg.norm(end - start)
        out = np.array([along[1], -along[0]])
        shift = rng.normal(0, 0.0004, 2)  # how far both ends are off
        before, after = width + rng.uniform(-0.3, 0.6, 2) * 0.02
        a, b = start + shift[0] * out - before * along, end + shift[1] * out + after * along
        ends = rng.uniform(-0.003, 0.003, 2)  # cut at an angle
        strip = np.array([a, b, b + width * out + ends[0] * along, a + width * out + ends[1] * along])
        lay(canvas, strip, surface, 0.3)
        if rng.random() < 0.4:  # the end curls up: bright or dark, and its shadow
            corner = np.array([b - 0.012 * along, b, b + width * out, b + width * out - 0.012 * along])
            lay(canvas, corner, color * rng.choice([0.5, 1.3]), 1.5, share=0.5)


def lay_tags(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Four printed tags, each laid a little crooked."""
    half = SHEET_HALF_M + TAPE_MARGIN_M
    corners = tag_corners(half)
    paper, ink = rng.uniform(0.88, 1.0), rng.uniform(0.03, 0.12)
    for tag in range(4):
        # all corners of all cells, row by row from the upper left one
        upper_left, upper_right, _, lower_left = corners[tag]
        right, down = (upper_right - upper_left) / CELLS, (lower_left - upper_left) / CELLS
        angle, shift = np.deg2rad(rng.normal(0, 0.4)), rng.normal(0, 0.0005, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = corners[tag].mean(0)

        def laid(points: np.ndarray, turn=turn, middle=middle, shift=shift) -> np.ndarray:
            return (points - middle) @ turn.T + middle + shift

        lay(canvas, laid(rectangle(np.full(2, CARD_M / 2), *middle, 0.0)), np.full(3, paper), 0.3)
        for row, column in np.argwhere(cells_of(tag)):
            square = np.array([[0, 0], [0, 1.02], [1.02, 1.02], [1.02, 0]]) + (row, column)
            lay(canvas, laid(upper_left + square[:, :1] * down + square[:, 1:] * right), np.full(3, ink))


def lay_sheet(canvas: np.ndarray, rng: np.random.Generator, pose: np.ndarray) -> None:
    """A white A5 sheet, printed or not, with the narrow shadow of its edges."""
    corners = rectangle(SHEET_HALF_M, *pose)
    darken(canvas, corners + rng.uniform(-0.0012, 0.0012, 2), rng.uniform(0.1, 0.4), 1.0)
    paper = rng.uniform(0.9, 1.0) * np.array([1, 1, 1]) * rng.uniform([1, 1, 0.95], [1, 1, 1.0])
    shade = 1 + 0.012 * noise(rng, CANVAS_SIZE, (40.0, 40.0))
    lay(canvas, corners, paper * shade[..., None], 0.2)
    c, s = np.cos(pose[2]), np.sin(pose[2])
    axes = np.array([[c, s], [-s, c]])
    kind = rng.choice(["blank", "text", "text", "figure"])
    if kind == "blank":
        return
    ink = rng.uniform(0.05, 0.45) * np.ones(3) if rng.random() < 0.7 else rng.uniform(0.05, 0.6, 3)
    for x in np.arange(-0.058, 0.058, rng.uniform(0.006, 0.012)):
        low, high = -0.09 + rng.uniform(0, 0.02), 0.09 - rng.uniform(0, 0.06) * (rng.random() < 0.3)
        if kind == "figure" and -0.03 < x < 0.03:
            continue
        line = np.array([[x, low], [x, high], [x + 0.0022, high], [x + 0.0022, low]])
        lay(canvas, line @ axes + pose[:2], ink, 0.5, share=0.6)
    if kind == "figure":
        box = rectangle(np.array([0.028, rng.uniform(0.03, 0.085)]), 0, 0, 0.0) @ axes + pose[:2]
        lay(canvas, box, rng.uniform(0.1, 0.9, 3))


def lay_clutter(canvas: np.ndarray, rng: np.random.Generator, tape_m: float) -> None:
    """Things beside the tape: books, a hand, a pen, another sheet. Some are reddish, none is as red as tape."""
    outer = SHEET_HALF_M + TAPE_MARGIN_M + tape_m
    for _ in range(rng.integers(0, 7)):
        anything, skin = rng.uniform(0.05, 0.9, 3), rng.uniform([0.75, 0.52, 0.42], [0.92, 0.7, 0.6])
        wooden, white = rng.uniform([0.5, 0.3, 0.2], [0.7, 0.45, 0.3]), np.full(3, rng.uniform(0.5, 1))
        color = (anything, skin, wooden, white)[rng.integers(4)]
        color[1:] = np.maximum(color[1:], 0.55 * color[0] - 0.1)  # not as red as tape
        size = rng.uniform(0.01, 0.09, 2)
        reach = np.linalg.norm(size)
        axis, sign = rng.integers(2), rng.choice([-1, 1])
        place = rng.uniform(-0.32, 0.32, 2)
        place[axis] = sign * (outer[axis] + 0.01 + reach + rng.uniform(0, 0.06))
        shape = rectangle(size, *(TAPE_CENTER_M + place), rng.uniform(0, 3))
        if rng.random() < 0.4:
            angle = np.linspace(0, 2 * np.pi, 40)[:, None]
            shape = TAPE_CENTER_M + place + size * np.hstack([np.cos(angle), np.sin(angle)])
        darken(canvas, shape + rng.uniform(-0.006, 0.006, 2), 0.4, 4.0)
        lay(canvas, shape, color, 0.4)


def shadow(rng: np.random.Generator) -> np.ndarray:
    """Light (H, W) that a thing in front of the lamp leaves: a half-plane, a bar, or a blob like a hand."""
    kind, angle = rng.integers(3), rng.uniform(0, np.pi)
    middle = TAPE_CENTER_M + rng.uniform(-0.08, 0.08, 2)
    if kind < 2:
        half = np.array([1.0, 1.0]) if kind == 0 else np.array([1.0, rng.uniform(0.02, 0.09)])
        if kind == 0:
            middle = middle + 1.0 * np.array([-np.sin(angle), np.cos(angle)]) * rng.choice([-1, 1])
        shape = rectangle(half, *middle, angle)
    else:
        turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        radius = rng.uniform(0.06, 0.12) * (1 + 0.3 * np.sin(rng.integers(2, 6) * turn + angle))
        shape = middle + radius[:, None] * np.column_stack([np.cos(turn), np.sin(turn)])
    light = np.ones(CANVAS_SIZE, np.float32)
    darken(light, shape, rng.uniform(0.5, 0.7), rng.uniform(0.5, 3.0))
    return light


# ---------------------------------------------------------------------------------------------------------------------
# the camera


class Studio:
    """Composes the photographs. Holds MuJoCo's renderer, for the arm."""

    def __init__(self):
        self.model, self.camera = load_model(), NominalCamera(DRAWN_SIZE)
        self.renderer = Renderer(self.model, DRAWN_SIZE, fast=False)
        own = {self.model.body(name).id for name in ("world", "tape", "sheet")}
        self.arm = np.array([i for i in range(self.model.ngeom) if self.model.geom_bodyid[i] not in own])

    def close(self) -> None:
        """Free the renderer."""
        self.renderer.close()

    def photograph(self, number: int, condition: Condition) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A scene.

        Returns:
            The picture (480, 640, 3) uint8; the sheet's true pose (3,); the homography (3, 3) from the table, m, to the
            pixels of that picture, which leaves out the lens distortion.
        """
        # every part draws from numbers of its own, so that a condition changes nothing else
        streams = [np.random.default_rng((number, k)) for k in range(9)]
        for_table, for_tape, for_sheet, for_clutter, for_camera, for_arm, for_light, for_shadow, for_lens = streams
        canvas = np.clip(TABLES[for_table.integers(len(TABLES))](for_table), 0.02, 0.72).astype(np.float32)
        canvas = np.ascontiguousarray(canvas)
        lay_clutter(canvas, for_clutter, condition.tape_mm[1] / 1000)
        lay_tags(canvas, for_tape) if condition.tags else lay_tape(canvas, for_tape, condition)
        distance = for_sheet.uniform(*((0, 0.04) if for_sheet.random() < 0.3 else (0.04, 0.12)))
        direction, yaw = for_sheet.uniform(-np.pi, np.pi), for_sheet.uniform(-0.3, 0.3)
        pose = np.append(TAPE_CENTER_M + distance * np.array([np.cos(direction), np.sin(direction)]), yaw)
        lay_sheet(canvas, for_sheet, pose)
        light = np.ones(CANVAS_SIZE, np.float32)
        rows, columns = np.mgrid[-1 : 1 : CANVAS_SIZE[0] * 1j, -1 : 1 : CANVAS_SIZE[1] * 1j].astype(np.float32)
        tilt = for_light.uniform(-0.25, 0.25, 2)
        light *= np.clip(1 + tilt[0] * rows + tilt[1] * columns, 0.5, 1.5)
        if condition.shadow:
            light *= shadow(for_shadow)
        canvas *= light[..., None]

        change, homography = self._camera(for_camera, condition)
        maps = self._lens(for_lens, homography)
        drawn = cv2.remap(canvas, *maps[0], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        if (look := for_arm.random()) < 0.6:
            joints = HOME_RAD + for_arm.uniform(-0.25, 0.25, 6) * [1, 0.6, 0.6, 0.6, 0.5, 1]
            if look < 0.25:
                joints[0] += for_arm.choice([-1, 1]) * for_arm.uniform(0.6, 1.0)
            arm, mask = self._arm(for_arm, change, np.append(joints, np.zeros(4)))
            arm, mask = (cv2.remap(each, *maps[1], cv2.INTER_LINEAR) for each in (arm, mask))
            drawn += mask[..., None] * (arm - drawn)
        gain = for_light.uniform(*condition.gain) * for_light.uniform(0.94, 1.06, 3)
        picture = cv2.resize(drawn * gain.astype(np.float32), SIZE[::-1], interpolation=cv2.INTER_AREA)
        picture = cv2.GaussianBlur(picture, (0, 0), for_lens.uniform(0.5, 1.5))
        picture += for_lens.uniform(1, 4) / 255 * for_lens.standard_normal(picture.shape, dtype=np.float32)
        picture = np.clip(np.rint(255 * picture), 0, 255).astype(np.uint8)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(for_lens.integers(60, 96))]
        coded = cv2.imencode(".jpg", picture[..., ::-1], quality)[1]
        share = SIZE[0] / DRAWN_SIZE[0]
        scale = np.array([[share, 0, share / 2 - 0.5], [0, share, share / 2 - 0.5], [0, 0, 1]])  # centres of pixels
        return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1].copy(), pose, scale @ homography

    def _camera(self, rng: np.random.Generator, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
        """The deviation (7,) of a camera that sees all four sides, and its homography (3, 3)."""
        width = CARD_M if condition.tags else min(condition.tape_mm[0] / 1000, 0.015)
        corners = rectangle(SHEET_HALF_M + TAPE_MARGIN_M + width, *TAPE_CENTER_M, 0.0)
        while True:
            axis = rng.standard_normal(3)
            turn = axis / np.linalg.norm(axis) * np.deg2rad(rng.uniform(0, 6))
            change = np.concatenate([turn, rng.uniform(-0.04, 0.04, 3), [np.log(1 + rng.uniform(-0.1, 0.1))]])
            pixels = project(self.camera.homography(change), corners)
            if (pixels > 20).all() and (pixels < np.array(DRAWN_SIZE[::-1]) - 20).all():
                return change, self.camera.homography(change)

    def _lens(self, rng: np.random.Generator, homography: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where each pixel that is drawn lies on the canvas, and in the picture of a lens without distortion."""
        k1, off = rng.uniform(-0.1, 0.05), self.camera.center * (1 + rng.uniform(-0.01, 0.01, 2))
        matrix = np.array([[self.camera.focal, 0, off[0]], [0, self.camera.focal, off[1]], [0, 0, 1]])
        rows, columns = np.mgrid[0 : DRAWN_SIZE[0], 0 : DRAWN_SIZE[1]].astype(np.float64)
        taken = np.stack([columns.ravel(), rows.ravel()], axis=1)[:, None]
        straight = cv2.undistortPoints(taken, matrix, np.array([k1, 0, 0, 0]), P=matrix)[:, 0]
        table = to_canvas(project(np.linalg.inv(homography), straight))
        return [tuple(each.reshape(*DRAWN_SIZE, 2).astype(np.float32).transpose(2, 0, 1)) for each in (table, straight)]

    def _arm(self, rng: np.random.Generator, change: np.ndarray, qpos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The arm in a camera that deviates by change (7,): its colours (H, W, 3), and where it is (H, W)."""
        look, number = nominal_look(self.model), self.model.camera(CAMERA).id
        for name in ("printed", "jaw"):  # not red
            color = rng.uniform(0.05, 0.95, 3)
            color[1] = max(color[1], 0.7 * color[0])
            look.fields["mat_rgba"][self.model.material(name).id, :3] = color
        rotation = cv2.Rodrigues(change[:3])[0] @ self.camera.rotation
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, rotation.T.ravel())
        look.fields["cam_quat"][number] = quaternion
        look.fields["cam_pos"][number] = self.camera.position_m + change[3:6]
        fovy = 2 * np.arctan(DRAWN_SIZE[0] / 2 / (self.camera.focal * np.exp(change[6])))
        look.fields["cam_fovy"][number] = np.rad2deg(fovy)
        colors = self.renderer.render(qpos, CAMERA, look).astype(np.float32) / 255
        self.renderer.renderer.enable_segmentation_rendering()
        geom = self.renderer.render(qpos, CAMERA, look)[..., 0]
        self.renderer.renderer.disable_segmentation_rendering()
        return colors, cv2.GaussianBlur(np.isin(geom, self.arm).astype(np.float32), (0, 0), 0.7)


# ---------------------------------------------------------------------------------------------------------------------
# the score


def judge(found: np.ndarray | None, pose: np.ndarray) -> str:
    """right, wrong, or refused."""
    if found is None:
        return "refused"
    off_mm, off_rad = 1000 * np.linalg.norm((found - pose)[:2]), abs(wrap_angle(2 * (found - pose)[2])) / 2
    return "right" if off_mm < RIGHT_MM and np.rad2deg(off_rad) < RIGHT_DEG else "wrong"


def main() -> int:
    """Print the table; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"scenes": (1, 10_000), "first": (0, 10**9)})
    check_output("--json", args.json, (".json",))
    if unknown := [name for name in args.conditions if name not in CONDITIONS]:
        raise SO101Error(f"--conditions {unknown[0]}: not known; there are {', '.join(CONDITIONS)}")
    if args.pictures and not Path(args.pictures).is_dir():
        raise SO101Error(f"--pictures {args.pictures}: no such directory; create it first")
    studio, result = Studio(), {}
    print(f"{'condition':20}{'right':>8}{'wrong':>8}{'refused':>9}{'median':>10} mm  of {args.scenes}")
    for name in args.conditions or CONDITIONS:
        verdicts, off_mm, condition = [], [], CONDITIONS[name]
        locator = SheetLocator(marks="tags" if condition.tags else "tape")
        for number in range(args.first, args.first + args.scenes):
            image, pose, _ = studio.photograph(number, condition)
            seen = cv2.resize(image, SEEN_SIZE[::-1], interpolation=cv2.INTER_AREA)
            to_picture, found, trouble = None, None, ""
            try:
                to_picture = locator.find_tape(seen)
                found = locator.locate(seen, to_picture)
                off_mm.append(1000 * np.linalg.norm((found - pose)[:2]))
            except NotSeen as error:
                trouble = str(error)
            verdicts.append(judge(found, pose))
            if args.pictures and number == args.first:
                film = overlay(seen, to_picture, found, text=trouble.replace(": ", ":\n"))
                cv2.imwrite(str(Path(args.pictures) / f"{name.replace(' ', '_')}.png"), film[..., ::-1])
        counts = {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "refused")}
        median = float(np.median(off_mm)) if off_mm else None
        result[name] = {**counts, "median_mm": median}
        shares = "".join(f"{counts[verdict] / args.scenes:{w}.3f}" for verdict, w in zip(counts, (8, 8, 9)))
        print(f"{name:20}{shares}{np.nan if median is None else median:10.2f}", flush=True)
    studio.close()
    if args.json:
        write_json(Path(args.json), result)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
