"""Four printed tags at the corners of the rectangle, instead of red tape: found under any light, and never turned.

    python -m so101.tags --write DIR

writes tags.pdf, one A4 page in true size (assets/ has it). Print it at 100 %, check the ruler, and cut out the four
cards. Lay each card outside the rectangle, its marked corner on a corner of the rectangle, its edges in line with the
rectangle's sides, and its arrow pointing away from the arm. The rectangle is the one that red tape would enclose: 228 x
290 mm in the standard task.

Tag n, of OpenCV's dictionary DICT_4X4_50, lies at the rectangle's corner n: 0 far from the arm on the left, 1 near the
arm on the left, 2 near the arm on the right, 3 far from the arm on the right. Its centre is CARD_M / 2 outside the
rectangle, along x and along y.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import numpy as np

from so101.camera import SCALE, NominalCamera, NotSeen, import_cv2, project
from so101.cli import parse, run_script
from so101.files import write_atomic
from so101.tape import half_turn
from so101_env import SHEET_HALF_M, TAPE_CENTER_M, TAPE_MARGIN_M, SO101Error

CELLS = 6  # along the side of a tag, with its black border
TAG_M, CARD_M = 0.054, 0.072  # a tag, and the white card around it
CORNERS = ("far from the arm, left", "near the arm, left", "near the arm, right", "far from the arm, right")
MIN_TAGS = 3
MAX_SPILL_M = 0.0025  # by which bright paper makes each side of a dark tag appear farther in
MAX_RESIDUAL_M = 0.002  # root mean square distance of the tags from where they should lie
ENLARGE = 3  # small pictures are enlarged before tags are searched in them
SIGNS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])  # signs of x and y at the rectangle's corners


# ---------------------------------------------------------------------------------------------------------------------
# finding


@functools.cache
def _dictionary():
    """The dictionary of the tags."""
    aruco = import_cv2().aruco
    return aruco.getPredefinedDictionary(aruco.DICT_4X4_50)


def cells_of(tag: int) -> np.ndarray:
    """The cells (6, 6) of a tag, True where it is black, as it is read with its arrow upwards."""
    return import_cv2().aruco.generateImageMarker(_dictionary(), tag, CELLS) == 0


def tag_corners(opening_half_m: np.ndarray) -> np.ndarray:
    """Where the corners of the four tags lie, (4, 4, 2), m: upper left, upper right, lower right, lower left."""
    centers = TAPE_CENTER_M + SIGNS * (opening_half_m + CARD_M / 2)
    # upwards is away from the arm (x), to the left is y
    return centers[:, None] + np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * TAG_M / 2


def find_tags(image: np.ndarray, opening_half_m: np.ndarray) -> tuple[np.ndarray, float]:
    """The homography (3, 3) from the table, m, to pixels, and the tags' root mean square distance from it, m.

    Args:
        image: (H, W, 3) uint8, RGB.
        opening_half_m: half the sides (2,) of the rectangle at whose corners the tags lie.

    Raises:
        NotSeen: fewer than three tags can be read, or they do not lie at the corners of this rectangle.
    """
    cv2 = import_cv2()
    settings = cv2.aruco.DetectorParameters()
    settings.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
    settings.adaptiveThreshWinSizeMax = 63
    settings.minMarkerPerimeterRate = 0.02
    detector, seen = cv2.aruco.ArucoDetector(_dictionary(), settings), {}
    for scale in (SCALE, np.arange(256, dtype=np.float32)):  # the logarithmic one shows a tag in the dark better
        grey = np.round(scale[image.min(axis=2)]).astype(np.uint8)
        grey = cv2.resize(grey, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
        found, ids, _ = detector.detectMarkers(grey)
        numbers = [] if ids is None else ids.ravel().tolist()
        seen |= {n: corners.reshape(4, 2) for n, corners in zip(numbers, found) if n < 4 and numbers.count(n) == 1}
    if len(seen) < MIN_TAGS:
        missing = ", ".join(f"{n} ({CORNERS[n]})" for n in range(4) if n not in seen)
        raise NotSeen(f"at least three of the four tags must be in view; not seen: {missing}")
    camera, places = NominalCamera(image.shape[:2]), tag_corners(opening_half_m)
    pixels = {n: ((corners + 0.5) / ENLARGE - 0.5).astype(np.float64) for n, corners in seen.items()}

    def fit(order: tuple[int, ...]) -> tuple[float, np.ndarray, np.ndarray]:
        """Residual, m, of these tags; the homography; how far each of them lies from it, m."""
        homography, misses_m = _fit(camera, places[list(order)], np.array([pixels[n] for n in order]))
        off_m = np.median(misses_m, axis=1)  # one per tag; the edge of a shadow may shift single corners
        return float(np.sqrt(np.mean(off_m**2))), homography, off_m

    order = tuple(sorted(seen))
    residual_m, homography, off_m = fit(order)
    if residual_m > MAX_RESIDUAL_M and len(order) > MIN_TAGS:
        # one tag may be cut by a shadow or a hand; the others must then agree better
        best = min((fit(three) for three in itertools.combinations(order, MIN_TAGS)), key=lambda each: each[0])
        if best[0] < MAX_RESIDUAL_M / 2:
            return best[1], best[0]
    if residual_m > MAX_RESIDUAL_M:
        a, b = 2000 * opening_half_m
        raise NotSeen(
            f"the tags lie {1000 * residual_m:.1f} mm (root mean square) from the corners of a rectangle of {a:.0f} x "
            f"{b:.0f} mm, tag {order[int(off_m.argmax())]} the farthest: lay them again, or pass --tape-margin"
        )
    return homography, residual_m


def _fit(camera: NominalCamera, places: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the camera to the corners of tags.

    Bright paper spills over the edges of dark tags, which then appear smaller: by how much is fitted, too.

    Args:
        camera: the nominal camera.
        places: (n, 4, 2) on the table, m.
        pixels: (n, 4, 2), where they appear.

    Raises NotSeen if the tags seem to have another size than they should.

    Returns:
        The homography (3, 3) from the table, m, to pixels; distances (n, 4), m, of places from pixels.
    """
    from scipy.optimize import least_squares

    centers = places.mean(1, keepdims=True)

    def misses_m(fit: np.ndarray, turn: np.ndarray) -> np.ndarray:
        shown = places + fit[7] * np.sign(places - centers)
        return project(np.linalg.inv(camera.homography(fit[:7]) @ turn), pixels) - shown

    def cost(fit: np.ndarray, turn: np.ndarray) -> np.ndarray:  # in mm, with weak priors
        return np.concatenate([1000 * misses_m(fit, turn).ravel(), [fit[6] / 0.3, fit[7] / 0.001]])

    # the camera may stand on the arm's side, and may be mounted upside down
    fits = []
    for turn, roll_rad in itertools.product((np.eye(3), half_turn()), (0.0, np.pi)):
        start = np.array([0.0, 0.0, roll_rad, 0.0, 0.0, 0.0, 0.0, 0.0])
        pixels_then = project(camera.homography(start[:7]) @ turn, centers[:, 0])
        fits.append((np.abs(pixels_then - pixels.mean(1)).sum(), turn, start))
    _, turn, start = min(fits, key=lambda each: each[0])
    fit = least_squares(cost, start, loss="soft_l1", args=(turn,)).x
    if abs(fit[7]) > MAX_SPILL_M:
        raise NotSeen(
            f"the tags appear to measure {1000 * (TAG_M + 2 * fit[7]):.0f} mm, not {1000 * TAG_M:.0f}: print them at "
            "100 %, and lay them as far apart as --tape-margin says"
        )
    return camera.homography(fit[:7]) @ turn, np.linalg.norm(misses_m(fit, turn), axis=2)


