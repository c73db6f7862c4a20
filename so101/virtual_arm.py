"""A virtual SO-101 on a serial port: the simulated arm, sheet and table, driven by any software that knows the arm.

    python -m so101.virtual_arm --port ./ttySO101 --camera 8090    # a follower, and its camera over HTTP
    python -m so101.virtual_arm --port ./ttyLeader --hand swing    # a leader that a hand moves
    python -m so101.virtual_arm --port ./ttySO101 --fault lost:0.01 --fault silent:elbow_flex@5

The port is a pseudo-terminal with six STS3215 servos that speak Feetech's protocol, in real time. The camera `top` is
an MJPEG stream under any path, and one picture under /snapshot.jpg. Lines on standard input are commands, each answered
by a line of JSON: state, sheet SEED, sheet away, reset SEED, place DEGREES (six), hand NAME, fault FAULT, clear. See
docs/virtual_arm.md.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import collections
import contextlib
import dataclasses
import errno
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from so101.cli import Stop, Stoppable, check_flags, check_output, check_unused, parse, run_script
from so101.feetech import ERRORS, MIDDLE, READ, REGISTERS, SYNC_READ, Bus, Packet, Reader, Servo
from so101.files import write_json
from so101.simulated_arm import Flaws, RealTime, SimulatedArm, report_speed
from so101.virtual_camera import Camera
from so101_env import HOME_RAD, TAPE_MARGIN_M, Task
from so101_sim.control import ACT_DIM, FIRMWARE_P, GRIPPER, JOINTS, TICKS_PER_TURN, WRIST_ROLL
from so101_sim.errors import SO101Error, strict_json
from so101_sim.scene import CONTROL_HZ

TICK_RAD = 2 * np.pi / TICKS_PER_TURN
# End stops. Those of printed arms are a few degrees wider than the model's: 13 public calibrations of SO-101 arms span
# 203 to 222 degrees of shoulder_lift, where the model has 200. The jaws close where the model's do.
JOINT_RANGE_DEG = np.array([(-112, 112), (-106, 106), (-99, 99), (-98, 98), (-160, 165), (-10, 100)], float)
# the encoders' own positions at the middle of the joints, ticks: how the servos happen to be mounted
MOUNTED_TICKS = np.array([2148, 1977, 2301, 1893, 2230, 1764], float)
HALF_TURN_TICKS = 2047  # what LeRobot makes of the position in the middle
REST_RAD = np.deg2rad([0.0, -106.0, 90.0, 79.0, 0.0, 0.0])  # folded, where the limp arm comes to rest
MIDDLE_RAD = np.array([0.0] * GRIPPER + [float(np.deg2rad(JOINT_RANGE_DEG[GRIPPER].mean()))])
# supply, V; torque and gain, by variant: stall torques 30 and 16.5 kg cm (Feetech's data sheets)
SERVOS = {"12V": (12.0, 1.0), "7.4V": (7.4, 16.5 / 30)}
ROOM_CELSIUS, HOT_CELSIUS = 30.0, 75.0
SWING_RAD, SWING_S = np.deg2rad([20.0, 12.0, 12.0, 15.0, 20.0, 20.0]), (7.0, 5.0, 6.0, 4.0, 8.0, 3.0)
SWING_CENTER_RAD = np.deg2rad([0.0, -20.0, 20.0, 60.0, 0.0, 30.0])
SWEEP_S, SWEEP_WAIT_S = 6.0, 1.0  # one way and back; from the last homing offset to the sweep
HAND_WAIT_S = 1.0  # in which the hand moves the arm to where its motion begins


# ---------------------------------------------------------------------------------------------------------------------
# faults


class Kind(NamedTuple):
    """The arguments that a fault takes, and what it does."""

    joint: bool  # whether it needs a joint
    number: tuple[float, float] | None  # range of its number; None: it needs none
    does: str


FAULTS = {
    "lost": Kind(False, (0, 1), "this share of all packets is lost"),
    "corrupt": Kind(False, (0, 1), "in this share of all packets a bit is wrong"),
    "drop": Kind(False, (1, 1e6), "this many answers are lost, then none"),
    "garble": Kind(False, (1, 1e6), "in this many answers a bit is wrong, then in none"),
    "latency": Kind(False, (0, 5), "answers come this many seconds late"),
    "silent": Kind(True, None, "the servo neither hears nor answers; it keeps its last goal"),
    "jump": Kind(True, (-360, 360), "the next reading of the joint's position is this many degrees off, once"),
    "eeprom": Kind(True, (-180, 180), "the servo's homing offset is this many degrees off"),
    "overload": Kind(True, None, "the servo reports overload, and has a fifth of its torque"),
    "hot": Kind(True, None, "the servo reports 75 degrees Celsius, and is limp"),
    "voltage": Kind(False, (0, 20), "the servos measure this supply voltage"),
    "unplug": Kind(False, None, "the USB cable is pulled: the port is gone, the servos keep their goals"),
    "power": Kind(False, None, "the supply is off: all servos are limp and silent"),
    "frozen": Kind(False, None, "the camera sends the same picture again and again"),
    "stalled": Kind(False, None, "the camera sends nothing more"),
    "broken": Kind(False, (0, 1), "this share of all pictures is broken"),
}


class Fault(NamedTuple):
    """One fault."""

    name: str
    joint: int | None
    number: float
    at_s: float  # after a servo's torque was first turned on; 0: at once


def parse_fault(text: str) -> Fault:
    """A fault from "name[:joint][:number][@seconds]". Raises SO101Error."""
    head, _, at = text.partition("@")
    name, *values = head.split(":")
    if name not in FAULTS:
        raise SO101Error(f"--fault {text}: there is no {name!r}; known: {', '.join(FAULTS)}")
    kind = FAULTS[name]
    form = name + ":JOINT" * kind.joint + ":NUMBER" * (kind.number is not None)
    wrong = SO101Error(f"--fault {text}: write {form}, and @SECONDS if it is not to begin at once")
    if len(values) != kind.joint + (kind.number is not None):
        raise wrong
    joint = None
    if kind.joint:
        if values[0] not in JOINTS:
            raise SO101Error(f"--fault {text}: there is no joint {values[0]!r}; known: {', '.join(JOINTS)}")
        joint = JOINTS.index(values[0])
    try:
        number, at_s = float(values[-1]) if kind.number else 0.0, float(at) if at else 0.0
    except ValueError:
        raise wrong from None
    if kind.number and not kind.number[0] <= number <= kind.number[1]:
        raise SO101Error(f"--fault {text}: the number must be in {[*kind.number]}")
    if not 0 <= at_s < np.inf:
        raise wrong
    return Fault(name, joint, number, at_s)


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def factory_calibration() -> dict[str, dict[str, int]]:
    """LeRobot's calibration of this arm, as a hand that found all end stops would make it, without an error.

    Zero of the model is the middle of each range; the gripper is closed at range_min. LeRobot does not measure
    wrist_roll: its range is a full turn.
    """
    calibration = {}
    for number, joint in enumerate(JOINTS):
        half = round(np.deg2rad(np.ptp(JOINT_RANGE_DEG[number])) / 2 / TICK_RAD)
        low, high = HALF_TURN_TICKS - half, HALF_TURN_TICKS + half
        if number == WRIST_ROLL:
            low, high = 0, TICKS_PER_TURN - 1
        offset = int(MOUNTED_TICKS[number]) - HALF_TURN_TICKS
        values = {"id": number + 1, "drive_mode": 0, "homing_offset": offset, "range_min": low, "range_max": high}
        calibration[joint] = values
    return calibration


CALIBRATED = {"homing_offset": "Homing_Offset", "range_min": "Min_Position_Limit", "range_max": "Max_Position_Limit"}


def load_calibration(path: str) -> dict[str, dict[str, int]]:
    """A calibration file of LeRobot's. Raises SO101Error."""
    try:
        motors = strict_json(Path(path).read_text(encoding="utf-8"))
        calibration = {joint: {name: motors[joint][name] for name in CALIBRATED} for joint in JOINTS}
        for motor in calibration.values():
            offset, low, high = (motor[name] for name in CALIBRATED)
            if (
                {type(offset), type(low), type(high)} != {int}
                or not abs(offset) < MIDDLE
                or not 0 <= low < high < TICKS_PER_TURN
            ):
                raise ValueError("numbers that no servo can store")
    except OSError as error:
        raise SO101Error(f"--calibration {path}: cannot be read ({error.strerror}); name another file") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SO101Error(f"--calibration {path}: is not a LeRobot calibration of an SO-101 ({error!r:.100})") from error
    return calibration


