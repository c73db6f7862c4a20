"""A camera on this machine, or a video stream, through OpenCV."""

from __future__ import annotations

import threading
import time

import numpy as np

from so101.extras import import_extra
from so101.robot import Picture, RobotError

HEIGHT, WIDTH = 480, 640  # pixels, requested from the camera
FIRST_PICTURE_S = 5.0  # a camera that delivers nothing for this long does not work
GIVE_UP_S = 1.0  # a camera that delivers nothing for this long is lost


class Camera:
    """The newest picture of a camera, taken in a thread.

    A picture that cannot be read is skipped. A picture that equals the one before counts as that one, with its time: a
    frozen camera delivers old pictures. `skipped` counts the pictures that could not be read.

    Args:
        source: index, path or address, for OpenCV.

    Raises:
        RobotError: the camera delivers no pictures.
        SO101Error: OpenCV is not installed.
    """

    def __init__(self, source: str):
        self.source, self.cv2 = source, import_extra("cv2", "arm", f"--camera {source}")
        self.capture = self.cv2.VideoCapture(int(source) if source.isdecimal() and len(source) < 9 else source)
        self.capture.set(self.cv2.CAP_PROP_FRAME_HEIGHT, HEIGHT)
        self.capture.set(self.cv2.CAP_PROP_FRAME_WIDTH, WIDTH)
        self.capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)
        self.newest: Picture | None = None
        self.skipped = 0
        self.running = self.capture.isOpened()
        self.thread = threading.Thread(target=self._film, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + FIRST_PICTURE_S
        while self.newest is None and self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        if self.newest is None:
            self.close()
            raise RobotError(f"--camera {source}: delivers no pictures; name another index or path")

    def _film(self) -> None:
        """Take pictures until the camera is closed or fails."""
        last = time.monotonic()
        while self.running:
            done, image = self.capture.read()
            now = time.monotonic()
            if done:
                last, image = now, self.cv2.cvtColor(image, self.cv2.COLOR_BGR2RGB)
                if self.newest is None or not np.array_equal(image, self.newest.image):
                    self.newest = Picture(image, now)
            elif now - last > GIVE_UP_S:
                self.running = False
            else:
                self.skipped += 1
                time.sleep(0.005)

    def picture(self) -> Picture:
        """The newest picture."""
        if not self.running or self.newest is None:
            raise RobotError(f"--camera {self.source}: delivers no more pictures; is it unplugged?")
        return self.newest

    def close(self) -> None:
        """Release the camera."""
        self.running = False
        self.thread.join(2.0)
        if not self.thread.is_alive():  # otherwise OpenCV still waits for a picture, and ends with the program
            self.capture.release()