# ---------------------------------------------------------------------------------------------------------------------
# printing


@dataclasses.dataclass
class Page:
    """An A4 page: black or grey rectangles and lines of text, in mm from the upper left corner."""

    width: float = 210.0
    height: float = 297.0
    boxes: list[tuple[float, float, float, float, float]] = dataclasses.field(default_factory=list)
    """left, top, width, height, grey (0 is black)"""
    texts: list[tuple[float, float, float, str]] = dataclasses.field(default_factory=list)
    """left, baseline, height of the font, text"""

    def frame(self, left: float, top: float, width: float, height: float, line: float, grey: float) -> None:
        """Add the outline of a rectangle."""
        for box in ((left, top, width, line), (left, top + height - line, width, line),
                    (left, top, line, height), (left + width - line, top, line, height)):  # fmt: skip
            self.boxes.append((*box, grey))

    def pdf(self) -> bytes:
        """The page as PDF 1.4, of vectors and one of the fonts that every reader has."""
        unit = 72 / 25.4  # points in a mm
        drawing = []
        for x, y, width, height, grey in self.boxes:
            place = (x, self.height - y - height, width, height)
            drawing.append(f"{grey:.3f} g " + " ".join(f"{unit * v:.3f}" for v in place) + " re f")
        for x, y, size, text in self.texts:
            drawing.append(
                f"0 g BT /F1 {unit * size:.2f} Tf {unit * x:.3f} {unit * (self.height - y):.3f} Td ({text}) Tj ET"
            )
        content = "\n".join(drawing).encode("ascii")
        box = f"[0 0 {unit * self.width:.3f} {unit * self.height:.3f}]"
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R /ViewerPreferences << /PrintScaling /None >> >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 4 0 R "
            "/Resources << /Font << /F1 5 0 R >> >> >>".encode(),
            b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        ]
        out, places = b"%PDF-1.4\n", []
        for number, body in enumerate(objects, 1):
            places.append(len(out))
            out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
        table = b"".join(b"%010d 00000 n \n" % place for place in places)
        head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
        tail = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
        return out + head + table + tail