# ---------------------------------------------------------------------------------------------------------------------
# the arm


HANDS = ("none", "still", "swing", "sweep")


class Hand:
    """A hand that moves the limp arm.

    Args:
        name: "still" holds it; "swing" moves every joint to and fro; "sweep" holds the middle, as lerobot-calibrate
            asks first, and from SWEEP_WAIT_S after a homing offset was written moves every joint but wrist_roll
            between its end stops.
        start_rad: where it takes the arm, (6,).
        time_s: when.
    """

    def __init__(self, name: str, start_rad: np.ndarray, time_s: float):
        self.name, self.start_rad, self.time_s = name, start_rad, time_s
        self.homed_s: float | None = None  # when a homing offset was written last

    def joints_rad(self, time_s: float) -> np.ndarray:
        """Where the arm is, (6,)."""
        elapsed = time_s - self.time_s
        goal = self._goal(max(elapsed - HAND_WAIT_S, 0.0), time_s)
        return self.start_rad + min(elapsed / HAND_WAIT_S, 1.0) * (goal - self.start_rad)

    def _goal(self, elapsed: float, time_s: float) -> np.ndarray:
        if self.name == "still":
            return self.start_rad
        if self.name == "swing":
            return SWING_CENTER_RAD + SWING_RAD * np.sin(2 * np.pi * elapsed / np.array(SWING_S))
        since = 0.0 if self.homed_s is None else max(time_s - self.homed_s - SWEEP_WAIT_S, 0.0)
        half = np.deg2rad(np.ptp(JOINT_RANGE_DEG, axis=1)) / 2
        half[WRIST_ROLL] = 0.0
        return MIDDLE_RAD + half * np.sin(2 * np.pi * since / SWEEP_S)


