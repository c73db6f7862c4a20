"""Evaluate a trained policy on held-out episodes: beside its base policy alone, or its teacher; or a base policy only.

    python eval_so101.py                      # the checkpoint that comes with the project
    python eval_so101.py --model logs/.../best_model/best_model.pt --episodes 50
    python eval_so101.py --model logs/.../student.pt  # one that sees, of distill_so101.py
    python eval_so101.py --base-policy jacobian --episodes 100
    python eval_so101.py --model logs/.../best_model/best_model.pt --export policy.onnx  # one that travels

The episodes' seeds are fixed and used nowhere else, and the policy acts with its mean action: the same command gives
the same numbers. A checkpoint carries the settings of the task.
"""

if __name__ == "__main__":  # Ctrl+C while importing ends the program, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from scipy.stats import binomtest
from tqdm import tqdm

from so101_dataset import write_dataset
from so101_env import (
    ACT_DIM,
    ACTION,
    ENVIRONMENT,
    SHEET_HALF_M,
    STATE,
    TAPE_CENTER_M,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
    Viewer,
    check_display,
)
from so101_onnx import CHECKED_OBSERVATIONS, OnnxPolicy, export_onnx
from so101_policies import (
    CHECKPOINT,
    STUDENT,
    BasePolicy,
    Server,
    check_base,
    load_checkpoint,
    load_file,
    load_policy,
    load_script,
)
from so101_runs import (
    HOLD_S,
    RECORD_SEED,
    TEST_SEED,
    check_flags,
    check_output,
    check_rendering,
    command_of,
    episode_mean,
    evaluate,
    flag_of,
    no_residual,
    residual_to_base,
    run_script,
    write_atomically,
    write_json,
    write_video,
)
from so101_scene import ASSETS


