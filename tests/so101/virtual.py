"""A virtual arm in a process of its own, for tests that drive it through its port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT


class VirtualProcess:
    """`python -m so101.virtual_arm` with these flags, ready to be driven. Use as a context manager.

    Args:
        directory: where its port and calibration go.
        flags: further flags, e.g. "--camera", "0", "--fault", "lost:0.01".
        name: of the port and of the calibration.

    Attributes:
        port: path of the serial port.
        calibration: path of LeRobot's calibration file of this arm; its directory is a `calibration_dir` for LeRobot,
            and `name` the id.
        camera: URL of the MJPEG stream; None without --camera.
    """

    def __init__(self, directory: Path, *flags: str, name: str = "virtual"):
        self.port, self.calibration, self.name = directory / f"tty_{name}", directory / f"{name}.json", name
        command = [sys.executable, "-m", "so101.virtual_arm", "--port", str(self.port)]
        command += ["--write-calibration", str(self.calibration), *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.ready = self.process.stdout.readline()
        if not self.ready.startswith("ready: "):
            raise RuntimeError(f"the virtual arm did not start: {self.ready}{self.process.communicate()[1]}")
        self.camera = self.ready.split("camera ")[1].split(";")[0] if "camera " in self.ready else None

    def ask(self, command: str) -> dict[str, Any]:
        """Send a line to its standard input; returns its answer. Raises RuntimeError if it is an error."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def state(self) -> dict[str, Any]:
        """The ground truth, see VirtualArm.state."""
        return self.ask("state")

    def fault(self, fault: str) -> None:
        """Begin a fault, as "silent:elbow_flex"."""
        self.ask(f"fault {fault}")

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str, str]:
        """End it; returns its exit code, and what was left on stdout and stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err

    def __enter__(self) -> VirtualProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()
