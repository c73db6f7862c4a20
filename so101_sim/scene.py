"""Scenes and how they look: MJCF files, off-screen rendering, visual randomisation."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from so101_sim.errors import SO101Error

_ROOT = Path(__file__).resolve().parent.parent
# in a clone, or beside this package where it is installed
ASSETS = next((path for path in (_ROOT / "assets", _ROOT / "so101_assets") if (path / "so101.xml").is_file()), _ROOT)
CONTROL_HZ = 30
WORKSPACE_CENTER_M = np.array([0.27, 0.0, 0.0])  # what the lamp shines on


def load_spec(mjcf: str) -> mujoco.MjSpec:
    """A scene to edit and compile, from MJCF text that may include so101.xml (the arm) and table.xml by name."""
    parts = {name: (ASSETS / name).read_bytes() for name in ("so101.xml", "table.xml")}
    return mujoco.MjSpec.from_string(mjcf, include=parts)


def camera_names(model: mujoco.MjModel) -> tuple[str, ...]:
    """Names of the cameras of a scene that policies can see through."""
    return tuple(model.camera(i).name for i in range(model.ncam))


# ---------------------------------------------------------------------------------------------------------------------
# visual randomisation


class Look(NamedTuple):
    """How a scene looks in one episode."""

    seed: int  # determines everything below, and the image noise together with the step
    fields: dict[str, np.ndarray]  # fields of MjModel
    ambient: np.ndarray  # headlight, RGB
    headlight: np.ndarray  # diffuse part of the headlight, RGB
    shadows: bool
    noise: float  # standard deviation of the image noise, in 1/255


TABLES = ("wood", "plain", "speckled", "tiles", "blotches")  # materials in table.xml
LAMP_DISTANCE_M = 1.3
LOOK_FIELDS = (
    "mat_rgba", "geom_matid", "cam_pos", "cam_quat", "cam_fovy", "light_pos", "light_dir", "light_diffuse"
)  # fmt: skip
Paint = Callable[[str, np.ndarray], None]  # sets the colour, RGB, of a material


@dataclasses.dataclass(frozen=True)
class VisualRandomization:
    """Appearance that is resampled every episode. Ranges are uniform, (lowest, highest).

    A task overrides `paint_objects` to recolour its own objects.
    """

    camera_position_m: float = 0.005
    """each coordinate of each camera, uniform in +- this"""
    camera_angle_rad: float = float(np.deg2rad(2.0))
    """largest rotation of each camera about a random axis"""
    camera_fov: float = 0.03
    """fraction, field of view of each camera"""
    brightness: tuple[float, float] = (0.6, 1.15)
    """sum of all light; at 1 a white surface is shown as white"""
    light_elevation_rad: tuple[float, float] = (0.7, 1.5)
    """elevation of the lamp; its azimuth is uniform"""
    table: tuple[float, float] = (0.1, 0.7)
    """brightness of the table, which gets one of five textures and a random tint"""
    shadows: float = 0.5
    """share of the episodes with shadows"""
    noise: tuple[float, float] = (0.0, 6.0)
    """standard deviation of Gaussian noise on every pixel of every picture, in 1/255"""

    def paint_objects(self, rng: np.random.Generator, paint: Paint) -> None:
        """Recolour the task's own objects."""

    def draw(self, model: mujoco.MjModel, seed: int) -> Look:
        """The look of an episode: a function of the nominal model, these ranges and the seed alone."""
        rng = np.random.default_rng(seed)
        fields = nominal_look(model).fields

        def paint(material: str, rgb: np.ndarray) -> None:
            fields["mat_rgba"][model.material(material).id, :3] = np.clip(rgb, 0.0, 1.0)

        table = TABLES[rng.integers(len(TABLES))]
        fields["geom_matid"][model.geom("table_top").id] = model.material(table).id
        # the texture of wood is brown already
        paint(table, tinted(rng, self.table, 0.3) / (np.array([0.62, 0.48, 0.34]) if table == "wood" else 1.0))
        self.paint_objects(rng, paint)
        paint("printed", rng.uniform(0.05, 1.0, 3))
        paint("jaw", rng.uniform(0.05, 1.0, 3))
        paint("servo", tinted(rng, (0.05, 0.25), 0.1))

        for camera in range(model.ncam):
            fields["cam_pos"][camera] += self.camera_position_m * rng.uniform(-1, 1, 3)
            axis, turn = rng.standard_normal(3), np.zeros(4)
            angle = self.camera_angle_rad * rng.uniform(0, 1)
            mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), angle)
            mujoco.mju_mulQuat(fields["cam_quat"][camera], model.cam_quat[camera], turn)
            fields["cam_fovy"][camera] *= 1 + self.camera_fov * rng.uniform(-1, 1)

        azimuth, elevation = rng.uniform(-np.pi, np.pi), rng.uniform(*self.light_elevation_rad)
        across = np.cos(elevation)
        towards_lamp = np.array([across * np.cos(azimuth), across * np.sin(azimuth), np.sin(elevation)])
        fields["light_pos"][0] = WORKSPACE_CENTER_M + LAMP_DISTANCE_M * towards_lamp
        fields["light_dir"][0] = -towards_lamp
        brightness = rng.uniform(*self.brightness)
        ambient, head = rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.35)
        white = rng.uniform(0.9, 1.1, (2, 3))
        fields["light_diffuse"][0] = brightness * (1 - ambient - head) * white[0]
        return Look(
            seed, fields, brightness * ambient * white[1], brightness * head * white[1],
            bool(rng.random() < self.shadows), rng.uniform(*self.noise),
        )  # fmt: skip


