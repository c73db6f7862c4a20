"""Feetech's protocol, packet by packet, and what the registers of a servo do."""

import itertools

import numpy as np
import pytest

from so101.feetech import (
    ACTION,
    BROADCAST,
    OVERLOAD,
    PING,
    READ,
    REGISTERED_WRITE,
    REGISTERS,
    SYNC_READ,
    SYNC_WRITE,
    VOLTAGE,
    WRITE,
    Bus,
    Packet,
    Reader,
    Servo,
    encode,
    from_sign_magnitude,
    to_sign_magnitude,
)


@pytest.fixture
def bus() -> Bus:
    """Two servos with ids 1 and 2, at raw positions 1000 and 2000, with nothing to complain about."""
    servos = [Servo(1), Servo(2)]
    for servo in servos:
        servo.measure(1000.0 * servo.get("ID"), 0.0, 0.0, 12.0, 30.0)
    return Bus(servos)


def handle(bus: Bus, packet: Packet) -> list[Packet]:
    """The answers to a packet, decoded."""
    return Reader().feed(b"".join(bus.handle(packet)), 0.0)


def read(bus: Bus, number: int, name: str) -> int:
    """The register of a servo as the bus reads it, without its sign."""
    register = REGISTERS[name]
    (answer,) = handle(bus, Packet(number, READ, bytes([register.address, register.size])))
    return int.from_bytes(answer.parameters, "little")


def write(bus: Bus, number: int, name: str, value: int) -> list[Packet]:
    """The answers to a write."""
    register = REGISTERS[name]
    return handle(bus, Packet(number, WRITE, bytes([register.address]) + value.to_bytes(register.size, "little")))


# the examples of Feetech's protocol manual for ping, read, write and action
MANUAL = [
    ("FF FF 01 02 01 FB", Packet(1, PING)),
    ("FF FF 01 04 02 38 02 BE", Packet(1, READ, bytes([0x38, 2]))),
    ("FF FF FE 04 03 05 01 F4", Packet(BROADCAST, WRITE, bytes([5, 1]))),
    ("FF FF FE 02 05 FA", Packet(BROADCAST, ACTION)),
]


@pytest.mark.parametrize("text, packet", MANUAL)
def test_packets_have_the_form_of_the_manual(text, packet):
    assert encode(packet) == bytes.fromhex(text)
    assert Reader().feed(bytes.fromhex(text), 0.0) == [packet]


def test_packets_are_found_wherever_the_bytes_are_cut():
    packets = [Packet(1, PING), Packet(2, WRITE, b"\x2a\xff\xff\xff"), Packet(0xFD, READ, b"\x38\x02")]
    stream = b"\x00\xff" + b"".join(encode(packet) for packet in packets)
    for first, second in itertools.combinations(range(len(stream)), 2):
        reader = Reader()
        found = [
            each for part in (stream[:first], stream[first:second], stream[second:]) for each in reader.feed(part, 0)
        ]
        assert found == packets


