"""How a policy copes with an arm that is not the one it was trained on: success with one thing wrong at a time.

    python benchmark/reality_gap.py --json gap.json
    python benchmark/reality_gap.py --model policy.onnx --episodes 100 --first-seed 200 --pose true

The control loop of so101.drive runs the policy on its simulated arm, in virtual time: on any machine, however loaded,
the same command gives the same numbers. Every row has the same episodes, which differ by what is wrong. The seeds are
not those of held-out evaluations. The sheet's pose comes from the camera through OpenCV; `--pose true` takes the true
pose with noise instead, in a third of the time.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from so101.base import BasePolicy, StackedPolicy, with_sheet
from so101.cli import check_flags, check_output, parse, run_script
from so101.drive import Args as DriveArgs
from so101.drive import make_policy
from so101.files import write_json
from so101.robot import Picture
from so101.simulated_arm import Flaws
from so101.stats import wilson
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import (
    MAX_EPISODE_STEPS,
    NOISE_SHEET_M,
    NOISE_YAW_RAD,
    TAPE_CENTER_M,
    BaseObservation,
    Task,
    sheet_inside,
)
from so101_sim.control import JOINTS
from so101_sim.errors import SO101Error
from so101_sim.geometry import rotate

ROOT = Path(__file__).resolve().parent.parent
SEED = 1_540_000_000  # first episode's seed; used nowhere else


@dataclasses.dataclass
class Args:
    """Success of a policy on arms with one thing wrong."""

    model: str = str(ROOT / "assets" / "arm.onnx")
    """policy to run: a checkpoint or an ONNX file"""
    episodes: int = 40
    """episodes in each row"""
    first_seed: int = 0
    """number of the first episode; settings are chosen on other episodes than those of published figures"""
    rows: tuple[str, ...] = ()
    """only the rows whose names contain one of these words"""
    pose: Literal["camera", "true"] = "camera"
    """where the policy gets the sheet's pose from"""
    json: str | None = None
    """write the results to this file after every row; rows that it already has are not run again"""


@dataclasses.dataclass(frozen=True)
class Row:
    """What is wrong in a row."""

    flaws: Flaws = Flaws()
    """with the arm and its table"""
    known_gain: float | None = None
    """factor of the servo gain that the command law is told, if it is"""
    picture_delay_s: float = 0.0
    """age of the pictures"""
    tape_shift_m: tuple[float, float] = (0.0, 0.0)
    """by how much the tape is off its place, x and y"""
    tape_turn_rad: float = 0.0
    """by how much the tape is turned about its centre"""
    dropout: bool = False
    """whether the view is lost now and then: for DROPOUT_S, beginning in a step with probability DROPOUT_CHANCE"""


DROPOUT_S, DROPOUT_CHANCE = 0.5, 0.03


def offset(joint: str, degrees: float) -> Row:
    """A row whose encoder of one joint is off."""
    return Row(Flaws(joint_offset_deg=tuple(degrees * (name == joint) for name in JOINTS)))


def make_rows() -> dict[str, Row]:
    """The rows by name."""
    rows = {"nothing": Row()}
    for degrees in (-5, -3, -2, 2, 3, 5):
        rows[f"shoulder_lift {degrees:+} degrees"] = offset("shoulder_lift", degrees)
    for joint, degrees in (("elbow_flex", -3), ("elbow_flex", 3), ("wrist_roll", 10)):
        rows[f"{joint} {degrees:+} degrees"] = offset(joint, degrees)
    for factor in (0.5, 0.7, 0.85, 1.4, 2.0):
        rows[f"servo gain x{factor}"] = Row(Flaws(gain=factor))
    rows["servo gain x0.5, told"] = Row(Flaws(gain=0.5), known_gain=0.5)
    for degrees in (2, 3):
        rows[f"backlash {degrees} degrees"] = Row(Flaws(backlash_deg=degrees))
    for finger in (0.6, 0.4, 0.3):
        rows[f"finger friction {finger}"] = Row(Flaws(finger_friction=finger))
    rows["finger friction 0.4, table 0.4"] = Row(Flaws(finger_friction=0.4, table_friction=0.4))
    rows["table friction 0.6"] = Row(Flaws(table_friction=0.6))
    rows["command 150 ms late"] = Row(Flaws(latency_s=0.15))
    rows["picture 200 ms late"] = Row(picture_delay_s=0.2)
    rows["tape 20 mm off"] = Row(tape_shift_m=(0.02, 0.0))
    rows["tape turned by 10 degrees"] = Row(tape_turn_rad=float(np.deg2rad(10)))
    for height_mm in (-5, 5):
        rows[f"table {height_mm:+} mm"] = Row(Flaws(table_height_m=height_mm / 1000))
    rows["view lost for 0.5 s now and then"] = Row(dropout=True)
    return rows


