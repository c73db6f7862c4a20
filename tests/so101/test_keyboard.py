"""A person at the keyboard: events of real keys, on a display that exists for pygame only."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from so101 import record, subject
from so101.dataset import read_dataset, read_info
from so101.evaluation import RECORD_SEED, evaluate, no_residual
from so101.policies import load_policy
from so101_env import (
    ACTION,
    ENVIRONMENT,
    MAX_EPISODE_STEPS,
    OBS,
    STATE,
    TAPE_CENTER_M,
    BasePolicyError,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
    sheet_inside,
)

pygame = pytest.importorskip("pygame")


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    policy = load_policy("keyboard")
    policy.clock = SimpleNamespace(tick=lambda hz: None)  # not in real time
    yield policy
    policy.close()


class Person:
    """Presses and releases keys, as somebody would who looks at the sheet and the tip."""

    def __init__(self) -> None:
        self.down: set[int] = set()

    def hold(self, *keys: int) -> None:
        for key in self.down - set(keys):
            pygame.event.post(pygame.event.Event(pygame.KEYUP, key=key))
        for key in set(keys) - self.down:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        self.down = set(keys)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        tip, sheet = obs[0, OBS["tip_pos"]], obs[0, OBS["sheet_pos"]][:2]
        over_sheet = bool(np.abs(tip[:2] - sheet).max() < 0.05)
        way = TAPE_CENTER_M - sheet if over_sheet else sheet - tip[:2]
        keys = [pygame.K_SPACE] * over_sheet
        if not over_sheet or tip[2] < 0.009:
            keys += [pygame.K_DOWN if way[0] > 0 else pygame.K_UP] * bool(abs(way[0]) > 0.005)
            keys += [pygame.K_RIGHT if way[1] > 0 else pygame.K_LEFT] * bool(abs(way[1]) > 0.005)
        self.hold(*keys)
        return no_residual(obs)


def test_keys_push_the_sheet_into_the_tape_and_are_recorded(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "load_policy", lambda spec, server: policy)
    monkeypatch.setattr(subject, "no_residual", Person())
    flags = ["--base-policy", "keyboard", "--episodes", "3", "--dataset", str(tmp_path / "demos")]
    monkeypatch.setattr(sys, "argv", ["record.py", *flags])
    assert record.main() == 0
    keys = (STATE, ACTION, ENVIRONMENT)
    demos = read_dataset(tmp_path / "demos", read_info(tmp_path / "demos", keys), keys).values()
    assert len(demos) == 3 and all(30 < len(demo[ACTION]) < MAX_EPISODE_STEPS for demo in demos)
    for demo in demos:
        x, y, _, qw, _, _, qz = demo[ENVIRONMENT][-1, 6:13]
        assert sheet_inside(np.array([[x, y]]), np.array([2 * np.arctan2(qz, qw)]), Task().tape_margin)


@pytest.mark.parametrize("key, axis, sign", [("K_LEFT", 1, -1), ("K_d", 1, 1), ("K_UP", 0, -1), ("K_s", 0, 1)])
def test_keys_move_the_tip_as_the_picture_shows_it(policy, key, axis, sign):
    """The camera stands opposite the arm: right is +y, up is -x."""
    envs = SO101ResidualVectorEnv(1, policy, autoreset_mode=AutoresetMode.DISABLED)
    start = envs.reset(seed=0)[0][0, OBS["tip_pos"]]
    Person().hold(getattr(pygame, key))
    for _ in range(20):
        obs = envs.step(np.zeros((1, 6)))[0]
    moved = obs[0, OBS["tip_pos"]] - start
    assert 0.01 < sign * moved[axis] < 0.08 and abs(moved[1 - axis]) < 0.005 and abs(moved[2]) < 0.01


def test_closing_the_window_keeps_what_is_finished(policy):
    envs = SO101ResidualVectorEnv(1, policy, autoreset_mode=AutoresetMode.DISABLED)
    person, seen = Person(), []

    def act(obs):
        seen.append(policy.episode)
        if policy.episode == 2:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return person(obs)

    episodes = evaluate(act, envs, [RECORD_SEED + i for i in range(5)])
    assert len(episodes) == 1 and seen.count(2) == 1


def test_what_is_no_arm_for_one_person_is_refused(policy, monkeypatch):
    with pytest.raises(BasePolicyError, match="1 environment at a time, not in 2; to train on it, record it"):
        SO101ResidualVectorEnv(2, policy)
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(SO101Error, match=r'base policy keyboard needs pygame: pip install -e "\.\[teleop\]"'):
        load_policy("keyboard")


class Gamepad:
    """pygame's Joystick: an axis or button that it lacks, and all of one that is unplugged, is an error."""

    def __init__(self, axes, buttons, number=7):
        self.axes, self.buttons, self.number, self.unplugged = axes, buttons, number, False

    def get_numaxes(self):
        return len(self.axes)

    def get_numbuttons(self):
        return len(self.buttons)

    def get_name(self):
        return "Fancy\nPad"

    def get_instance_id(self):
        return self.number

    def read(self, values, number):
        if self.unplugged or number >= len(values):
            raise pygame.error("Invalid joystick axis")
        return values[number]

    def get_axis(self, number):
        return self.read(self.axes, number)

    def get_button(self, number):
        return self.read(self.buttons, number)


