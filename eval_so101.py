"""Evaluate a trained policy on held-out episodes, next to its base policy alone or its teacher; or a base policy only.

    python eval_so101.py                      # the model that comes with the project
    python eval_so101.py --model logs/RUN/best_model/best_model.pt --episodes 50
    python eval_so101.py --base-policy jacobian --tape-margin 0.02 --episodes 100
    python eval_so101.py --model logs/RUN/best_model/best_model.pt --video film.mp4 --plot paths.png
    python eval_so101.py --model logs/RUN/best_model/best_model.pt --export policy.onnx

The seeds of the episodes are fixed and used nowhere else, and the policy acts with its mean action: the same command
gives the same numbers. The settings of the task are by default those the model was trained with.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from so101.cli import (
    check_flags,
    check_output,
    check_rendering,
    check_unused,
    command_line,
    command_of,
    parse,
    run_script,
)
from so101.evaluation import BLOCK, TEST_SEED, evaluate, no_residual, residual_to_base, summarize
from so101.files import sha256, write_json
from so101.films import play, plot, write_video
from so101.hub import connect
from so101.run_dirs import describe_run
from so101.subject import CONDITIONS, Loaded, Subject, base_envs, parse_subject
from so101.trust import Trust, allow_flags
from so101_env import SO101Error
from so101_sim.viewer import check_display

BATCH = 50  # episodes that run at once
OF_AN_EXPORT = {"subject", "export", "export_lerobot", "push_to_hub"}  # what --export depends on, and what it refuses


@dataclasses.dataclass
class EvalArgs:
    """Evaluation, films, export."""

    subject: Subject = dataclasses.field(default_factory=Subject)
    episodes: int = 50
    """number of episodes"""
    seed: int = 0
    """block of held-out episodes; 0 is the one of all published figures"""
    base: bool = True
    """also evaluate the base policy alone; for a student, its teacher"""
    json: str | None = None
    """write the results and the list of episodes to this file"""
    video: str | None = None
    """film the first episodes into this MP4 or GIF file, with the pictures of a camera policy in the corner; next to
    a residual its base policy alone, next to a student its teacher"""
    video_episodes: int = 5
    """episodes in --video"""
    size: tuple[int, int] | None = None
    """width and height of --video in pixels, for each of its columns (default: 640 480; GIF: 480 360)"""
    plot: str | None = None
    """plot success over the initial distance, and the paths of the sheet, into this PNG file"""
    render_mode: Literal["human"] | None = None
    """human: play the evaluated episodes in MuJoCo's viewer"""
    export: str | None = None
    """write the checkpoint of --model as an ONNX file instead of evaluating it"""
    export_lerobot: str | None = None
    """also write --model, with its base policy, as this directory, a policy of LeRobot that sees the sheet by OpenCV,
    with the figures of this evaluation in its card"""
    push_to_hub: str | None = None
    """also upload what --export or --export-lerobot writes to this repository on the Hugging Face Hub, as
    NAME/REPOSITORY; a new one is private"""


def check_args(args: EvalArgs) -> None:
    """Raise SO101Error, before any work is done, for what cannot work."""
    if args.size is not None and not all(64 <= side <= 4096 and side % 2 == 0 for side in args.size):
        raise SO101Error(f"--size {args.size[0]} {args.size[1]}: give even numbers from 64 to 4096")
    check_flags(args, {"episodes": (1, 100_000), "video_episodes": (1, 100_000), "seed": (0, 1000)})
    outputs = {"json": (".json",), "video": (".mp4", ".gif"), "plot": (".png",), "export": (".onnx",)}
    for name, suffixes in outputs.items():
        check_output(f"--{name}", getattr(args, name), suffixes, args.subject.model)
    if not args.video:
        check_unused(args, ("video_episodes", "size"), "needs --video")
    if args.export:
        check_unused(args, vars(args).keys() - OF_AN_EXPORT, "--export evaluates nothing")
        check_unused(args.subject, CONDITIONS, "--export evaluates nothing")
    if args.export and args.subject.model is None:
        raise SO101Error("--export needs --model: the checkpoint to export")
    if args.export_lerobot:
        if os.path.lexists(args.export_lerobot):
            raise SO101Error(f"--export-lerobot {args.export_lerobot}: exists already; name a new directory")
        check_output("--export-lerobot", args.export_lerobot, (), args.subject.model)
        if args.subject.model is None or args.export:
            raise SO101Error("--export-lerobot needs --model, the policy to export, and no --export")
    if args.push_to_hub and not (args.export or args.export_lerobot):
        raise SO101Error("--push-to-hub needs --export or --export-lerobot: the policy to upload")
    if args.render_mode:
        try:
            check_display()
        except SO101Error as error:
            raise SO101Error(f"--render-mode human: {error}") from error


