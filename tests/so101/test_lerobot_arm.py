"""An evening with an arm: what goes wrong on the way, and how every run ends. In virtual time, on a stub of LeRobot.

With LEROBOT_PYTHON the main events run once more in LeRobot's environment, in real time: with its own driver, through
a pseudo-terminal.
"""

import errno
import io
import json
import os
import re
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from lerobot_stub import Time, install
from virtual import VirtualProcess

from so101 import capture, drive, lerobot_arm, loop
from so101.cli import Stop, Stoppable, run_script
from so101.feetech import REGISTERS as TABLE
from so101.loop import REST_RAD, Clock
from so101.robot import Picture, ServoFault, signals_wait
from so101.virtual_arm import VirtualArm, factory_calibration, parse_fault
from so101.virtual_time import VirtualClock
from so101_sim.control import JOINTS, SPANS_DEG, read_calibration
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ, Renderer

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

SEED = 3  # of a sheet that the included policy brings into the tape
PYTHON = os.environ.get("LEROBOT_PYTHON")


class VirtualCamera:
    """Renders when it is asked; with the fault "frozen" its picture gets older."""

    def __init__(self, virtual, time):
        self.virtual, self.time, self.skipped = virtual, time, 0
        self.painter = Renderer(virtual.arm.model, (240, 320), fast=True)
        self.last = None

    def picture(self):
        if self.last is None or not self.virtual.begun("frozen"):
            self.last = Picture(self.painter.render(self.virtual.arm.qpos, "top"), self.time.now_s)
        return self.last

    def close(self):
        self.painter.close()


class Evening:
    """A virtual arm with its calibration, and so101.drive on it."""

    def __init__(self, monkeypatch, capsys, directory, **settings):
        self.virtual = VirtualArm(seed=SEED, **settings)
        self.time, self.directory, self.monkeypatch, self.capsys = Time(self.virtual), directory, monkeypatch, capsys
        self.json, self.enters = directory / "result.json", 10
        (directory / "mine.json").write_text(json.dumps(factory_calibration()))
        install(monkeypatch, self.time, directory)
        monkeypatch.setattr(lerobot_arm, "time", self.time)
        monkeypatch.setattr(lerobot_arm, "Camera", lambda source: VirtualCamera(self.virtual, self.time))
        monkeypatch.setattr(drive, "Clock", lambda: VirtualClock(self.time))
        monkeypatch.setattr(loop, "read_line", self.enter)

    def enter(self, question, idle):
        self.enters -= 1
        if self.enters < 0:
            raise EOFError
        self.time.sleep(0.1)
        return ""

    def at(self, seconds, action):
        """Do something so many seconds after a torque was first switched on."""

        def act():
            if self.virtual.age_s - self.virtual.first_torque_s >= seconds:
                self.time.on_sleep = lambda: None
                action()

        self.time.on_sleep = act

    def run(self, *flags, main=drive.main):
        """Run the script; returns its exit code, and what it wrote to stderr."""
        words = ["so101.drive", "--robot", "lerobot:PORT", "--robot-id", "mine", *flags]
        words += ["--json", str(self.json)] if main is drive.main and "--check" not in flags else []
        self.monkeypatch.setattr(sys, "argv", words)
        code = run_script(main)
        self.out, err = self.capsys.readouterr()
        self.time.on_sleep = lambda: None
        self.time.sleep(2.0)  # without torque the arm falls to its stops
        self.state = self.virtual.state()
        return code, err

    @property
    def report(self):
        return json.loads(self.json.read_text())

    def off_rest_deg(self):
        """How far the arm is from its rest pose."""
        joints = np.array([*self.state["joints_deg"].values()])
        return float(np.abs(joints - np.rad2deg(REST_RAD))[:4].max())


@pytest.fixture
def evening(monkeypatch, capsys, tmp_path):
    return Evening(monkeypatch, capsys, tmp_path)


def torque(evening):
    return [joint for joint, on in evening.state["torque_on"].items() if on]


def test_an_episode_ends_at_rest_and_limp(evening):
    code, err = evening.run()
    assert code == 0 and evening.report["seen_inside_rate"] == 1 and evening.state["inside"]
    assert torque(evening) == [] and evening.off_rest_deg() < 10
    assert err.splitlines()[-1] == "torque off at rest"
    assert evening.report["missed_deadlines"] == 0 and "stopped" not in evening.report