class RowRobot(VirtualRobot):
    """An arm in virtual time with what is wrong in a row."""

    def __init__(self, task: Task, row: Row, pictures: bool):
        super().__init__(task, row.flaws, pictures)
        self.row = row
        self.servo_gain, self.gain_known = row.known_gain or 1.0, row.known_gain is not None
        tape = self.arm.model.body("tape")
        tape.pos[:2] += row.tape_shift_m
        tape.quat[:] = [np.cos(row.tape_turn_rad / 2), 0, 0, np.sin(row.tape_turn_rad / 2)]

    def reset(self, seed: int) -> None:
        """Start an episode."""
        super().reset(seed)
        self.rng = np.random.default_rng(seed)  # for lost views and pose noise
        self.dark_until_s = -np.inf
        self.views: list[tuple[float, np.ndarray]] = []  # times and true positions of the last pictures

    @property
    def in_view(self) -> bool:
        """Whether the camera sees anything."""
        return self.time_s >= self.dark_until_s

    def look(self) -> np.ndarray:
        """The positions (10,) that the newest picture shows."""
        self.views.append((self.time_s, self.arm.qpos))
        if self.row.dropout and self.in_view and self.rng.random() < DROPOUT_CHANCE:
            self.dark_until_s = self.time_s + DROPOUT_S
        while len(self.views) > 1 and self.views[1][0] <= self.time_s - self.row.picture_delay_s + 1e-9:
            self.views.pop(0)
        return self.views[0][1]

    def picture(self) -> Picture:
        """See Robot."""
        image = self.render(self.look())
        return Picture(image * self.in_view, self.time_s)

    def sheet(self, qpos: np.ndarray) -> np.ndarray:
        """The sheet's pose (3,), x and y (m), yaw (rad), in positions (10,), relative to the tape: as it is seen."""
        x_y_m = qpos[6:8] - TAPE_CENTER_M - self.row.tape_shift_m
        turned = rotate(x_y_m[None], np.array([-self.row.tape_turn_rad]))[0]
        return np.append(TAPE_CENTER_M + turned, qpos[9] - self.row.tape_turn_rad)


class TruePosePolicy(StackedPolicy):
    """A policy that gets the sheet's true pose with noise, as old and as often as the camera would show it."""

    robot: RowRobot

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """See BasePolicy."""
        self.sees = np.array([self.estimate is None or self.robot.in_view])
        if self.sees[0]:
            noise = self.robot.rng.standard_normal(3) * (NOISE_SHEET_M / 2, NOISE_SHEET_M / 2, NOISE_YAW_RAD / 2)
            self.estimate = (self.robot.sheet(self.robot.views[0][1]) + noise)[None]
        return self.base_delta(with_sheet(obs, self.estimate), mask)

    def reset(self, mask: np.ndarray) -> None:
        """See BasePolicy."""
        super().reset(mask)
        self.estimate = None


def run_row(row: Row, policy: BasePolicy, task: Task, args: Args, count: Callable[[], Any]) -> list[dict[str, Any]]:
    """The episodes of a row: seed, success (ground truth), steps, and trouble, what ended it early."""
    robot, episodes = RowRobot(task, row, args.pose == "camera"), []
    policy.robot, loop = robot, virtual_loop(robot, policy, task)
    for number in range(args.first_seed, args.first_seed + args.episodes):
        robot.reset(SEED + number)
        loop.controller.reset()
        episode = {"seed": SEED + number, "steps": 0, "trouble": ""}
        try:
            loop.measure()
            loop.home()
            episode["steps"] = loop.episode(MAX_EPISODE_STEPS, task.tape_margin)["ticks"]
        except SO101Error as error:  # an arm that gives up has failed
            episode["trouble"] = str(error)
        pose = robot.sheet(robot.arm.qpos)[None]
        episode["success"] = bool(sheet_inside(pose[:, :2], pose[:, 2], task.tape_margin)[0])
        episodes.append(episode)
        count()
    robot.close()
    return episodes


def print_table(result: dict[str, Any]) -> None:
    """The rows as a table in Markdown."""
    print("| one thing wrong | success | 95 % | steps | stopped |\n|---|---|---|---|---|")
    for name, row in result["rows"].items():
        low, high = row["success_ci95"]
        print(f"| {name} | {row['success_rate']:.2f} | {low:.2f} to {high:.2f} | {row['mean_steps']:.0f} | "
              f"{row['stopped']} |")  # fmt: skip
    rates = [row["success_rate"] for row in result["rows"].values()]
    print(f"| **mean of {len(rates)} rows; worst** | **{np.mean(rates):.3f}; {min(rates):.2f}** | | | |")


def main() -> int:
    """Run the rows; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"episodes": (1, 100_000), "first_seed": (0, 10_000_000)})
    check_output("--json", args.json, (".json",))
    torch.set_num_threads(1)
    rows = make_rows()
    if unknown := [word for word in args.rows if not any(word in name for name in rows)]:
        raise SO101Error(f"--rows {unknown[0]}: no row has this in its name; there are {', '.join(rows)}")
    wanted = {name: row for name, row in rows.items() if not args.rows or any(word in name for word in args.rows)}
    policy, task = make_policy(DriveArgs(model=args.model))
    if args.pose == "true":
        policy = TruePosePolicy(policy.base)
    head = {"model": args.model, "pose": args.pose, "episodes": args.episodes, "first_seed": args.first_seed}
    result: dict[str, Any] = {**head, "rows": {}}
    if args.json and Path(args.json).exists():
        result = json.loads(Path(args.json).read_text())
        if other := [key for key, value in head.items() if result.get(key) != value]:
            raise SO101Error(f"--json {args.json}: has rows with another {other[0]}; name another file")
    left = [name for name in wanted if name not in result["rows"]]
    with tqdm(total=len(left) * args.episodes, unit="episode", dynamic_ncols=True, disable=None) as bar:
        for name in left:
            episodes = run_row(wanted[name], policy, task, args, bar.update)
            successes = sum(episode["success"] for episode in episodes)
            result["rows"][name] = {
                "success_rate": successes / len(episodes),
                "success_ci95": wilson(successes / len(episodes), len(episodes)),
                "mean_steps": float(np.mean([episode["steps"] for episode in episodes])),
                "stopped": sum(bool(episode["trouble"]) for episode in episodes),
                "episode_list": episodes,
            }
            if args.json:
                write_json(Path(args.json), result)
    print_table(result)
    policy.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
