"""The virtual arm: its physics and faults without a process, and the program with its port, camera and commands."""

import io
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import mujoco
import numpy as np
import pytest
from PIL import Image
from virtual import VirtualProcess

from so101 import simulated_arm, virtual_arm
from so101.feetech import BROADCAST, PING, READ, REGISTERS, SYNC_READ, WRITE, Packet, Reader, encode
from so101.simulated_arm import Flaws, RealTime
from so101.virtual_arm import (
    FAULTS,
    JOINT_RANGE_DEG,
    TICK_RAD,
    Port,
    VirtualArm,
    factory_calibration,
    load_calibration,
    parse_fault,
)
from so101_env import Task
from so101_sim.control import GRIPPER, JOINTS, read_calibration, to_rad
from so101_sim.errors import SO101Error

SHOULDER_LIFT, ELBOW_FLEX = 1, 2
ABOVE_DEG = [0.0, -20.0, 20.0, 60.0, 0.0, 0.0]  # well above the table
READ_POSITIONS = Packet(BROADCAST, SYNC_READ, bytes([56, 2, 1, 2, 3, 4, 5, 6]))


def write_to(virtual: VirtualArm, name: str, value: int, joints: range | list[int] = range(6)) -> None:
    """Write a register of joints over the bus."""
    register = REGISTERS[name]
    for joint in joints:
        data = bytes([register.address]) + value.to_bytes(register.size, "little")
        virtual.receive(encode(Packet(joint + 1, WRITE, data)), 0.0)


def run(virtual: VirtualArm, seconds: float) -> np.ndarray:
    """Let time pass; returns the true joint positions (6,), degrees."""
    for _ in range(round(seconds / virtual.arm.timestep_s)):
        virtual.step()
    return np.rad2deg(virtual.arm.qpos[:6])


def positions(virtual: VirtualArm) -> dict[int, int]:
    """Present_Position by id, as a sync read returns it."""
    answers = Reader().feed(b"".join(virtual.receive(encode(READ_POSITIONS), 0.0)), 0.0)
    return {answer.id: int.from_bytes(answer.parameters, "little") for answer in answers}


def placed(**arguments) -> VirtualArm:
    """A virtual arm above the table, at P = 32."""
    virtual = VirtualArm(**arguments)
    virtual.place(ABOVE_DEG)
    return virtual


# ---------------------------------------------------------------------------------------------------------------------
# real time


class SlowMachine:
    """A clock, and a simulation whose every step takes this long on it."""

    def __init__(self, step_s: float):
        self.now, self.step_s, self.steps, self.lines = 100.0, step_s, 0, []
        self.real_time = RealTime(self.step, 0.005, self.lines.append, lambda: self.now)

    def step(self) -> None:
        self.steps, self.now = self.steps + 1, self.now + self.step_s


def test_a_fast_machine_keeps_real_time_and_says_nothing():
    machine = SlowMachine(0.0001)
    while machine.now < 120.0:
        machine.now += machine.real_time.wait_s()
        machine.real_time.advance()
    assert machine.steps == pytest.approx(20.0 / 0.005, abs=2)
    assert not machine.lines


def test_a_pause_is_made_up_for_in_turns_between_which_requests_are_answered():
    machine = SlowMachine(0.0005)
    machine.now += 0.08
    turns = 0
    while not machine.real_time.wait_s():
        before = machine.now
        machine.real_time.advance()
        turns += 1
        assert machine.now - before <= RealTime.TURN_S + machine.step_s
    assert turns > 1 and machine.steps == pytest.approx((machine.now - 100.0) / 0.005, abs=2)


def test_a_slow_machine_falls_behind_but_each_turn_stays_short():
    machine = SlowMachine(0.02)  # four times as long as what it simulates
    while machine.now < 120.0:
        before = machine.now
        machine.real_time.advance()
        assert machine.now - before <= RealTime.TURN_S + machine.step_s
        machine.now += 0.001  # a request
    assert machine.steps * 0.005 == pytest.approx(20.0 / 4, rel=0.1)
    assert len(machine.lines) == 3  # one every REPORT_S
    assert all(" runs at 24 % of real time" in line for line in machine.lines)
    machine.step_s = 0.0  # the other programs have ended: what is made up for is bounded
    steps = machine.steps
    while not machine.real_time.wait_s():
        machine.real_time.advance()
    assert (machine.steps - steps) * 0.005 <= RealTime.MAX_LAG_S + 0.01