def test_a_dry_run_writes_nothing_and_leaves_the_arm_limp(evening):
    code, _ = evening.run("--dry-run", "--episode-steps", "20")
    assert code == 0 and evening.state["writes"] == 0 and torque(evening) == []
    assert evening.out.count("would send") == 20


def test_a_servo_is_only_written_what_differs_and_does_not_jump(evening):
    """Also where another program has left a target in its memory."""
    for servo in evening.virtual.servos:
        servo.set("Goal_Position", 3000)
    before = evening.virtual.arm.qpos[:6]
    evening.enters = 0
    robot = lerobot_arm.LeRobotArm("PORT", "mine", None, 24)
    robot.enable()
    evening.time.sleep(0.5)
    assert np.abs(evening.virtual.arm.qpos[:6] - before).max() < np.deg2rad(2)
    state = evening.virtual.state()
    assert all(servo["P_Coefficient"] == 24 and servo["I_Coefficient"] == 0 for servo in state["servos"].values())
    assert state["servos"]["gripper"]["Max_Torque_Limit"] == 500 and all(state["torque_on"].values())
    written = state["written"]
    robot.enable()
    again = evening.virtual.state()["written"]
    assert again["P_Coefficient"] == written["P_Coefficient"] == 6 and "Operating_Mode" not in again
    robot.close()
    assert not any(evening.virtual.state()["torque_on"].values())


# what happens, when, the exit code, what the last line says, and which servos are still under torque
FATAL = [
    ("silent:elbow_flex@6", r"elbow_flex \(id 3\) does not answer", ["elbow_flex"]),
    ("silent:wrist_flex@0.005", r"wrist_flex \(id 4\) does not answer", []),
    ("unplug@6", "the port is gone", list(JOINTS)),
    ("overload:shoulder_lift@6", "shoulder_lift reports an error: overload", []),
    ("hot:wrist_flex@6", "wrist_flex (has 75 degrees|reports an error)", []),
    ("power@6", "no servo answers; check the power supply", []),
    ("jump:elbow_flex:83@6", "", []),
    ("frozen@6", "newest picture is .* ms old", []),
]


@pytest.mark.parametrize("fault, text, under_torque", FATAL, ids=[fault for fault, _, _ in FATAL])
def test_what_ends_a_run(evening, fault, text, under_torque):
    """One line with the joint's name, exit code 2, every other servo limp, and a report."""
    evening.virtual.faults.append(parse_fault(fault))
    code, err = evening.run("--episodes", "2")
    lines = err.splitlines()
    assert torque(evening) == under_torque
    if not text:  # a single reading that jumps is asked for again
        assert code == 0 and evening.report["events"]["readings that jumped"] == 1
        return
    assert code == 2 and re.search(text, lines[-1]) and "Traceback" not in err
    assert re.search(text, evening.report["stopped"])
    if under_torque or fault.startswith("power"):
        assert re.search("torque NOT off in .*" + ", ".join(under_torque), err)
    if fault.startswith("frozen"):  # the arm can still be moved
        assert evening.off_rest_deg() < 10 and "torque off at rest" in err
    if fault.startswith("overload"):  # it is not asked to move any more
        assert "not moved any more" in err and evening.off_rest_deg() > 20


def test_an_overload_ends_the_run_although_every_servo_also_reports_a_low_supply(evening):
    """The overload of a later joint than the first one that reports anything, and what an overload does to a supply."""
    evening.virtual.faults += [parse_fault("overload:elbow_flex@6"), parse_fault("voltage:3.5@4")]
    code, err = evening.run()
    assert code == 2 and "elbow_flex reports an error: overload" in err.splitlines()[-1]
    assert "the arm is not moved any more" in err and torque(evening) == []


def test_an_arm_that_waits_for_a_person_is_watched(evening, monkeypatch):
    """It holds itself up meanwhile, and a servo gets hot."""
    waits = []

    def wait(question, idle):
        waits.append(question)
        if len(waits) == 2:  # the arm is raised and under torque
            evening.virtual.faults.append(parse_fault("hot:shoulder_lift"))
            for _ in range(150):
                evening.time.sleep(1 / CONTROL_HZ)
                idle()
            raise AssertionError("nothing was noticed in five seconds")
        return ""

    monkeypatch.setattr(loop, "read_line", wait)
    code, err = evening.run("--episodes", "2")
    assert code == 2 and "shoulder_lift has 75 degrees" in err.splitlines()[-1] and torque(evening) == []


