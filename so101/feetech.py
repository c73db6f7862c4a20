"""Feetech's serial protocol and the registers of STS3215 servos, without input and output of its own.

A packet is FF FF, id, length, instruction, parameters, checksum; an answer has an error byte in place of the
instruction. Words are little-endian. Addresses and units are those of Feetech's memory table of the STS series, which
LeRobot's `motors/feetech/tables.py` follows (0.4.4 and 0.6.1). Protection is stricter than Feetech's manual describes:
a write to the EEPROM while Lock is 1 changes nothing, where some firmware keeps it until the power goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from so101_sim.control import TICKS_PER_TURN

PING, READ, WRITE, REGISTERED_WRITE, ACTION, SYNC_READ, SYNC_WRITE = 1, 2, 3, 4, 5, 0x82, 0x83
INSTRUCTIONS = {
    PING: "ping", READ: "read", WRITE: "write", REGISTERED_WRITE: "registered_write", ACTION: "action",
    SYNC_READ: "sync_read", SYNC_WRITE: "sync_write",
}  # fmt: skip
BROADCAST = 0xFE
HEADER = b"\xff\xff"
PACKET_GAP_S = 0.02  # a packet that is still incomplete after this long is discarded
# bits of the error byte
VOLTAGE, OVERHEATED, OVERLOAD = 1, 4, 32
ERRORS = {VOLTAGE: "voltage", OVERHEATED: "overheated", OVERLOAD: "overload"}
MODEL_NUMBER = 777  # STS3215
FIRMWARE = (3, 10)
EEPROM_END = 40  # registers below it survive a power cut
SET_MIDDLE = 128  # written to Torque_Enable: the present position becomes 2048
MIDDLE = TICKS_PER_TURN // 2
STALL_CURRENT = 2.7 / 0.0065  # STS3215 at 12 V: 2.7 A (Feetech's data sheet), in units of 6.5 mA


class Register(NamedTuple):
    """Where a value lies in a servo's memory."""

    address: int
    size: int  # bytes
    sign_bit: int | None = None  # sign and magnitude; None: unsigned