def test_no_packet_with_a_wrong_bit_is_accepted_and_the_next_one_is_found():
    broken, good = encode(Packet(1, WRITE, b"\x28\x01")), Packet(2, PING)
    for bit in range(8 * len(broken)):
        wrong = bytearray(broken)
        wrong[bit // 8] ^= 1 << bit % 8
        reader = Reader()
        found = reader.feed(bytes(wrong), 0.0) + reader.feed(encode(good), 1.0)  # 1 s later: what was begun is over
        assert found == [good]


def test_a_packet_inside_a_broken_one_is_found():
    longer = bytearray(encode(Packet(1, PING)))
    longer[3] += 6  # its length: it now ends with the next packet
    assert Reader().feed(bytes(longer) + encode(Packet(2, PING)), 0.0) == [Packet(2, PING)]


def test_sign_and_magnitude():
    for bit, number in itertools.product((10, 11, 15), (-1023, -1, 0, 1, 1023)):
        assert from_sign_magnitude(to_sign_magnitude(number, bit), bit) == number
    assert to_sign_magnitude(-5, 11) == 0x805 and to_sign_magnitude(-5, 15) == 0x8005
    assert to_sign_magnitude(5000, 11) == 2047 and to_sign_magnitude(-5000, 11) == 4095  # clipped


def test_ping_answers_with_the_id_and_no_error_and_a_broadcast_from_all(bus):
    assert handle(bus, Packet(2, PING)) == [Packet(2, 0)]
    assert handle(bus, Packet(BROADCAST, PING)) == [Packet(1, 0), Packet(2, 0)]
    assert handle(bus, Packet(3, PING)) == []


def test_a_servo_is_an_sts3215_of_the_factory(bus):
    values = {"Model_Number": 777, "P_Coefficient": 32, "Max_Position_Limit": 4095, "Lock": 1, "Torque_Enable": 0}
    assert {name: read(bus, 1, name) for name in values} == values


def test_the_eeprom_is_written_only_without_lock_and_ram_always(bus):
    assert write(bus, 1, "P_Coefficient", 16) == [Packet(1, 0)]
    assert read(bus, 1, "P_Coefficient") == 32
    write(bus, 1, "Goal_Position", 1234)
    assert read(bus, 1, "Goal_Position") == 1234
    write(bus, 1, "Lock", 0)
    write(bus, 1, "P_Coefficient", 16)
    assert (read(bus, 1, "P_Coefficient"), read(bus, 2, "P_Coefficient")) == (16, 32)


def test_sensors_and_the_model_number_cannot_be_written(bus):
    write(bus, 1, "Lock", 0)
    before = bytes(bus.servos[0].memory)
    for name in ("Model_Number", "Present_Position", "Present_Load", "Status", "Present_Current"):
        write(bus, 1, name, 3)
    assert bytes(bus.servos[0].memory) == before


def test_the_id_can_be_changed(bus):
    write(bus, 2, "Lock", 0)
    write(bus, 2, "ID", 7)
    assert handle(bus, Packet(2, PING)) == [] and handle(bus, Packet(7, PING)) == [Packet(7, 0)]


def test_present_position_is_the_encoder_minus_the_homing_offset_within_a_turn(bus):
    servo = bus.servos[0]
    servo.set("Homing_Offset", -100)
    assert read(bus, 1, "Homing_Offset") == 0x800 + 100
    for raw, position in ((1000.0, 1100), (4000.4, 4), (-200.0, 3996), (3995.6, 0)):
        servo.measure(raw, 0.0, 0.0, 12.0, 30.0)
        assert read(bus, 1, "Present_Position") == position


def test_velocity_load_and_current_have_their_signs_and_units(bus):
    bus.servos[0].measure(0.0, -50.0, -0.25, 7.4, 41.0)
    assert read(bus, 1, "Present_Velocity") == 0x8000 + 50
    assert read(bus, 1, "Present_Load") == 0x400 + 250
    assert read(bus, 1, "Present_Voltage") == 74 and read(bus, 1, "Present_Temperature") == 41
    assert 0.0065 * read(bus, 1, "Present_Current") == pytest.approx(2.7 / 4, rel=0.01)  # A, of 2.7 A when stalled
    assert read(bus, 1, "Moving") == 1


def test_128_in_torque_enable_makes_the_present_position_the_middle(bus):
    servo = bus.servos[0]
    for raw in (1000.0, 3900.0, 2048.0):
        servo.measure(raw, 0.0, 0.0, 12.0, 30.0)
        write(bus, 1, "Torque_Enable", 128)
        servo.measure(raw, 0.0, 0.0, 12.0, 30.0)
        assert (read(bus, 1, "Present_Position"), read(bus, 1, "Torque_Enable")) == (2048, 0)


def test_sync_read_answers_in_the_order_of_the_request_and_leaves_out_who_is_silent(bus):
    request = Packet(BROADCAST, SYNC_READ, bytes([56, 2, 2, 1]))
    assert handle(bus, request) == [
        Packet(2, 0, (2000).to_bytes(2, "little")),
        Packet(1, 0, (1000).to_bytes(2, "little")),
    ]
    bus.servos[1].silent = True
    assert [answer.id for answer in handle(bus, request)] == [1]


def test_sync_write_is_not_answered_and_reaches_each_servo(bus):
    parameters = bytes([42, 2, 1, 0xE8, 0x03, 2, 0xD0, 0x07])
    assert handle(bus, Packet(BROADCAST, SYNC_WRITE, parameters)) == []
    assert [servo.get("Goal_Position") for servo in bus.servos] == [1000, 2000]
    assert bus.servos[0].written == {"Goal_Position": 1}
    handle(bus, Packet(BROADCAST, SYNC_WRITE, parameters[:-1] + b"\x00\x00"))  # does not fit its length
    assert bus.servos[1].get("Goal_Position") == 2000


def test_a_registered_write_waits_for_the_action(bus):
    for number in (1, 2):
        assert handle(bus, Packet(number, REGISTERED_WRITE, b"\x2a\x05\x00")) == [Packet(number, 0)]
    assert [servo.get("Goal_Position") for servo in bus.servos] == [0, 0]
    assert handle(bus, Packet(BROADCAST, ACTION)) == []
    assert [servo.get("Goal_Position") for servo in bus.servos] == [5, 5]
    write(bus, 1, "Goal_Position", 9)
    handle(bus, Packet(BROADCAST, ACTION))  # nothing is registered any more
    assert bus.servos[0].get("Goal_Position") == 9


def test_a_broadcast_write_reaches_all_and_is_not_answered(bus):
    assert handle(bus, Packet(BROADCAST, WRITE, b"\x28\x01")) == []
    assert [servo.get("Torque_Enable") for servo in bus.servos] == [1, 1]


def test_instructions_are_counted_by_name(bus):
    for packet in (Packet(1, PING), Packet(1, READ, b"\x38\x02"), Packet(9, PING), Packet(1, 0x55)):
        bus.handle(packet)
    assert bus.counts == {"ping": 2, "read": 1}


# ---------------------------------------------------------------------------------------------------------------------
# what the firmware does with the registers


def test_turning_the_torque_on_holds_the_present_position(bus):
    servo = bus.servos[0]
    servo.set("Goal_Position", 3000)
    write(bus, 1, "Torque_Enable", 1)
    servo.advance(0.01)
    assert servo.torque_on and servo.position_error == 0
    write(bus, 1, "Goal_Position", 1300)
    servo.advance(0.01)
    assert servo.position_error == 300


def test_goals_end_at_the_position_limits(bus):
    servo = bus.servos[0]
    servo.set("Min_Position_Limit", 900)
    servo.set("Max_Position_Limit", 1100)
    for goal, error in ((0, -100), (4000, 100), (950, -50)):
        servo.set("Goal_Position", goal)
        servo.advance(0.01)
        assert servo.position_error == error


def test_goal_velocity_limits_the_speed_of_the_set_point(bus):
    servo = bus.servos[0]
    write(bus, 1, "Torque_Enable", 1)
    servo.set("Goal_Velocity", 100)
    servo.set("Goal_Position", 1200)
    for _ in range(10):
        servo.advance(0.1)
    assert servo.position_error == pytest.approx(100)


def test_any_mode_but_position_is_limp(bus):
    servo = bus.servos[0]
    write(bus, 1, "Torque_Enable", 1)
    servo.set("Operating_Mode", 1)
    assert not servo.torque_on


def test_a_voltage_outside_its_limits_is_in_every_answer(bus):
    bus.servos[0].measure(0.0, 0.0, 0.0, 3.5, 30.0)
    assert handle(bus, Packet(1, PING)) == [Packet(1, VOLTAGE)]
    assert handle(bus, Packet(BROADCAST, SYNC_READ, bytes([62, 1, 1, 2]))) == [
        Packet(1, 1, b"\x23"),
        Packet(2, 0, b"\x78"),
    ]
    assert read(bus, 1, "Status") == VOLTAGE


def test_heat_makes_limp(bus):
    write(bus, 1, "Torque_Enable", 1)
    bus.servos[0].measure(0.0, 0.0, 0.0, 12.0, 71.0)
    assert not bus.servos[0].torque_on


@pytest.mark.parametrize(
    "load, seconds, overloaded", [(0.85, 2.1, True), (-0.85, 2.1, True), (0.85, 1.9, False), (0.7, 9, False)]
)
def test_a_motor_that_is_strained_for_its_protection_time_is_overloaded(bus, load, seconds, overloaded):
    servo = bus.servos[0]
    write(bus, 1, "Torque_Enable", 1)
    for _ in range(round(seconds / 0.1)):
        servo.measure(1000.0, 0.0, load, 12.0, 30.0)
        servo.advance(0.1)
    assert servo.overloaded == overloaded
    assert servo.torque_share == (0.2 if overloaded else 1.0)
    assert handle(bus, Packet(1, PING)) == [Packet(1, OVERLOAD * overloaded)]
    write(bus, 1, "Torque_Enable", 0)
    assert not servo.overloaded


def test_the_smaller_torque_limit_counts(bus):
    servo = bus.servos[0]
    for most, limit, share in ((500, 1000, 0.5), (1000, 300, 0.3)):
        servo.set("Max_Torque_Limit", most)
        servo.set("Torque_Limit", limit)
        np.testing.assert_allclose(servo.torque_share, share)