def test_a_line_is_read_while_something_else_is_done(monkeypatch, capsys):
    """Two answers that come at once are two answers; and after the last one the input has ended."""
    source, sink = os.pipe()
    with open(source) as stdin, open(sink, "w") as person:
        monkeypatch.setattr(sys, "stdin", stdin)
        done = []

        def answer():
            done.append(1)
            if len(done) == 3:
                person.write("yes\nno\n")
                person.flush()

        assert loop.read_line("sure? ", answer) == "yes\n" and len(done) == 3
        assert loop.read_line("sure? ", answer) == "no\n" and len(done) == 3
        person.close()
        with pytest.raises(EOFError):
            loop.read_line("sure? ", answer)
    assert capsys.readouterr().out == 3 * "sure? "


def test_keys_that_were_pressed_before_a_question_do_not_answer_it(monkeypatch):
    """An arm would move at once, with a person's hands beside it."""
    person, terminal = os.openpty()
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(person, b"\n\n")
        assert select.select([stdin], [], [], 5.0)[0]
        asked = []

        def answer():
            if not asked:
                asked.append(os.write(person, b"now\n"))

        assert loop.read_line("ready? ", answer) == "now\n" and asked
    os.close(person)


@pytest.mark.parametrize("fault, text", [("overload:shoulder_lift@11", "overload"), ("silent:gripper@11", "gripper")])
def test_a_fault_while_the_arm_folds_is_reported(evening, fault, text):
    """After an episode that has ended well: the run has not."""
    evening.virtual.faults.append(parse_fault(fault))
    code, err = evening.run("--episode-steps", "30")
    assert evening.report["episodes"] == 1 and "stopped after the last episode" in evening.report["stopped"]
    assert code == 2 and text in err.splitlines()[-1] and "stopped on the way" in err


def test_a_result_that_cannot_be_written_costs_no_other(evening):
    """The directory of the film is removed while the arm moves."""
    directory = evening.directory / "films"
    directory.mkdir()
    evening.at(5, directory.rmdir)
    code, err = evening.run("--video", str(directory / "film.mp4"), "--episode-steps", "30")
    assert code == 2 and "film.mp4: cannot be written" in err.splitlines()[-1]
    assert evening.report["episodes"] == 1 and "success, by camera         1.00" in evening.out


def test_the_arm_folds_when_nobody_reads_what_it_says(evening, monkeypatch):
    """The reader of stderr is gone, as with `2>&1 | less`, when the first line after that is due."""
    closed, real = io.StringIO(), sys.stderr
    closed.write = lambda text: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe"))
    monkeypatch.setattr("so101.loop.silence_output", lambda: setattr(sys, "stderr", real))
    evening.at(5, lambda: setattr(sys, "stderr", closed))
    try:
        code, err = evening.run("--episode-steps", "30")
    finally:
        sys.stderr = real
    assert code == 0 and torque(evening) == [] and evening.off_rest_deg() < 10
    assert err.splitlines()[-1] == "torque off at rest"  # printed as in the next run, which has a reader


def test_a_slow_arm_gets_the_time_it_needs(evening):
    code, err = evening.run("--max-speed", "0.1", "--episode-steps", "1")
    assert code == 0 and err.splitlines()[-1] == "torque off at rest" and evening.virtual.age_s > 40


def keeps(servo, register):
    """Let a servo ignore what is written to a register."""
    write, address = servo.write, TABLE[register].address
    return lambda at, data: None if at == address else write(at, data)


# what is wrong with a servo, and what the last line says: nothing moves
NOT_READY = [
    ("P_Coefficient", "elbow_flex does not take 24 as its P_Coefficient, and keeps 32"),
    ("Torque_Enable", "elbow_flex does not take 1 as its Torque_Enable, and keeps 0"),
    ("horn", "elbow_flex is .* degrees outside its range"),
    ("temperature", "elbow_flex has 67 degrees C"),
]