class VirtualArm:
    """A SimulatedArm whose servos have registers and answer packets.

    Args:
        flaws: what is wrong with it.
        tape_margin: m between sheet and tape.
        servo: "12V" or "7.4V".
        start_rad: where the arm rests at the start, (6,).
        calibration: by joint, what the EEPROM holds of it; None: that of the factory.
        seed: seed of the sheet's start, the look, and the random faults.
    """

    def __init__(
        self,
        flaws: Flaws | None = None,
        tape_margin: float = TAPE_MARGIN_M,
        servo: str = "12V",
        start_rad: np.ndarray = REST_RAD,
        calibration: dict[str, dict[str, int]] | None = None,
        seed: int = 0,
    ):
        flaws = flaws or Flaws()
        self.arm = SimulatedArm(Task(firmware_p=FIRMWARE_P, tape_margin=tape_margin), flaws, False, JOINT_RANGE_DEG)
        self.start_rad, (self.volts, self.power) = start_rad, SERVOS[servo]
        self.stall_n_m = self.power * self.arm.model.actuator_forcerange[:, 1]
        self.servos = [Servo(number + 1) for number in range(ACT_DIM)]
        self.bus, self.reader = Bus(self.servos), Reader()
        for joint, servo_ in zip(JOINTS, self.servos):
            for name, register in CALIBRATED.items():
                servo_.set(register, (calibration or factory_calibration())[joint][name])
        self.rng = np.random.default_rng(seed)
        self.faults: list[Fault] = []
        self.hand: Hand | None = None
        self.age_s, self.first_torque_s = 0.0, np.inf  # simulated time since the start; when a torque was turned on
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start anew with another sheet: the arm at its start, all torques off. The EEPROM keeps its values."""
        for servo in self.servos:
            servo.set("Torque_Enable", 0)
        self.arm.reset(seed, self.start_rad)
        self.seed = seed  # for the sheet's start and the look
        self.arm.strength, self.arm.max_torque_n_m = np.zeros((1, ACT_DIM)), np.zeros((1, ACT_DIM))
        self._target_rad = self.arm.target_rad
        if self.hand is not None:
            self.hand = Hand(self.hand.name, self.start_rad, 0.0)
        self._sense()

    # -- physics

    def _sense(self) -> None:
        """Let the servos measure everything."""
        raw = _raw_ticks(self.arm.encoders_rad)
        velocity, load = self.arm.velocity_rad_s / TICK_RAD, self.arm.torque_n_m / self.stall_n_m
        volts = next((fault.number for fault in self._active("voltage")), self.volts)
        hot = {fault.joint for fault in self._active("hot")}
        values = zip(self.servos, raw.tolist(), velocity.tolist(), load.tolist())
        for number, (servo, *sensed) in enumerate(values):
            servo.measure(*sensed, volts, HOT_CELSIUS if number in hot else ROOM_CELSIUS)

    def step(self) -> None:
        """One physics step."""
        seconds, arm = self.arm.timestep_s, self.arm
        unpowered = any(self._active("power"))
        silent = {fault.joint for fault in self._active("silent")}
        overloaded = {fault.joint for fault in self._active("overload")}
        for fault in self._active("eeprom"):
            servo = self.servos[fault.joint]
            servo.set("Homing_Offset", servo.get("Homing_Offset") + round(np.deg2rad(fault.number) / TICK_RAD))
            self.faults.remove(fault)
        target = arm.encoders_rad
        for number, (servo, raw) in enumerate(zip(self.servos, _raw_ticks(target).tolist())):
            servo.raw = raw
            servo.silent = unpowered or number in silent
            servo.overloaded |= number in overloaded
            if unpowered:
                servo.set("Torque_Enable", 0)
            servo.advance(seconds)
            on = servo.torque_on
            arm.strength[0, number] = on * self.power * servo.get("P_Coefficient") / FIRMWARE_P
            arm.max_torque_n_m[0, number] = servo.torque_share * self.stall_n_m[number]
            target[number] += on * servo.position_error * TICK_RAD
            if on and self.first_torque_s == np.inf:
                self.first_torque_s = self.age_s
        if self.hand is None:
            if np.abs(target - self._target_rad).max() > 1e-9:
                arm.command(target)
                self._target_rad = target
            arm.step()
        else:
            arm.place(self.hand.joints_rad(arm.time_s))
            arm.time_s, arm.count = arm.time_s + seconds, arm.count + 1
        self.age_s += seconds
        if arm.count % arm.arms.substeps == 0:
            self._sense()

    def _active(self, name: str) -> list[Fault]:
        """The faults of a name that have begun."""
        return [each for each in self.faults if each.name == name and (not each.at_s or self._began(each))]

    def _began(self, fault: Fault) -> bool:
        return self.age_s - self.first_torque_s >= fault.at_s

    def begun(self, name: str) -> Fault | None:
        """The first fault of a name that has begun."""
        return next(iter(self._active(name)), None)

    # -- the bus

    def receive(self, data: bytes, time_s: float) -> list[bytes]:
        """Answers to bytes that have arrived on the bus at time_s."""
        answers = []
        for packet in self.reader.feed(self._disturb(data), time_s):
            self._sense()
            jumps = [fault for fault in self._active("jump") if _reads_position(packet)]
            for fault in jumps:
                servo, ticks = self.servos[fault.joint], np.deg2rad(fault.number) / TICK_RAD
                servo.set("Present_Position", round(servo.position + ticks) % TICKS_PER_TURN)
                self.faults.remove(fault)
            homed = sum(servo.written["Homing_Offset"] for servo in self.servos)
            answers += [self._disturb(self._spoil(answer)) for answer in self.bus.handle(packet)]
            if self.hand is not None and sum(servo.written["Homing_Offset"] for servo in self.servos) > homed:
                self.hand.homed_s = self.arm.time_s
        return [answer for answer in answers if answer]

    def _disturb(self, data: bytes) -> bytes:
        """What is left of bytes on the bus: nothing if they are lost, maybe a flipped bit."""
        if not data:
            return data
        for fault in self._active("lost"):
            if self.rng.random() < fault.number:
                return b""
        for fault in self._active("corrupt"):
            if self.rng.random() < fault.number:
                return self._flip(data)
        return data

    def _spoil(self, answer: bytes) -> bytes:
        """What is left of an answer if its turn to be lost or wrong has come."""
        for name, spoilt in (("drop", lambda: b""), ("garble", lambda: self._flip(answer))):
            if fault := self.begun(name):
                self.faults.remove(fault)
                if fault.number > 1:
                    self.faults.append(fault._replace(number=fault.number - 1))
                return spoilt()
        return answer

    def _flip(self, data: bytes) -> bytes:
        """The same bytes with one bit changed."""
        broken, bit = bytearray(data), int(self.rng.integers(8 * len(data)))
        broken[bit // 8] ^= 1 << bit % 8
        return bytes(broken)

    # -- what tests and people ask

    def place(self, degrees: list[float]) -> None:
        """Put the joints at rest at true positions (6,), degrees."""
        low, high = JOINT_RANGE_DEG.T
        if len(degrees) != ACT_DIM or not all(low <= degrees) or not all(degrees <= high):
            raise SO101Error(f"place {degrees}: needs six degrees, from {low.tolist()} to {high.tolist()}")
        self.arm.place(np.deg2rad(degrees))
        if self.hand is not None:
            self.grasp(self.hand.name)  # where the arm is now
        self._sense()

    def grasp(self, name: str) -> None:
        """Let a hand take the arm, "none": let it go."""
        if name not in HANDS:
            raise SO101Error(f"hand {name}: known are {', '.join(HANDS)}")
        self.hand = None if name == "none" else Hand(name, self.arm.qpos[:ACT_DIM], self.arm.time_s)

    def picture(self) -> tuple[np.ndarray, int, int, bool, bool, float]:
        """What the camera needs to know, see Camera.show."""
        frozen, stalled, broken = (self.begun(name) for name in ("frozen", "stalled", "broken"))
        share = broken.number if broken else 0.0
        return self.arm.qpos, self.seed, self.arm.count, frozen is not None, stalled is not None, share

    def state(self) -> dict[str, Any]:
        """The ground truth, and what the bus has done."""
        self._sense()
        truth, written = self.arm.truth(), collections.Counter()
        for servo in self.servos:
            written.update(servo.written)
        servos = {}
        for joint, servo in zip(JOINTS, self.servos):
            servos[joint] = {name: servo.get(name) for name in REGISTERS}
            servos[joint]["errors"] = [text for bit, text in ERRORS.items() if servo.error & bit]
        return {
            "time_s": self.age_s,
            "joints_deg": dict(zip(JOINTS, np.rad2deg(truth["qpos"][:ACT_DIM]).tolist())),
            "tip_m": self.arm.arms.tip_m[0].tolist(),
            "torque_on": {joint: servo.torque_on for joint, servo in zip(JOINTS, self.servos)},
            "sheet": truth["sheet"].tolist(),
            "inside": truth["inside"],
            "instructions": dict(self.bus.counts),
            "writes": sum(written.values()),
            "written": dict(written),
            "servos": servos,
            "faults": [fault.name for fault in self.faults],
        }


def _raw_ticks(joints_rad: np.ndarray) -> np.ndarray:
    """The encoders' own positions, ticks, at joint positions (6,), rad, as they measure them."""
    return MOUNTED_TICKS + (joints_rad - MIDDLE_RAD) / TICK_RAD