def export(model: str, path: str, trust: Trust) -> None:
    """Write a checkpoint as an ONNX file."""
    from so101.onnx_export import CHECKED_OBSERVATIONS, export_onnx

    made = export_onnx(model, Path(path), trust)
    print(f"{model} ({made['global_step']} steps, base policy {made['base_policy']}) exported to {path}")
    print(f"largest difference on {CHECKED_OBSERVATIONS} observations: {made['difference']:.1g}")
    allow = allow_flags([made["base_policy"]], trust)
    print(f"evaluate: {command_of('eval_so101.py')} --model {shlex.quote(path)}{allow}")


def draft_policy(args: EvalArgs, kind: str) -> Any:
    """The policy directory of --export-lerobot, for the plug-in to write. Raises SO101Error if that cannot be done."""
    if kind != "agent":
        raise SO101Error(f"--export-lerobot {args.export_lerobot}: {args.subject.model} is not a residual")
    try:
        from lerobot_policy_so101_residual.export import Draft
    except ImportError as error:
        raise SO101Error(
            f"--export-lerobot {args.export_lerobot}: needs {error.name}: install LeRobot and extras/lerobot_plugin in "
            "this environment, see docs/lerobot.md"
        ) from error
    draft = Draft(args.subject.model, args.export_lerobot, args.subject.trust)
    if draft.task.tape_margin != args.subject.tape_margin:
        raise SO101Error(f"--tape-margin {args.subject.tape_margin}: --export-lerobot needs the model's own; drop it")
    return draft


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    """Summaries side by side under their titles."""

    def success(summary: dict[str, Any]) -> str:
        low, high = summary["success_ci95"]
        return f"{summary['success_rate']:.2f} [{low:.2f}, {high:.2f}]"

    def estimate(summary: dict[str, Any]) -> str:
        if "mean_estimate_error_m" not in summary:
            return "true pose"
        yaw = np.rad2deg(summary["mean_estimate_error_rad"])
        return f"{1000 * summary['mean_estimate_error_m']:.1f}, {yaw:.1f}"

    rows = [
        ("success rate [Wilson 95 %]", success),
        ("return", lambda s: f"{s['mean_return']:.2f}"),
        ("length (control steps)", lambda s: f"{s['mean_length']:.1f}"),
    ]
    for key in [key for key in next(iter(columns.values())) if key.startswith("mean_final_")]:
        name, _, unit = key.removeprefix("mean_").replace("_", " ").rpartition(" ")
        factor, shown = {"m": (1000, "mm"), "rad": (np.rad2deg(1), "degrees")}.get(unit, (1, unit))
        rows.append((f"{name} ({shown})", lambda s, key=key, factor=factor: f"{factor * s[key]:.1f}"))
    rows.append(("residual magnitude", lambda s: f"{s['mean_residual_magnitude']:.3f}"))
    rows.append(
        ("out of reach, non-finite", lambda s: f"{s['failures']['out_of_reach']}, {s['failures']['non_finite']}")
    )
    if any("mean_estimate_error_m" in summary for summary in columns.values()):
        rows.append(("pose estimate off (mm, deg)", estimate))
    print(f"{'':28}" + "".join(f"{name:>24}" for name in columns))
    for name, text in rows:
        print(f"{name:28}" + "".join(f"{text(summary):>24}" for summary in columns.values()))


def print_results(
    loaded: Loaded, args: EvalArgs, task: Any, count: int, columns: dict[str, dict[str, Any]], ratios: dict[str, float]
) -> None:
    """What was evaluated on what, what has trained it, the table, and the size of the residual."""
    name = f"{args.subject.model} ({loaded.steps} steps)" if args.subject.model else f"base policy {loaded.base_policy}"
    wide = [name for name in ("arm", "full") if getattr(task, f"{name}_randomization", False)]
    physics = wide[0] if wide else "default" if task.randomize else "no"
    visual = ", visual too" if getattr(task, "visual_randomization", False) else ""
    margin = f", tape margin {1000 * task.tape_margin:.0f} mm" if hasattr(task, "tape_margin") else ""
    block = f" of block {args.seed}" if args.seed else ""
    print(f"{name}: {count} held-out episodes{block}, mean action{margin}, {physics} randomisation{visual}")
    if loaded.command:
        print("trained by: " + "".join(each if each.isprintable() else "?" for each in loaded.command[:1000]))
    print_table(columns)
    if ratios:
        print("residual to base, per joint  " + "  ".join(f"{joint} {ratio:.2f}" for joint, ratio in ratios.items()))


