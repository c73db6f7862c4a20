"""A person at the keyboard or with a gamepad, as base policy: `--base-policy keyboard`.

    python -m so101.record --base-policy keyboard --dataset demos --episodes 20 --only-successes

Arrow keys (or W, A, S, D, or the left stick) move the gripper's tip as the window shows it. Holding space (or the first
button) presses. Closing the window ends the recording. An episode starts with its first key; until then the simulation
waits. Needs pygame, the extra "teleop".
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from so101.base import flat_observation
from so101.extras import import_extra
from so101.pusher import TipPolicy
from so101_env import COMMAND, MAX_EPISODE_STEPS, OBS, BaseObservation, BasePolicyError
from so101_sim.scene import CONTROL_HZ
from so101_sim.vector import IMAGES

CAMERA = "top"  # stands opposite the arm: right in its picture is +y, and up is -x, towards the arm
DEAD_ZONE = 0.15  # deflections up to this count as zero: a stick does not return exactly to its centre


class KeyboardPolicy(TipPolicy):
    """Moves the tip by keys or a gamepad. One environment at a time.

    Raises:
        SO101Error: pygame is not installed.
        BasePolicyError: there is no display.
    """

    cameras, image_size, max_envs = (CAMERA,), (480, 640), 1

    def __init__(self) -> None:
        super().__init__()
        # otherwise SDL draws with an OpenGL context of its own, and then MuJoCo cannot use its context
        os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"
        pygame = import_extra("pygame", "teleop", "base policy keyboard")
        self.pygame, self.held = pygame, set()  # keys that are down
        self.directions = {
            pygame.K_LEFT: (0, -1), pygame.K_a: (0, -1), pygame.K_RIGHT: (0, 1), pygame.K_d: (0, 1),
            pygame.K_UP: (-1, 0), pygame.K_w: (-1, 0), pygame.K_DOWN: (1, 0), pygame.K_s: (1, 0),
        }  # fmt: skip
        try:
            pygame.display.init()
            height, width = self.image_size
            self.window = pygame.display.set_mode((width, height))
            if pygame.display.get_driver() == "offscreen":  # SDL's last resort: an invisible window without keys
                raise pygame.error("there is no display")
        except pygame.error as error:
            pygame.quit()
            raise BasePolicyError(f"base policy keyboard: no window can be opened here ({error})") from error
        pygame.font.init()
        pygame.joystick.init()
        pygame.display.set_caption("paper in square")
        self.font, self.clock = pygame.font.Font(None, 28), pygame.time.Clock()
        self.notice = ""  # shown in the window
        self.gamepad = self._find_gamepad()
        self.episode = 0
        self.memory = {"steps": np.zeros(1, np.int64), "pressing": np.zeros(1, bool)}

    def _find_gamepad(self) -> Any:
        """The first gamepad that has a stick and a button, or None. Prints a line for those that have not."""
        for number in range(self.pygame.joystick.get_count()):
            gamepad = self.pygame.joystick.Joystick(number)
            axes, buttons = gamepad.get_numaxes(), gamepad.get_numbuttons()
            if axes >= 2 and buttons >= 1:
                return gamepad
            name = " ".join(gamepad.get_name().split())
            print(
                f"gamepad {name} is not used: it has {axes} axes and {buttons} buttons, 2 and 1 are needed", flush=True
            )
        return None

    def reset(self, mask: np.ndarray) -> None:
        """Start the next episode, which waits for its first key."""
        self.episode += 1
        for array in self.memory.values():
            array[mask] = 0

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (1, 6). Takes the time of a control step, so that the person acts in real time."""
        steps, pressing = self.memory["steps"], self.memory["pressing"]
        picture = obs[IMAGES + CAMERA][0]
        motion, down = self._wanted()
        while steps[0] == 0 and not motion.any() and not down and not self.quit:
            self._show(
                picture, f"episode {self.episode}: arrow keys move, space presses; any of them starts the episode"
            )
            motion, down = self._wanted()
        seconds = (MAX_EPISODE_STEPS - steps[0]) / CONTROL_HZ
        self._show(picture, f"episode {self.episode}, {seconds:.0f} s left" + (", pressing" if pressing[0] else ""))
        steps[mask] += 1

        command, obs = obs[COMMAND], flat_observation(obs).astype(np.float64)
        tip = obs[:, OBS["tip_pos"]]
        pressing[mask] = down and (pressing | (tip[:, 2] < self.CONTACT_M))[mask]
        speed = self.DRAG_M if pressing[0] else self.REACH_M
        rise = np.zeros(1) if pressing[0] else np.full(1, -self.SINK_M) if down else self.rise_to_hover(tip)
        return self.move_tip(obs, command, self.tip_jacobian(obs), speed * motion[None], rise, pressing)

    def _wanted(self) -> tuple[np.ndarray, bool]:
        """The keys' present meaning: direction x, y (2,) of length at most 1, and whether to press."""
        pygame = self.pygame
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self.quit = True
            elif event.type == pygame.KEYDOWN:
                self.held.add(event.key)
            elif event.type == pygame.KEYUP:
                self.held.discard(event.key)
            elif event.type == pygame.JOYDEVICEREMOVED and self.gamepad is not None:
                if event.instance_id == self.gamepad.get_instance_id():
                    self._lose_gamepad()
        motion = np.sum([self.directions.get(key, (0, 0)) for key in self.held] or [(0, 0)], axis=0, dtype=float)
        down = pygame.K_SPACE in self.held
        stick, button = self._read_gamepad()
        motion += stick * (np.linalg.norm(stick) > DEAD_ZONE)
        return motion / max(np.linalg.norm(motion), 1.0), down or button

    def _read_gamepad(self) -> tuple[np.ndarray, bool]:
        """The stick's deflection x, y (2,), and whether the button is down; nothing without a gamepad."""
        if self.gamepad is not None:
            try:  # down and right are positive
                stick = np.array([self.gamepad.get_axis(1), self.gamepad.get_axis(0)])
                return stick, bool(self.gamepad.get_button(0))
            except self.pygame.error:  # unplugged, before its event has come
                self._lose_gamepad()
        return np.zeros(2), False

    def _lose_gamepad(self) -> None:
        """Go on with the keys alone, and show it in the window."""
        self.gamepad, self.notice = None, "; gamepad unplugged, use the keys"

    def _show(self, picture: np.ndarray, text: str) -> None:
        """Show a picture (H, W, 3) uint8 with a line of text, and wait for the end of the control step."""
        self.window.blit(self.pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        self.window.blit(self.font.render(text + self.notice, True, "white", "black"), (8, 8))
        self.pygame.display.flip()
        self.clock.tick(CONTROL_HZ)

    def close(self) -> None:
        """Close the window."""
        self.pygame.quit()