def _reads_position(packet: Packet) -> bool:
    """Whether a packet asks for Present_Position."""
    if packet.instruction not in (READ, SYNC_READ) or len(packet.parameters) < 2:
        return False
    address, size = packet.parameters[:2]
    return address <= REGISTERS["Present_Position"].address < address + size


# ---------------------------------------------------------------------------------------------------------------------
# the port and the program


class Port:
    """A pseudo-terminal with a symbolic link to it.

    Args:
        link: path of the link. A link that an earlier virtual arm has left there is replaced.

    Raises:
        SO101Error: something else is there.
    """

    def __init__(self, link: str):
        self.link = Path(link)
        if os.path.islink(link) and os.readlink(link).startswith("/dev/") and not os.path.exists(link):
            os.unlink(link)  # its pseudo-terminal is gone
        if os.path.lexists(link):
            raise SO101Error(f"--port {link}: exists; remove it, stop the virtual arm that has it, or name another")
        self.fd, self._client_fd = os.openpty()  # open on both ends, so that clients may come and go
        tty.setraw(self._client_fd)
        settings = termios.tcgetattr(self._client_fd)
        settings[4] = settings[5] = termios.B1000000
        termios.tcsetattr(self._client_fd, termios.TCSANOW, settings)
        os.set_blocking(self.fd, False)
        self.name = os.ttyname(self._client_fd)
        try:
            os.symlink(self.name, link)
        except OSError as error:
            self.link = Path()
            self.close()
            raise SO101Error(f"--port {link}: cannot be made ({error.strerror}); name another path") from error

    def read(self) -> bytes:
        """What clients have sent."""
        try:
            return os.read(self.fd, 4096)
        except BlockingIOError:
            return b""

    def write(self, data: bytes) -> None:
        """Send to the clients. What they do not fetch is lost, as on a bus."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.fd, data)

    def close(self) -> None:
        """Pull the plug: the link goes, and clients get errors."""
        if os.path.islink(self.link) and os.readlink(self.link) == self.name:
            os.unlink(self.link)
        for fd in (self._client_fd, self.fd):
            os.close(fd)


class Program:
    """The loop: packets first, then commands, then physics.

    Args:
        virtual: the arm.
        link: path of the port.
        camera: None: without.
    """

    def __init__(self, virtual: VirtualArm, link: str, camera: Camera | None):
        self.virtual, self.link, self.camera = virtual, link, camera
        self.port: Port | None = Port(link)
        self.real_time = RealTime(virtual.step, virtual.arm.timestep_s, report_speed)
        self.outbox: collections.deque[tuple[float, bytes]] = collections.deque()  # when it is due, and what
        self._film_s = 0.0  # when the camera gets the next state
        self.stdin, self._line = _stdin_to_watch(), b""

    def run(self) -> None:
        """Serve until a signal raises Stop."""
        self.real_time.restart()
        while True:
            if self.virtual.begun("unplug"):
                self._unplug()
            elif self.port is None:
                self.port = Port(self.link)
            wait_s = self.real_time.wait_s()
            if self.outbox:
                wait_s = min(wait_s, max(self.outbox[0][0] - time.monotonic(), 0.0))
            watched = [self.port.fd] if self.port else []
            watched += [self.stdin] if self.stdin is not None else []
            ready, _, _ = select.select(watched, [], [], wait_s)
            if self.port and self.port.fd in ready:
                self._serve(self.port)
            self._send()
            if self.stdin is not None and self.stdin in ready:
                self._obey()
            self.real_time.advance()
            if self.camera and time.monotonic() >= self._film_s:
                self._film_s = time.monotonic() + 1 / CONTROL_HZ
                self.camera.show(*self.virtual.picture())

    def _serve(self, port: Port) -> None:
        now = time.monotonic()
        late = self.virtual.begun("latency")
        for answer in self.virtual.receive(port.read(), now):
            self.outbox.append((now + (late.number if late else 0.0), answer))

    def _send(self) -> None:
        due = b""
        while self.outbox and self.outbox[0][0] <= time.monotonic():
            due += self.outbox.popleft()[1]
        if due and self.port:
            self.port.write(due)

    def _unplug(self) -> None:
        if self.port:
            self.port.close()
            self.port = None
            self.outbox.clear()

    def _obey(self) -> None:
        """Answer the commands that have arrived on standard input."""
        try:
            data = os.read(self.stdin, 4096)
        except OSError as error:
            if error.errno != errno.EIO:  # the program runs in the background of its terminal
                raise
            data = b""
        if not data:
            self.stdin = None
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if words := line.decode(errors="replace").split():
                print(json.dumps(self._do(words)), flush=True)

    def _do(self, words: list[str]) -> dict[str, Any]:
        name, values, virtual = words[0], words[1:], self.virtual
        try:
            if name == "state" and not values:
                return virtual.state()
            if name == "clear" and not values:
                virtual.faults.clear()
                for servo in virtual.servos:
                    servo.overloaded = False
            elif name == "place":
                virtual.place([float(value) for value in values])
            elif name == "fault" and len(values) == 1:
                virtual.faults.append(parse_fault(values[0]))
            elif name == "hand" and len(values) == 1:
                virtual.grasp(values[0])
            elif words == ["sheet", "away"]:
                virtual.arm.lay_sheet(None)
            elif name in ("sheet", "reset") and len(values) == 1 and values[0].isdecimal():
                (virtual.arm.lay_sheet if name == "sheet" else virtual.reset)(int(values[0]))
            else:
                known = "state, sheet SEED, sheet away, reset SEED, place DEGREES (six), hand NAME, fault FAULT, clear"
                return {"error": f"{' '.join(words)}: is not one of {known}"}
        except (SO101Error, ValueError) as error:
            return {"error": str(error)}
        return {"done": " ".join(words)}

    def close(self) -> None:
        """Remove the link; clients get errors."""
        self._unplug()


def answer_first() -> None:
    """Ask for real-time scheduling, which usually only root gets: LeRobot gives up after 50 ms without an answer.

    The loop needs a few percent of a core. The camera, a process of its own, is scheduled as any other program.
    """
    if hasattr(os, "sched_setscheduler"):  # not on macOS
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def _stdin_to_watch() -> int | None:
    """The descriptor of standard input; None if there is none, or if it is a terminal that another program reads."""
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fd = sys.stdin.fileno()
        if not os.isatty(fd) or os.tcgetpgrp(fd) == os.getpgrp():
            return fd
    return None


@dataclasses.dataclass
class Args:
    """The flags."""

    port: str
    """path of the serial port to make, a symbolic link to a pseudo-terminal"""
    camera: int | None = None
    """port on 127.0.0.1 at which the camera's pictures are served over HTTP; 0: any free one; default: no camera"""
    camera_zmq: int | None = None
    """port on 127.0.0.1 at which LeRobot's cameras of type zmq get the pictures; default: not at all"""
    camera_size: tuple[int, int] = (480, 640)
    """height and width of the pictures, pixels"""
    visual_randomization: bool = False
    """draw colours, light and camera pose from the seed"""
    seed: int = 0
    """determines the sheet's pose at the start, the look and the random faults"""
    start: Literal["rest", "home"] = "rest"
    """pose of the limp arm at the start: folded (rest), or over the tape (home), from where it falls"""
    servo: Literal["12V", "7.4V"] = "12V"
    """variant of the servos; those for 7.4 V have 55 % of the torque and the gain"""
    hand: Literal["none", "still", "swing", "sweep"] = "none"
    """a hand that moves the arm: not at all; in slow swings, as a leader; to all end stops, for lerobot-calibrate"""
    fault: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a fault, as name[:joint][:number][@seconds after a torque was first turned on]; docs/virtual_arm.md lists them;
    can be repeated"""
    calibration: str | None = None
    """LeRobot's calibration file to put into the servos' EEPROM; default: the one that --write-calibration writes"""
    write_calibration: str | None = None
    """write LeRobot's calibration file of this arm there, .json"""
    tape_margin: float = TAPE_MARGIN_M
    """m between sheet and tape on every side"""
    flaws: Flaws = dataclasses.field(default_factory=Flaws)