def test_the_simulated_arm_of_drive_answers_between_its_steps(monkeypatch):
    """Also where every step takes five times as long as what it simulates."""
    steps = []

    def slow_step(arm):
        steps.append(time.sleep(0.02))

    monkeypatch.setattr(simulated_arm.SimulatedArm, "step", slow_step)
    monkeypatch.setattr(simulated_arm, "film", lambda *arguments: None)
    ours, theirs = multiprocessing.Pipe()
    process = threading.Thread(target=simulated_arm._run_arm, args=(theirs, Task(), False, (24, 32), None), daemon=True)
    process.start()
    for _ in range(10):
        ours.send(("read", None))
        assert ours.poll(20.0), "no answer"
        ours.recv()
    ours.close()
    process.join(20.0)
    assert not process.is_alive() and steps


# ---------------------------------------------------------------------------------------------------------------------
# physics


def test_a_limp_arm_falls_and_one_under_torque_holds():
    limp, held = placed(flaws=Flaws(latency_s=0.1)), placed()
    write_to(held, "Torque_Enable", 1)
    fell, stayed = run(limp, 1.5) - ABOVE_DEG, run(held, 1.5) - ABOVE_DEG
    assert fell[SHOULDER_LIFT] > 10 and limp.arm.arms.tip_m[0, 2] < 0.02
    assert np.abs(stayed).max() < 5 and held.arm.arms.tip_m[0, 2] > 0.05
    assert np.abs(limp.arm.torque_n_m).max() < 1e-9


def test_each_joint_has_its_own_torque():
    virtual = placed()
    write_to(virtual, "Torque_Enable", 1, [SHOULDER_LIFT])
    moved = run(virtual, 1.5) - ABOVE_DEG
    assert abs(moved[SHOULDER_LIFT]) < 5 and moved[ELBOW_FLEX] > 20


def test_the_gain_is_proportional_to_p_and_to_the_servo():
    sags = {}
    for name, p, arguments in (
        ("p32", 32, {}), ("p16", 16, {}), ("small", 32, {"servo": "7.4V"}), ("weak", 32, {"flaws": Flaws(gain=0.5)}),
    ):  # fmt: skip
        virtual = placed(**arguments)
        write_to(virtual, "Lock", 0)
        write_to(virtual, "P_Coefficient", p)
        write_to(virtual, "Torque_Enable", 1)
        load = virtual.servos[SHOULDER_LIFT]
        run(virtual, 2.0)
        # without the half degree of backlash: what the servo feels of its error
        sags[name] = virtual.servos[SHOULDER_LIFT].position_error * np.rad2deg(TICK_RAD) + 0.5
        assert -300 < load.get("Present_Load") < -50
    assert sags["p16"] / sags["p32"] == pytest.approx(2, rel=0.1)
    assert sags["weak"] / sags["p32"] == pytest.approx(2, rel=0.1)
    assert sags["small"] / sags["p32"] == pytest.approx(30 / 16.5, rel=0.1)


def test_the_torque_limit_holds_no_arm_up():
    virtual = placed()
    write_to(virtual, "Torque_Limit", 30)
    write_to(virtual, "Torque_Enable", 1)
    assert (run(virtual, 1.5) - ABOVE_DEG)[SHOULDER_LIFT] > 10


def test_the_servos_go_to_their_goals_within_the_limits_of_the_calibration():
    virtual = placed()
    write_to(virtual, "Torque_Enable", 1)
    write_to(virtual, "Goal_Position", 0)  # far beyond
    pan = run(virtual, 5.0)[0]
    assert pan == pytest.approx(JOINT_RANGE_DEG[0, 0], abs=1)
    assert abs(positions(virtual)[1] - factory_calibration()["shoulder_pan"]["range_min"]) < 12


