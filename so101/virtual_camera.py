"""The camera of a virtual arm, in a process of its own, so that its work never delays an answer on the bus.

`Camera` starts it and keeps it up to date. Run as a program, this file is that process: its only argument is a JSON
object, its standard input the state of the scene, thirty times a second, and its first line of output the URL or an
error, as JSON.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from so101.extras import import_extra
from so101.robot import Picture
from so101.simulated_arm import Flaws, SimulatedArm, film
from so101_env import Task
from so101_sim.errors import SO101Error
from so101_sim.scene import Look

# qpos (10); seed of the look, physics steps, whether the picture is frozen or stalled, share of broken pictures
STATE = struct.Struct("10d5d")


class Camera:
    """The process of a camera at 127.0.0.1, from the side of the arm.

    Args:
        port: for HTTP: an MJPEG stream under any path, one picture under /snapshot.jpg; 0: any free one, see `url`.
        zmq_port: for LeRobot's cameras of type zmq; None: not for them.
        size: height and width, pixels.
        visual: whether the scene looks as drawn from the seed.
        flaws, tape_margin: those of the arm.

    Raises:
        SO101Error: a port is in use, or this machine cannot render.
    """

    def __init__(
        self, port: int, zmq_port: int | None, size: tuple[int, int], visual: bool, flaws: Flaws, tape_margin: float
    ):
        settings = {
            "port": port, "zmq_port": zmq_port, "size": size, "visual": visual, "flaws": dataclasses.asdict(flaws),
            "tape_margin": tape_margin,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "so101.virtual_camera", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,  # Ctrl+C is for the arm alone
        )  # fmt: skip
        os.set_blocking(self.process.stdin.fileno(), False)

    def wait(self) -> None:
        """Wait until it is ready; its address is in `url` then."""
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process of the camera has ended"}')
        if "error" in answer:
            raise SO101Error(answer["error"])
        self.url = answer["url"]

    def show(self, qpos: np.ndarray, seed: int, count: int, frozen: bool, stalled: bool, broken: float) -> None:
        """Send the state of the scene; a process that is too slow for it misses some."""
        try:
            os.write(self.process.stdin.fileno(), STATE.pack(*qpos, seed, count, frozen, stalled, broken))
        except BlockingIOError:
            pass
        except BrokenPipeError as error:
            raise SO101Error("--camera: the process of the camera has ended; start the virtual arm again") from error

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# the process


class Scene:
    """What is filmed: the last state that has arrived, as `film` needs it."""

    def __init__(self, flaws: Flaws, tape_margin: float):
        self._arm = SimulatedArm(Task(tape_margin=tape_margin), flaws, drawn=False)
        self._arm.reset(0)
        self.model, self._seed = self._arm.model, 0
        self.qpos, self.seed, self.count = self._arm.qpos, 0, 0
        self.frozen, self.stalled, self.broken = False, False, 0.0

    @property
    def look(self) -> Look:
        """How it looks with the present seed."""
        if self._seed != self.seed:
            self._seed = self.seed
            self._arm.reset(self.seed)
        return self._arm.look

    def follow(self) -> None:
        """Read states from standard input until it ends."""
        while len(data := sys.stdin.buffer.read(STATE.size)) == STATE.size:
            *qpos, seed, count, frozen, stalled, self.broken = STATE.unpack(data)
            self.qpos, self.seed, self.count = np.array(qpos), int(seed), int(count)
            self.frozen, self.stalled = bool(frozen), bool(stalled)


class Publisher:
    """Sends pictures over ZeroMQ as LeRobot's ImageServer does, whose cameras are of type zmq.

    JSON: timestamps and images by camera, base64 of JPEG. LeRobot encodes and decodes it with red and blue swapped.

    Args:
        port: on 127.0.0.1.

    Raises:
        SO101Error: the port is in use, or pyzmq is not installed.
    """

    def __init__(self, port: int):
        self.zmq = import_extra("zmq", "server", "--camera-zmq")
        self.socket = self.zmq.Context.instance().socket(self.zmq.PUB)
        self.socket.setsockopt(self.zmq.SNDHWM, 2)  # late pictures are dropped
        self.socket.setsockopt(self.zmq.LINGER, 0)
        try:
            self.socket.bind(f"tcp://127.0.0.1:{port}")
        except self.zmq.ZMQError as error:
            self.socket.close()
            raise SO101Error(f"--camera-zmq {port}: {error.strerror}; name another port") from error

    def send(self, image: np.ndarray) -> None:
        """Send a picture (H, W, 3) uint8, RGB; nobody needs to listen."""
        text = base64.b64encode(_jpeg(image[:, :, ::-1])).decode()
        self.socket.send_string(json.dumps({"timestamps": {"top": time.time()}, "images": {"top": text}}))

    def close(self) -> None:
        """Free the port."""
        self.socket.close()


class Server:
    """Films a scene and serves the pictures. They are only taken while somebody watches, or if there is a publisher.

    Args:
        scene: what is filmed.
        port: for HTTP, on 127.0.0.1; 0: any free one, see `url`.
        publisher: also gets the pictures. None: none.
        delay_s: until a picture is delivered.
        size: height and width, pixels.
        visual: whether the scene looks as drawn from the seed.

    Raises:
        SO101Error: the port is in use, or this machine cannot render.
    """

    def __init__(
        self, scene: Scene, port: int, publisher: Publisher | None, delay_s: float, size: tuple[int, int], visual: bool
    ):
        self.scene, self.publisher, self.delay_s = scene, publisher, delay_s
        self._stop, self._changed, self._started = threading.Event(), threading.Condition(), threading.Event()
        self._watchers, self._number, self._jpeg, self._problem = 0, 0, b"", ""
        self._image: np.ndarray | None = None  # the newest
        self._late: collections.deque[Picture] = collections.deque()  # taken, but not delivered yet
        self._rng = np.random.default_rng(0)  # which pictures are broken
        try:
            self._http = _HTTPServer(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise SO101Error(f"--camera {port}: {error.strerror}; name another port") from error
        self._http.pictures = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/video"
        self._threads = [
            threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}),
            threading.Thread(target=self._film, args=(size, visual)),
        ]
        for thread in self._threads:
            thread.start()
        self._started.wait()
        if self._problem:
            self.close()
            raise SO101Error(f"--camera: {self._problem}")

    def _film(self, size: tuple[int, int], visual: bool) -> None:
        try:
            film(self.scene, size, self._stop, self._publish, visual)
        except SO101Error as error:
            self._problem = str(error)
            self._started.set()

    def _publish(self, picture: Picture) -> None:
        """Deliver a picture, or wait until somebody watches; the picture is old by then."""
        self._started.set()
        scene = self.scene
        with self._changed:
            if not self._watchers and self.publisher is None:
                self._late.clear()
                self._changed.wait_for(lambda: self._watchers or self._stop.is_set())
                return
        self._late.append(picture)
        while self._late and self._late[0].time_s <= time.monotonic() - self.delay_s:
            image = self._late.popleft().image
            if scene.stalled:
                continue
            if scene.frozen and self._image is not None:
                image = self._image
            self._image, jpeg = image, _jpeg(image)
            if scene.broken and self._rng.random() < scene.broken:
                jpeg = jpeg[: len(jpeg) // 3]
            elif self.publisher:
                self.publisher.send(image)
            with self._changed:
                self._jpeg, self._number = jpeg, self._number + 1
                self._changed.notify_all()

    def watch(self, deliver: Callable[[bytes], Any], once: bool) -> None:
        """Call deliver with each new picture, JPEG, or with one; returns when the camera is closed."""
        with self._changed:
            self._watchers, number = self._watchers + 1, self._number
            self._changed.notify_all()
        try:
            while not self._stop.is_set():
                with self._changed:
                    self._changed.wait(1.0)
                    if self._number == number:
                        continue
                    number, jpeg = self._number, self._jpeg
                deliver(jpeg)
                if once:
                    return
        finally:
            with self._changed:
                self._watchers -= 1

    def close(self) -> None:
        """Stop filming and serving."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join()
        if self.publisher:
            self.publisher.close()


