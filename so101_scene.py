"""The scene and how it is seen: the model, pictures for policies and for people, visual randomisation, the viewer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

_HERE = Path(__file__).resolve().parent
# in a clone, or beside this file where it has been installed
ASSETS = next((path for path in (_HERE / "assets", _HERE / "so101_assets") if (path / "so101.xml").is_file()), _HERE)
CONTROL_HZ = 30
SHEET_HALF_M = np.array([0.074, 0.105])  # A5, x and y at yaw 0
SHEET_HALF_THICKNESS_M = 0.0005
SHEET_MEAN_RADIUS_M = 0.0691  # mean distance of its points from its centre
TAPE_CENTER_M = np.array([0.27, 0.0])
TAPE_WIDTH_M = 0.019
TAPE_MARGIN_M = 0.04  # between sheet and tape on every side, in the standard task


class SO101Error(ValueError):
    """A mistake that the user can mend, said in one line with the way out. Scripts print it and exit with code 2."""


def load_model(tape_margin: float = TAPE_MARGIN_M, limp_sheet: bool = False) -> mujoco.MjModel:
    """The compiled scene with the tape laid tape_margin (m) outside the sheet's outline.

    With limp_sheet, spots below the fingertips carry what they press with, and fingertips resist twisting.
    """
    spec = mujoco.MjSpec.from_file(str(ASSETS / "paper_in_square.xml"))
    if limp_sheet:  # its own weight lies on all of it: friction that holds back its centre, and its turning
        friction_n = spec.pair("sheet_table").friction[0] * spec.body("sheet").mass * -spec.option.gravity[2]
        for joint, lever in (("sheet_x", 1.0), ("sheet_y", 1.0), ("sheet_yaw", SHEET_MEAN_RADIUS_M)):
            spec.joint(joint).frictionloss = friction_n * lever
    for finger in ("fixed", "moving"):
        if limp_sheet:
            spec.pair(f"{finger}_finger_sheet").condim = 4
        else:
            spec.delete(spec.pair(f"{finger}_spot_table"))
            spec.delete(spec.geom(f"{finger}_spot_col"))
    spec.body("tape").pos = [*TAPE_CENTER_M, 0.0]
    half, width = SHEET_HALF_M + tape_margin, TAPE_WIDTH_M / 2
    for name, axis, sign in (("front", 0, 1), ("back", 0, -1), ("left", 1, 1), ("right", 1, -1)):
        geom = spec.geom(f"tape_{name}")
        pos, size = np.zeros(3), np.append(half + 2 * width, 0.0002)
        pos[axis], pos[2], size[axis] = sign * (half[axis] + width), 0.0002, width
        geom.pos, geom.size = pos, size
    return spec.compile()


@functools.cache
def camera_names() -> tuple[str, ...]:
    """The cameras of the scene that policies can look through."""
    model = load_model()
    return tuple(model.camera(i).name for i in range(model.ncam))


# ---------------------------------------------------------------------------------------------------------------------
# visual randomisation


@dataclasses.dataclass(frozen=True)
class VisualRandomization:
    """What of the pictures is resampled every episode; ranges are uniform, (lowest, highest)."""

    camera_position_m: float = 0.005
    """each coordinate of each camera, uniform in +- this"""
    camera_angle_rad: float = float(np.deg2rad(2.0))
    """each camera is turned by up to this about a random axis"""
    camera_fov: float = 0.03
    """fraction, field of view of each camera"""
    brightness: tuple[float, float] = (0.6, 1.15)
    """all light together, where 1 shows a white sheet as white"""
    light_elevation_rad: tuple[float, float] = (0.7, 1.5)
    """of the lamp, whose azimuth is any"""
    table: tuple[float, float] = (0.1, 0.7)
    """brightness of the table, whose texture is one of five and whose tint is random"""
    paper: tuple[float, float] = (0.85, 1.0)
    """brightness of the sheet; its lines have any colour, those of the paper included"""
    tape_red: tuple[float, float] = (0.5, 0.95)
    """red of the tape"""
    tape_other: tuple[float, float] = (0.02, 0.2)
    """green and blue of the tape"""
    shadows: float = 0.5
    """share of the episodes with shadows"""
    noise: tuple[float, float] = (0.0, 6.0)
    """standard deviation of Gaussian noise in every pixel and picture, of 255"""


class Look(NamedTuple):
    """How the scene looks in one episode, and through which cameras it is seen."""

    seed: int  # all below follows from it; so does the noise, from it and the step
    fields: dict[str, np.ndarray]  # of MjModel
    ambient: np.ndarray  # of the headlight, RGB
    headlight: np.ndarray  # its diffuse part, RGB
    shadows: bool
    noise: float  # standard deviation, of 255


TABLES = ("wood", "plain", "speckled", "tiles", "blotches")  # materials in paper_in_square.xml
LAMP_DISTANCE_M = 1.3
LOOK_FIELDS = (
    "mat_rgba", "geom_matid", "cam_pos", "cam_quat", "cam_fovy", "light_pos", "light_dir", "light_diffuse"
)  # fmt: skip


def nominal_look(model: mujoco.MjModel) -> Look:
    """The scene as it is in the files."""
    fields = {name: getattr(model, name).copy() for name in LOOK_FIELDS}
    light = model.vis.headlight
    return Look(0, fields, light.ambient.copy(), light.diffuse.copy(), shadows=False, noise=0.0)


def draw_look(model: mujoco.MjModel, ranges: VisualRandomization, seed: int) -> Look:
    """The look of an episode, a function of the nominal model, the ranges and the seed alone."""
    rng = np.random.default_rng(seed)
    fields = nominal_look(model).fields

    def paint(material: str, rgb: np.ndarray) -> None:
        fields["mat_rgba"][model.material(material).id, :3] = np.clip(rgb, 0.0, 1.0)

    def tinted(brightness: tuple[float, float], tint: float) -> np.ndarray:
        return rng.uniform(*brightness) * rng.uniform(1 - tint, 1 + tint, 3)

    table = TABLES[rng.integers(len(TABLES))]
    fields["geom_matid"][model.geom("table_top").id] = model.material(table).id
    # the texture of wood is brown already
    paint(table, tinted(ranges.table, 0.3) / (np.array([0.62, 0.48, 0.34]) if table == "wood" else 1.0))
    paper = tinted(ranges.paper, 0.05)
    paint("paper", paper)
    for lines in ("heading", "lines"):
        paint(lines, rng.uniform(0, 1, 3) if rng.random() < 0.7 else paper)
    paint("tape", np.append(rng.uniform(*ranges.tape_red), rng.uniform(*ranges.tape_other, 2)))
    paint("printed", rng.uniform(0.05, 1.0, 3))
    paint("jaw", rng.uniform(0.05, 1.0, 3))
    paint("servo", tinted((0.05, 0.25), 0.1))

    for camera in range(model.ncam):
        fields["cam_pos"][camera] += ranges.camera_position_m * rng.uniform(-1, 1, 3)
        axis, turn = rng.standard_normal(3), np.zeros(4)
        angle = ranges.camera_angle_rad * rng.uniform(0, 1)
        mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), angle)
        mujoco.mju_mulQuat(fields["cam_quat"][camera], model.cam_quat[camera], turn)
        fields["cam_fovy"][camera] *= 1 + ranges.camera_fov * rng.uniform(-1, 1)

    azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(*ranges.light_elevation_rad)
    across = np.cos(elevation)
    towards = np.array([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)])
    fields["light_pos"][0] = np.append(TAPE_CENTER_M, 0.0) + LAMP_DISTANCE_M * towards
    fields["light_dir"][0] = -towards
    brightness = rng.uniform(*ranges.brightness)
    ambient, head = rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.35)
    white = rng.uniform(0.9, 1.1, (2, 3))
    fields["light_diffuse"][0] = brightness * (1 - ambient - head) * white[0]
    return Look(
        seed, fields, brightness * ambient * white[1], brightness * head * white[1],
        bool(rng.random() < ranges.shadows), rng.uniform(*ranges.noise),
    )  # fmt: skip


def add_noise(image: np.ndarray, look: Look, step: int, camera: int) -> None:
    """Add the noise of a look to a picture (H, W, 3) uint8 in place: the same for the same step of an episode."""
    rng = np.random.default_rng((look.seed, step, camera))
    noisy = image + look.noise * rng.standard_normal(image.shape, dtype=np.float32)
    image[:] = np.clip(np.rint(noisy), 0, 255)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


# Without shadows, antialiasing and round shapes a picture of 96 x 96 pixels costs 0.6 ms instead of 40. Those in
# datasets were drawn so: a policy that was trained on them is wrong about any other picture. Shadows, where visual
# randomisation wants them, cost three more; at MuJoCo's usual resolution they would cost twenty.
FAST_QUALITY = {"offsamples": 0, "numslices": 8, "numstacks": 4, "numquads": 1, "shadowsize": 512}
FAST_FLAGS_OFF = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE", "mjRND_FOG")


class Painter:
    """Draws one picture after the other, in any look. OpenGL is first touched here: EGL on Linux, if not MUJOCO_GL.

    Args:
        model: the nominal scene; it is copied.
        size: height and width, pixels.
        fast: as policies see it; else as people do.

    Raises:
        SO101Error: the machine cannot render off screen.
    """

    def __init__(self, model: mujoco.MjModel, size: tuple[int, int], fast: bool):
        self.model, self.fast, (height, width) = copy.copy(model), fast, size
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = width, height
        for name, value in FAST_QUALITY.items() if fast else ():
            setattr(self.model.vis.quality, name, value)
        try:
            if sys.platform.startswith("linux") and not os.environ.get("MUJOCO_GL"):
                # MuJoCo chooses GLFW, which needs a display, when it is imported without MUJOCO_GL
                from mujoco.egl import GLContext
                from mujoco.rendering.classic import gl_context

                gl_context.GLContext = GLContext
            self.renderer = mujoco.Renderer(self.model, height, width)
        except Exception as error:  # ImportError, AttributeError, RuntimeError, FatalError: each layer fails otherwise
            raise SO101Error(
                f"off-screen rendering failed ({type(error).__name__}): install EGL (Debian: apt-get install libegl1) "
                "or set MUJOCO_GL=osmesa"
            ) from error
        for name in FAST_FLAGS_OFF if fast else ():
            self.renderer.scene.flags[getattr(mujoco.mjtRndFlag, name)] = 0
        self.data = mujoco.MjData(self.model)
        self.nominal = self.look = nominal_look(model)

    def paint(self, qpos: np.ndarray, camera: str | None, look: Look | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of positions (10,) through a camera; None looks from the side."""
        look, model = look or self.nominal, self.model
        if look is not self.look:
            for name, value in look.fields.items():
                getattr(model, name)[:] = value
            model.vis.headlight.ambient, model.vis.headlight.diffuse = look.ambient, look.headlight
            if self.fast:
                self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = look.shadows
            self.look = look
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(model, self.data)
        mujoco.mj_comPos(model, self.data)
        mujoco.mj_camlight(model, self.data)
        self.renderer.update_scene(self.data, -1 if camera is None else camera)  # -1 is the free camera
        return self.renderer.render()

    def close(self) -> None:
        """Free the renderer."""
        self.renderer.close()