@pytest.mark.parametrize("wrong, text", NOT_READY, ids=[wrong for wrong, _ in NOT_READY])
def test_a_servo_that_is_not_ready_stops_the_run_before_it_moves(evening, wrong, text):
    servo = evening.virtual.servos[2]
    if wrong in TABLE:
        servo.write = keeps(servo, wrong)
    elif wrong == "horn":
        servo.measure = slipped(servo, 400)
    else:
        measure = servo.measure
        servo.measure = lambda *values: measure(*values[:-1], 67.0)
    before = evening.virtual.arm.qpos[:6]
    code, err = evening.run("--firmware-p", "24")
    assert code == 2 and re.search(text, err.splitlines()[-1]) and torque(evening) == []
    assert np.abs(evening.virtual.arm.qpos[:6] - before).max() < np.deg2rad(5)
    assert evening.state["writes"] == 0 or wrong in TABLE


def test_lost_and_damaged_answers_are_asked_for_again(evening):
    evening.virtual.faults += [parse_fault("lost:0.002"), parse_fault("corrupt:0.002")]
    code, err = evening.run()
    assert code == 0, err
    assert evening.report["events"]["answers asked for again"] > 3
    assert torque(evening) == [] and evening.off_rest_deg() < 10


def test_a_reading_that_stays_where_it_jumped_to_stops_the_arm(evening):
    """The horn of a servo slips."""
    evening.at(6, lambda: setattr(evening.virtual.servos[2], "measure", slipped(evening.virtual.servos[2], 400)))
    code, err = evening.run()
    assert code == 2 and re.search("elbow_flex jumps by 3[3-8] degrees", err) and torque(evening) == []


def slipped(servo, ticks):
    original = servo.measure
    return lambda raw, *rest: original(raw + ticks, *rest)


def test_a_low_voltage_is_said_when_it_happens(evening):
    evening.virtual.faults.append(parse_fault("voltage:9.5@5"))
    code, err = evening.run()
    assert code == 0 and "supply voltage: 9.5 V instead of 12.0 V" in err
    assert err.index("supply voltage") < err.index("the arm folds itself")
    assert evening.report["events"]["warnings: supply voltage"] >= 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_folds_the_arm_slowly_and_lets_it_go_limp(evening, monkeypatch, signum):
    monkeypatch.setattr("so101.cli.silence_output", lambda: None)  # it would silence the tests
    fastest = []

    def watch():
        fastest.append(np.abs(evening.virtual.arm.arms.joint_vel[0]).max())

    def stop():
        evening.time.on_sleep = watch
        os.kill(os.getpid(), signum)

    evening.at(7, stop)
    code, err = evening.run("--episode-steps", "100000")
    assert code == 128 + signum and "torque off at rest" in err
    assert torque(evening) == [] and evening.off_rest_deg() < 10
    # until the joints fall by a few degrees in the end, it moves at about HOME_SPEED_RAD_S
    assert 0.3 < max(fastest[5:-1]) < 1.0
    assert evening.report["stopped"] == f"signal {signum}"


def test_a_second_signal_makes_it_limp_at_once(evening):
    def twice():
        evening.at(8, lambda: os.kill(os.getpid(), signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)

    evening.at(7, twice)
    code, err = evening.run()
    assert code == 130 and "torque off where it was" in err
    assert torque(evening) == [] and evening.off_rest_deg() > 20 and evening.virtual.age_s < 12


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGINT])
def test_a_terminal_that_closes_lets_no_arm_fall(evening, monkeypatch, first):
    """System and shell both report it, and a person may have pressed Ctrl+C before."""
    monkeypatch.setattr("so101.cli.silence_output", lambda: None)  # it would silence the tests

    def twice():
        evening.at(8, lambda: os.kill(os.getpid(), signal.SIGHUP))
        os.kill(os.getpid(), first)

    evening.at(7, twice)
    code, err = evening.run("--episode-steps", "100000")
    assert code == 128 + first and "torque off at rest" in err
    assert torque(evening) == [] and evening.off_rest_deg() < 10