class _HTTPServer(http.server.ThreadingHTTPServer):
    """An HTTP server with pictures."""

    daemon_threads = True
    block_on_close = False
    pictures: Server


class _Handler(http.server.BaseHTTPRequestHandler):
    """One HTTP client."""

    server: _HTTPServer

    def do_GET(self) -> None:
        """Send pictures until the client is gone."""
        once = self.path == "/snapshot.jpg"
        self.send_response(200)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Type", "image/jpeg" if once else "multipart/x-mixed-replace; boundary=picture")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client is gone
            self.server.pictures.watch(self.wfile.write if once else self._send_part, once)

    def _send_part(self, jpeg: bytes) -> None:
        head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        self.wfile.write(head.encode() + jpeg + b"\r\n")

    def log_message(self, *args: Any) -> None:
        """Requests are not logged."""


def _jpeg(image: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    """The process of the camera: ends with its standard input."""
    settings = json.loads(sys.argv[1])
    try:
        flaws = Flaws(**settings["flaws"])
        scene = Scene(flaws, settings["tape_margin"])
        publisher = None if settings["zmq_port"] is None else Publisher(settings["zmq_port"])
        size, visual = tuple(settings["size"]), settings["visual"]
        server = Server(scene, settings["port"], publisher, flaws.picture_latency_s, size, visual)
    except SO101Error as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"url": server.url}), flush=True)
    scene.follow()
    server.close()


if __name__ == "__main__":
    main()