def page() -> Page:
    """The four cards, with instructions and a ruler."""
    sheet, card, tag = Page(), 1000 * CARD_M, 1000 * TAG_M
    for number, (x_sign, y_sign) in enumerate(SIGNS):
        # as they will lie, seen from above with the arm below
        left, top = (22.0 if y_sign > 0 else 116.0), (42.0 if x_sign > 0 else 140.0)
        sheet.frame(left, top, card, card, 0.15, 0.6)  # to cut along
        border, cell = (card - tag) / 2, tag / CELLS
        for row, column in np.argwhere(cells_of(number)):
            # a hair larger than a cell, so that no gaps remain between them
            box = (left + border + column * cell, top + border + row * cell, cell + 0.02, cell + 0.02)
            sheet.boxes.append((*box, 0.0))
        # the marked corner points to the middle of the rectangle: a thick L along the edges of the card
        x, y = (left + card if y_sign > 0 else left), (top + card if x_sign > 0 else top)
        length, thick = 14.0, 1.2
        sheet.boxes.append((x - length if y_sign > 0 else x, y - thick if x_sign > 0 else y, length, thick, 0.0))
        sheet.boxes.append((x - thick if y_sign > 0 else x, y - length if x_sign > 0 else y, thick, length, 0.0))
        # the arrow, made of boxes: away from the arm
        middle = left + card / 2
        sheet.boxes.append((middle - 0.3, top + 1.8, 0.6, 3.6, 0.0))
        for k in range(6):
            sheet.boxes.append((middle - 0.3 * (k + 1) / 2, top + 1.0 + 0.3 * k, 0.3 * (k + 1), 0.3, 0.0))
        sheet.texts.append((left, top - 2.0, 3.6, f"tag {number}: {CORNERS[number]}"))
    a, b = 2000 * (SHEET_HALF_M + TAPE_MARGIN_M)
    for line, text in enumerate((
        "Print at 100 %: the ruler must measure 100 mm. Cut out the four cards.",
        f"Lay the thick corner of each card on a corner of the rectangle ({a:.0f} x {b:.0f} mm in the standard task),",
        "the card outside, its edges in line with the sides, its arrow pointing away from the arm.",
    )):  # fmt: skip
        sheet.texts.append((22.0, 16.0 + 6.0 * line, 4.0, text))
    left, top = 55.0, 240.0
    sheet.boxes.append((left, top, 100.0, 0.3, 0.0))
    for mm in range(0, 101, 10):
        sheet.boxes.append(
            (left + mm - 0.1, top - (5.0 if mm % 50 == 0 else 3.0), 0.2, 5.0 if mm % 50 == 0 else 3.0, 0.0)
        )
    sheet.texts += [(left - 1.0, top + 5.0, 3.6, "0"), (left + 95.0, top + 5.0, 3.6, "100 mm")]
    for x in (10.0, 200.0):  # crosshairs: their distance is 190 mm across and 277 mm down
        for y in (10.0, 287.0):
            sheet.boxes += [(x - 4, y - 0.1, 8, 0.2, 0.0), (x - 0.1, y - 4, 0.2, 8, 0.0)]
    return sheet


@dataclasses.dataclass
class Args:
    """Write the page with the four tags."""

    write: str
    """directory for tags.pdf"""


def main() -> int:
    """Write the file; returns the exit code."""
    args = parse(Args, __doc__)
    directory = Path(args.write)
    if not directory.is_dir():
        raise SO101Error(f"--write {directory}: no such directory; create it first")
    path, content = directory / "tags.pdf", page().pdf()
    write_atomic(path, lambda temporary: temporary.write_bytes(content))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
