"""Practice on an arm through its bus: how it begins and ends, on a stub of LeRobot, in virtual time."""

import os
import signal

import pytest
from conftest import load
from test_lerobot_arm import Evening, torque

from so101 import practice
from so101.learner import MODEL
from so101.virtual_arm import parse_fault
from so101.virtual_time import VirtualClock

FLAGS = (
    "--no-learner-process --train-episode-steps 25 --learning-starts 25 --hidden-size 16 --batch-size 32 --seed 3 "
    "--run-name run --minutes 0.5"
).split()


class Practised(Evening):
    """A virtual arm, and so101.practice on it."""

    def __init__(self, monkeypatch, capsys, directory):
        super().__init__(monkeypatch, capsys, directory)
        monkeypatch.setattr(practice, "Clock", lambda: VirtualClock(self.time))
        self.model = directory / "run" / MODEL

    def practise(self, *flags):
        """Run the script; returns its exit code, and what it wrote to stderr."""
        return self.run(*FLAGS, "--log-dir", str(self.directory), *flags, main=practice.main)


@pytest.fixture
def arm(monkeypatch, capsys, tmp_path):
    return Practised(monkeypatch, capsys, tmp_path)


def test_an_arm_practises_and_ends_at_rest_and_limp(arm):
    code, err = arm.practise()
    assert code == 0, err
    assert torque(arm) == [] and arm.off_rest_deg() < 10 and err.splitlines()[-1] == "torque off at rest"
    saved = load(arm.model)
    records = saved["recorder"]["recent_episodes"]
    assert len(records) >= 2 and records[-1]["arm_time_s"] >= 30 and sum(each["missed"] for each in records) == 0
    assert records[-1]["exploring"] and saved["ranks"][0]["buffer"]["actions"].abs().max() > 0
    assert arm.enters == 9  # one Enter, before anything moves


def test_nothing_moves_before_a_person_has_pressed_enter(arm):
    arm.enters = 0
    code, err = arm.practise()
    assert code == 2 and "no terminal to press Enter at" in err
    assert torque(arm) == [] and not arm.model.exists()


def test_a_sheet_that_is_gone_is_asked_for(arm, monkeypatch):
    """The arm waits raised, and goes on when a hand has laid it."""
    prompts, enter = [], arm.enter

    def lay(prompt, idle):
        prompts.append(prompt)
        if len(prompts) > 1:
            arm.virtual.arm.lay_sheet(7)
        return enter(prompt, idle)

    arm.at(3, lambda: arm.virtual.arm.lay_sheet(None))
    monkeypatch.setattr("so101.loop.read_line", lay)
    code, err = arm.practise()
    assert code == 0, err
    assert len(prompts) >= 2 and "hand.png" in prompts[1]
    assert load(arm.model)["ranks"][0]["arm"]["hands"] == len(prompts) - 1


@pytest.mark.parametrize("fault, text", [("overload:shoulder_lift@25", "overload"), ("unplug@25", "the port is gone")])
def test_a_fault_ends_practice_and_says_how_to_go_on(arm, fault, text):
    arm.virtual.faults.append(parse_fault(fault))
    code, err = arm.practise()
    assert code == 2 and text in err.splitlines()[-1] and f"resume with --resume {arm.model}" in err
    assert len(load(arm.model)["recorder"]["recent_episodes"]) >= 1


def test_ctrl_c_folds_the_arm_and_keeps_what_was_learned(arm, monkeypatch):
    monkeypatch.setattr("so101.cli.silence_output", lambda: None)  # it would silence the tests
    arm.at(20, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, err = arm.practise()
    assert code == 130 and "torque off at rest" in err
    assert torque(arm) == [] and arm.off_rest_deg() < 10 and arm.model.exists()