@pytest.mark.parametrize(
    "pads, used",
    [
        ([([], [])], None), ([([0.0], [False])], None), ([([0.0, 0.0], [])], None), ([([0.0, 0.0], [False])], 0),
        ([([0.0], [False]), ([0.0, 0.0, 0.0], [False, False])], 1),
    ],
)  # fmt: skip
def test_a_gamepad_without_stick_or_button_is_not_used(monkeypatch, capsys, pads, used):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pads = [Gamepad(*pad) for pad in pads]
    monkeypatch.setattr(pygame.joystick, "get_count", lambda: len(pads))
    monkeypatch.setattr(pygame.joystick, "Joystick", pads.__getitem__)
    policy = load_policy("keyboard")
    lines = [line for line in capsys.readouterr().out.splitlines() if "is not used" in line]
    assert policy.gamepad is (None if used is None else pads[used])
    assert len(lines) == (len(pads) if used is None else used) and all("gamepad Fancy Pad" in line for line in lines)
    policy._wanted()
    policy.close()


@pytest.mark.parametrize("how", ["event", "error", "event of another"])
def test_with_the_gamepad_unplugged_the_keys_go_on(policy, monkeypatch, how):
    envs = SO101ResidualVectorEnv(1, policy, autoreset_mode=AutoresetMode.DISABLED)
    start = envs.reset(seed=0)[0][0, OBS["tip_pos"]]
    policy.gamepad, shown = Gamepad([0.0, -1.0], [False]), []
    monkeypatch.setattr(
        policy, "font", SimpleNamespace(render=lambda text, *_: shown.append(text) or pygame.Surface((1, 1)))
    )
    envs.step(np.zeros((1, 6)))
    policy.gamepad.unplugged = how == "error"
    if how != "error":
        number = 7 if how == "event" else 8
        pygame.event.post(pygame.event.Event(pygame.JOYDEVICEREMOVED, instance_id=number))
    if how == "event of another":
        envs.step(np.zeros((1, 6)))
        assert policy.gamepad is not None and "unplugged" not in shown[-1]
        return
    Person().hold(pygame.K_RIGHT)
    for _ in range(20):
        obs = envs.step(np.zeros((1, 6)))[0]
    assert policy.gamepad is None and "gamepad unplugged" in shown[-1] and "gamepad unplugged" not in shown[0]
    assert obs[0, OBS["tip_pos"]][1] - start[1] > 0.01


def test_a_gamepads_stick_and_button_do_the_same(policy):
    envs = SO101ResidualVectorEnv(1, policy, autoreset_mode=AutoresetMode.DISABLED)
    start = envs.reset(seed=0)[0][0, OBS["tip_pos"]]
    axes = [0.8, 0.0]  # to the right
    policy.gamepad = Gamepad(axes, buttons=[True])
    for _ in range(20):
        obs = envs.step(np.zeros((1, 6)))[0]
    moved = obs[0, OBS["tip_pos"]] - start
    assert moved[1] > 0.01 and moved[2] < -0.005 and policy.memory["pressing"][0]


def test_without_a_display_nobody_is_waited_for(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BasePolicyError, match="no window can be opened here"):
        load_policy("keyboard")
