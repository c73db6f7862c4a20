"""The scripted scene reset: between episodes the arm drags the sheet to a new start by itself.

It uses what an arm and its camera measure: joints, and the locator's pose of the sheet. See `SceneReset`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from so101.base import flat_observation
from so101.camera import project, rectangle
from so101.extras import import_extra
from so101.files import write_atomic
from so101.locator import SheetLocator, overlay
from so101.loop import Blind, Loop, scaled
from so101.opencv import OpenCVPolicy
from so101.pusher import ARM, TipPolicy
from so101_env import (
    COMMAND,
    HOME_RAD,
    OBS,
    PAN_AXIS_M,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    TURN_RAD_PER_M2,
    Task,
    draw_start,
    sheet_inside,
    sheet_pose,
)
from so101_sim.errors import SO101Error, check_arrays
from so101_sim.geometry import distance_to_rectangle, rotate, wrap_angle
from so101_sim.scene import CONTROL_HZ

# ---------------------------------------------------------------------------------------------------------------------
# the drag

RISE, REACH, LOWER, DRAG, LIFT, DONE = range(6)  # stages
INSET_M = 0.03  # press the sheet at least this far inside its edges
NEAR_M, FAR_M = 0.085, 0.285  # from the shoulder_pan axis: here the gripper reaches the table and points down
LEAN_M, LEAN_RAD_PER_M = 0.27, 6.3  # farther out it has to lean outwards, by this much more per m
GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, 13)] * 2, indexing="ij"), -1).reshape(-1, 2) * (SHEET_HALF_M - INSET_M)
WRIST_TURN_RAD, TURN_M_PER_RAD = 0.25, 0.6  # by this much the wrist turns a sheet; distance from the centre for more
PATIENCE_STEPS = {REACH: 75, LOWER: 45, DRAG: 150}  # after this many control steps the drag ends without success
RISE_STEPS = 20


def press_point(pose: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, float]:
    """Where to press a sheet that is dragged from pose (3,) to goal (3,): x, y (m), yaw (rad).

    Returns:
        The point (2,), m, in the sheet's axes, that the gripper reaches at both ends of the drag: the one nearest to
        the centre, or beside it if the sheet has to turn by more than the wrist turns it. How far the point is out of
        reach, m; 0 if it is not.
    """
    outside = np.zeros(len(GRID))
    for x, y, yaw in (pose, goal):
        radius = np.linalg.norm(rotate(GRID, np.full(len(GRID), yaw)) + (x, y) - PAN_AXIS_M, axis=1)
        outside = np.maximum(outside, np.maximum(radius - FAR_M, NEAR_M - radius))
    lever, drag = rotate(GRID, np.full(len(GRID), pose[2])), goal[:2] - pose[:2]
    turn_rad = TURN_RAD_PER_M2 * (lever[:, 0] * drag[1] - lever[:, 1] * drag[0])
    left_rad = np.maximum(np.abs(wrap_angle(goal[2] - pose[2]) - turn_rad) - WRIST_TURN_RAD, 0.0)
    best = int((np.linalg.norm(GRID, axis=1) + TURN_M_PER_RAD * left_rad + 100.0 * outside).argmin())
    return GRID[best], float(outside[best])


class DragPolicy(TipPolicy):
    """Scripted: goes over the sheet, presses, drags the sheet's centre to `goal`, and lifts; `done` says it has lifted.

    While the sheet slides, the wrist turns it towards the goal's yaw. An arm with backlash or weak servos lags: the
    tip is sent farther ahead until it follows. A sheet that does not follow the tip is pressed harder, and a tip
    that does not move presses less. A tip that moves the sheet on its way through the air is lower than it seems, since
    an encoder is off: it then travels higher. The next drag starts with the last press and height.
    """

    HOVER_M, RAISED_M, LEAD_RAD = 0.028, 0.02, 0.03
    MIN_PRESS, MAX_PRESS, PRESS_STEP = 0.3, 2.5, 0.1  # in units of PRESS_N; change per control step
    # a tip moves, or stands still, if it covers more, or less, than this per control step
    MOVING_M, STILL_M = 0.0015, 0.0008
    # a tip on its way touches a sheet that moves more than this per control step, and then travels higher: by this
    # every few control steps, and at most
    TOUCH_M, CLEAR_STEP_M, CLEAR_STEPS, MAX_CLEAR_M = 0.001, 0.004, 5, 0.04
    FOLLOWS = 0.5  # a sheet follows if it moves by this share of the tip's motion
    RESTING_M, STUCK_STEPS = 0.0001, 60  # a sheet is stuck if it still moves less than this per control step
    TOLERANCE_M, COAST_STEPS = 0.006, 3  # near enough to the goal, where the sheet will be in this many control steps
    SHARE, AIR_RAD = 0.12, 0.02  # per control step in the air: share of the remaining way; largest motion of a joint
    SINK_M, LOWER_SHARE = 0.0022, 0.25  # lowered slowly: with backlash the tip drifts meanwhile
    PITCH_GAIN = 0.1  # an arm with latency oscillates with more
    PASSING_M = 0.02  # a sheet this near that slides past the goal is let go
    CENTERED_M = 0.006  # near enough to the point to press at
    SLACK_M = 0.022  # once down, the tip may be this far nearer to the edge than INSET_M before it is lifted
    # the tip is sent ahead of its way by this much at first in a drag, by this share of its lag more, and at most
    FIRST_LEAD_M, LEAD_SHARE, MAX_LEAD_M = 0.004, 0.25, 0.012
    BRAKE_SHARE = 0.5  # and less, where it is faster than wanted
    MEAN_SHARE = 0.25  # weight of the newest step in the running mean of motions
    # share of the error in yaw corrected per control step, and at most this much; farthest from home: it may not help
    ROLL_SHARE, ROLL_RAD, MAX_ROLL_RAD = 0.2, 0.03, 0.8
    SINKING_M_S = -0.03  # a tip that sinks more slowly has met the table
    ROLL = ARM  # the joint that turns the gripper

    def __init__(self) -> None:
        super().__init__()
        self.goal = np.zeros((0, 3))
        self.press, self.clear = np.zeros(0), np.zeros(0)  # in units of PRESS_N; height in m above HOVER_M
        self.memory: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Begin a drag in the environments in mask, (N,) bool."""
        if not self.memory or len(self.memory["stage"]) != len(mask):
            count = len(mask)
            self.memory = {name: np.zeros(count, np.int64) for name in ("stage", "steps", "count")}
            self.memory["lead"] = np.zeros(count)
            self.memory |= {name: np.zeros((count, 2)) for name in ("point", "sheet", "tip_mean", "sheet_mean")}
            self.press, self.clear, self.goal = np.ones(count), np.zeros(count), np.zeros((count, 3))
        for array in self.memory.values():
            array[mask] = 0
        self.memory["point"][mask] = np.nan

    @property
    def done(self) -> np.ndarray:
        """Whether each drag has ended and the tip is lifted, (N,) bool."""
        return self.memory["stage"] == DONE

    def lean_rad(self, obs: np.ndarray) -> np.ndarray:
        """See TipPolicy."""
        radius = np.linalg.norm(obs[:, OBS["tip_pos"]][:, :2] - PAN_AXIS_M, axis=1)
        return LEAN_RAD_PER_M * np.maximum(radius - LEAN_M, 0.0)

    def act(self, obs: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6)."""
        command, flat = obs[COMMAND], flat_observation(obs).astype(np.float64)
        (sheet, yaw), tip, jacobian = sheet_pose(flat), flat[:, OBS["tip_pos"]], self.tip_jacobian(flat)
        tip_step = np.einsum("nij,nj->ni", jacobian, flat[:, OBS["joint_vel"]][:, :ARM]) / CONTROL_HZ
        self._follow(sheet, yaw, tip_step, mask)
        stage = self._next_stage(sheet, yaw, tip, tip_step, mask)
        dragging = stage == DRAG

        to_point = sheet + rotate(np.nan_to_num(self.memory["point"]), yaw) - tip[:, :2]
        share = np.select([stage == REACH, stage == LOWER], [self.SHARE, self.LOWER_SHARE], 0.0)
        motion = share[:, None] * to_point
        motion = np.where(dragging[:, None], self.goal[:, :2] - sheet, motion)
        longest = np.where(dragging, self.DRAG_M, self.REACH_M)
        motion *= np.minimum(longest / np.maximum(np.linalg.norm(motion, axis=1), 1e-9), 1.0)[:, None]
        hover = np.clip(self.SHARE * (self.HOVER_M + self.clear - tip[:, 2]), -self.SINK_M, self.LIFT_M)
        raising = (stage == RISE) | (stage == LIFT)
        rise = np.select([dragging, stage == LOWER, raising], [0.0, -self.SINK_M, self.LIFT_M], hover)

        # in the air the last targets move on, so that the arm does not lag behind; on the sheet they lead by a force
        delta = np.zeros(command.shape)
        step = self.joint_steps(flat, jacobian, motion, rise)
        delta[:, :ARM] = step / np.maximum(np.abs(step).max(1, keepdims=True) / self.AIR_RAD, 1.0)
        ahead = self._lead(motion, tip_step, dragging, mask)
        drag = self.move_tip(flat, command, jacobian, motion + ahead, rise, self.press * dragging)
        turn = np.clip(self.ROLL_SHARE * wrap_angle(self.goal[:, 2] - yaw), -self.ROLL_RAD, self.ROLL_RAD)
        roll = command[:, self.ROLL] - HOME_RAD[self.ROLL]
        drag[:, self.ROLL] = np.clip(roll + turn, -self.MAX_ROLL_RAD, self.MAX_ROLL_RAD) - roll
        delta[:, self.ROLL] = np.clip(-self.SHARE * roll, -self.AIR_RAD, self.AIR_RAD)
        return np.where(dragging[:, None], drag, delta)

    def _lead(self, motion: np.ndarray, tip_step: np.ndarray, dragging: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """How far ahead of a motion (N, 2) the tip is sent in a drag, m, (N, 2), against friction and backlash."""
        wanted = np.linalg.norm(motion, axis=1)
        ahead = motion / np.maximum(wanted, 1e-9)[:, None]
        lag = wanted - np.einsum("ni,ni->n", tip_step[:, :2], ahead)
        share = np.where(lag < 0.0, self.BRAKE_SHARE, self.LEAD_SHARE)
        lead = np.clip(self.memory["lead"] + share * lag, 0.0, self.MAX_LEAD_M)
        lead = np.where(self.memory["steps"] == 0, self.FIRST_LEAD_M, lead) * dragging
        self.memory["lead"][mask] = lead[mask]
        return lead[:, None] * ahead

    def _follow(self, sheet: np.ndarray, yaw: np.ndarray, tip_step: np.ndarray, mask: np.ndarray) -> None:
        """Watch how tip and sheet move in a drag, and adapt the press; choose where to press in a drag that begins."""
        memory = self.memory
        for i in np.flatnonzero(mask & np.isnan(memory["point"]).any(1)):
            memory["point"][i] = press_point(np.append(sheet[i], yaw[i]), self.goal[i])[0]
            memory["sheet"][i] = sheet[i]
        for name, step in (("tip_mean", tip_step[:, :2]), ("sheet_mean", sheet - memory["sheet"])):
            memory[name][mask] += (self.MEAN_SHARE * (step - memory[name]))[mask]
        memory["sheet"][mask] = sheet[mask]
        tip_m, sheet_m = (np.linalg.norm(memory[name], axis=1) for name in ("tip_mean", "sheet_mean"))
        dragging = mask & (memory["stage"] == DRAG) & (memory["steps"] > 6)
        dragging &= np.linalg.norm(self.goal[:, :2] - sheet, axis=1) > 2 * self.TOLERANCE_M
        slipping = dragging & (tip_m > self.MOVING_M) & (sheet_m < self.FOLLOWS * tip_m)
        stalled = dragging & (tip_m < self.STILL_M)
        touching = mask & (memory["stage"] == REACH) & (memory["steps"] % self.CLEAR_STEPS == self.CLEAR_STEPS - 1)
        touching &= sheet_m > self.TOUCH_M
        self.clear[touching] = np.minimum(self.clear[touching] + self.CLEAR_STEP_M, self.MAX_CLEAR_M)
        press = self.press + self.PRESS_STEP * (1.0 * slipping - 1.0 * stalled)
        self.press[mask] = np.clip(press, self.MIN_PRESS, self.MAX_PRESS)[mask]

    def _next_stage(
        self, sheet: np.ndarray, yaw: np.ndarray, tip: np.ndarray, tip_step: np.ndarray, mask: np.ndarray
    ) -> np.ndarray:
        """The stage to be in (N,); remembered, as is how long it lasts, for the environments in mask."""
        old, steps, count, point = (self.memory[name] for name in ("stage", "steps", "count", "point"))
        off = np.linalg.norm(sheet + rotate(np.nan_to_num(point), yaw) - tip[:, :2], axis=1)
        aside = distance_to_rectangle(tip[:, :2], sheet, yaw, SHEET_HALF_M, INSET_M)
        left, coast = self.goal[:, :2] - sheet, self.COAST_STEPS * self.memory["sheet_mean"]
        there = np.linalg.norm(left - coast, axis=1) < self.TOLERANCE_M
        # or it will slide past the goal
        there |= (np.linalg.norm(left, axis=1) < self.PASSING_M) & (((left - coast) * coast).sum(1) < 0.0)
        count = (count + 1) * ((old == LOWER) & (tip_step[:, 2] * CONTROL_HZ > self.SINKING_M_S))
        raised = (tip[:, 2] > self.RAISED_M + self.clear) | (steps > RISE_STEPS)

        stage = old.copy()
        stage[(old == RISE) & raised] = REACH
        stage[(old == REACH) & (off < self.CENTERED_M)] = LOWER
        stage[(old == LOWER) & (steps > 6) & (count >= 3)] = DRAG
        stage[(old == DRAG) & (there | (aside > self.SLACK_M))] = LIFT
        resting = np.linalg.norm(self.memory["sheet_mean"], axis=1) < self.RESTING_M
        stage[(old == DRAG) & (steps > self.STUCK_STEPS) & resting] = LIFT
        for each, patience in PATIENCE_STEPS.items():
            stage[(old == each) & (steps >= patience)] = LIFT
        stage[(old == LIFT) & raised] = DONE
        changed = stage != old
        now = {"stage": stage, "steps": (steps + 1) * ~changed, "count": count * ~changed}
        for name, array in now.items():
            self.memory[name][mask] = array[mask]
        return stage


# ---------------------------------------------------------------------------------------------------------------------
# the reset

GOAL_DRAWS = 300
NEAR_TRIES, MAX_TRIES = 3, 6
DRAG_STEPS = RISE_STEPS * 2 + sum(PATIENCE_STEPS.values()) + 10  # a drag ends by itself before
TEXT_COLUMNS = 50  # columns of text that fit into a picture
VIEW_PIXELS = 3.0  # a start's corners are at least this far inside the picture
# the point to press at may be this far out of reach at a start, where the gripper leans a bit, and before a drag
BEYOND_M, FARTHEST_M = 0.01, 0.05
GOAL_M, STRAY_M, STRAY_RAD = 0.015, 0.01, 0.05  # see SceneReset
STAY_M = 0.005  # a sheet that moves less in a drag has not followed


class HandNeeded(SO101Error):
    """The arm cannot reset the scene by itself. The message is the reason."""


class Reset(NamedTuple):
    """What a reset has done."""

    ticks: int  # control steps, with the ways to home
    tries: int  # drags; 0: the sheet lay at a fair start already
    goal: np.ndarray  # (3,), drawn start: x, y (m), yaw (rad)
    pose: np.ndarray  # (3,), start as it is seen at last


class SceneReset:
    """Brings the sheet to a random start, and the arm home.

    A start is drawn from the task's own distribution, as far as camera and arm reach. A fair start is one that this
    distribution has: seen outside of the tape, in view, within reach, its distance from the tape at most STRAY_M and
    its yaw at most STRAY_RAD outside of the task's ranges. A sheet at a fair start is not moved. Otherwise a reset ends
    at a fair start within GOAL_M of the drawn one, with its yaw turned towards the drawn yaw as far as the sheet
    follows. After NEAR_TRIES drags, any fair start will do.

    Args:
        loop: the control loop of the arm. Its policy does not act. If it is an OpenCVPolicy, the tape is where it has
            seen it.
        task: the starts are those of this task.
        locator: locates the sheet.
    """

    def __init__(self, loop: Loop, task: Task, locator: SheetLocator):
        self.caller, self.drag = loop, DragPolicy()
        self.tape: np.ndarray | None = None  # homography (1, 3, 3) from the table, m, to pixels; None: not known
        self.policy = OpenCVPolicy(self.drag, task.tape_margin)
        self.policy.firmware_p, self.policy.locator = task.firmware_p, locator
        self.loop = Loop(loop.robot, self.policy, loop.controller, loop.clock, loop.dry_run, loop.offset_rad)
        self.tape_margin, self.ranges = task.tape_margin, task.randomization()
        self.mask = np.ones(1, bool)
        self.drag.reset(self.mask)

    def get_state(self) -> dict[str, np.ndarray]:
        """What the next reset depends on, besides the arm and its scene."""
        tape = self._known_tape()
        tape = np.zeros((0, 3, 3)) if tape is None else tape
        return {"press": self.drag.press.copy(), "clear": self.drag.clear.copy(), "tape": tape}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where get_state was called. Raises SO101Error for a state that does not fit."""
        own = {"press": self.drag.press, "clear": self.drag.clear, "tape": np.zeros((min(len(state["tape"]), 1), 3, 3))}
        check_arrays(own, state, "state of the scene reset")
        self.drag.press[:], self.drag.clear[:] = state["press"], state["clear"]
        if len(state["tape"]) and isinstance(self.caller.policy, OpenCVPolicy):
            self.caller.policy.reset(self.mask)
            self.caller.policy.seen["to_picture"][:] = state["tape"]

    def _known_tape(self) -> np.ndarray | None:
        """Where the last episode has seen the tape, a homography (1, 3, 3), or None."""
        known = self.caller.policy.seen if isinstance(self.caller.policy, OpenCVPolicy) else {}
        return known["to_picture"].copy() if known and np.isfinite(known["to_picture"]).all() else None

    def run(self, rng: np.random.Generator, fresh: bool = False) -> Reset:
        """Reset the scene, from any pose of the arm. It may take MAX_TRIES drags of a few seconds each.

        Args:
            rng: draws the start.
            fresh: also drag a sheet that lies at a fair start already, to the drawn one.

        Raises:
            HandNeeded: a person has to lay the sheet.
            Blind: the sheet is not seen, even with the arm out of the way.
            RobotError: the arm or its camera is lost.
        """
        began, tries, moved = self.loop.clock.ticks, 0, True
        self.loop.film = self.caller.film
        # a sheet that covers the tape hides it; then only the episode that has ended knows where the tape is
        self.tape = self._known_tape()
        self.loop.measure()
        pose = self.look()
        goal = pose if self.is_fair(pose) and not fresh else self.draw_goal(rng, pose)
        while True:
            near = tries < NEAR_TRIES
            if self._arrived(pose, goal, near):
                self.loop.home(self.drag.AIR_RAD * CONTROL_HZ)
                pose = self.look()
                if self._arrived(pose, goal, near):
                    return Reset(self.loop.clock.ticks - began, tries, goal, pose)
            if tries == MAX_TRIES:
                raise HandNeeded(f"the sheet is not at a start after {tries} drags: lay it by hand outside of the tape")
            # at the goal, but turned: it turns while it is dragged; not moved: another drag may begin at a better point
            if np.linalg.norm(goal[:2] - pose[:2]) <= GOAL_M or not moved:
                goal = self.draw_goal(rng, pose)
            before, tries = pose, tries + 1
            pose = self._drag_to(goal)
            moved = bool(np.linalg.norm(pose[:2] - before[:2]) > STAY_M)

    def look(self) -> np.ndarray:
        """The sheet's pose (3,) in a new picture, if need be with the arm out of the view. Raises Blind."""
        try:
            self._forget(self.tape)
            self.loop.act(self.mask)
        except Blind as blind:
            self.loop.lift()
            self._look_from_aside(blind)
        self.tape = self.policy.seen["to_picture"].copy()
        return self.policy.estimate[0].copy()

    def _look_from_aside(self, blind: Blind) -> None:
        """Look with the arm out of the view, at last also for the tape. Raises Blind."""
        for tape in (None,) if self.tape is None else (self.tape, None):
            self._forget(tape)
            try:
                self.loop.look_from_aside(self.mask, blind)
                return
            except Blind as error:  # where the tape was known, the camera was moved, or the arm has misled the locator
                blind = error
        raise blind

    def _forget(self, tape: np.ndarray | None) -> None:
        """Forget the sheet's pose, and the tape, unless it is known: a homography (1, 3, 3), see OpenCVPolicy."""
        self.policy.reset(self.mask)
        if tape is not None:
            self.policy.seen["to_picture"][:] = tape

    def draw_goal(self, rng: np.random.Generator, pose: np.ndarray) -> np.ndarray:
        """A start (3,) to which the arm can drag a sheet at pose (3,). Raises HandNeeded if there is none."""
        beyond_m = press_point(pose, pose)[1]
        if beyond_m > FARTHEST_M:
            raise HandNeeded("the sheet lies out of the arm's reach: lay it by hand outside of the tape")
        for _ in range(GOAL_DRAWS):
            goal = np.array(draw_start(rng, self.ranges, self.tape_margin))
            if self.in_view(goal) and press_point(pose, goal)[1] <= max(beyond_m, BEYOND_M):
                return goal
        raise HandNeeded("no start is within view and reach: turn the camera to the tape, and lay the sheet by hand")

    def in_view(self, pose: np.ndarray) -> bool:
        """Whether the camera sees all corners of a sheet at pose (3,)."""
        corners = project(self.policy.seen["to_picture"][0], rectangle(SHEET_HALF_M, *pose))
        height, width = self.policy.image_size
        low, high = VIEW_PIXELS, np.array([width, height]) - 1 - VIEW_PIXELS
        return bool(((corners >= low) & (corners <= high)).all())

    def is_fair(self, pose: np.ndarray) -> bool:
        """Whether a sheet at pose (3,) is at a fair start, see SceneReset."""
        nearest_m, farthest_m = self.ranges.sheet_distance_m
        distance_m = np.linalg.norm(pose[:2] - TAPE_CENTER_M)
        return bool(
            nearest_m - STRAY_M <= distance_m <= farthest_m + STRAY_M
            and abs(pose[2]) <= self.ranges.sheet_yaw_rad + STRAY_RAD
            and not sheet_inside(pose[None, :2], pose[2:], self.tape_margin)[0]
            and self.in_view(pose)
            and press_point(pose, pose)[1] <= BEYOND_M
        )

    def _arrived(self, pose: np.ndarray, goal: np.ndarray, near: bool) -> bool:
        """Whether a sheet at pose (3,) is at a fair start, and, if asked for, near goal (3,)."""
        return self.is_fair(pose) and (not near or bool(np.linalg.norm(goal[:2] - pose[:2]) <= GOAL_M))

    def _drag_to(self, goal: np.ndarray) -> np.ndarray:
        """Drag the sheet towards goal (3,), and lift the tip; returns the sheet's pose (3,) as it is seen then."""
        self.drag.reset(self.mask)
        self.drag.goal[0], self.drag.gain_factor = goal, self.loop.controller.gain_factor
        self.loop.clock.start()
        try:
            for _ in range(DRAG_STEPS):
                delta = self.loop.act(self.mask)
                if self.drag.done[0]:
                    break
                self.loop.move(delta)
                self.loop.clock.wait()
                self.loop.measure()
        except Blind:  # below the arm; if it is not seen from aside, either, this look raises it again
            self.loop.lift()
            return self.look()
        return self.policy.estimate[0].copy()

    def save_picture(self, path: Path, text: str) -> None:
        """Save what the camera sees now as a PNG, with outlines of tape and sheet as far as they are known, and text.

        Raises:
            DiskError: the file cannot be written.
            RobotError: the camera is lost.
        """
        cv2 = import_extra("cv2", "arm", "a picture of the camera")
        image, seen, to_picture = self.loop.robot.picture().image, self.policy.seen, None
        if seen and np.isfinite(seen["to_picture"]).all():
            to_picture = scaled(seen["to_picture"][0], self.policy.image_size, image)
        pose = None if self.policy.estimate is None else self.policy.estimate[0]
        drawn = overlay(image, to_picture, pose, self.tape_margin, textwrap.fill(text, TEXT_COLUMNS))
        png = cv2.imencode(".png", drawn[..., ::-1])[1].tobytes()
        write_atomic(path, lambda temporary: temporary.write_bytes(png))
