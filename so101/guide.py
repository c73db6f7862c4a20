"""The guided check of an arm, `python -m so101.drive --check`: from parts to the first episode.

Each step prints a line, and its result is kept in the arm's profile, so that the next check skips what is done. The
measurements are those of so101/arm_check.py. Later runs of so101.drive use the profile.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from so101.arm_check import ASIDE_PAN_RAD, ArmCheck, ArmProfile, servo_advice
from so101.files import disk_error, write_atomic
from so101.lerobot_arm import VARIANT_V, LeRobotArm
from so101.locator import Marks, SheetLocator, overlay
from so101.loop import Loop, ask
from so101_sim.control import JOINTS, SPANS_DEG
from so101_sim.errors import SO101Error

STEPS = ("servos", "calibration", "directions", "zero and gain", "camera", "fingertip")


def profile_path(robot_id: str) -> Path:
    """Where the profile of an arm lies: so101/ID.json in the user's configuration directory."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "so101" / f"{robot_id}.json"


def calibration_hash(arm: LeRobotArm) -> str:
    """SHA-256 of the arm's calibration file: another calibration needs another check."""
    return hashlib.sha256(Path(arm.arm.calibration_fpath).read_bytes()).hexdigest()


def load_profile(arm: LeRobotArm, robot_id: str) -> ArmProfile | None:
    """The profile of an arm; None if it was not checked.

    Raises:
        SO101Error: the file is damaged, or the arm was calibrated anew since its check.
    """
    if not (path := profile_path(robot_id)).exists():
        return None
    profile = ArmProfile.load(path, robot_id)
    if profile.steps.get("calibration", {}).get("sha256") != calibration_hash(arm):
        raise SO101Error(f"{path}: the arm was calibrated anew since this check; delete the file and run --check again")
    return profile