def tinted(rng: np.random.Generator, brightness: tuple[float, float], tint: float) -> np.ndarray:
    """A random colour, RGB, of a brightness in a range; each channel varies by the fraction tint."""
    return rng.uniform(*brightness) * rng.uniform(1 - tint, 1 + tint, 3)


def nominal_look(model: mujoco.MjModel) -> Look:
    """The look that the MJCF files describe."""
    fields = {name: getattr(model, name).copy() for name in LOOK_FIELDS}
    light = model.vis.headlight
    return Look(0, fields, light.ambient.copy(), light.diffuse.copy(), shadows=False, noise=0.0)


def add_noise(image: np.ndarray, look: Look, step: int, camera: int) -> None:
    """Add the image noise of a look to a picture (H, W, 3) uint8 in place. A function of look, step and camera."""
    rng = np.random.default_rng((look.seed, step, camera))
    noisy = image + look.noise * rng.standard_normal(image.shape, dtype=np.float32)
    image[:] = np.clip(np.rint(noisy), 0, 255)


# ---------------------------------------------------------------------------------------------------------------------
# rendering


# Without shadows, antialiasing and round shapes a picture of 96 x 96 pixels costs 0.6 ms instead of 40. Datasets are
# recorded this way, and a policy trained on them fails on any other rendering. Shadows, which visual randomisation
# turns on, cost another 3 ms; at MuJoCo's usual resolution they would cost 20.
FAST_QUALITY = {"offsamples": 0, "numslices": 8, "numstacks": 4, "numquads": 1, "shadowsize": 512}
FAST_FLAGS_OFF = ("mjRND_SHADOW", "mjRND_REFLECTION", "mjRND_SKYBOX", "mjRND_HAZE", "mjRND_FOG")


class Renderer:
    """Off-screen rendering of one scene in any look. OpenGL is first used here; EGL on Linux unless MUJOCO_GL is set.

    Args:
        model: the nominal scene; it is copied.
        size: height and width, pixels.
        fast: True renders as policies see the scene, False as people do.

    Raises:
        SO101Error: off-screen rendering does not work on this machine.
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
        except Exception as error:  # ImportError, AttributeError, RuntimeError, FatalError: each layer has its own
            raise SO101Error(
                f"off-screen rendering failed ({type(error).__name__}): install EGL (Debian: apt-get install libegl1) "
                "or set MUJOCO_GL=osmesa"
            ) from error
        for name in FAST_FLAGS_OFF if fast else ():
            self.renderer.scene.flags[getattr(mujoco.mjtRndFlag, name)] = 0
        self.data = mujoco.MjData(self.model)
        self.nominal = self.look = nominal_look(model)

    def render(self, qpos: np.ndarray, camera: str | None, look: Look | None = None) -> np.ndarray:
        """The picture (H, W, 3) uint8 of positions (nq,) through a camera; None is the free camera, from the side."""
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
        """Free the OpenGL context."""
        self.renderer.close()