# ---------------------------------------------------------------------------------------------------------------------
# the viewer


def check_display() -> None:
    """Raise SO101Error where MuJoCo's viewer cannot open a window: it would hang, or end the process."""
    import glfw
    import mujoco.viewer

    if sys.platform == "darwin" and mujoco.viewer._MJPYTHON is None:
        raise SO101Error("on macOS the viewer needs its own Python: start the same command with mjpython")
    with warnings.catch_warnings(action="ignore"):
        displayed = glfw.init()
    if not displayed:
        raise SO101Error("there is no display here for MuJoCo's viewer: film instead, render_mode rgb_array or --video")


RIGHT_ARROW = 262  # as GLFW numbers keys


class Viewer:
    """MuJoCo's passive viewer, in real time: panels hidden; space pauses. Raises SO101Error without a display.

    Args:
        model: the scene.
        camera_name: what to look through first; None: from the side.
    """

    def __init__(self, model: mujoco.MjModel, camera_name: str | None = None):
        check_display()
        import mujoco.viewer

        self._model, self._data = model, mujoco.MjData(model)
        self._paused, self._next = False, False
        before = threading.enumerate()
        self._handle = mujoco.viewer.launch_passive(
            model, self._data, key_callback=self._on_key, show_left_ui=False, show_right_ui=False
        )
        self._threads = [thread for thread in threading.enumerate() if thread not in before]  # the window's
        with self._handle.lock():
            if camera_name is None:
                mujoco.mjv_defaultFreeCamera(model, self._handle.cam)
            else:
                self._handle.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
                self._handle.cam.fixedcamid = model.camera(camera_name).id
        self._frame_due = time.perf_counter()

    def _on_key(self, key: int) -> None:
        """Space pauses; the right arrow goes on to the next episode. Called in the viewer's own thread."""
        if key == ord(" "):
            self._paused = not self._paused
        elif key == RIGHT_ARROW:
            self._next = True

    @property
    def running(self) -> bool:
        """Whether the window is still open."""
        return self._handle.is_running()

    def write(self, text: str, right: str = "") -> None:
        """Show lines at the top of the window, and others beside them."""
        font, place = mujoco.mjtFontScale.mjFONTSCALE_150, mujoco.mjtGridPos.mjGRID_TOPLEFT
        self._handle.set_texts((font, place, text, right))

    def show(self, qpos: np.ndarray) -> bool:
        """Show positions (10,) for one control step, and for as long as it is paused.

        Returns False once the window is closed, or the next episode is asked for.
        """
        with self._handle.lock():
            self._data.qpos[:] = qpos
            mujoco.mj_forward(self._model, self._data)
        while self.running and not self._next:
            self._handle.sync()
            # real time; after a pause of the caller's, time starts from here instead of rushing to catch up
            now = time.perf_counter()
            self._frame_due = max(self._frame_due + 1 / CONTROL_HZ, now)
            time.sleep(self._frame_due - now)
            if not self._paused:
                return True
        self._next = False
        return False

    def close(self) -> None:
        """Close the window, and wait until it is: a process that ends while it is drawn crashes."""
        self._handle.close()
        for thread in self._threads:
            thread.join()
