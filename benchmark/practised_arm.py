"""Success of a policy on the simulated arm on which another one has practised: the same arm, other starts.

    python benchmark/practised_arm.py --model logs/RUN/practice_model.pt --seed 1 --gain 0.7 --json after.json

`python -m so101.practice --virtual-time --seed 1 --gain 0.7` practises on this arm. Here the policy acts without
exploration. A hand lays the sheet at starts that are drawn by another generator, and success is the true one.
benchmark/reality_gap.py draws another arm in every episode instead.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from so101.cli import check_flags, check_output, parse, run_script
from so101.drive import Args as DriveArgs
from so101.drive import make_policy
from so101.files import write_json
from so101.loop import Blind, Loop
from so101.practice import check_flaws
from so101.scene_reset import DragPolicy
from so101.simulated_arm import Flaws
from so101.stats import wilson
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import Task
from so101_sim.scene import CONTROL_HZ

START_SEED = 1_700_000_000  # seeds of the starts begin here; used nowhere else


@dataclasses.dataclass
class Args:
    model: str
    """policy to run: a checkpoint or an ONNX file"""
    seed: int = 1
    """the arm, as in so101.practice --seed"""
    episodes: int = 40
    """number of episodes"""
    episode_steps: int = 150
    """control steps until an episode ends without success"""
    json: str | None = None
    """write the results to this file"""
    flaws: Flaws = dataclasses.field(default_factory=Flaws)


def run_episode(loop: Loop, start: int, task: Task, episode_steps: int) -> dict[str, Any]:
    """An episode with the sheet at the start of this seed: success, steps, and what ended it early; then home."""
    loop.robot.lay_sheet(start)
    trouble = ""
    try:
        loop.episode(episode_steps, task.tape_margin)
    except Blind as blind:
        trouble = str(blind)
    episode = {"success": loop.robot.truth()["inside"], "steps": loop.moves, "trouble": trouble}
    loop.lift_if_low()
    loop.home(DragPolicy.AIR_RAD * CONTROL_HZ)  # as after a scene reset
    return episode


def main() -> int:
    """Run the episodes; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"seed": (0, 2**31), "episodes": (1, 100_000), "episode_steps": (1, 10**6)})
    check_flaws(args.flaws)
    check_output("--json", args.json, (".json",), args.model)
    torch.set_num_threads(1)
    policy, task = make_policy(DriveArgs(model=args.model))
    policy.locator.turned = args.flaws.camera_turned
    robot = VirtualRobot(task, args.flaws)
    loop = virtual_loop(robot, policy, task)
    robot.reset(args.seed)
    loop.controller.reset()
    loop.measure()
    loop.home()  # estimates the servo gain
    starts = np.random.default_rng(START_SEED + args.seed).integers(2**31, size=args.episodes).tolist()
    bar = tqdm(starts, disable=None)
    episodes = [run_episode(loop, start, task, args.episode_steps) for start in bar]
    rate = float(np.mean([episode["success"] for episode in episodes]))
    result = {
        "model": args.model, "seed": args.seed, "flaws": dataclasses.asdict(args.flaws), "success_rate": rate,
        "success_ci95": wilson(rate, len(episodes)), "episode_list": episodes,
    }  # fmt: skip
    if args.json:
        write_json(Path(args.json), result)
    print(f"success {rate:.2f} [{result['success_ci95'][0]:.2f}, {result['success_ci95'][1]:.2f}]")
    robot.close()
    policy.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