def test_a_third_signal_still_says_what_became_of_the_arm(evening):
    """It comes while the torque is switched off."""

    def third():
        if "torque" in state and evening.virtual.servos[0].written["Torque_Enable"] == 2:
            state.remove("torque")
            os.kill(os.getpid(), signal.SIGINT)

    def second():
        evening.time.on_sleep = third
        os.kill(os.getpid(), signal.SIGINT)

    def first():
        evening.at(8, second)
        os.kill(os.getpid(), signal.SIGINT)

    state = ["torque"]
    evening.at(7, first)
    code, err = evening.run()
    assert state == [] and code == 130
    assert torque(evening) == [] and err.splitlines()[-1] == "torque off where it was: hold the arm, it falls"


def test_a_signal_that_had_to_wait_comes_afterwards():
    """Whichever thread the system delivers it to."""
    steps = []
    with pytest.raises(Stop) as stop, Stoppable():
        with signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            capture.time.sleep(0.05)
            steps.append("the rest of the block")
        steps.append("what follows it")
    assert steps == ["the rest of the block"] and stop.value.signum == signal.SIGTERM


@pytest.mark.parametrize("stdin", ["closed", "gone"])
def test_without_a_terminal_nothing_moves(evening, monkeypatch, stdin):
    def gone(question, idle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(loop, "read_line", gone)
    if stdin == "closed":
        monkeypatch.setattr(sys, "stdin", None)
    code, err = evening.run()
    assert code == 2 and "no terminal to press Enter at" in err.splitlines()[-1] and evening.state["writes"] == 0


def test_a_closed_terminal_ends_after_what_is_complete(evening):
    evening.enters = 1
    code, err = evening.run("--episodes", "3")
    assert code == 2 and "no terminal to press Enter at" in err
    assert evening.report["episodes"] == 1 and torque(evening) == [] and evening.off_rest_deg() < 10


def test_a_fault_in_the_policy_folds_the_arm_too(evening, monkeypatch):
    """Even one that nobody has thought of. Report and film of what was before it are written."""
    calls, film = [], evening.directory / "film.mp4"

    def act(self, obs, mask):
        calls.append(1)
        if len(calls) > 30:
            raise ZeroDivisionError("of the policy")
        return np.zeros((1, 6))

    monkeypatch.setattr("so101.opencv.OpenCVPolicy.act", act)
    with pytest.raises(ZeroDivisionError):
        evening.run("--video", str(film))
    evening.state = evening.virtual.state()
    assert evening.report["stopped"] == "of the policy"
    assert torque(evening) == [] and evening.off_rest_deg() < 10


def test_servos_that_are_calibrated_otherwise_are_refused(evening):
    evening.virtual.faults.append(parse_fault("eeprom:shoulder_lift:26"))
    evening.time.sleep(0.01)
    code, err = evening.run()
    assert code == 2 and "is not the one in the servos (shoulder_lift's Homing_Offset differs by +26 degrees)" in err
    assert evening.state["writes"] == 0


def test_a_folded_arm_moves_in_from_its_stops(monkeypatch, capsys, tmp_path):
    """Its stops lie beyond the model's limits."""
    evening = Evening(monkeypatch, capsys, tmp_path, start_rad=np.deg2rad([0.0, -105.9, 98.9, 97.9, 0, -10]))
    code, err = evening.run()
    assert code == 0, err
    assert evening.report["seen_inside_rate"] == 1 and evening.off_rest_deg() < 10


def test_a_weak_servo_is_believed_to_be_one(monkeypatch, capsys, tmp_path):
    """By its supply: 7.4 V servos have about half the gain, and the command window is as much wider."""
    evening = Evening(monkeypatch, capsys, tmp_path, servo="7.4V")
    code, err = evening.run()
    assert code == 0 and "servos at 7.4 V, P = 16, gain 0.55" in err
    assert evening.report["seen_inside_rate"] == 1


@pytest.mark.parametrize("text", ["{", "", "[1"])
def test_a_calibration_that_lerobot_cannot_read(evening, text):
    (evening.directory / "mine.json").write_text(text)
    code, err = evening.run()
    assert code == 2 and "--robot-id mine: LeRobot cannot read this arm's calibration" in err
    assert "run lerobot-calibrate --robot.type=so101_follower --robot.port=PORT --robot.id=mine" in err


# a change of the calibration file, and the joint that the refusal names
SPANS = [
    ("shoulder_lift", 4084, "359 degrees"),
    ("elbow_flex", 1100, "97 degrees"),
    ("wrist_flex", 12, "1 degrees"),
    ("gripper", 57, "5 degrees"),
    ("shoulder_pan", 0, "0 degrees"),
    ("shoulder_pan", -500, "-44 degrees"),
    ("wrist_roll", 2000, "176 degrees"),
]


@pytest.mark.parametrize("joint, span, text", SPANS)
def test_impossible_calibrations_are_refused(evening, joint, span, text):
    motors = factory_calibration()
    motors[joint]["range_max"] = motors[joint]["range_min"] + span
    path = evening.directory / "mine.json"
    path.write_text(json.dumps(motors))
    code, err = evening.run()
    assert code == 2 and f"calibration {path}: {joint} has a range of {text}" in err and "calibrate again" in err
    assert evening.state["instructions"] == {}


def test_published_calibrations_are_accepted(tmp_path):
    """Ticks of six arms whose calibrations their owners have published."""
    spans = {
        "shoulder_pan": (2731, 2751, 2072, 2655, 2651, 2395), "shoulder_lift": (2389, 2404, 2369, 2416, 2523, 2360),
        "elbow_flex": (2209, 2215, 2216, 2285, 2227, 2192), "wrist_flex": (2367, 2331, 2310, 2405, 2352, 2293),
        "wrist_roll": (3849, 4095, 4095, 4095, 3243, 3817), "gripper": (1590, 1519, 1488, 1361, 1444, 1240),
    }  # fmt: skip
    path = tmp_path / "arm.json"
    for arm in range(6):
        path.write_text(
            json.dumps({joint: {"range_min": 200, "range_max": 200 + spans[joint][arm]} for joint in spans})
        )
        ranges = read_calibration(path)
        assert np.rad2deg(ranges.high_rad[1]) == pytest.approx(spans["shoulder_lift"][arm] * 180 / 4096)
    assert set(SPANS_DEG) == set(JOINTS)


def test_a_stall_stops_the_arm_at_the_second_reading(evening):
    robot = lerobot_arm.LeRobotArm("PORT", "mine", None)
    free, stalled = dict.fromkeys(JOINTS, 0), {**dict.fromkeys(JOINTS, 0), "shoulder_lift": -850}
    pressed = {**free, "gripper": 450}
    for values in (stalled, free, stalled):
        robot._check_state("Present_Load", values)
    with pytest.raises(ServoFault, match="shoulder_lift is stalled"):
        robot._check_state("Present_Load", stalled)
    robot._check_state("Present_Load", pressed)
    with pytest.raises(ServoFault, match="gripper is stalled"):
        robot._check_state("Present_Load", pressed)
    robot.close()


def test_a_port_that_is_used_or_not_there(evening):
    first = lerobot_arm.LeRobotArm("PORT", "mine", None)
    with pytest.raises(SO101Error, match="is used by another program"):
        lerobot_arm.LeRobotArm("PORT", "mine", None)
    first.close()
    second = lerobot_arm.LeRobotArm("PORT", "mine", None)
    second.close()
    with pytest.raises(SO101Error, match="no calibration in .*run lerobot-calibrate"):
        lerobot_arm.LeRobotArm("PORT", "another", None)


def test_missed_deadlines_are_said_when_they_happen(capsys):
    now = [0.0]
    clock = Clock.__new__(Clock)
    clock.now, clock.sleep = lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + max(seconds, 0))
    Clock.__init__(clock)
    for step in range(300):
        now[0] += 0.05 if 100 <= step < 120 else 0.01
        clock.wait()
        said = capsys.readouterr().err
        assert bool(said) == (step == 107), (step, said)  # the eighth, and not again within five seconds
    assert clock.missed == 20 and clock.worst_s == pytest.approx(0.05)