REGISTERS = {
    "Firmware_Major_Version": Register(0, 1), "Firmware_Minor_Version": Register(1, 1), "Model_Number": Register(3, 2),
    "ID": Register(5, 1), "Baud_Rate": Register(6, 1), "Return_Delay_Time": Register(7, 1),
    "Response_Status_Level": Register(8, 1), "Min_Position_Limit": Register(9, 2),
    "Max_Position_Limit": Register(11, 2), "Max_Temperature_Limit": Register(13, 1),
    "Max_Voltage_Limit": Register(14, 1), "Min_Voltage_Limit": Register(15, 1), "Max_Torque_Limit": Register(16, 2),
    "P_Coefficient": Register(21, 1), "D_Coefficient": Register(22, 1), "I_Coefficient": Register(23, 1),
    "Protection_Current": Register(28, 2), "Homing_Offset": Register(31, 2, 11), "Operating_Mode": Register(33, 1),
    "Protective_Torque": Register(34, 1), "Protection_Time": Register(35, 1), "Overload_Torque": Register(36, 1),
    "Torque_Enable": Register(40, 1), "Acceleration": Register(41, 1), "Goal_Position": Register(42, 2, 15),
    "Goal_Time": Register(44, 2), "Goal_Velocity": Register(46, 2, 15), "Torque_Limit": Register(48, 2),
    "Lock": Register(55, 1), "Present_Position": Register(56, 2, 15), "Present_Velocity": Register(58, 2, 15),
    "Present_Load": Register(60, 2, 10), "Present_Voltage": Register(62, 1), "Present_Temperature": Register(63, 1),
    "Status": Register(65, 1), "Moving": Register(66, 1), "Present_Current": Register(69, 2),
    "Maximum_Acceleration": Register(85, 1),
}  # fmt: skip
MEMORY_BYTES = 256
READ_ONLY = {*range(5), *range(56, 72)}  # addresses
FACTORY = {
    "Firmware_Major_Version": FIRMWARE[0], "Firmware_Minor_Version": FIRMWARE[1], "Model_Number": MODEL_NUMBER,
    "Return_Delay_Time": 250, "Response_Status_Level": 1, "Max_Position_Limit": TICKS_PER_TURN - 1,
    "Max_Temperature_Limit": 70, "Max_Voltage_Limit": 140, "Min_Voltage_Limit": 40, "Max_Torque_Limit": 1000,
    "P_Coefficient": 32, "D_Coefficient": 32, "Protection_Current": 500, "Protective_Torque": 20,
    "Protection_Time": 200, "Overload_Torque": 80, "Torque_Limit": 1000, "Lock": 1,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# packets


class Packet(NamedTuple):
    """An instruction, or an answer with its error byte as `instruction`."""

    id: int
    instruction: int
    parameters: bytes = b""


def checksum(body: bytes) -> int:
    """Of the bytes from the id to the last parameter: their inverted sum."""
    return ~sum(body) & 0xFF


def encode(packet: Packet) -> bytes:
    """The bytes of a packet."""
    body = bytes([packet.id, len(packet.parameters) + 2, packet.instruction]) + packet.parameters
    return HEADER + body + bytes([checksum(body)])


class Reader:
    """Splits what arrives on a bus into packets. Noise and packets with a wrong checksum are dropped."""

    def __init__(self) -> None:
        self._buffer, self._time_s = bytearray(), 0.0

    def feed(self, data: bytes, time_s: float) -> list[Packet]:
        """The packets that are complete with these bytes, which arrived at time_s."""
        if time_s - self._time_s > PACKET_GAP_S:
            self._buffer.clear()
        buffer, packets, self._time_s = self._buffer, [], time_s
        buffer += data
        while (start := buffer.find(HEADER)) >= 0:
            del buffer[:start]
            if len(buffer) < 4:
                break
            length = buffer[3]
            if buffer[2] == 0xFF or length < 2:
                del buffer[0]
                continue
            if len(buffer) < length + 4:
                break
            body = bytes(buffer[2 : length + 3])
            if checksum(body) == buffer[length + 3]:
                packets.append(Packet(body[0], body[2], body[3:]))
                del buffer[: length + 4]
            else:
                del buffer[:2]  # a packet may begin inside the broken one
        return packets


def to_sign_magnitude(value: int, sign_bit: int) -> int:
    """A signed number as Feetech stores it; magnitudes that do not fit are clipped."""
    return min(abs(value), (1 << sign_bit) - 1) | (value < 0) << sign_bit


def from_sign_magnitude(stored: int, sign_bit: int) -> int:
    """Inverse of to_sign_magnitude."""
    magnitude = stored & ((1 << sign_bit) - 1)
    return -magnitude if stored >> sign_bit & 1 else magnitude


# ---------------------------------------------------------------------------------------------------------------------
# servos


class Servo:
    """The memory of one STS3215, and what its firmware does with it.

    Whoever simulates the motor calls `measure` with what the sensors see, then `advance`, and turns `position_error`
    with `gain` and `torque_share` into torque. Position mode only: in any other Operating_Mode the servo is limp.
    Acceleration and the I and D coefficients are stored without effect.

    Args:
        number: id on the bus.
    """

    def __init__(self, number: int):
        self.memory = bytearray(MEMORY_BYTES)
        self._values: dict[str, int] = {}  # decoded registers, until the bus writes
        for name, value in {**FACTORY, "ID": number}.items():
            self.set(name, value)
        self.raw = 0.0  # the encoder's own position, ticks
        self.setpoint = 0.0  # where the firmware's ramp towards Goal_Position is, ticks as in Present_Position
        self.silent = False  # neither hears nor answers
        self.overloaded, self._strained_s = False, 0.0
        self.written: Counter[str] = Counter()  # writes by register, also those without effect
        self.registered: tuple[int, bytes] | None = None

    def get(self, name: str) -> int:
        """The value of a register."""
        if (value := self._values.get(name)) is None:
            register = REGISTERS[name]
            value = int.from_bytes(self.memory[register.address : register.address + register.size], "little")
            value = value if register.sign_bit is None else from_sign_magnitude(value, register.sign_bit)
            self._values[name] = value
        return value

    def set(self, name: str, value: int) -> None:
        """Change a register, whether the bus may or not."""
        if self._values.pop(name, None) == value:
            self._values[name] = value
            return
        register = REGISTERS[name]
        stored = value if register.sign_bit is None else to_sign_magnitude(value, register.sign_bit)
        self.memory[register.address : register.address + register.size] = stored.to_bytes(register.size, "little")

    @property
    def position(self) -> float:
        """The position in [0, 4096), ticks, of which Present_Position is the whole part."""
        return (self.raw - self.get("Homing_Offset")) % TICKS_PER_TURN

    @property
    def torque_on(self) -> bool:
        """Whether the motor is driven."""
        return self.get("Torque_Enable") == 1 and self.get("Operating_Mode") == 0 and not self.error & OVERHEATED

    @property
    def error(self) -> int:
        """The error byte."""
        volts, hot = self.get("Present_Voltage"), self.get("Present_Temperature") >= self.get("Max_Temperature_Limit")
        fits = self.get("Min_Voltage_Limit") <= volts <= self.get("Max_Voltage_Limit")
        return VOLTAGE * (not fits) | OVERHEATED * hot | OVERLOAD * self.overloaded

    @property
    def position_error(self) -> float:
        """From the present position to the set-point, ticks."""
        return self.setpoint - self.position

    @property
    def torque_share(self) -> float:
        """The largest torque, as a share of the stall torque."""
        share = min(self.get("Max_Torque_Limit"), self.get("Torque_Limit")) / 1000
        return min(share, self.get("Protective_Torque") / 100) if self.overloaded else share

    def measure(self, raw: float, velocity: float, load: float, volts: float, celsius: float) -> None:
        """Take what the sensors see.

        Args:
            raw: the encoder's position, ticks.
            velocity: ticks/s.
            load: torque as a share of the stall torque, -1 to 1.
            volts, celsius: voltage of the supply, temperature of the motor.
        """
        self.raw = raw
        self.set("Present_Position", round(self.position) % TICKS_PER_TURN)
        self.set("Present_Velocity", round(velocity))
        self.set("Present_Load", round(1000 * load))
        self.set("Present_Voltage", round(10 * volts))
        self.set("Present_Temperature", round(celsius))
        self.set("Present_Current", round(STALL_CURRENT * abs(load)))
        self.set("Moving", int(abs(velocity) > 5))
        self.set("Status", self.error)

    def advance(self, seconds: float) -> None:
        """Let time pass: the set-point ramps with Goal_Velocity, and a strained motor counts as overloaded in the end.

        An overload ends when the torque is turned off.
        """
        low, high = self.get("Min_Position_Limit"), self.get("Max_Position_Limit")
        goal = self.get("Goal_Position")
        goal = min(max(goal, low), high) if (low, high) != (0, 0) else goal
        if (speed := abs(self.get("Goal_Velocity"))) == 0:
            self.setpoint = goal
        else:
            self.setpoint += min(max(goal - self.setpoint, -speed * seconds), speed * seconds)
        strained = abs(self.get("Present_Load")) >= 10 * self.get("Overload_Torque") and self.torque_on
        self._strained_s = self._strained_s + seconds if strained else 0.0
        if self._strained_s >= self.get("Protection_Time") / 100:
            self.overloaded = True

    # -- what the bus does

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the memory."""
        return bytes(self.memory[address : address + size])

    def write(self, address: int, data: bytes) -> None:
        """Write as the bus does: read-only registers, and the EEPROM while Lock is 1, keep their values."""
        was_on, locked = self.get("Torque_Enable") == 1, self.get("Lock") == 1
        for at, value in enumerate(data, address):
            if at < MEMORY_BYTES and at not in READ_ONLY and not (locked and at < EEPROM_END):
                self.memory[at] = value
        self._values.clear()
        for name, register in REGISTERS.items():
            if address <= register.address < address + len(data):
                self.written[name] += 1
        if self.get("Torque_Enable") == SET_MIDDLE:
            offset = round(self.raw) - MIDDLE
            self.set("Homing_Offset", (offset + MIDDLE) % TICKS_PER_TURN - MIDDLE)
            self.set("Torque_Enable", int(was_on))
        is_on = self.get("Torque_Enable") == 1
        if is_on and not was_on:  # the arm stays where it is
            self.set("Goal_Position", int(self.position))
            self.setpoint = self.position
        if not is_on:
            self.overloaded, self._strained_s = False, 0.0


class Bus:
    """The servos on one bus.

    Args:
        servos: in the order in which they answer a broadcast.
    """

    def __init__(self, servos: Iterable[Servo]):
        self.servos = list(servos)
        self.counts: Counter[str] = Counter()  # instructions by name

    def _at(self, number: int) -> list[Servo]:
        """The servos that an id addresses."""
        return [each for each in self.servos if number in (each.get("ID"), BROADCAST) and not each.silent]

    def handle(self, packet: Packet) -> list[bytes]:
        """Do what a packet says; returns the answers, in their order. Unknown instructions have none."""
        if packet.instruction not in INSTRUCTIONS:
            return []
        self.counts[INSTRUCTIONS[packet.instruction]] += 1
        handlers = {SYNC_READ: self._sync_read, SYNC_WRITE: self._sync_write}
        if packet.instruction in handlers:
            return handlers[packet.instruction](packet.parameters)
        broadcast, answers = packet.id == BROADCAST, []
        for servo in self._at(packet.id):
            number, data, parameters = servo.get("ID"), b"", packet.parameters
            if packet.instruction == READ:
                if broadcast or len(parameters) != 2:
                    continue
                data = servo.read(*parameters)
            elif packet.instruction in (WRITE, REGISTERED_WRITE) and len(parameters) > 1:
                if packet.instruction == WRITE:
                    servo.write(parameters[0], parameters[1:])
                else:
                    servo.registered = parameters[0], parameters[1:]
            elif packet.instruction == ACTION and servo.registered:
                servo.write(*servo.registered)
                servo.registered = None
            told = packet.instruction in (PING, READ) or (servo.get("Response_Status_Level") and not broadcast)
            if told:
                answers.append(encode(Packet(number, servo.error, data)))
        return answers

    def _sync_read(self, parameters: bytes) -> list[bytes]:
        if len(parameters) < 3:
            return []
        address, size, *numbers = parameters
        servos = [servo for number in numbers for servo in self._at(number) if number != BROADCAST]
        return [encode(Packet(servo.get("ID"), servo.error, servo.read(address, size))) for servo in servos]

    def _sync_write(self, parameters: bytes) -> list[bytes]:
        if len(parameters) < 2 or (len(parameters) - 2) % (parameters[1] + 1):
            return []
        address, size = parameters[:2]
        for start in range(2, len(parameters), size + 1):
            for servo in self._at(parameters[start]):
                servo.write(address, parameters[start + 1 : start + 1 + size])
        return []