def listed(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Episodes without their trajectories."""
    return [{k: v for k, v in episode.items() if not isinstance(v, np.ndarray)} for episode in episodes]


def main() -> int:
    """Evaluate; returns the exit code."""
    check_args(parse(EvalArgs, __doc__))
    args, loaded, task = parse_subject(EvalArgs, __doc__)
    torch.set_num_threads(1)
    hub = connect("--push-to-hub", args.push_to_hub, "model") if args.push_to_hub else None
    model_sha256 = args.subject.model and sha256(args.subject.model)  # now: a training may replace the file meanwhile
    if args.export:
        check_output("--export", args.export, (".onnx",), loaded.base_policy.partition(":")[2] or None)
        export(args.subject.model, args.export, args.subject.trust)
        if hub:
            hub.push(args.export)
        return 0
    draft = draft_policy(args, loaded.kind) if args.export_lerobot else None
    envs = loaded.make_envs(min(args.episodes, BATCH), task)
    if args.video:
        check_rendering(envs, "--video")
    seeds = [TEST_SEED + args.seed * BLOCK + i for i in range(args.episodes)]
    traced = bool(args.video or args.plot or args.render_mode)
    compared = bool(args.subject.model and args.base)
    others = loaded.make_others(envs.num_envs, task) if compared and loaded.make_others else envs
    episodes = evaluate(loaded.act, envs, seeds, trace=traced)
    if not episodes:
        raise SO101Error(f"--base-policy {loaded.base_policy}: ended before its first episode did; nothing is written")
    columns = {loaded.kind: summarize(episodes)}
    corrects = loaded.kind == "agent" and loaded.base_policy != "zero"  # a base policy that moves
    films = {"base and residual" if corrects else loaded.kind: episodes[: args.video_episodes]}
    base = None
    if compared:
        alone = evaluate(no_residual, others, seeds, trace=bool(args.video))
        base = summarize(alone)
        spec = "" if loaded.make_others else f" ({loaded.base_policy.partition(':')[0]})"
        columns[loaded.other + spec] = base
        if corrects or loaded.make_others:
            films = {loaded.other: alone[: args.video_episodes], **films}
    if draft:
        seeing = base_envs(envs.num_envs, draft.policy, task, args.subject.num_threads)
        columns["pose by OpenCV"] = summarize(evaluate(no_residual, seeing, seeds))
        seeing.close()
    ratios = residual_to_base(episodes) if loaded.kind == "agent" else {}
    try:
        if args.json:
            result = {
                "provenance": {"command": command_line("eval_so101.py"), **describe_run("eval_so101.py", args)},
                "model": args.subject.model,
                "model_sha256": model_sha256,
                "training_steps": loaded.steps,
                "training_seed": loaded.training_seed,
                "base_policy": loaded.base_policy,
                "task": dataclasses.asdict(task),
                "seed": args.seed,
                **columns[loaded.kind],
                "episodes": len(episodes),
                "base_success_rate": base["success_rate"] if base else None,
                "base": base,
                "residual_to_base": ratios,
                "episode_list": listed(episodes),
                "base_episode_list": listed(alone) if base else None,
            }
            write_json(Path(args.json), result)
        if args.plot:
            plot(envs, episodes, args.subject.model or f"base policy {loaded.base_policy}", Path(args.plot))
        if args.video:
            write_video(envs, films, Path(args.video), args.size, blind=["teacher"])
    finally:  # also if a file could not be written
        print_results(loaded, args, task, len(episodes), columns, ratios)
    if args.render_mode:
        play(envs, episodes)
    envs.close()
    if draft:
        titles = {loaded.kind: "base + residual, true pose", "pose by OpenCV": "base + residual, pose by OpenCV"}
        draft.finish({titles.get(name, "base alone"): each for name, each in columns.items()}, seeds, task)
        if hub:
            hub.push(args.export_lerobot)
        print(f"{args.export_lerobot}: lerobot-eval --policy.path={args.export_lerobot} --env.type=so101_residual")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
