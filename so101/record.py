"""Record demonstrations of a policy, or of a person at the keyboard, as a LeRobotDataset v3.0.

    python -m so101.record --base-policy jacobian --dataset demos --episodes 200 --action-noise 0.25 --only-successes
    python -m so101.record --base-policy jacobian --dataset demos --cameras top wrist --image-size 96

Recorded episodes have seeds of their own: a policy that is trained on them has not seen the held-out episodes of
eval_so101.py. With --cameras the dataset has videos, and leaves out the sheet's pose, which a real arm does not know.
Ctrl+C ends the recording, and the complete episodes are written.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from so101.cli import (
    Stop,
    Stoppable,
    check_flags,
    check_output,
    check_unused,
    command_of,
    parse,
    print_line,
    run_script,
    use_one_torch_thread,
)
from so101.dataset import DatasetError, write_dataset
from so101.evaluation import RECORD_SEED, evaluate, summarize
from so101.extras import import_extra
from so101.hub import connect, upload_command
from so101.subject import Subject, parse_subject
from so101.trust import SERVED
from so101_env import ACTION, ENVIRONMENT, STATE, SO101Error
from so101_sim.control import ACT_DIM
from so101_sim.vector import ArmVectorEnv

BATCH = 50  # episodes that run at once


@dataclasses.dataclass
class RecordArgs:
    """A recording."""

    dataset: str
    """new directory for the dataset"""
    subject: Subject = dataclasses.field(default_factory=Subject)
    episodes: int = 50
    """number of episodes"""
    seed: int = 0
    """number of the first episode: another recording of the same policy starts at its own"""
    action_noise: float = 0.0
    """standard deviation of noise on the residual; 1 is alpha * act_scale rad"""
    only_successes: bool = False
    """leave out episodes that fail"""
    environment_state: bool = False
    """with --cameras: also write what a real arm does not know, as the sheet's pose"""
    push_to_hub: str | None = None
    """also upload the dataset to this repository on the Hugging Face Hub, as NAME/REPOSITORY; a new one is private"""


def check_args(args: RecordArgs) -> None:
    """Raise SO101Error, before any work is done, for what cannot work."""
    check_flags(args, {"episodes": (1, 100_000), "action_noise": (0, 100), "seed": (0, 10**8)})
    check_output("--dataset", args.dataset)
    if os.path.lexists(args.dataset):
        raise SO101Error(f"--dataset {args.dataset}: exists; delete it or name another directory")
    if not args.subject.server.cameras:
        served = (args.subject.base_policy or "").removeprefix("opencv:").startswith(SERVED)
        check_unused(args, ["environment_state"], "needs --cameras")
        check_unused(args.subject.server, [] if served else ["image_size"], "needs --cameras")


def write(args: RecordArgs, envs: ArmVectorEnv, episodes: list[dict[str, Any]]) -> None:
    """Write traced episodes, and the pictures of the cameras, as a dataset."""
    server, length = args.subject.server, sum(len(episode["command"]) for episode in episodes)
    cameras = server.camera_map()
    privileged = args.environment_state or not cameras
    demos = []
    for episode in episodes:
        state, environment = np.split(episode["obs"], [ACT_DIM], axis=1)
        demos.append({STATE: state, ACTION: episode["command"]} | ({ENVIRONMENT: environment} if privileged else {}))

    def pictures(name: str, camera: str) -> Iterator[np.ndarray]:
        states = (  # the states in which the policy acted
            (qpos[None], np.array([episode["look_seed"]]), np.array([step]))
            for episode in episodes
            for step, qpos in enumerate(episode["qpos"][:-1])
        )
        for qpos, *look in tqdm(states, f"camera {name}", length, unit="frame", dynamic_ncols=True, disable=None):
            yield envs.camera_images(qpos, camera, server.size, *look)[0]

    frames = {name: pictures(name, camera) for name, camera in cameras.items()}
    try:
        write_dataset(Path(args.dataset), demos, frames)
    finally:
        for each in frames.values():
            each.close()  # ends the line of its progress bar before an error is printed
    print_line(f"{len(demos)} episodes, {length} frames in {args.dataset}")
    if privileged:
        print_line(f"clone: {command_of('so101.clone')} --dataset {shlex.quote(args.dataset)}")
    if cameras:
        flags = f"--dataset.repo_id=local/demos --dataset.root={shlex.quote(args.dataset)} --policy.type=act"
        print_line(f"train: lerobot-train {flags} --policy.push_to_hub=false --output_dir=outputs/act")


def main() -> int:
    """Record; returns the exit code."""
    check_args(parse(RecordArgs, __doc__))
    import_extra("pyarrow", "data", "so101.record")
    args, loaded, task = parse_subject(RecordArgs, __doc__, default_model=False, records=True)
    hub = connect("--push-to-hub", args.push_to_hub, "dataset") if args.push_to_hub else None
    use_one_torch_thread()
    envs = loaded.make_envs(min(args.episodes, BATCH), task)
    for camera in args.subject.server.camera_map().values():  # fails early without OpenGL
        envs.camera_images(envs.qpos[:1], camera, args.subject.server.size)
    noise = np.random.default_rng(args.seed)

    def act(obs: Any) -> np.ndarray:
        action = loaded.act(obs)
        return action + args.action_noise * noise.standard_normal(action.shape) if args.action_noise else action

    seeds = [RECORD_SEED + args.seed + i for i in range(args.episodes)]
    episodes: list[dict[str, Any]] = []
    ended: BaseException | None = None  # what ended the recording early; the complete episodes are written nevertheless
    with Stoppable() as signals:
        try:
            evaluate(act, envs, seeds, trace=True, done=episodes)
            signals.finishing()
        except (Stop, Exception) as error:
            signals.finishing()
            ended = error
        kept = [episode for episode in episodes if episode["success"] or not args.only_successes]
        if not kept and ended:
            raise ended
        if not episodes:
            raise SO101Error(f"{loaded.base_policy}: ended before its first episode did; nothing is written")
        if not kept:
            raise SO101Error(f"--only-successes: none of {len(episodes)} episodes succeeded; nothing is written")
        if ended:
            print_line(f"stopped; writing {len(kept)} complete episodes; Ctrl+C again discards them")
        while True:
            try:
                write(args, envs, kept)
                break
            except DatasetError as error:  # a full disk must not cost a person's demonstrations
                if not (sys.stdin and sys.stdin.isatty()):
                    raise
                input(f"{error}, then press Enter to try again (Ctrl+C discards the episodes) ")
        if not ended:
            low, high = (summary := summarize(episodes))["success_ci95"]
            print_line(f"success {summary['success_rate']:.2f} [{low:.2f}, {high:.2f}] in {len(episodes)} episodes")
        envs.close()
    if hub and not ended:
        hub.push(args.dataset)
    elif hub:
        again = upload_command(args.dataset, args.push_to_hub)
        print_line(f"not uploaded, because the recording ended early; upload it: {again}")
    if isinstance(ended, SO101Error):
        raise SO101Error(f"{ended}; the {len(kept)} complete episodes are in {args.dataset}") from ended
    if ended:
        raise ended
    return 128 + signals.signum if signals.signum else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
