"""Error of the sheet's pose by OpenCV, on the held-out starts, under visual randomisation, with the arm in view.

    python benchmark/pose.py

The same pictures are also examined as worse cameras would have taken them: with lens distortion, blur, glare and
compression, which MuJoCo does not draw.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from so101.camera import CAMERA, NominalCamera, NotSeen
from so101.cli import check_flags, check_output, parse, run_script
from so101.evaluation import TEST_SEED
from so101.files import write_json
from so101.locator import SheetLocator
from so101_env import SO101ResidualVectorEnv
from so101_sim.geometry import wrap_angle

SIZE, SEEN_SIZE = (480, 640), (240, 320)  # height and width, pixels, of the camera's pictures, and after scaling


@dataclasses.dataclass
class Args:
    """Errors of the pose by OpenCV."""

    episodes: int = 250
    """number of starts"""
    json: str | None = None
    """write the results to this file"""


def distort(image: np.ndarray, k1: float) -> np.ndarray:
    """A picture through a lens with radial distortion k1 (as in OpenCV); -0.1 shifts the corners by 18 pixels."""
    rows, columns = np.mgrid[0 : SIZE[0], 0 : SIZE[1]].astype(np.float64)
    focal = NominalCamera(SIZE).focal
    camera = np.array([[focal, 0, (SIZE[1] - 1) / 2], [0, focal, (SIZE[0] - 1) / 2], [0, 0, 1]])
    taken = np.stack([columns.ravel(), rows.ravel()], axis=1)[:, None]
    straight = cv2.undistortPoints(taken, camera, np.array([k1, 0, 0, 0]), P=camera)
    straight = straight.reshape(*SIZE, 2).astype(np.float32)
    return cv2.remap(image, straight[..., 0], straight[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def glare(image: np.ndarray) -> np.ndarray:
    """A picture with the reflection of a lamp in its middle: up to 160/255 brighter, sigma a tenth of the width."""
    rows, columns = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    spot = np.exp(-((columns - SIZE[1] / 2) ** 2 + (rows - SIZE[0] / 2) ** 2) / (2 * 60.0**2))
    return np.clip(image + 160 * spot[..., None], 0, 255).astype(np.uint8)


def compress(image: np.ndarray) -> np.ndarray:
    """A picture after JPEG compression of quality 40."""
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], cv2.IMREAD_COLOR)


CAMERAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as drawn": lambda image: image,
    "radial distortion k1 = -0.1": lambda image: distort(image, -0.1),
    "radial distortion k1 = 0.05": lambda image: distort(image, 0.05),
    "blur, sigma 2 of 640 pixels": lambda image: cv2.GaussianBlur(image, (0, 0), 2),
    "motion blur, 9 of 640 pixels": lambda image: cv2.blur(image, (9, 1)),
    "glare": glare,
    "JPEG, quality 40": compress,
    "gamma 0.6": lambda image: (255 * (image / 255.0) ** 0.6).astype(np.uint8),
}


def main() -> int:
    """Print the table; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"episodes": (1, 10_000)})
    check_output("--json", args.json, (".json",))
    envs = SO101ResidualVectorEnv(args.episodes, visual_randomization=True)
    envs.reset(seed=TEST_SEED)
    truth, locator, result = envs.qpos[:, [6, 7, 9]], SheetLocator(), {}
    images = envs.camera_images(envs.qpos, CAMERA, SIZE, envs.look_seed)
    head = f"{'pictures':30}{'mean':>8}{'95 %':>8}{'largest':>9}  mm{'mean':>8}  degrees"
    print(f"{head}{'no answer':>11} of {args.episodes}")
    for name, take in CAMERAS.items():
        found = np.full((args.episodes, 3), np.nan)
        for i, image in enumerate(images):
            seen = cv2.resize(take(image), SEEN_SIZE[::-1], interpolation=cv2.INTER_AREA)
            try:
                found[i] = locator.locate(seen, locator.find_tape(seen))
            except NotSeen:
                continue
        known = np.isfinite(found[:, 0])
        if not known.any():
            result[name] = {"no_answer": args.episodes}
            print(f"{name:30}{'no answer at all':>25}")
            continue
        off = 1000 * np.linalg.norm((found - truth)[known, :2], axis=1)
        turned = np.rad2deg(np.abs(wrap_angle((found - truth)[known, 2]))).mean()
        errors = {"mean_mm": off.mean(), "p95_mm": np.percentile(off, 95), "max_mm": off.max(), "mean_deg": turned}
        result[name] = {key: float(value) for key, value in errors.items()} | {"no_answer": int((~known).sum())}
        print(
            f"{name:30}{off.mean():8.1f}{np.percentile(off, 95):8.1f}{off.max():9.1f}{turned:12.2f}"
            f"{result[name]['no_answer']:20}"
        )
    if args.json:
        write_json(Path(args.json), result)
    envs.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
