"""The camera that looks at the table: where points of the table appear in its pictures, and samples along outlines."""

from __future__ import annotations

import functools
import types

import mujoco
import numpy as np

from so101.extras import import_extra
from so101_env import SO101Error, load_model

CAMERA = "top"
DARK = 100.0  # in 1/255: below this brightness the scale of `whiteness_of` is nearly linear
SCALE = (255 * np.log1p(np.arange(256) / DARK) / np.log1p(255 / DARK)).astype(np.float32)


class NotSeen(SO101Error):
    """Tape, tags or sheet cannot be made out in a picture. The message names which, and why."""


def import_cv2() -> types.ModuleType:
    """OpenCV. Raises SO101Error if it is not installed."""
    return import_extra("cv2", "arm", "locating the sheet")


def smallest_channel(image: np.ndarray) -> np.ndarray:
    """The smallest channel (H, W) uint8 of a picture (H, W, 3) uint8. NumPy's min over so short an axis is slow."""
    return np.minimum(np.minimum(image[..., 0], image[..., 1]), image[..., 2])


def whiteness_of(image: np.ndarray) -> np.ndarray:
    """Whiteness (H, W) float32, 0 to 255, of a picture (H, W, 3) uint8: the smallest channel, on a logarithmic scale.

    On this scale the step from table to sheet is nearly as high in a shadow as in the light.
    """
    return SCALE[smallest_channel(image)]


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) mapped by a homography (3, 3)."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


@functools.cache
def _nominal_view() -> tuple[float, np.ndarray, np.ndarray]:
    """The camera's vertical field of view, degrees, its rotation (3, 3) from the scene, and its position (3,), m.

    MuJoCo's cameras look along -z, with y up.
    """
    model = load_model()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    number = model.camera(CAMERA).id
    return float(model.cam_fovy[number]), data.cam_xmat[number].reshape(3, 3).T.copy(), data.cam_xpos[number].copy()


class NominalCamera:
    """A camera of the scene in its nominal place. `homography` describes a camera that deviates from it.

    The principal point is the centre of the picture, and pixels are square. Seven numbers remain to be found.

    Args:
        size: height and width of the pictures, pixels.
    """

    def __init__(self, size: tuple[int, int]):
        (height, width), (fovy_deg, self.rotation, self.position_m) = size, _nominal_view()
        self.focal = height / 2 / np.tan(np.deg2rad(fovy_deg) / 2)  # pixels
        self.center = np.array([(width - 1) / 2, (height - 1) / 2])

    def homography(self, change: np.ndarray) -> np.ndarray:
        """The homography (3, 3) from the table, m, to pixels, for a deviation (7,) from the nominal camera.

        The deviation is a rotation vector (3, rad), a translation (3, m), and the log ratio of the focal lengths.
        """
        focal, (x, y) = self.focal * np.exp(change[6]), self.center
        intrinsic = np.array([[focal, 0, -x], [0, -focal, -y], [0, 0, -1]])
        rotation = import_cv2().Rodrigues(change[:3])[0] @ self.rotation
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
        image: (H, W) or (H, W, C) float32.
        to_picture: homography (3, 3) from the table, m, to pixels.
        corners: (4, 2), m, the result of `rectangle`.
        offsets_m: distances (K,) from the side at which each normal is sampled, positive outwards.
        count: number of normals per side.

    Returns:
        Values (4, count, K) or (4, count, K, C), NaN outside the picture; feet (4, count, 2) of the normals, m; unit
        normals (4, 2).
    """
    sides = corners[[1, 2, 3, 0]] - corners
    along = (np.arange(count) + 0.5) / count * 0.92 + 0.04  # leave out the corners themselves
    points = corners[:, None] + along[:, None] * sides[:, None]
    normals = np.column_stack([sides[:, 1], -sides[:, 0]])  # outwards, since the corners run counterclockwise
    normals /= np.hypot(sides[:, 0], sides[:, 1])[:, None]
    # homogeneous pixels, linear in the offset: those of the feet, and how they change along the normals
    feet, change = points @ to_picture[:, :2].T + to_picture[:, 2], normals @ to_picture[:, :2].T
    x, y, scale = (feet[..., k, None] + change[:, k, None, None] * offsets_m for k in range(3))  # (4, count, K) each
    cv2 = import_cv2()
    x, y = ((each / scale).reshape(len(corners), -1).astype(np.float32) for each in (x, y))
    values = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=[np.nan] * 4)
    return values.reshape(len(corners), count, len(offsets_m), *image.shape[2:]), points, normals