class Capture:
    """A camera that delivers what a list says: pictures, or None for one that cannot be read."""

    def __init__(self, frames):
        self.frames = iter(frames)

    def isOpened(self):
        return True

    def set(self, what, value):
        pass

    def read(self):
        frame = next(self.frames, "end")
        if isinstance(frame, str):
            capture.time.sleep(0.01)
            return False, None
        capture.time.sleep(0.002)
        return frame is not None, frame

    def release(self):
        pass


def test_a_camera_with_pictures_that_fail_or_repeat(monkeypatch):
    cv2 = capture.import_extra("cv2", "arm", "the test")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (4, 6, 3), np.uint8) for _ in range(3)]
    shown = [frames[0], None, frames[1], None, None, frames[2], *[frames[2]] * 10]
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Capture(shown))
    monkeypatch.setattr(capture, "GIVE_UP_S", 0.3)
    source = capture.Camera("7")
    while source.running and source.newest.image[0, 0, 0] != frames[2][0, 0, 2]:
        capture.time.sleep(0.001)
    taken = source.picture().time_s
    capture.time.sleep(0.05)
    assert source.skipped >= 3 and source.picture().time_s == taken  # frozen: it counts as taken when it was new
    source.thread.join(10)
    with pytest.raises(SO101Error, match="delivers no more pictures"):
        source.picture()
    source.close()