class Guide:
    """The steps of the check, in their order.

    Args:
        loop: on a LeRobotArm.
        robot_id: the arm's name.
        tape_margin: m between sheet and tape on every side.
        marks: "tape" or "tags", see SheetLocator.
        say: prints a line.
    """

    def __init__(self, loop: Loop, robot_id: str, tape_margin: float, marks: Marks, say: Callable[[str], None] = print):
        self.loop, self.arm, self.tape_margin, self.marks, self.say = loop, loop.robot, tape_margin, marks, say
        self.path = profile_path(robot_id)
        self.profile = load_profile(self.arm, robot_id) or ArmProfile(robot_id)
        self.check: ArmCheck | None = None  # made when the arm moves for the first time

    def run(self) -> ArmProfile:
        """All steps that are not done yet.

        Raises:
            SO101Error: a step has found a fault. The steps before it are kept.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from error
        steps = (
            self._servos, self._calibration, self._directions, self._zero_and_gain, self._camera, self._fingertip
        )  # fmt: skip
        for number, (name, step) in enumerate(zip(STEPS, steps), 1):
            head = f"{number}/{len(STEPS)} {name}"
            if name in self.profile.steps:
                done = self.profile.steps[name]
                self.say(f"{head}: {done.get('summary', 'done')} (on {done['date']})")
                continue
            self.say(f"{head} ...")
            summary, result, changes = step()
            self.profile = self.profile.with_step(name, {"summary": summary, **result}, **changes)
            self.profile.save(self.path)
            self.say(f"{head}: {summary}")
        self.say(f"the arm is checked; {self.path} keeps the results, and so101.drive uses them")
        return self.profile

    # -- what a person does

    def _wait(self, request: str) -> None:
        """Ask the person to do something, and wait for Enter. The first time, switch the arm on."""
        ask(f"    {request}; press Enter ", self.arm)
        if not self.arm.enabled:
            self.loop.enable()
        if self.check is None:
            self.check = ArmCheck(self.loop)

    def _confirm(self, question: str, otherwise: str) -> None:
        """Ask a question. Raises SO101Error with the way out unless the answer is yes."""
        while (answer := ask(f"    {question} (y/n) ", self.arm)) not in ("y", "yes", "n", "no"):
            self.say("    answer y or n")
        if answer.startswith("n"):
            raise SO101Error(otherwise)

    # -- the steps: each returns its summary, its result, and changes of the profile

    def _servos(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        variant = "12 V" if self.arm.voltage > VARIANT_V else "7.4 V"
        summary = f"six STS3215 answer, supply {self.arm.voltage:.1f} V, taken for the {variant} variant"
        return summary, {"voltage": self.arm.voltage}, {"gain_factor": self.arm.servo_gain}

    def _calibration(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        spans = np.rad2deg(self.arm.ranges.high_rad - self.arm.ranges.low_rad)
        for joint, span in zip(JOINTS, spans):
            low, high = SPANS_DEG[joint]
            self.say(f"    {joint:<14} {span:4.0f} degrees, expected {low} to {high}")
        result = {"sha256": calibration_hash(self.arm), "spans_deg": spans.round(1).tolist()}
        return "every joint's range is possible, and the servos have this calibration", result, {}

    def _directions(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        self._wait("take the sheet off the table, clear the arm's reach, and keep a hand at the power switch")
        for joint, name in enumerate(JOINTS):
            nudge = self.check.nudge(joint)
            self._confirm(
                nudge.question,
                f"{name} turns the wrong way: run {self.arm.calibrate_command}, and if that does not help, mount its "
                "servo as the assembly guide shows",
            )
        return "every joint turns the right way", {}, {}

    def _zero_and_gain(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        self._wait("no sheet on the table: the arm lifts, and touches the table four times")
        gain, offsets = self.check.measure_servos()
        for advice in servo_advice(gain, offsets):
            self.say(f"    {advice}")
        lift, elbow = np.rad2deg(offsets.offset_rad[1:3])
        summary = (
            f"zero of shoulder_lift off by {lift:+.1f} degrees, of elbow_flex by {elbow:+.1f}; servo gain "
            f"{gain.factor:.2f} (+-{gain.error:.2f}) of the 12 V STS3215's"
        )
        changes = {"offset_rad": tuple(offsets.offset_rad.tolist()), "gain_factor": gain.factor}
        result = {
            "gain_error": gain.error, "backlash_deg": np.rad2deg(gain.backlash_rad).tolist(),
            "offset_error_deg": np.rad2deg(offsets.error_rad).tolist(), "misfit_mm": 1000 * offsets.misfit_m,
        }  # fmt: skip
        return summary, result, changes

    def _camera(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        self._wait("lay the sheet into the rectangle of tape, and keep out of the picture")
        turned = False
        if self.marks == "tape":
            turned = self.check.find_side(SheetLocator(self.tape_margin)).turned
        locator = SheetLocator(self.tape_margin, marks=self.marks, turned=turned)
        image = self.check.look(ASIDE_PAN_RAD)
        to_picture = locator.find_tape(image)
        pose = locator.locate(image, to_picture)
        tape = locator.measure_tape(image)
        where = f"sheet at x {1000 * pose[0]:.0f} mm, y {1000 * pose[1]:.0f} mm, {np.rad2deg(pose[2]):.0f} degrees"
        size = " x ".join(f"{side:.0f}" for side in tape.sides_mm)
        text = f"{where}; rectangle {size} mm, off by {tape.residual_mm:.1f} mm"
        path = self.path.with_suffix(".png")
        write_png(path, overlay(image, to_picture, pose, self.tape_margin, text.replace("; ", "\n")))
        self.say(f"    {text}")
        self._confirm(
            f"{path} shows the picture with outlines: do they lie on the sheet and on the tape's inner edges?",
            "the camera does not see the table as it is: mend light, tape or the camera's place, see docs/arm.md",
        )
        side = "on the arm's side" if turned else "opposite the arm"
        return f"the camera stands {side}; {text}", {}, {"camera_turned": turned}

    def _fingertip(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        locator = SheetLocator(self.tape_margin, marks=self.marks, turned=self.profile.camera_turned)
        while True:
            self._wait("lay the sheet in front of the arm, with its middle in its reach")
            grip = self.check.measure_grip(locator)
            if not grip.advice:
                return f"the sheet follows {grip.share:.0%} of the fingertip's way", {"share": grip.share}, {}
            self.say(f"    the sheet follows {grip.share:.0%} of the fingertip's way: {grip.advice}")


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a picture (H, W, 3) uint8."""
    from PIL import Image

    write_atomic(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"))
