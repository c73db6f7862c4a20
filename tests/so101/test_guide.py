"""The guided check of an arm that is off, in virtual time: what it finds, what it keeps, and what it is good for."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
from conftest import error_of
from test_lerobot_arm import Evening, torque

from so101 import drive
from so101.arm_check import ArmProfile
from so101.simulated_arm import Flaws

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

WRONG = Flaws(joint_offset_deg=(0, -3.0, 0, 0, 0, 0), gain=0.6, camera_turned=True)


class Person:
    """Does what the check asks for, and answers its questions with yes, up to the question with this number."""

    def __init__(self, evening, answers=100):
        self.evening, self.asked, self.answers = evening, [], answers

    def __call__(self, prompt, idle):
        self.asked.append(prompt)
        virtual = self.evening.virtual
        self.evening.time.sleep(0.1)
        if "take the sheet off" in prompt:
            virtual.arm.lay_sheet(None)
        if "lay the sheet" in prompt:
            virtual.arm.lay_sheet(5)
        if "(y/n)" in prompt:
            self.answers -= 1
            return "y" if self.answers >= 0 else "n"
        return ""


@pytest.fixture
def make_evening(monkeypatch, capsys, tmp_path):
    def make(answers=100, **settings):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        evening = Evening(monkeypatch, capsys, tmp_path, **settings)
        evening.person = Person(evening, answers)
        evening.profile = tmp_path / "so101" / "mine.json"
        monkeypatch.setattr("so101.loop.read_line", evening.person)
        return evening

    return make


def test_from_a_wrong_arm_to_a_success(make_evening):
    """Lift zero off by 3 degrees, servos with 0.6 of the gain, and a camera on the arm's side."""
    evening = make_evening(flaws=WRONG)
    code, err = evening.run("--check")
    assert code == 0, err
    assert torque(evening) == [] and evening.off_rest_deg() < 10
    profile = json.loads(evening.profile.read_text())
    degrees = [180 / 3.141593 * each for each in profile["offset_rad"]]
    assert degrees[1] == pytest.approx(-3, abs=0.7) and degrees[2] == pytest.approx(0, abs=0.7)
    assert profile["gain_factor"] == pytest.approx(0.6, rel=0.1) and profile["camera_turned"] is True
    assert evening.profile.with_suffix(".png").stat().st_size > 10_000

    evening.person.asked.clear()
    code, _ = evening.run("--check")  # everything is done
    assert code == 0 and evening.person.asked == [] and evening.out.count("(on 20") == 6

    evening.virtual.reset(1000)
    code, err = evening.run()
    assert code == 0 and evening.report["seen_inside_rate"] == 1 and evening.state["inside"]
    assert "camera on the arm's side" in err

    calibration = evening.directory / "mine.json"
    motors = json.loads(calibration.read_text())
    calibration.write_text(json.dumps(motors, indent=1))
    code, err = evening.run("--check")
    assert code == 2 and "was calibrated anew since this check; delete the file and run --check again" in err


def test_a_weak_arm_folds_before_its_gain_is_known(make_evening):
    """Half of the gain that its supply suggests, and Ctrl+C while the first joints are tried."""
    evening = make_evening(flaws=Flaws(gain=0.5))
    evening.at(12, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, err = evening.run("--check")
    assert code == 130 and err.splitlines()[-1] == "torque off at rest" and evening.off_rest_deg() < 10


def test_a_joint_that_turns_the_wrong_way_ends_the_check(make_evening):
    """What is done is kept, and the arm folds itself."""
    evening = make_evening(answers=2)
    code, err = evening.run("--check")
    assert code == 2 and "elbow_flex turns the wrong way: run lerobot-calibrate" in err
    assert {*json.loads(evening.profile.read_text())["steps"]} == {"servos", "calibration"}
    assert torque(evening) == [] and evening.off_rest_deg() < 10

    # a run knows what the check has not measured
    code, err = evening.run("--dry-run", "--episode-steps", "1")
    missing = "directions, zero and gain, camera, fingertip"
    assert f"this arm was not checked: {missing}; check it once with so101.drive --check" in err
    arm, profile = (
        SimpleNamespace(servo_gain=0.55, voltage=7.4, firmware_p=16),
        ArmProfile.load(evening.profile, "mine"),
    )
    drive.use_profile(drive.Args(), arm, None, profile)
    assert not arm.gain_known and arm.servo_gain == 0.55


def test_a_place_for_the_profile_that_cannot_be_written(make_evening):
    evening = make_evening()
    (evening.directory / "so101").write_text("in the way")
    code, err = evening.run("--check")
    assert code == 2 and "so101/mine.json: cannot be written" in err and evening.state["writes"] == 0


def test_without_a_table_the_touch_is_given_up(make_evening):
    """The arm stands on something: its table is 50 mm lower."""
    evening = make_evening(flaws=Flaws(table_height_m=-0.05))
    code, err = evening.run("--check")
    assert code == 2 and "no table was felt" in err
    assert torque(evening) == [] and "torque off at rest" in err


def test_refusals(monkeypatch, tmp_path):
    for flags, text in (
        (["--check"], "--check: needs an arm"),
        (["--check", "--robot", "lerobot:PORT", "--dry-run"], "--check: needs an arm"),
        (["--check", "--robot", "lerobot:PORT", "--json", "check.json"], "--json: --check keeps its results"),
        (["--check", "--robot", "lerobot:PORT", "--video", "check.mp4"], "--video: --check keeps its results"),
        (["--robot", "lerobot:PORT", "--robot-id", "../me"], "--robot-id '../me': must be a plain name"),
        (["--replay", str(tmp_path / "none.mp4")], "none.mp4: no such file"),
    ):
        assert text in error_of(monkeypatch, "so101.drive", *flags)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no film")
    assert "film.mp4: FFmpeg reads no pictures from it" in error_of(monkeypatch, "so101.drive", "--replay", str(film))