def test_an_offset_is_what_the_encoder_reads_too_much():
    offset = (0.0, -3.0, 2.0, 0.0, 0.0, 0.0)
    right, wrong = positions(placed()), positions(placed(flaws=Flaws(joint_offset_deg=offset)))
    for number in right:
        assert wrong[number] - right[number] == pytest.approx(np.deg2rad(offset[number - 1]) / TICK_RAD, abs=1)


def test_flaws_reach_the_model():
    virtual = VirtualArm(Flaws(finger_friction=0.4, table_friction=0.2, table_height_m=0.005, camera_turned=True))
    plain = VirtualArm()
    model, normal = virtual.arm.model, plain.arm.model
    assert model.pair("moving_finger_sheet").friction[0] == pytest.approx(0.4)
    assert model.pair("sheet_table").friction[0] == pytest.approx(0.2)
    np.testing.assert_allclose(virtual.arm.arms.tip_m[0] - plain.arm.arms.tip_m[0], [0, 0, -0.005], atol=1e-6)
    # the camera is turned about the tape's centre, at (0.27, 0), and so is the spot of the table that it looks at
    stands, looks_at = [], []
    for each in (model, normal):
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, each.camera("top").quat)
        position, ahead = each.camera("top").pos, -turn.reshape(3, 3)[:, 2]
        stands.append(position[0])
        looks_at.append((position - position[2] / ahead[2] * ahead)[0])
    assert np.mean(stands) == pytest.approx(0.27) and stands[0] < 0 < stands[1]
    assert np.mean(looks_at) == pytest.approx(0.27) and 0.2 < min(looks_at) < max(looks_at) < 0.35


def test_the_sheet_is_where_the_seed_puts_it_and_the_arm_stays():
    virtual, other = placed(seed=3), VirtualArm(seed=4)
    sheet, joints = virtual.state()["sheet"], virtual.state()["joints_deg"]
    virtual.arm.lay_sheet(4)
    assert virtual.state()["sheet"] == other.state()["sheet"] != sheet
    assert virtual.state()["joints_deg"] == joints


def test_the_same_packets_give_the_same_arm():
    def last(seed: int) -> tuple[dict, list[float]]:
        virtual = placed(seed=seed)
        virtual.faults = [parse_fault("lost:0.3"), parse_fault("corrupt:0.2")]
        counts = []
        for _ in range(30):
            write_to(virtual, "Torque_Enable", 1)
            counts.append(len(positions(virtual)))
            run(virtual, 0.02)
        return virtual.state(), counts

    assert last(5) == last(5) and last(5)[1] != last(6)[1]


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def test_the_factory_calibration_reads_as_true_joint_angles(tmp_path):
    """As LeRobot converts them: degrees from the middle of the range; the gripper from 0 at range_min to 100."""
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(factory_calibration()))
    ranges, motors = read_calibration(path), factory_calibration()
    for degrees in (ABOVE_DEG, [30.0, 50.0, -40.0, -60.0, 100.0, 70.0]):
        virtual = VirtualArm()
        virtual.place(degrees)
        ticks = np.array([positions(virtual)[number + 1] for number in range(6)])
        low, high = (np.array([motors[joint][end] for joint in JOINTS]) for end in ("range_min", "range_max"))
        values = (ticks - (low + high) / 2) * 360 / 4095
        values[GRIPPER] = 100 * (ticks - low)[GRIPPER] / (high - low)[GRIPPER]
        np.testing.assert_allclose(np.rad2deg(to_rad(values, "deg", ranges)), degrees, atol=0.15)


def test_the_eeprom_holds_a_calibration_that_is_given(tmp_path):
    calibration = factory_calibration()
    calibration["elbow_flex"] = {**calibration["elbow_flex"], "homing_offset": -321, "range_min": 700}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(calibration))
    servo = VirtualArm(calibration=load_calibration(str(path))).servos[ELBOW_FLEX]
    assert (servo.get("Homing_Offset"), servo.get("Min_Position_Limit")) == (-321, 700)
    calibration["elbow_flex"]["range_min"] = -700
    for text in ("{}", "[", '{"elbow_flex": 3}', json.dumps(calibration)):
        path.write_text(text)
        with pytest.raises(SO101Error, match="is not a LeRobot calibration"):
            load_calibration(str(path))