def write_calibration(path: str) -> None:
    """Write LeRobot's calibration file of this arm. Raises SO101Error if another file is there, as a real arm's."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        if json.loads(Path(path).read_bytes()) == factory_calibration():
            return
    if os.path.lexists(path):
        raise SO101Error(
            f"--write-calibration {path}: exists, and may be of another arm; delete it, or name another place"
        )
    write_json(Path(path), factory_calibration())


def main() -> int:
    """Run the virtual arm until a signal; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(
        args,
        {
            "camera": (0, 65535),
            "camera_zmq": (1, 65535),
            "seed": (0, 2**32 - 1),
            "tape_margin": Task.RANGES["tape_margin"],
        },
    )
    check_flags(args.flaws, Flaws.RANGES)
    if not all(8 <= side <= 2048 for side in args.camera_size):
        raise SO101Error(f"--camera-size {args.camera_size}: both must be in [8, 2048]")
    if args.camera is None:
        check_unused(args, ("camera_size", "visual_randomization"), "needs --camera")
        check_unused(args.flaws, ("camera_turned", "picture_latency_s"), "needs --camera")
    check_output("--write-calibration", args.write_calibration, (".json",))
    if args.camera_zmq is not None and args.camera is None:
        raise SO101Error("--camera-zmq needs --camera: --camera 0 takes any free port")
    faults = [parse_fault(text) for text in args.fault]
    if args.write_calibration:
        write_calibration(args.write_calibration)
    calibration = load_calibration(args.calibration) if args.calibration else None
    start_rad = REST_RAD if args.start == "rest" else HOME_RAD
    virtual = VirtualArm(args.flaws, args.tape_margin, args.servo, start_rad, calibration, args.seed)
    virtual.faults += faults
    virtual.grasp(args.hand)
    with Stoppable():
        camera = program = None
        try:
            if args.camera is not None:
                look = tuple(args.camera_size), args.visual_randomization, args.flaws, args.tape_margin
                camera = Camera(args.camera, args.camera_zmq, *look)
                camera.wait()
            program = Program(virtual, args.port, camera)
            where = f", camera {camera.url}" if camera else ""
            print(f"ready: port {args.port} ({program.port.name}){where}; Ctrl+C ends", flush=True)
            answer_first()
            program.run()
        except Stop:
            pass
        finally:
            if program:
                program.close()
            if camera:
                camera.close()
    print(f"stopped: {args.port} is removed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
