"""An SO-101 follower through LeRobot's driver.

LeRobot opens the port, names the servos and encodes their registers. What may go wrong with real hardware is handled
here: a lost answer is asked for again, a servo that does not answer is named, and on the way out the torque of every
servo is switched off, also when one of them fails.
"""

from __future__ import annotations

import fcntl
import shlex
import termios
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from so101.capture import Camera
from so101.feetech import MODEL_NUMBER
from so101.robot import LEROBOT_P, SAY_AGAIN_S, Picture, Robot, RobotError, ServoFault, signals_wait
from so101_sim.control import ACT_DIM, JOINTS, TICKS_PER_TURN, WATCHDOG_S, from_rad, read_calibration, to_rad

ANSWER_S = 0.025  # a servo that has not answered by then has not got the request; it takes about 1 ms
TRIES = 4  # for requests outside of the control loop
# A reading is plausible if the joint can have got there: the fastest variant of the servo turns at 5.5 rad/s unloaded
MAX_SERVO_SPEED_RAD_S, JUMP_RAD = 8.0, 0.1
# registers of the servos' state, one of which is read every WATCH_TICKS control steps: each about twice a second
STATE, WATCH_TICKS = ("Present_Load", "Present_Voltage", "Present_Temperature", "Status"), 4
STALL_LOAD = 800  # 0.1 % of the stall torque; a free arm needs up to 550
WARM_C, HOT_C = 55, 65  # the servo switches itself off at 70
VOLTAGE_DROP = 0.15  # share of the voltage at the start
STATUS_BITS = ("supply voltage", "position sensor", "temperature", "current", "", "overload")  # STS3215, register 65
# Above this voltage the servo is the 12 V variant. By its stall torque the 7.4 V variant (16.5 against 30 kg cm) has
# 0.55 times the gain at the same P coefficient.
VARIANT_V, WEAK_GAIN = 9.0, 0.55
# what LeRobot's SOFollower.configure sets, and in "gripper" what it sets for that servo alone
SETTINGS = {
    "Return_Delay_Time": 0, "Maximum_Acceleration": 254, "Acceleration": 254, "Operating_Mode": 0, "I_Coefficient": 0,
    "D_Coefficient": 32,
}  # fmt: skip
KEPT = ("Operating_Mode", "P_Coefficient", "Torque_Enable")  # read again after they were written
GRIPPER_SETTINGS = {"Max_Torque_Limit": 500, "Protection_Current": 250, "Overload_Torque": 25}