def test_the_hand_sweeps_all_joints_to_their_ends_after_the_homing():
    """As lerobot-calibrate has it: the middle first, the homing offsets, then all ranges but that of wrist_roll."""
    virtual = VirtualArm()
    virtual.grasp("sweep")
    run(virtual, 2.0)
    for number in range(6):
        middle = positions(virtual)[number + 1] + virtual.servos[number].get("Homing_Offset")
        write_to(virtual, "Lock", 0, [number])
        offset = (middle - 2047) & 0x7FF | (middle < 2047) << 11
        assert -2047 < middle - 2047 < 2047
        write_to(virtual, "Homing_Offset", abs(middle - 2047) | offset & 0x800, [number])
    low, high = np.full(6, 9999), np.zeros(6)
    for _ in range(300):
        run(virtual, 0.025)
        now = np.array([positions(virtual)[number + 1] for number in range(6)])
        low, high = np.minimum(low, now), np.maximum(high, now)
    motors = factory_calibration()
    for number, joint in enumerate(JOINTS):
        if joint == "wrist_roll":
            assert high[number] - low[number] <= 1
        else:
            found = [low[number], high[number]]
            assert found == pytest.approx([motors[joint][end] for end in ("range_min", "range_max")], abs=4)


# ---------------------------------------------------------------------------------------------------------------------
# faults


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("lots:0.1", "known: lost, corrupt"), ("lost", "write lost:NUMBER"), ("lost:2", "must be in"),
        ("silent", "write silent:JOINT"), ("silent:knee", "known: shoulder_pan"), ("jump:gripper", "write jump:JOINT"),
        ("unplug@soon", "write unplug"), ("unplug@-1", "write unplug"), ("lost:nan", "must be in"),
    ],
)  # fmt: skip
def test_a_fault_that_cannot_be_read_is_named(text, wrong):
    with pytest.raises(SO101Error, match=wrong) as error:
        parse_fault(text)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_each_fault_has_a_form_that_is_read():
    for name, kind in FAULTS.items():
        number = ":1" if kind.number else ""
        fault = parse_fault(name + ":gripper" * kind.joint + number + "@3")
        assert (fault.name, fault.joint, fault.at_s) == (name, GRIPPER if kind.joint else None, 3.0)


def test_a_silent_servo_neither_answers_nor_obeys_but_holds_its_goal():
    virtual = placed()
    write_to(virtual, "Torque_Enable", 1)
    virtual.faults = [parse_fault("silent:elbow_flex@1")]
    run(virtual, 0.9)
    assert len(positions(virtual)) == 6
    run(virtual, 0.2)
    assert [*positions(virtual)] == [1, 2, 4, 5, 6]
    write_to(virtual, "Torque_Enable", 0)
    assert [on for on in virtual.state()["torque_on"].values()] == [False, False, True, False, False, False]
    virtual.faults.clear()
    run(virtual, 0.01)
    assert len(positions(virtual)) == 6


def test_lost_and_corrupt_packets_have_their_shares():
    for fault, kept in (("lost:0.2", 0.8 * 0.8), ("corrupt:0.2", 0.8 * 0.8)):
        virtual = VirtualArm(seed=1)
        virtual.faults = [parse_fault(fault)]
        answered = []
        for _ in range(500):
            data = b"".join(virtual.receive(encode(Packet(1, PING)), 10.0 * len(answered)))
            answered.append(Reader().feed(data, 0.0) == [Packet(1, 0)])
        assert np.mean(answered) == pytest.approx(kept, abs=0.06)