@dataclasses.dataclass
class EvalArgs:
    """Evaluation, films, recordings."""

    model: str | None = None
    """checkpoint, student or ONNX file to evaluate (default, without --base-policy: the checkpoint that comes with the
    project)"""
    base_policy: str | None = None
    """without --model: the base policy to evaluate; with it, only the new address of its server:HOST:PORT"""
    tape_margin: float | None = None
    """without --model: m between sheet and tape, 0.04 standard (default), 0.02 precise"""
    episodes: int = 50
    """number of episodes"""
    visual_randomization: bool | None = None
    """randomise what cameras see (default: as --model was trained, else not)"""
    base: bool = True
    """evaluate the base policy alone, too; of a student, its teacher"""
    json: str | None = None
    """write the results and the list of episodes to this file"""
    video: str | None = None
    """film the first episodes into this MP4 file, or GIF, what the policy sees in the corner; with a base policy that
    moves, it alone beside them, and beside a student its teacher"""
    video_episodes: int = 5
    """episodes in --video"""
    size: tuple[int, int] | None = None
    """width and height of --video in pixels, for each of its columns (default: 640 480, of a GIF 480 360)"""
    export: str | None = None
    """write the checkpoint of --model as an ONNX file, instead of evaluating it"""
    plot: str | None = None
    """plot success over the initial displacement and the sheets' paths into this PNG file"""
    record: str | None = None
    """write the episodes as a LeRobotDataset v3.0 into this new directory; they then have seeds of their own"""
    action_noise: float = 0.0
    """with --record: standard deviation of noise on the residual, 1 being alpha * act_scale rad"""
    only_successes: bool = False
    """with --record: leave out episodes that fail"""
    environment_state: bool = False
    """with --record and --cameras: also write what a real arm does not know, as where the sheet lies"""
    render_mode: Literal["human"] | None = None
    """human: play the evaluated episodes in MuJoCo's viewer"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    server: Server = dataclasses.field(default_factory=Server)


def check_eval_args(args: EvalArgs) -> None:
    """Raise SO101Error for what cannot work, before any work is done."""
    if args.size is not None and not all(64 <= side <= 4096 and side % 2 == 0 for side in args.size):
        raise SO101Error(f"--size {args.size[0]} {args.size[1]}: give even numbers from 64 to 4096")
    own = {"tape_margin": args.tape_margin is not None}
    names = ["units", "chunk_steps", "instruction"] + ["cameras", "image_size"] * (args.record is None)
    own |= {name: getattr(args.server, name) != getattr(Server(), name) for name in names}
    if args.model is not None and any(own.values()):
        given = next(name for name in own if own[name])
        raise SO101Error(f"{flag_of(given)}: the checkpoint of --model has its own; drop it")
    ranges = {"episodes": (1, 100_000), "video_episodes": (1, 100_000), "num_threads": (1, 1024)}
    check_flags(args.server, Server.RANGES)
    check_flags(args, ranges | {"action_noise": (0, 100), "tape_margin": Task.RANGES["tape_margin"]})
    check_output("--json", args.json, (".json",))
    check_output("--video", args.video, (".mp4", ".gif"))
    check_output("--plot", args.plot, (".png",))
    check_output("--export", args.export, (".onnx",))
    check_output("--record", args.record)
    if args.record and Path(args.record).exists():
        raise SO101Error(f"--record {args.record}: exists; delete it or name another directory")
    for name in ("action_noise", "only_successes", "environment_state"):
        if getattr(args, name) and args.record is None:
            raise SO101Error(f"{flag_of(name)} is for --record PATH")
    if args.render_mode:
        try:
            check_display()
        except SO101Error as error:
            raise SO101Error(f"--render-mode human: {error}") from error


def summarize(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over episodes, and the success rate's Wilson 95 % interval."""
    successes = sum(episode["success"] for episode in episodes)
    interval = binomtest(successes, len(episodes)).proportion_ci(0.95, method="wilson")

    return {
        "success_rate": successes / len(episodes),
        "success_ci95": [float(interval.low), float(interval.high)],
        "mean_return": episode_mean(episodes, "return"),
        "mean_length": episode_mean(episodes, "length"),
        "mean_final_distance_m": episode_mean(episodes, "final_distance_m"),
        "mean_final_yaw_error_rad": episode_mean(episodes, "final_yaw_error_rad"),
        "mean_residual_magnitude": episode_mean(episodes, "residual_magnitude"),
        "failures": {
            kind: sum(episode["failure"] == kind for episode in episodes) for kind in ("non_finite", "out_of_reach")
        },
        **{
            f"mean_{name}": np.average([e[name] for e in episodes], weights=[max(e["estimates"], 1) for e in episodes])
            for name in ("estimate_error_m", "estimate_error_rad")
            if name in episodes[0]
        },
    }


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    """Summaries side by side under their names, in the units a person thinks in."""

    def success(summary: dict[str, Any]) -> str:
        low, high = summary["success_ci95"]
        return f"{summary['success_rate']:.2f} [{low:.2f}, {high:.2f}]"

    rows = [
        ("success rate [Wilson 95 %]", success),
        ("return", lambda s: f"{s['mean_return']:.2f}"),
        ("length (control steps)", lambda s: f"{s['mean_length']:.1f}"),
        ("final distance (mm)", lambda s: f"{1000 * s['mean_final_distance_m']:.1f}"),
        ("final yaw error (degrees)", lambda s: f"{np.rad2deg(s['mean_final_yaw_error_rad']):.2f}"),
        ("residual magnitude", lambda s: f"{s['mean_residual_magnitude']:.3f}"),
        ("out of reach, non-finite", lambda s: f"{s['failures']['out_of_reach']}, {s['failures']['non_finite']}"),
    ]
    if any("mean_estimate_error_m" in summary for summary in columns.values()):

        def estimate(summary: dict[str, Any]) -> str:
            if "mean_estimate_error_m" not in summary:
                return "knows"
            yaw = np.rad2deg(summary["mean_estimate_error_rad"])
            return f"{1000 * summary['mean_estimate_error_m']:.1f}, {yaw:.1f}"

        rows.append(("estimate off by (mm, deg)", estimate))
    print(f"{'':28}" + "".join(f"{name:>24}" for name in columns))
    for name, text in rows:
        print(f"{name:28}" + "".join(f"{text(summary):>24}" for summary in columns.values()))


