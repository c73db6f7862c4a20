"""MuJoCo's passive viewer, in real time."""

from __future__ import annotations

import sys
import threading
import time
import warnings

import mujoco
import numpy as np

from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ


def check_display() -> None:
    """Raise SO101Error where MuJoCo's viewer cannot open a window: it would hang or end the process."""
    import glfw
    import mujoco.viewer

    if sys.platform == "darwin" and mujoco.viewer._MJPYTHON is None:
        raise SO101Error("on macOS the viewer needs its own Python: start the same command with mjpython")
    with warnings.catch_warnings(action="ignore"):
        displayed = glfw.init()
    if not displayed:
        raise SO101Error("there is no display here for MuJoCo's viewer: film instead, render_mode rgb_array or --video")


RIGHT_ARROW = 262  # GLFW's number of the key


class Viewer:
    """MuJoCo's passive viewer, in real time: panels hidden; space pauses. Raises SO101Error without a display.

    Args:
        model: the scene.
        camera_name: camera to start with; None looks from the side.
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
        self._threads = [thread for thread in threading.enumerate() if thread not in before]  # those of the window
        with self._handle.lock():
            if camera_name is None:
                mujoco.mjv_defaultFreeCamera(model, self._handle.cam)
            else:
                self._handle.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
                self._handle.cam.fixedcamid = model.camera(camera_name).id
        self._frame_due = time.perf_counter()

    def _on_key(self, key: int) -> None:
        """Space pauses, the right arrow skips to the next episode. Called in the viewer's own thread."""
        if key == ord(" "):
            self._paused = not self._paused
        elif key == RIGHT_ARROW:
            self._next = True

    @property
    def running(self) -> bool:
        """Whether the window is still open."""
        return self._handle.is_running()

    def write(self, text: str, right: str = "") -> None:
        """Show two columns of text at the top left of the window."""
        font, place = mujoco.mjtFontScale.mjFONTSCALE_150, mujoco.mjtGridPos.mjGRID_TOPLEFT
        self._handle.set_texts((font, place, text, right))

    def show(self, qpos: np.ndarray) -> bool:
        """Show positions (nq,) for one control step, or longer while the viewer is paused.

        Returns False once the window is closed or the next episode is requested.
        """
        with self._handle.lock():
            self._data.qpos[:] = qpos
            mujoco.mj_forward(self._model, self._data)
        while self.running and not self._next:
            self._handle.sync()
            # real time; after a pause the clock starts again from here instead of rushing to catch up
            now = time.perf_counter()
            self._frame_due = max(self._frame_due + 1 / CONTROL_HZ, now)
            time.sleep(self._frame_due - now)
            if not self._paused:
                return True
        self._next = False
        return False

    def close(self) -> None:
        """Close the window and wait for its thread: a process that ends while the window is drawn crashes."""
        self._handle.close()
        for thread in self._threads:
            thread.join()