def test_a_number_of_answers_is_lost_or_wrong_and_then_none():
    for name in ("drop", "garble"):
        virtual = placed()
        virtual.faults = [parse_fault(f"{name}:2")]
        assert [[*positions(virtual)] for _ in range(2)] == [[3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
        virtual.faults = [parse_fault(f"{name}:1")]
        write_to(virtual, "Torque_Enable", 1, [4])  # is done nevertheless
        assert virtual.servos[4].torque_on and len(positions(virtual)) == 6


def test_a_hand_leaves_nothing_behind():
    virtual = VirtualArm()
    virtual.grasp("swing")
    run(virtual, 3.0)
    assert not virtual.arm.pending
    virtual.grasp("none")
    before = virtual.arm.arms.tip_m[0, 2]
    run(virtual, 1.0)
    assert before - virtual.arm.arms.tip_m[0, 2] > 0.02  # it falls


def test_a_jump_is_in_one_reading():
    virtual = placed()
    before = positions(virtual)
    virtual.faults = [parse_fault("jump:shoulder_lift:83")]
    virtual.receive(encode(Packet(2, READ, bytes([62, 1]))), 0.0)  # the voltage
    jumped, after = positions(virtual), positions(virtual)
    assert jumped[2] - before[2] == pytest.approx(83 / 360 * 4096, abs=1)
    assert jumped == {**before, 2: jumped[2]} and after == before


def test_wrong_eeprom_turns_the_readings():
    virtual = placed()
    before = positions(virtual)
    virtual.faults = [parse_fault("eeprom:elbow_flex:26")]
    virtual.step()
    assert before[3] - positions(virtual)[3] == pytest.approx(26 / 360 * 4096, abs=2)


def test_overload_heat_and_voltage_are_in_the_error_byte_and_act():
    virtual = placed()
    write_to(virtual, "Torque_Enable", 1)
    virtual.faults = [parse_fault("overload:shoulder_lift"), parse_fault("hot:elbow_flex"), parse_fault("voltage:3.5")]
    moved = run(virtual, 1.0) - ABOVE_DEG
    errors = {joint: servo["errors"] for joint, servo in virtual.state()["servos"].items()}
    assert errors["shoulder_lift"] == ["voltage", "overload"] and errors["elbow_flex"] == ["voltage", "overheated"]
    assert errors["gripper"] == ["voltage"]
    assert moved[ELBOW_FLEX] > 10  # limp


def test_without_power_all_servos_are_limp_and_silent():
    virtual = placed()
    write_to(virtual, "Torque_Enable", 1)
    virtual.faults = [parse_fault("power")]
    assert (run(virtual, 1.5) - ABOVE_DEG)[SHOULDER_LIFT] > 10
    assert positions(virtual) == {}


# ---------------------------------------------------------------------------------------------------------------------
# the program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A virtual arm with its camera, in a process."""
    with VirtualProcess(tmp_path_factory.mktemp("virtual"), "--camera", "0", "--camera-size", "120", "160") as virtual:
        yield virtual


def exchange(fd: int, packet: Packet, size: int) -> bytes:
    """Bytes that come back, at most size; fewer after a second of silence."""
    os.write(fd, encode(packet))
    answer = b""
    while len(answer) < size and select.select([fd], [], [], 1.0)[0]:
        answer += os.read(fd, size)
    return answer


def test_the_port_is_a_serial_port_that_clients_open_and_close(program):
    for _ in range(2):
        fd = os.open(program.port, os.O_RDWR | os.O_NOCTTY)
        assert exchange(fd, Packet(4, PING), 6) == encode(Packet(4, 0))
        answers = Reader().feed(exchange(fd, READ_POSITIONS, 48), 0.0)
        assert [answer.id for answer in answers] == [1, 2, 3, 4, 5, 6]
        os.close(fd)


def test_the_state_is_the_ground_truth_and_counts_what_was_written(program):
    before = program.state()
    fd = os.open(program.port, os.O_RDWR | os.O_NOCTTY)
    exchange(fd, Packet(1, READ, bytes([56, 2])), 8)
    assert program.state()["writes"] == before["writes"]
    exchange(fd, Packet(6, WRITE, b"\x28\x01"), 6)
    after = program.state()
    os.close(fd)
    assert after["writes"] == before["writes"] + 1 and after["written"]["Torque_Enable"] == 1
    assert after["torque_on"] == {joint: joint == "gripper" for joint in JOINTS}
    deadline = time.monotonic() + 20
    while program.state()["time_s"] == before["time_s"] and time.monotonic() < deadline:
        pass
    assert program.state()["time_s"] > before["time_s"]


def test_commands_act_and_wrong_ones_are_answered_with_an_error(program):
    program.ask("hand still")
    program.ask("place 10 -30 40 50 0 20")
    program.ask("hand still")
    degrees = program.state()["joints_deg"]
    assert [*degrees.values()] == pytest.approx([10, -30, 40, 50, 0, 20], abs=1e-6)
    program.ask("hand none")
    for wrong in ("dance", "place 1 2 3", "place 0 0 0 0 0 999", "fault lots", "sheet x", "hand foot", "state now"):
        with pytest.raises(RuntimeError, match="known|needs six|is not one of"):
            program.ask(wrong)
    program.ask("sheet 8")
    assert program.state()["sheet"] == VirtualArm(seed=8).state()["sheet"]


def pictures(url: str, count: int) -> list[bytes]:
    """The first JPEGs of a stream."""
    with urllib.request.urlopen(url, timeout=20) as stream:
        assert stream.headers["Content-Type"].startswith("multipart/x-mixed-replace")
        result = []
        while len(result) < count:
            line = stream.readline()
            if line.lower().startswith(b"content-length:"):
                stream.readline()
                result.append(stream.read(int(line.split(b":")[1])))
        return result


def picture(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)


def test_the_camera_shows_the_scene_as_a_stream_and_as_one_picture(program):
    program.ask("hand still")
    program.ask("sheet 1")
    stream = [picture(jpeg) for jpeg in pictures(program.camera, 3)]
    with urllib.request.urlopen(program.camera.replace("/video", "/snapshot.jpg"), timeout=20) as answer:
        once = picture(answer.read())
    assert {image.shape for image in [*stream, once]} == {(120, 160, 3)}
    red = once[..., 0] - once[..., 1:].max(-1) > 60  # tape
    assert 200 < red.sum() < 3000
    assert (once.min(-1) > 200).sum() > 500  # paper
    program.ask("sheet 2")
    moved = picture(pictures(program.camera, 3)[-1])
    assert (np.abs(moved - once).max(-1) > 60).sum() > 50


def test_a_frozen_camera_repeats_its_picture(program):
    program.ask("sheet 1")
    pictures(program.camera, 3)
    program.fault("frozen")
    first = pictures(program.camera, 2)[-1]
    program.ask("sheet 2")
    assert pictures(program.camera, 4)[-1] == first
    program.ask("clear")
    assert pictures(program.camera, 3)[-1] != first


def test_a_pulled_cable_is_an_error_for_the_client_until_it_is_plugged_in_again(program):
    fd = os.open(program.port, os.O_RDWR | os.O_NOCTTY)
    program.fault("unplug")
    program.state()  # the loop has gone round
    with pytest.raises(OSError):
        while True:
            os.write(fd, b"\xff")
            time.sleep(0.01)
    os.close(fd)
    assert not os.path.lexists(program.port)
    program.ask("clear")
    program.state()
    fd = os.open(program.port, os.O_RDWR | os.O_NOCTTY)
    assert exchange(fd, Packet(1, PING), 6) == encode(Packet(1, 0))
    os.close(fd)


def test_a_port_that_exists_is_refused_and_kept(program, tmp_path):
    file, directory, dangling = (tmp_path / name for name in ("file", "directory", "dangling"))
    file.write_text("precious")
    directory.mkdir()
    dangling.symlink_to(tmp_path / "nothing")
    before = os.readlink(program.port)
    for path in (file, directory, dangling, program.port):
        with pytest.raises(SO101Error, match=f"--port {path}: exists"):
            Port(str(path))
    with pytest.raises(SO101Error, match="--port .* cannot be made"):
        Port(str(tmp_path / "none" / "port"))
    assert file.read_text() == "precious" and directory.is_dir() and dangling.is_symlink()
    assert os.readlink(program.port) == before


def test_the_link_of_an_arm_that_was_killed_is_replaced(tmp_path):
    link = tmp_path / "port"
    link.symlink_to("/dev/pts/987654321")
    port = Port(str(link))
    assert os.readlink(link) == port.name and os.path.exists(link)
    port.close()
    assert not os.path.lexists(link)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_a_line_and_without_the_link(tmp_path, signum):
    with VirtualProcess(tmp_path) as virtual:
        assert os.path.exists(virtual.port)
        assert virtual.stop(signum) == (0, f"stopped: {virtual.port} is removed\n", "")
        assert not os.path.lexists(virtual.port)


@pytest.mark.parametrize(
    "flags, wrong",
    [
        (["--fault", "lost"], "--fault lost: write"), (["--gain", "9"], "--gain must be in"),
        (["--camera-zmq", "5599"], "--camera-zmq needs --camera"),
        (["--calibration", "none.json"], "--calibration none.json: cannot be read"),
        (["--camera-size", "2", "2"], "--camera-size"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_used_are_named_and_no_port_is_left(tmp_path, monkeypatch, flags, wrong):
    port = str(tmp_path / "port")
    monkeypatch.setattr(sys, "argv", ["virtual_arm", "--port", port, *flags])
    with pytest.raises(SO101Error, match=wrong):
        virtual_arm.main()
    assert not os.path.lexists(port)


def test_the_calibration_of_another_arm_is_not_replaced(tmp_path):
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    for _ in range(2):  # its own file may be there already
        virtual_arm.write_calibration(str(own))
    changed = json.loads(own.read_text()) | {"gripper": {}}
    other.write_text(json.dumps(changed))
    with pytest.raises(SO101Error, match="other.json: exists, and may be of another arm"):
        virtual_arm.write_calibration(str(other))
    assert json.loads(other.read_text()) == changed


# ---------------------------------------------------------------------------------------------------------------------
# LeRobot


LEROBOT = os.environ.get("LEROBOT_PYTHON")
FOLLOWER = """
import json, sys, time
from pathlib import Path
from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

port, file = sys.argv[1], Path(sys.argv[2])
config = SO101FollowerConfig(port=port, id=file.stem, calibration_dir=file.parent, use_degrees=True)
arm = SO101Follower(config)
arm.connect(calibrate=False)
result = {"calibrated": arm.is_calibrated, "before": arm.get_observation()}
goal = {"shoulder_pan.pos": 20.0, "shoulder_lift.pos": -40.0, "elbow_flex.pos": 50.0, "wrist_flex.pos": 40.0,
        "wrist_roll.pos": -15.0, "gripper.pos": 50.0}
for step in range(75):
    share = min(step / 45, 1.0)
    arm.send_action({name: (1 - share) * result["before"][name] + share * goal[name] for name in goal})
    time.sleep(1 / 30)
result |= {"goal": goal, "after": arm.get_observation(), "p": arm.bus.read("P_Coefficient", "elbow_flex")}
arm.disconnect()
print(json.dumps(result))
"""


@pytest.mark.skipif(not LEROBOT, reason="set LEROBOT_PYTHON to a Python with LeRobot")
def test_lerobots_own_follower_drives_it(tmp_path):
    with VirtualProcess(tmp_path) as virtual:
        command = [LEROBOT, "-c", FOLLOWER, str(virtual.port), str(virtual.calibration)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        result, state = json.loads(done.stdout.splitlines()[-1]), virtual.state()
    assert result["calibrated"] and result["p"] == 16
    before = result["before"]
    assert before["shoulder_lift.pos"] == pytest.approx(-106, abs=1)  # folded at its stop
    for name, goal in result["goal"].items():  # gravity pulls lift and elbow down, at P = 16
        assert result["after"][name] == pytest.approx(goal, abs=6), name
    assert not any(state["torque_on"].values()) and state["written"]["Goal_Position"] == 75 * 6
