"""An SO-101 follower through LeRobot's driver, and its camera through OpenCV."""

from __future__ import annotations

import threading
import time

import numpy as np

from so101.extras import import_extra
from so101.robot import LEROBOT_P, Picture, Robot, RobotError
from so101_sim.control import JOINTS, from_rad, read_calibration, to_rad


class LeRobotRobot(Robot):
    """An SO-101 follower through LeRobot's driver, with a camera through OpenCV. Runs in LeRobot's environment.

    Args:
        port: serial port, as LeRobot names it.
        robot_id: name under which LeRobot has stored the arm's calibration.
        camera: index or path, for OpenCV, of the camera that looks at the table.
        firmware_p: P coefficient that the servos are set to.

    Raises:
        RobotError: LeRobot is not installed, or there is no arm, no calibration, or no camera.
    """

    def __init__(self, port: str, robot_id: str, camera: str, firmware_p: int = LEROBOT_P):
        try:
            from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

            self.arm = SO101Follower(SO101FollowerConfig(port=port, id=robot_id, use_degrees=True))
        except ImportError as error:
            text = f"lerobot:{port}: needs LeRobot's environment, see docs/arm.md ({error.name} is missing)"
            raise RobotError(text) from error
        self.port = port
        if not self.arm.calibration:
            raise RobotError(
                f"lerobot:{port}: no calibration in {self.arm.calibration_fpath}; run lerobot-calibrate "
                f"--robot.type=so101_follower --robot.port={port} --robot.id={robot_id}"
            )
        self.ranges = read_calibration(self.arm.calibration_fpath)
        self.camera = Camera(camera)
        try:
            self.arm.connect(calibrate=False)
            for joint in JOINTS:
                self.arm.bus.write("P_Coefficient", joint, firmware_p)
        except Exception as error:  # serial ports and LeRobot's bus raise many types of exceptions
            self.camera.close()
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> RobotError:
        """The error message for an arm that cannot be reached."""
        return RobotError(f"lerobot:{self.port}: the arm cannot be reached ({error}); check cable and power")

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot."""
        try:
            degrees = self.arm.bus.sync_read("Present_Position")
        except Exception as error:  # as above
            raise self._lost(error) from error
        return to_rad(np.array([degrees[joint] for joint in JOINTS]), "deg", self.ranges), time.monotonic()

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        degrees = from_rad(target_rad, "deg", self.ranges)
        try:
            self.arm.bus.sync_write("Goal_Position", dict(zip(JOINTS, degrees.tolist())))
        except Exception as error:  # as above
            raise self._lost(error) from error

    def picture(self) -> Picture:
        """See Robot."""
        return self.camera.picture()

    def close(self) -> None:
        """See Robot. LeRobot's disconnect turns the torque off, and the arm falls: hold it."""
        self.camera.close()
        if self.arm.is_connected:
            self.arm.disconnect()


class Camera:
    """The newest picture of a camera, taken in a thread.

    Args:
        source: index or path, for OpenCV.
        size: height and width to request, pixels.

    Raises:
        RobotError: the camera delivers no pictures.
        SO101Error: OpenCV is not installed.
    """

    def __init__(self, source: str, size: tuple[int, int] = (480, 640)):
        self.source, self.cv2 = source, import_extra("cv2", "arm", f"--camera {source}")
        self.capture = self.cv2.VideoCapture(int(source) if source.isdigit() else source)
        self.capture.set(self.cv2.CAP_PROP_FRAME_HEIGHT, size[0])
        self.capture.set(self.cv2.CAP_PROP_FRAME_WIDTH, size[1])
        self.capture.set(self.cv2.CAP_PROP_BUFFERSIZE, 1)
        self.newest: Picture | None = None
        self.running = self.capture.isOpened()
        self.thread = threading.Thread(target=self._film, daemon=True)
        self.thread.start()
        for _ in range(300):
            if self.newest is not None or not self.running:
                break
            time.sleep(0.01)
        if self.newest is None:
            self.close()
            raise RobotError(f"--camera {source}: delivers no pictures; name another index or path")

    def _film(self) -> None:
        """Take pictures until the camera is closed or fails."""
        while self.running:
            done, image = self.capture.read()
            if not done:
                self.running = False
                return
            self.newest = Picture(self.cv2.cvtColor(image, self.cv2.COLOR_BGR2RGB), time.monotonic())

    def picture(self) -> Picture:
        """The newest picture."""
        if not self.running or self.newest is None:
            raise RobotError(f"--camera {self.source}: delivers no more pictures; is it unplugged?")
        return self.newest

    def close(self) -> None:
        """Release the camera."""
        self.running = False
        self.thread.join(2.0)
        self.capture.release()
