"""The part of LeRobot that so101/lerobot_arm.py uses, on a virtual arm in virtual time, where LeRobot is not installed.

Packets go through the virtual arm's bus, with its faults, and are lost or refused as there: what `sync_read`, `read`,
`write` and `ping` raise is what LeRobot's FeetechMotorsBus raises (0.4.4 and 0.6.1). test_lerobot_arm.py runs the same
events with the real one where it is installed.
"""

from __future__ import annotations

import json
import sys
import termios
import types
from pathlib import Path
from typing import Any

from so101.feetech import (
    PING,
    READ,
    SYNC_READ,
    SYNC_WRITE,
    WRITE,
    Packet,
    Reader,
    encode,
    from_sign_magnitude,
    to_sign_magnitude,
)
from so101.feetech import REGISTERS as TABLE
from so101.virtual_arm import VirtualArm
from so101_sim.control import JOINTS, TICKS_PER_TURN

TIMEOUT_S = 0.05  # of LeRobot's bus, unless setPacketTimeout is replaced
ANSWER_S = 0.001  # what a packet and its answer take


class Time:
    """Virtual time: `sleep` lets the arm move. `on_sleep` is called each time before."""

    def __init__(self, virtual: VirtualArm):
        self.virtual, self.now_s, self.on_sleep = virtual, 100.0, lambda: None
        self._left_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.on_sleep()
        self._left_s += max(seconds, 0.0)
        self.now_s += max(seconds, 0.0)
        while self._left_s >= self.virtual.arm.timestep_s:
            self.virtual.step()
            self._left_s -= self.virtual.arm.timestep_s


class Port:
    """LeRobot's port_handler."""

    def __init__(self, time: Time, path: Path):
        self.time, self.path, self.is_using, self.timeout_s = time, path, False, TIMEOUT_S
        self.ser, self.is_open = self, False

    def setPacketTimeoutMillis(self, ms: float) -> None:
        self.timeout_s = ms / 1000

    def setPacketTimeout(self, length: int) -> None:
        self.timeout_s = TIMEOUT_S

    def reset_input_buffer(self) -> None:
        if self.time.virtual.begun("unplug"):
            raise termios.error(5, "Input/output error")  # what pyserial lets through

    def fileno(self) -> int:
        return self.file.fileno()

    def open(self) -> None:
        self.file, self.is_open = self.path.open("a"), True

    def close(self) -> None:
        self.file.close()
        self.is_open = False

    def ask(self, packet: Packet, answers: int) -> tuple[list[Packet], str]:
        """The answers to a packet, and what is wrong with them."""
        if self.is_using:
            return [], "[TxRxResult] Port is in use!"
        self.is_using = True
        if self.time.virtual.begun("unplug"):
            raise OSError(5, "Input/output error")
        received = self.time.virtual.receive(encode(packet), self.time.now_s)
        self.setPacketTimeout(0)
        late = self.time.virtual.begun("latency")
        self.time.sleep(min(late.number, self.timeout_s) if late else ANSWER_S)
        reader, packets = Reader(), []
        for data in received if not late or late.number < self.timeout_s else []:
            packets += reader.feed(data, 0.0)
        if len(packets) < answers:
            self.time.sleep(self.timeout_s)
        self.is_using = False
        return packets, "" if len(packets) >= answers else "[TxRxResult] There is no status packet!"


class PacketHandler:
    """LeRobot's packet_handler."""

    def ping(self, port: Port, number: int) -> tuple[int, int, int]:
        answers, wrong = port.ask(Packet(number, PING), 1)
        if wrong:
            return 0, -6, 0
        return 777, 0, answers[0].instruction


