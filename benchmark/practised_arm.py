"""Success of a policy on the simulated arm on which another one has practised: the same arm, other starts.

    python benchmark/practised_arm.py --model logs/RUN/practice_model.pt --seed 1 --gain 0.7 --json after.json

`python -m so101.practice --virtual-time --seed 1 --gain 0.7` practises on this arm. Here the policy acts without
exploration. A hand lays the sheet at starts that are drawn by another generator, and success is the true one.
benchmark/reality_gap.py draws another arm in every episode instead. With --dataset the episodes that succeed become
demonstrations for so101.practice --demos, in place of those that a person gives on a real arm.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from so101.camera import CAMERA
from so101.cli import check_flags, check_output, parse, run_script
from so101.dataset import write_dataset
from so101.drive import Args as DriveArgs
from so101.drive import make_policy
from so101.files import write_json
from so101.loop import Blind, Loop
from so101.practice import check_flaws
from so101.robot import Picture
from so101.scene_reset import DragPolicy
from so101.simulated_arm import Flaws
from so101.stats import wilson
from so101.virtual_time import VirtualRobot, virtual_loop
from so101_env import ACTION, STATE, SO101Error, Task
from so101_sim.control import ACT_DIM
from so101_sim.scene import CONTROL_HZ

START_SEED = 1_700_000_000  # seeds of the starts begin here; used nowhere else
DEMO_SEED = 1_800_000_000  # the same, of demonstrations
STILL_STEPS = 10  # after the success of a demonstration, in which the arm rests: pictures must show the success


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
    dataset: str | None = None
    """write the successful episodes, with the camera's pictures, to this new directory as a LeRobotDataset; their
    starts are others than those without this flag"""
    flaws: Flaws = dataclasses.field(default_factory=Flaws)


class RecordedRobot(VirtualRobot):
    """An arm that keeps, for every target since the sheet was laid, what it had measured and seen, and the target."""

    def __init__(self, task: Task, flaws: Flaws):
        super().__init__(task, flaws)
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # joints and targets (6,), rad; picture
        self.seen: np.ndarray | None = None  # the last picture

    def lay_sheet(self, seed: int) -> None:
        """See VirtualRobot."""
        super().lay_sheet(seed)
        self.rows, self.seen = [], None

    def picture(self) -> Picture:
        """See Robot."""
        picture = super().picture()
        self.seen = picture.image
        return picture

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        if self.seen is not None:
            self.rows.append((self.read()[0].copy(), target_rad.copy(), self.seen))
        super().write(target_rad)

    def episode(self, steps: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """The last steps, as an episode of a dataset, and their pictures."""
        joints, targets, pictures = zip(*self.rows[-steps:])
        return {STATE: np.array(joints), ACTION: np.array(targets)}, list(pictures)


def run_episode(
    loop: Loop, start: int, task: Task, episode_steps: int, demos: list[Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """An episode with the sheet at the start of this seed: success, steps, and what ended it early; then home.

    If it succeeds, it is appended to demos, see RecordedRobot.episode.
    """
    loop.robot.lay_sheet(start)
    trouble = ""
    try:
        loop.episode(episode_steps, task.tape_margin)
    except Blind as blind:
        trouble = str(blind)
    episode = {"success": loop.robot.truth()["inside"], "steps": loop.moves, "trouble": trouble}
    if demos is not None and episode["success"]:
        for _ in range(STILL_STEPS):
            loop.move(np.zeros(ACT_DIM))
            loop.clock.wait()
            loop.measure()
            loop.robot.picture()
        demos.append(loop.robot.episode(loop.moves + STILL_STEPS))
    loop.lift_if_low()
    loop.home(DragPolicy.AIR_RAD * CONTROL_HZ)  # as after a scene reset
    return episode


def main() -> int:
    """Run the episodes; returns the exit code."""
    args = parse(Args, __doc__)
    check_flags(args, {"seed": (0, 2**31), "episodes": (1, 100_000), "episode_steps": (1, 10**6)})
    check_flaws(args.flaws)
    check_output("--json", args.json, (".json",), args.model)
    check_output("--dataset", args.dataset)
    if args.dataset is not None and os.path.lexists(args.dataset):
        raise SO101Error(f"--dataset {args.dataset}: exists; delete it or name another directory")
    torch.set_num_threads(1)
    policy, task = make_policy(DriveArgs(model=args.model))
    policy.locator.turned = args.flaws.camera_turned
    demos = None if args.dataset is None else []
    robot = VirtualRobot(task, args.flaws) if demos is None else RecordedRobot(task, args.flaws)
    loop = virtual_loop(robot, policy, task)
    robot.reset(args.seed)
    loop.controller.reset()
    loop.measure()
    loop.home()  # estimates the servo gain
    first = START_SEED if demos is None else DEMO_SEED
    starts = np.random.default_rng(first + args.seed).integers(2**31, size=args.episodes).tolist()
    bar = tqdm(starts, disable=None)
    episodes = [run_episode(loop, start, task, args.episode_steps, demos) for start in bar]
    if demos is not None:
        if not demos:
            raise SO101Error(f"--dataset {args.dataset}: no episode succeeds, so there is none to write")
        pictures = {CAMERA: (image for _, images in demos for image in images)}
        write_dataset(Path(args.dataset), [episode for episode, _ in demos], pictures)
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