class LeRobotArm(Robot):
    """An SO-101 follower through LeRobot's driver, with a camera through OpenCV. Runs in LeRobot's environment.

    Nothing is written to the servos before `enable`.

    Args:
        port: serial port, as LeRobot names it.
        robot_id: name under which LeRobot has stored the arm's calibration.
        camera: index, path or address, for OpenCV, of the camera that looks at the table; None: no camera.
        firmware_p: P coefficient that `enable` sets.
        say: prints a line, for what happens while the arm moves.

    Raises:
        RobotError: LeRobot is not installed; there is no arm or no camera; the calibration is missing, impossible, or
            not the one in the servos.
    """

    def __init__(
        self, port: str, robot_id: str, camera: str | None, firmware_p: int = LEROBOT_P,
        say: Callable[[str], None] = print,
    ):  # fmt: skip
        super().__init__()
        flags = ["--robot.type=so101_follower", f"--robot.port={port}", f"--robot.id={robot_id}"]
        self.calibrate_command = shlex.join(["lerobot-calibrate", *flags])
        try:
            from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

            self.arm = SO101Follower(SO101FollowerConfig(port=port, id=robot_id, use_degrees=True))
        except (ImportError, RuntimeError) as error:  # torch raises RuntimeError beside another torchvision
            reason = " ".join(str(error).split())
            raise RobotError(f"lerobot:{port}: needs LeRobot's environment, see docs/arm.md ({reason:.120})") from error
        except Exception as error:  # LeRobot reads the calibration, and raises what its parser and the disk raise
            reason = " ".join(str(error).split())
            raise RobotError(
                f"--robot-id {robot_id}: LeRobot cannot read this arm's calibration ({reason:.160}); delete "
                f"robots/so_follower/{robot_id}.json in LeRobot's calibration directory, and run "
                f"{self.calibrate_command}"
            ) from error
        self.port, self.firmware_p, self.say, self.bus = port, firmware_p, say, self.arm.bus
        if not self.arm.calibration:
            raise RobotError(
                f"lerobot:{port}: no calibration in {self.arm.calibration_fpath}; run {self.calibrate_command}"
            )
        self.ranges = read_calibration(self.arm.calibration_fpath)
        self.camera: Camera | None = None
        self._last: tuple[np.ndarray, float] | None = None  # the last reading and its time
        self._ticks, self._said, self._stalled = 0, {}, np.zeros(ACT_DIM, bool)
        try:
            self._open()
            self._check_servos()
            self.camera = None if camera is None else Camera(camera)
        except BaseException:
            self.close()
            raise

    # -- before anything moves

    def _open(self) -> None:
        """Open the port, for this program alone."""
        try:
            self.bus.connect(handshake=False)
        except Exception as error:  # LeRobot wraps the cause
            cause = error.__cause__ or error
            reason = getattr(cause, "strerror", None) or str(cause).split(": ")[-1]
            hint = "name the port that lerobot-find-port finds"
            if isinstance(cause, PermissionError) or "ermission denied" in str(cause):
                hint = "add yourself to its group (Debian, Ubuntu: sudo usermod -aG dialout $USER), and log in again"
            raise RobotError(f"lerobot:{self.port}: cannot be opened ({' '.join(reason.split())}); {hint}") from error
        port = self.bus.port_handler
        port.setPacketTimeout = lambda length: port.setPacketTimeoutMillis(1000 * ANSWER_S)
        try:
            fcntl.flock(port.ser.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RobotError(f"lerobot:{self.port}: is used by another program; end that first") from error

    def _check_servos(self) -> None:
        """Raise RobotError unless all servos are there, and have the calibration of the file."""
        if silent := self._silent():
            raise self._missing(silent)
        for joint in JOINTS:
            model = self._try(self.bus.ping, joint, raise_on_error=True)
            if model != MODEL_NUMBER:
                raise RobotError(f"lerobot:{self.port}: {joint} is servo model {model}, not {MODEL_NUMBER} (STS3215)")
        path, differ = self.arm.calibration_fpath, []
        for joint in JOINTS:
            saved = self.arm.calibration[joint]
            pairs = (("Homing_Offset", saved.homing_offset), ("Min_Position_Limit", saved.range_min),
                     ("Max_Position_Limit", saved.range_max))  # fmt: skip
            for register, value in pairs:
                found = self._try(self.bus.read, register, joint, normalize=False)
                if found != value:
                    degrees = (found - value) * 360 / TICKS_PER_TURN
                    differ.append((abs(degrees), f"{joint}'s {register} differs by {degrees:+.0f} degrees"))
        if differ:
            raise RobotError(
                f"calibration {path}: is not the one in the servos ({max(differ)[1]}); run {self.calibrate_command} "
                "and press Enter to write the file to the servos, or type c to calibrate anew"
            )
        self.voltage = min(self._state("Present_Voltage").values()) / 10
        self.servo_gain = 1.0 if self.voltage > VARIANT_V else WEAK_GAIN

    def enable(self) -> None:
        """See Robot. Configures the servos as LeRobot does, and writes only what differs from what they have."""
        for name in STATE:
            self._check_state(name, self._state(name))
        present = {joint: round(value) for joint, value in self._ask("Present_Position", normalize=False).items()}
        self.enabled = True  # from here on a servo may be under torque
        for joint in JOINTS:
            extra = GRIPPER_SETTINGS if joint == "gripper" else {}
            self._set(joint, "Lock", 0)
            for name, value in {**SETTINGS, "P_Coefficient": self.firmware_p, **extra}.items():
                self._set(joint, name, value)
            self._set(joint, "Goal_Position", present[joint])  # otherwise it jumps to the last program's target
        for joint in JOINTS:
            self._set(joint, "Torque_Enable", 1)
            self._set(joint, "Lock", 1)

    def _set(self, joint: str, name: str, value: int) -> None:
        """Write a register unless it has the value. Raises RobotError if the servo must keep it, and does not."""
        if self._try(self.bus.read, name, joint, normalize=False) == value:
            return
        self._try(self.bus.write, name, joint, value, normalize=False)
        if name in KEPT and (kept := self._try(self.bus.read, name, joint, normalize=False)) != value:
            raise RobotError(
                f"lerobot:{self.port}: {joint} does not take {value} as its {name}, and keeps {kept}; switch its power "
                "off and on again"
            )

    # -- the bus

    def _try(self, request: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """The answer to a request to one servo, which is asked again when it is lost."""
        for left in reversed(range(TRIES)):
            self._clear()
            try:
                return request(*args, **settings)
            except ConnectionError as error:  # what LeRobot raises for a lost or damaged answer
                if not left:
                    raise self._lost(error) from error
                self.events["answers asked for again"] += 1
            except Exception as error:  # serial ports raise many types of exceptions, and LeRobot for a servo's error
                raise self._lost(error) from error

    def _ask(self, name: str, **settings: Any) -> dict[str, float]:
        """A register of all servos by joint, asked for again while another try fits into the watchdog's time."""
        began = time.monotonic()
        while True:
            self._clear()
            try:
                return self.bus.sync_read(name, **settings)
            except ConnectionError as error:
                if time.monotonic() - began + ANSWER_S > WATCHDOG_S:
                    raise self._lost(error) from error
                self.events["answers asked for again"] += 1
            except Exception as error:  # as above
                raise self._lost(error) from error

    def _clear(self) -> None:
        """Forget late answers, and a request that a signal has interrupted."""
        port = self.bus.port_handler
        port.is_using = False
        try:
            port.ser.reset_input_buffer()
        except (OSError, termios.error) as error:
            raise self._gone(error) from error

    def _silent(self) -> list[str]:
        """The joints whose servos do not answer a ping. Raises RobotError if the port is gone."""
        silent = []
        for joint in JOINTS:
            for _ in range(2):
                self._clear()
                try:
                    _, result, _ = self.bus.packet_handler.ping(self.bus.port_handler, self.bus.motors[joint].id)
                except Exception as error:  # as above
                    raise self._gone(error) from error
                if result == 0:  # COMM_SUCCESS
                    break
            else:
                silent.append(joint)
        return silent

    def _gone(self, error: Exception) -> RobotError:
        """The error for a port that cannot be used any more."""
        return RobotError(f"lerobot:{self.port}: the port is gone ({error}); is the USB cable pulled?")

    def _missing(self, silent: list[str]) -> RobotError:
        """The error for servos that do not answer."""
        if len(silent) == ACT_DIM:
            return RobotError(f"lerobot:{self.port}: no servo answers; check the power supply and the cable")
        names = " and ".join(f"{joint} (id {self.bus.motors[joint].id})" for joint in silent)
        verb = "does" if len(silent) == 1 else "do"
        return RobotError(f"lerobot:{self.port}: {names} {verb} not answer; check cable and id")

    def _lost(self, error: Exception) -> RobotError:
        """The error for a request that has failed: which servo is it?"""
        if isinstance(error, RobotError):
            return error
        reason = " ".join(str(error).split())
        if isinstance(error, RuntimeError):  # LeRobot raises it for a servo that answers with an error
            text = f"a servo reports an error ({reason:.160}); check the supply, and switch it off and on"
            return ServoFault(f"lerobot:{self.port}: {text}")
        if isinstance(error, (OSError, termios.error)) and not isinstance(error, ConnectionError):
            return self._gone(error)
        try:
            if silent := self._silent():
                return self._missing(silent)
        except RobotError as gone:
            return gone
        return RobotError(f"lerobot:{self.port}: the bus does not work ({reason:.120}); check cables and power")

    # -- while it moves

    def _positions(self) -> tuple[np.ndarray, float]:
        """Joint positions (6,), rad, and their time, as the servos report them."""
        degrees = self._ask("Present_Position")
        return to_rad(np.array([degrees[joint] for joint in JOINTS]), "deg", self.ranges), time.monotonic()

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot. A reading that no servo can have reached is asked for again."""
        for left in reversed(range(2)):
            joints, now = self._positions()
            if self._last is None:
                break
            moved = np.abs(joints - self._last[0])
            joint = int(moved.argmax())
            if moved[joint] <= JUMP_RAD + MAX_SERVO_SPEED_RAD_S * (now - self._last[1]):
                break
            if not left:
                jump = np.rad2deg(moved[joint])
                raise ServoFault(
                    f"lerobot:{self.port}: {JOINTS[joint]} jumps by {jump:.0f} degrees: its horn slips, or its encoder "
                    f"is at the end of its turn; check the horn, then run {self.calibrate_command}"
                )
            self.events["readings that jumped"] += 1
        self._last = joints, now
        return joints, now

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        degrees = from_rad(target_rad, "deg", self.ranges)
        self._clear()
        try:
            self.bus.sync_write("Goal_Position", dict(zip(JOINTS, degrees.tolist())))
        except Exception as error:  # serial ports and LeRobot's bus raise many types of exceptions
            raise self._lost(error) from error

    def picture(self) -> Picture:
        """See Robot."""
        if self.camera is None:
            raise RobotError("there is no camera: name one with --camera")
        self.events["pictures that could not be read"] = self.camera.skipped
        return self.camera.picture()

    def watch(self) -> None:
        """See Robot: reads one register of all servos every WATCH_TICKS calls."""
        self._ticks += 1
        which, rest = divmod(self._ticks, WATCH_TICKS)
        if rest == 0:
            name = STATE[which % len(STATE)]
            self._check_state(name, self._state(name))

    def _state(self, name: str) -> dict[str, int]:
        """A register of the servos' state by joint."""
        return {joint: int(value) for joint, value in self._ask(name, normalize=False).items()}

    def _check_state(self, name: str, values: dict[str, int]) -> None:
        """Warn of, or raise ServoFault for, what a register of the servos' state means."""
        numbers = np.array([values[joint] for joint in JOINTS])
        if name == "Present_Load":
            limit = np.full(ACT_DIM, STALL_LOAD)
            limit[-1] *= GRIPPER_SETTINGS["Max_Torque_Limit"] / 1000
            stalled = (np.abs(numbers) & 0x3FF) >= limit  # the sign is in bit 10
            if (stalled & self._stalled).any():
                joint = int((stalled & self._stalled).argmax())
                load = f"its load was above {limit[joint] / 10:.0f} % of the stall torque twice in a row"
                raise ServoFault(f"{JOINTS[joint]} is stalled: {load}; is something in its way?")
            self._stalled = stalled
        elif name == "Present_Voltage" and numbers.min() / 10 < (1 - VOLTAGE_DROP) * self.voltage:
            volts = numbers.min() / 10
            self._warn("supply voltage", f"{volts:.1f} V instead of {self.voltage:.1f} V: use a stronger supply")
        elif name == "Present_Temperature":
            joint, warmest = JOINTS[int(numbers.argmax())], int(numbers.max())
            if warmest >= HOT_C:
                raise ServoFault(f"{joint} has {warmest} degrees C: let it cool down")
            if warmest >= WARM_C:
                self._warn("temperature", f"{joint} has {warmest} degrees C; the arm stops at {HOT_C}")
        elif name == "Status" and numbers.any():
            if not (faults := numbers & ~1).any():  # only the supply voltage
                joint = JOINTS[int(numbers.argmax())]
                self._warn("supply voltage", f"{joint} reports it as outside of its limits")
                return
            joint, bits = JOINTS[int((faults > 0).argmax())], int(faults[faults > 0][0])
            words = [word for k, word in enumerate(STATUS_BITS) if bits >> k & 1 and word] or [f"code {bits}"]
            raise ServoFault(f"{joint} reports an error: {', '.join(words)}; switch the power off and on again")

    def _warn(self, what: str, text: str) -> None:
        """Say what happens, at most every SAY_AGAIN_S, and count it."""
        self.events[f"warnings: {what}"] += 1
        if time.monotonic() - self._said.get(what, -np.inf) >= SAY_AGAIN_S:
            self._said[what] = time.monotonic()
            self.say(f"{what}: {text}")

    # -- the way out

    def relax(self) -> list[str]:
        """See Robot. Signals wait until every servo was tried."""
        if not self.enabled:
            return []
        with signals_wait():
            failed = [joint for joint in JOINTS if not self._relax(joint)]
            self.enabled = bool(failed)
        return failed

    def _relax(self, joint: str) -> bool:
        """Switch the torque of a joint off; returns whether its servo has answered."""
        for _ in range(TRIES):
            try:
                self._clear()
                self.bus.write("Torque_Enable", joint, 0)
                return True
            except RobotError:
                return False  # the port is gone
            except RuntimeError:
                return True  # the servo has answered, and reports an error such as overload
            except Exception:  # a lost answer, or a port that is gone: the next servo must be tried nevertheless
                continue
        return False

    def close(self) -> None:
        """See Robot. Switches the torque off if that was not done."""
        try:
            self.relax()
        finally:
            if self.camera is not None:
                self.camera.close()
            if self.bus.is_connected:
                try:
                    self.bus.disconnect(disable_torque=False)
                except OSError:
                    pass  # the port is gone