class Bus:
    """LeRobot's FeetechMotorsBus."""

    def __init__(self, port: Port, calibration: dict[str, Any]):
        self.port_handler, self.packet_handler, self.calibration = port, PacketHandler(), calibration
        self.motors = {joint: types.SimpleNamespace(id=number) for number, joint in enumerate(JOINTS, 1)}

    @property
    def is_connected(self) -> bool:
        return self.port_handler.is_open

    def connect(self, handshake: bool = True) -> None:
        assert not handshake
        self.port_handler.open()

    def disconnect(self, disable_torque: bool = True) -> None:
        assert not disable_torque
        self.port_handler.close()

    def ping(self, joint: str, num_retry: int = 0, raise_on_error: bool = False) -> int:
        answer = self._ask(joint, PING, b"", f"ping {joint}")
        return 777 if answer is not None else 0

    def _ask(self, joint: str, instruction: int, parameters: bytes, what: str) -> bytes:
        answers, wrong = self.port_handler.ask(Packet(self.motors[joint].id, instruction, parameters), 1)
        if wrong:
            raise ConnectionError(f"Failed to {what} after 1 tries. {wrong}")
        if answers[0].instruction:
            raise RuntimeError(f"Failed to {what} after 1 tries. [RxPacketError] Overload error!")
        return answers[0].parameters

    def read(self, name: str, joint: str, normalize: bool = True) -> int:
        assert not normalize
        register = TABLE[name]
        return _decode(name, self._ask(joint, READ, bytes([register.address, register.size]), f"read {name!r}"))

    def write(self, name: str, joint: str, value: int, normalize: bool = True) -> None:
        register = TABLE[name]
        self._ask(joint, WRITE, bytes([register.address]) + _encode(name, value), f"write {name!r}")

    def sync_read(self, name: str, normalize: bool = True) -> dict[str, float]:
        register, numbers = TABLE[name], [motor.id for motor in self.motors.values()]
        packet = Packet(0xFE, SYNC_READ, bytes([register.address, register.size, *numbers]))
        answers, wrong = self.port_handler.ask(packet, len(numbers))
        if wrong:
            raise ConnectionError(f"Failed to sync read {name!r} after 1 tries. {wrong}")
        values = {joint: _decode(name, answer.parameters) for joint, answer in zip(JOINTS, answers)}
        return {joint: self._degrees(joint, value) for joint, value in values.items()} if normalize else values

    def sync_write(self, name: str, values: dict[str, float]) -> None:
        register = TABLE[name]
        rows = [bytes([self.motors[joint].id]) + _encode(name, self._ticks(joint, values[joint])) for joint in values]
        self.port_handler.ask(Packet(0xFE, SYNC_WRITE, bytes([register.address, register.size]) + b"".join(rows)), 0)

    def _degrees(self, joint: str, ticks: int) -> float:
        low, high = self.calibration[joint].range_min, self.calibration[joint].range_max
        if joint == "gripper":
            return (min(max(ticks, low), high) - low) / (high - low) * 100
        return (ticks - (low + high) / 2) * 360 / (TICKS_PER_TURN - 1)

    def _ticks(self, joint: str, value: float) -> int:
        low, high = self.calibration[joint].range_min, self.calibration[joint].range_max
        if joint == "gripper":
            return int(min(max(value, 0), 100) / 100 * (high - low) + low)
        return int(value * (TICKS_PER_TURN - 1) / 360 + (low + high) / 2)


def _decode(name: str, data: bytes) -> int:
    value, sign_bit = int.from_bytes(data, "little"), TABLE[name].sign_bit
    return value if sign_bit is None else from_sign_magnitude(value, sign_bit)


def _encode(name: str, value: int) -> bytes:
    register = TABLE[name]
    stored = value if register.sign_bit is None else to_sign_magnitude(value, register.sign_bit)
    return stored.to_bytes(register.size, "little")


def install(monkeypatch: Any, time: Time, directory: Path) -> None:
    """Put the stub in LeRobot's place. Calibrations are directory/ID.json."""

    class Follower:
        def __init__(self, config: Any):
            self.calibration_fpath, self.calibration = directory / f"{config.id}.json", {}
            if self.calibration_fpath.is_file():
                motors = json.loads(self.calibration_fpath.read_text())
                self.calibration = {joint: types.SimpleNamespace(**motors[joint]) for joint in motors}
            self.bus = Bus(Port(time, directory / "port"), self.calibration)

    module = types.ModuleType("lerobot.robots.so_follower")
    module.SO101Follower, module.SO101FollowerConfig = Follower, lambda **given: types.SimpleNamespace(**given)
    for name in ("lerobot", "lerobot.robots"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lerobot.robots.so_follower", module)