def plot(episodes: list[dict[str, Any]], tape_margin: float, path: Path) -> None:
    """Success over the initial displacement, and the sheets' centres from above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    distance = 1000 * np.array([episode["initial_distance_m"] for episode in episodes])
    success = np.array([episode["success"] for episode in episodes])
    edges = np.arange(40, 121, 20)
    for low, high in zip(edges[:-1], edges[1:]):
        chosen = success[(distance >= low) & (distance < high)]
        if len(chosen):
            interval = binomtest(int(chosen.sum()), len(chosen)).proportion_ci(method="wilson")
            left.bar((low + high) / 2, chosen.mean(), width=17, color="tab:blue", alpha=0.35)
            left.vlines((low + high) / 2, interval.low, interval.high, color="tab:blue")
            left.text((low + high) / 2 + 1, 0.02, f"n = {len(chosen)}", fontsize=8)
    left.plot(distance, success, "k|", markersize=10)
    left.set(xlabel="initial distance of the sheet from the tape's centre (mm)", ylabel="success", ylim=(-0.05, 1.05))
    half = SHEET_HALF_M + tape_margin
    # seen from above with the arm at the bottom: x up, y to the left
    square = plt.Rectangle(-1000 * half[::-1], *(2000 * half[::-1]), fill=False, color="red", linewidth=2)
    right.add_patch(square)
    box = 1000 * tape_margin
    inside = plt.Rectangle((-box, -box), 2 * box, 2 * box, fill=False, color="black", linestyle="--")
    right.add_patch(inside)
    right.legend(
        [square, inside],
        ["tape", "centre of a straight sheet inside"],
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
    )
    for episode in episodes:
        track = 1000 * (episode["qpos"][:, 6:8] - TAPE_CENTER_M)
        color = "tab:green" if episode["success"] else "tab:orange"
        right.plot(-track[:, 1], track[:, 0], color=color, linewidth=0.8)
        right.plot(-track[0, 1], track[0, 0], "o", color=color, markersize=3)
    right.set(aspect="equal", xlabel="right (mm)", ylabel="ahead (mm)")
    right.set_title("sheet centres, start at the dot; green: success", fontsize=10)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)


def play(envs: SO101ResidualVectorEnv, episodes: list[dict[str, Any]]) -> None:
    """Show traced episodes in MuJoCo's viewer, again and again until it is closed."""
    viewer, fps = Viewer(envs.model), envs.metadata["render_fps"]
    print("space: pause; right arrow: next episode; close the window to end")
    try:
        for number, episode in itertools.cycle(enumerate(episodes)):
            result = f"{'success' if episode['success'] else 'no success'}, {episode['length'] / fps:.1f} s"
            viewer.write(f"episode {number + 1} of {len(episodes)}\nspace\nright arrow", f"{result}\npause\nnext")
            rest = [episode["qpos"][-1]] * round(HOLD_S * fps)
            if not all(viewer.show(qpos) for qpos in [*episode["qpos"], *rest]) and not viewer.running:
                break
    finally:
        viewer.close()