@pytest.mark.parametrize("source", ["no such camera", "\N{SUPERSCRIPT TWO}", "9" * 20])
def test_a_camera_that_is_not_there(source):
    with pytest.raises(SO101Error, match=f"--camera {source}: delivers no pictures; name another index or path"):
        capture.Camera(source)


# ---------------------------------------------------------------------------------------------------------------------
# with LeRobot's own driver, in real time

# a machine that is busy with other tests answers late: the driver waits longer here
PATIENT = """
import sys
from so101 import drive, lerobot_arm, loop
from so101.cli import run_script
from so101_sim import control
lerobot_arm.ANSWER_S, lerobot_arm.WATCHDOG_S, control.WATCHDOG_S, loop.PICTURE_AGE_S = 0.3, 3.0, 9.0, 5.0
lerobot_arm.MAX_SERVO_SPEED_RAD_S = 50.0
sys.exit(run_script(drive.main))
"""
EVENTS = [
    ("", 0, "torque off at rest", []),
    ("dry run", 0, "", []),
    ("lost:0.002", 0, "torque off at rest", []),
    ("corrupt:0.002", 0, "torque off at rest", []),
    ("silent:elbow_flex", 2, r"elbow_flex \(id 3\) does not answer", ["elbow_flex"]),
    ("overload:shoulder_lift", 2, "shoulder_lift reports an error: overload", []),
    ("unplug", 2, "the port is gone", list(JOINTS)),
    ("eeprom:shoulder_lift:26", 2, "is not the one in the servos", []),
    (signal.SIGINT, 130, "torque off at rest", []),
    (signal.SIGTERM, 143, "torque off at rest", []),
    (signal.SIGHUP, 129, "", []),
]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no Python of an environment with LeRobot")
@pytest.mark.parametrize("event, code, text, under_torque", EVENTS, ids=[str(event) for event, *_ in EVENTS])
def test_with_lerobots_own_driver(tmp_path, event, code, text, under_torque):
    calibrations = tmp_path / "robots" / "so_follower"
    calibrations.mkdir(parents=True)
    before = event.startswith(("eeprom", "lost", "corrupt")) if isinstance(event, str) else False
    with VirtualProcess(calibrations, "--camera", "0", "--seed", str(SEED)) as virtual:
        if before:
            virtual.fault(event)
        words = ["--robot", f"lerobot:{virtual.port}", "--robot-id", virtual.name, "--camera", virtual.camera]
        words += ["--json", str(tmp_path / "result.json"), *(["--dry-run"] if event == "dry run" else [])]
        words += ["--episode-steps", "100000" if code else "60"]
        driver = subprocess.Popen(
            [PYTHON, "-c", PATIENT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT,
            env={**os.environ, "HF_LEROBOT_CALIBRATION": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        driver.stdin.write("\n")
        driver.stdin.flush()
        if code and not before:
            while not (state := virtual.state())["torque_on"]["gripper"] or state["joints_deg"]["shoulder_lift"] < 0:
                assert driver.poll() is None, driver.communicate()[1]
                capture.time.sleep(0.2)
            driver.send_signal(event) if isinstance(event, signal.Signals) else virtual.fault(event)
        _, err = driver.communicate(timeout=180)
        state = virtual.state()
    assert driver.returncode == code and re.search(text, err), err
    assert [joint for joint, on in state["torque_on"].items() if on] == under_torque
    if event == "dry run" or before and code:
        assert state["writes"] == 0
    if "at rest" in text or event == signal.SIGHUP:
        assert np.abs(np.array([*state["joints_deg"].values()]) - np.rad2deg(REST_RAD))[:4].max() < 10
