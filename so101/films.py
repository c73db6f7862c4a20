"""Films of episodes, in files and in MuJoCo's viewer, and a plot of where a policy succeeds."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from so101.files import write_atomic
from so101.stats import wilson
from so101_sim.vector import ArmVectorEnv
from so101_sim.viewer import Viewer

HOLD_S = 0.5  # how long a film shows the end of an episode


def write_video(
    envs: ArmVectorEnv,
    columns: Mapping[str, list[dict[str, Any]]],
    path: Path,
    size: tuple[int, int] | None = None,
    blind: Collection[str] = (),
) -> None:
    """Film traced episodes, one after the other: MP4 in real time, or a small GIF of every third frame.

    The pictures that a camera policy sees are shown in the corner.

    Args:
        columns: the episodes by title; several columns are shown side by side. The next episode follows when it has
            ended in all columns.
        path: ends in .mp4 or .gif.
        size: width and height of a column, pixels, even; None: 640 x 480, or 480 x 360 for a GIF.
        blind: titles of columns whose policy does not see the cameras of envs.
    """
    import imageio.v2 as imageio
    from PIL import Image, ImageDraw

    gif = path.suffix == ".gif"
    width, height = size or ((480, 360) if gif else (640, 480))
    fps, every = envs.metadata["render_fps"], 3 if gif else 1
    mp4 = {"fps": fps, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
    options = {"duration": 1000 * every / fps, "loop": 0} if gif else mp4

    cameras, seen_size = envs.cameras, envs.image_size
    if not cameras and envs.base_policy is not None:
        cameras, seen_size = envs.base_policy.cameras, tuple(envs.base_policy.image_size)
    rows = list(zip(*columns.values()))  # episodes that are shown side by side

    def picture(title: str, number: int, episode: dict[str, Any], t: int) -> np.ndarray:
        step, text, seed = min(t, len(episode["qpos"]) - 1), height // 20, episode["look_seed"]
        qpos = episode["qpos"][step]
        image = Image.fromarray(envs.render_state(qpos, (height, width), seed))
        for k, camera in enumerate(cameras if title not in blind else ()):
            seen = envs.camera_images(qpos[None], camera, seen_size, np.array([seed]), np.array([step]))[0]
            inset_width = round(height / 3 * seen_size[1] / seen_size[0])
            inset = Image.fromarray(seen).resize((inset_width, height // 3), Image.Resampling.NEAREST)
            image.paste(inset, (width - inset_width, k * (height // 3 + 2)))
        draw, edge = ImageDraw.Draw(image), {"stroke_width": 1, "stroke_fill": "black", "font_size": text}
        draw.text((text // 2, text // 2), title, fill="black", font_size=text)
        draw.text((text // 2, 2 * text), f"episode {number + 1} of {len(rows)}", fill="black", font_size=text)
        if step == len(episode["qpos"]) - 1:
            verdict = {True: "success", False: "no success", None: "end"}[episode["success"]]  # None: not judged
            end = verdict if episode["success"] else episode["failure"].replace("_", " ") or verdict
            draw.text((text // 2, height - 2 * text), f"{end}, {episode['length'] / fps:.1f} s", fill="white", **edge)
        return np.asarray(image)

    def frame(number: int, t: int) -> np.ndarray:
        return np.hstack([picture(title, number, each, t) for title, each in zip(columns, rows[number])])

    lengths = [max(len(episode["qpos"]) for episode in episodes) for episodes in rows]
    steps = [(n, t) for n, length in enumerate(lengths) for t in range(0, length + round(HOLD_S * fps), every)]

    def write(temporary: Path) -> None:
        if gif:  # one palette for all frames, without dithering: what does not move is then stored once
            palette = Image.fromarray(np.vstack([frame(n, 0) for n in range(len(rows))])).quantize(256)
        with imageio.get_writer(temporary, **options) as writer:
            for each in tqdm(
                steps, f"filming {path.name}", unit="frame", dynamic_ncols=True, disable=None, leave=False
            ):
                image = Image.fromarray(frame(*each))
                if gif:
                    image = image.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
                writer.append_data(np.asarray(image))

    write_atomic(path, write)


def plot(envs: ArmVectorEnv, episodes: list[dict[str, Any]], title: str, path: Path) -> None:
    """Success over the initial distance, and the object's paths from above, as PNG.

    Args:
        envs: their goal_xy_m and goal_half_m are drawn.
        episodes: traced.
        title: what acted; the overall success rate follows it.
        path: ends in .png.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    distance = 1000 * np.array([episode["initial_distance_m"] for episode in episodes])
    success = np.array([episode["success"] for episode in episodes])
    low, high = wilson(success.mean(), len(success))
    title = title.encode(errors="replace").decode()
    figure.suptitle(
        f"{title}\n{success.mean():.0%} success in {len(success)} episodes [{low:.0%}, {high:.0%}]", parse_math=False
    )
    edges = np.arange(distance.min() // 20 * 20, distance.max() + 20, 20)
    for start, end in zip(edges[:-1], edges[1:]):
        chosen = success[(distance >= start) & (distance < end)]
        if len(chosen):
            left.bar((start + end) / 2, chosen.mean(), width=17, color="tab:blue", alpha=0.35)
            left.vlines((start + end) / 2, *wilson(chosen.mean(), len(chosen)), color="tab:blue")
            left.text((start + end) / 2 + 1, 0.02, f"n = {len(chosen)}", fontsize=8)
    for value, color in ((True, "tab:green"), (False, "tab:orange")):
        left.plot(distance[success == value], success[success == value], "|", color=color, markersize=10)
    left.set(xlabel="initial distance from the goal (mm)", ylabel="success, 95 % intervals", ylim=(-0.05, 1.05))
    # seen from above with the arm at the bottom: x up, y to the left
    half_x, half_y = 1000 * np.asarray(envs.goal_half_m)
    handles = {"goal": plt.Rectangle((-half_y, -half_x), 2 * half_y, 2 * half_x, fill=False, color="red", linewidth=2)}
    right.add_patch(handles["goal"])
    for episode in episodes:
        track, succeeded = 1000 * (episode["qpos"][:, 6:8] - envs.goal_xy_m), episode["success"]
        color, name = ("tab:green", "success") if succeeded else ("tab:orange", "failure")
        (handles[name],) = right.plot(-track[:, 1], track[:, 0], color=color, linewidth=0.8, zorder=1 + (not succeeded))
        right.plot(-track[0, 1], track[0, 0], "o", color=color, markersize=3)
    right.legend(handles.values(), handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    right.set(aspect="equal", xlabel="to the right (mm)", ylabel="ahead (mm)")
    right.set_title("paths of the object's centre, from the dot", fontsize=10)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)


def play(envs: ArmVectorEnv, episodes: list[dict[str, Any]]) -> None:
    """Show traced episodes in MuJoCo's viewer, in a loop until it is closed."""
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