def record(args: EvalArgs, envs: SO101ResidualVectorEnv, episodes: list[dict[str, Any]]) -> None:
    """Write traced episodes, and what the cameras of args see in them, as a dataset."""
    cameras, length = args.server.camera_map(), sum(len(episode["command"]) for episode in episodes)
    privileged = args.environment_state or not cameras
    demos = []
    for episode in episodes:
        state, environment = np.split(episode["obs"], [ACT_DIM], axis=1)
        demos.append({STATE: state, ACTION: episode["command"]} | ({ENVIRONMENT: environment} if privileged else {}))

    def pictures(name: str, camera: str) -> Iterator[np.ndarray]:
        states = (  # those that were acted upon
            (qpos[None], np.array([episode["look_seed"]]), np.array([step]))
            for episode in episodes
            for step, qpos in enumerate(episode["qpos"][:-1])
        )
        for qpos, *look in tqdm(states, f"camera {name}", length, unit="frame", dynamic_ncols=True):
            yield envs.camera_images(qpos, camera, args.server.size, *look)[0]

    frames = {name: pictures(name, camera) for name, camera in cameras.items()}
    try:
        write_dataset(Path(args.record), demos, frames)
    finally:
        for each in frames.values():
            each.close()  # ends its progress bar's line before an error is printed
    print(f"{len(demos)} episodes, {length} frames in {args.record}")
    if privileged:
        print(f"clone: {command_of('bc_so101.py')} --demos {args.record}")
    if cameras:
        print(f"train: lerobot-train --dataset.repo_id=local/demos --dataset.root={args.record} --policy.type=act ...")


