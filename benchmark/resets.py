"""The scripted scene reset on simulated arms, in virtual time: how often it needs a hand, and how long it takes.

    python benchmark/resets.py                       # every row: about half an hour
    python benchmark/resets.py --rows nothing --resets 10

Every reset has another arm, look and friction, drawn as in training, and a sheet that lies at random inside the tape.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from so101.cli import check_flags, check_output, parse, run_script
from so101.files import write_json
from so101.loop import Blind, Loop
from so101.opencv import OpenCVPolicy
from so101.robot import LEROBOT_P
from so101.scene_reset import HandNeeded, SceneReset
from so101.simulated_arm import Flaws
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import FINGERS, TAPE_CENTER_M, Task, sheet_inside
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ

SEED = 1_650_000_000  # seeds of the resets begin here; used nowhere else
PRECISE_M = 0.02
# row | margin between sheet and tape, m | what is wrong with the arm
ROWS = {
    "nothing": (Task.tape_margin, Flaws()),
    "lift": (Task.tape_margin, Flaws(joint_offset_deg=(0, -3, 0, 0, 0, 0))),
    "lift_5": (Task.tape_margin, Flaws(joint_offset_deg=(0, -5, 0, 0, 0, 0))),
    "gain": (Task.tape_margin, Flaws(gain=0.7)),
    "backlash": (Task.tape_margin, Flaws(backlash_deg=3)),
    "precise": (PRECISE_M, Flaws()),
    "finger": (Task.tape_margin, Flaws(finger_friction=0.4)),
}


@dataclasses.dataclass
class Args:
    rows: list[str] = dataclasses.field(default_factory=lambda: list(ROWS))
    """rows to run"""
    resets: int = 40
    """resets of each row"""
    first_seed: int = 0
    """number of the first reset"""
    json: str | None = None
    """write every reset to this file"""


def reset_once(robot: VirtualRobot, loop: Loop, task: Task, seed: int) -> dict[str, Any]:
    """A reset of a scene that is drawn by the seed, the first one of its arm.

    Returns its control steps and drags, the drawn goal and the start reached, x, y (m), yaw (rad), why a hand was
    needed, and grip: friction between fingertip and sheet over that between sheet and table.
    """
    rng = np.random.default_rng(seed)
    robot.reset(seed)
    model, friction = robot.arm.model, robot.arm.arms.fields["pair_friction"][0, :, 0]
    tip, table = (float(friction[model.pair(name).id]) for name in (f"{FINGERS[0]}_finger_sheet", "sheet_table"))
    result = {"seed": seed, "grip": tip / table, "hand": ""}
    loop.controller.reset()
    robot.arm.arms.qpos[0, [6, 7, 9]] = draw_inside(rng, task.tape_margin)
    loop.measure()
    loop.home()  # estimates the servo gain
    try:
        done = SceneReset(loop, task, loop.policy.locator).run(rng)
    except (HandNeeded, Blind) as error:
        return result | {"hand": str(error)}
    goal, start = done.goal.tolist(), done.pose.tolist()
    return result | {"steps": done.ticks, "drags": done.tries, "goal": goal, "start": start}


def off_mm(done: dict[str, Any]) -> float:
    """Distance of the sheet's start from the drawn one."""
    return 1000 * float(np.linalg.norm(np.subtract(done["goal"], done["start"])[:2]))


def draw_inside(rng: np.random.Generator, tape_margin: float) -> tuple[float, float, float]:
    """A pose x, y (m), yaw (rad) of a sheet inside the tape."""
    while True:
        x, y = TAPE_CENTER_M + rng.uniform(-tape_margin, tape_margin, 2)
        yaw = rng.uniform(-0.3, 0.3)
        if sheet_inside(np.array([[x, y]]), np.array([yaw]), tape_margin)[0]:
            return x, y, yaw


def run_row(name: str, args: Args) -> list[dict[str, Any]]:
    """The resets of a row."""
    tape_margin, flaws = ROWS[name]
    task = Task(firmware_p=LEROBOT_P, tape_margin=tape_margin)
    robot, policy = VirtualRobot(task, flaws), OpenCVPolicy(None, tape_margin)
    loop = virtual_loop(robot, policy, task)
    seeds = range(SEED + args.first_seed, SEED + args.first_seed + args.resets)
    try:
        return [reset_once(robot, loop, task, seed) for seed in tqdm(seeds, name, disable=None)]
    finally:
        robot.close()


def main() -> int:
    """Run the rows; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"resets": (1, 100_000), "first_seed": (0, 10_000_000)})
    for name in args.rows:
        if name not in ROWS:
            raise SO101Error(f"--rows {name}: not one of {', '.join(ROWS)}")
    check_output("--json", args.json, (".json",))
    print(
        "| wrong with the arm | resets | hands | seconds | drags | mm off the drawn start |\n|---|---|---|---|---|---|"
    )
    rows = {}
    for name in args.rows:
        rows[name] = run_row(name, args)
        done = [each for each in rows[name] if not each["hand"]]
        columns = [[each["steps"] / CONTROL_HZ, each["drags"], off_mm(each)] for each in done] or [[np.nan] * 3]
        seconds, drags, off = np.mean(columns, axis=0)
        hands = len(rows[name]) - len(done)
        print(f"| {name} | {len(rows[name])} | {hands} | {seconds:.1f} | {drags:.1f} | {off:.0f} |", flush=True)
        if args.json:
            write_json(Path(args.json), rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