def main() -> int:
    """Evaluate; returns the exit code."""
    args = tyro.cli(EvalArgs, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    if args.model is None and (args.base_policy is None or args.export):
        args.model = os.path.relpath(ASSETS / "pretrained.pt")
    check_eval_args(args)
    torch.set_num_threads(1)
    policy, steps, num_envs = no_residual, None, min(args.episodes, 50)
    if args.export:
        made = export_onnx(args.model, Path(args.export))
        print(
            f"{args.model} ({made['global_step']} steps, base policy {made['base_policy']}) in {args.export}: within "
            f"{made['difference']:.1g} on {CHECKED_OBSERVATIONS} observations"
        )
        print(f"evaluate: {command_of('eval_so101.py')} --model {args.export}")
        return 0
    onnx = args.model is not None and Path(args.model).suffix == ".onnx"
    saved = load_file(args.model, CHECKPOINT, STUDENT) if args.model and not onnx else {}
    kind = CHECKPOINT if onnx else saved.get("format")
    visual = {} if args.visual_randomization is None else {"visual_randomization": args.visual_randomization}

    def base_envs(base_policy: BasePolicy | None, task: Task, observe_base: bool = False) -> SO101ResidualVectorEnv:
        n = num_envs if base_policy is None else min(num_envs, base_policy.max_envs or num_envs)
        threads = {"num_threads": args.num_threads, "autoreset_mode": AutoresetMode.DISABLED}
        return SO101ResidualVectorEnv(n, base_policy, task, observe_base=observe_base, **threads, **visual)

    if kind == CHECKPOINT and not onnx:
        checkpoint = load_checkpoint(args.model, saved)
        base, steps = checkpoint.args.base, checkpoint.saved["global_step"]
        if args.base_policy is not None:
            if not all(spec.startswith("server:") for spec in (base.base_policy, args.base_policy)):
                raise SO101Error(f"--base-policy {args.base_policy}: the checkpoint of --model has its own; drop it")
            base.base_policy = args.base_policy
        base_policy = base.base_policy
        checkpoint.args.task = dataclasses.replace(checkpoint.args.task, **visual)
        envs = checkpoint.script.make_envs(checkpoint.args, num_envs, evaluation=True, num_threads=args.num_threads)
        check_base(checkpoint.saved, base_policy, envs.base_policy, args.model)
        policy = checkpoint.agent(args.model).act
    elif onnx:
        exported = OnnxPolicy(args.model)
        base_policy, steps, policy = exported.metadata["base_policy"], exported.steps, exported.residuals
        envs = base_envs(exported.base, exported.task, exported.observe_base)
    elif kind == STUDENT:
        if args.base_policy is not None:
            raise SO101Error(f"--base-policy {args.base_policy}: the student of --model has its own; drop it")
        base_policy = f"checkpoint:{args.model}"
        script = load_script(saved["script"], args.model)
        student = script.load_student(saved, args.model)
        steps, envs = saved["global_step"], base_envs(student, student.task)
        teacher_envs = base_envs(script.load_teacher(saved, args.model), student.task) if args.base else None
    else:
        task, base_policy = Task() if args.tape_margin is None else Task(tape_margin=args.tape_margin), args.base_policy
        envs = base_envs(load_policy(base_policy, args.server), task)
    if args.video:
        check_rendering(envs, "--video")
    if args.record:
        for camera in args.server.camera_map().values():
            envs.camera_images(envs.qpos[:1], camera, args.server.size)

    # demonstrations are for training: they must not contain the episodes that training is judged by
    seeds = [(RECORD_SEED if args.record else TEST_SEED) + i for i in range(args.episodes)]
    traced, noise = bool(args.video or args.plot or args.render_mode or args.record), np.random.default_rng(0)

    def act(obs: np.ndarray) -> np.ndarray:
        action = policy(obs)
        return action + args.action_noise * noise.standard_normal(action.shape) if args.action_noise else action

    episodes = evaluate(act, envs, seeds, trace=traced)
    if not episodes:
        raise SO101Error(f"--base-policy {base_policy}: ended before its first episode did; nothing is written")
    summary, base = summarize(episodes), None
    name, other = {None: ("base alone", ""), CHECKPOINT: ("agent", "base alone"), STUDENT: ("student", "teacher")}[kind]
    columns, moves = {name: summary}, base_policy != "zero"
    films = {"base and residual" if kind == CHECKPOINT and moves else name: episodes[: args.video_episodes]}
    if args.model and args.base:
        alone = evaluate(no_residual, teacher_envs if kind == STUDENT else envs, seeds, trace=bool(args.video))
        base = summarize(alone)
        columns[other if kind == STUDENT else f"{other} ({base_policy.partition(':')[0]})"] = base
        if moves:
            films = {other: alone[: args.video_episodes], **films}
    physics = "full" if envs.task.full_randomization else "default" if envs.task.randomize else "no"
    physics += " randomisation" + (", visual too" if envs.task.visual_randomization else "")
    print(
        (f"{args.model} ({steps} steps)" if args.model else f"base policy {base_policy}")
        + f": {len(episodes)} {'recorded' if args.record else 'held-out'} episodes, mean action"
        + (f" with noise {args.action_noise:g}, " if args.action_noise else ", ")
        + f"tape margin {1000 * envs.task.tape_margin:.0f} mm, {physics}"
    )
    print_table(columns)
    ratios = residual_to_base(episodes)
    if ratios and kind == CHECKPOINT:
        print("residual to base, per joint  " + "  ".join(f"{joint} {ratio:.2f}" for joint, ratio in ratios.items()))

    if args.json:
        result = {
            "model": args.model,
            "training_steps": steps,
            "tape_margin_m": envs.task.tape_margin,
            "base_policy": base_policy,
            **summary,
            "episodes": len(episodes),
            "visual_randomization": envs.task.visual_randomization,
            "base_success_rate": base["success_rate"] if base else None,
            "base": base,
            "residual_to_base": ratios,
            "episode_list": [
                {k: v for k, v in episode.items() if not isinstance(v, np.ndarray)} for episode in episodes
            ],
        }
        write_json(Path(args.json), result)
    if args.record:
        record(args, envs, [episode for episode in episodes if episode["success"] or not args.only_successes])
    if args.plot:
        plot(episodes, envs.task.tape_margin, Path(args.plot))
    if args.video:
        write_video(envs, films, Path(args.video), args.size, blind=["teacher"] * (kind == STUDENT))
    if args.render_mode:
        play(envs, episodes)
    envs.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
