"""What surrounds learning: refusals, run directories, files that are complete or absent, evaluation, films."""

import atexit
import contextlib
import dataclasses
import datetime
import errno
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from so101_env import (
    ACT_DIM,
    JOINTS,
    OBS,
    SO101Error,
    SO101ResidualVectorEnv,
    camera_names,
    check_ranges,
    sheet_pose,
    wrap_angle,
)

# Episodes of training, of the evaluations during training, of demonstrations, and of eval_so101.py never share a seed:
# the best model is chosen on the second, and reported on the last.
VALIDATION_SEED, RECORD_SEED, TEST_SEED = 1_000_000_000, 1_400_000_000, 2_000_000_000


# ---------------------------------------------------------------------------------------------------------------------
# scripts


def run_script(main: Callable[[], int]) -> int:
    """Run a script's main; returns its exit code. A user's mistake, or a full disk, is one line and code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()  # here, where a reader that has gone is caught
        return code
    except SO101Error as error:
        message: Any = error
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            silence_output()
            return 128 + signal.SIGPIPE
        if error.errno not in DISK_ERRORS:
            raise
        message = disk_error(error.filename or "a file", error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    return 2


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EISDIR}


def disk_error(path: str | Path, error: OSError) -> SO101Error:
    """What to tell the user of a file that cannot be written."""
    reason = error.strerror or str(error).splitlines()[0]  # FFmpeg's own words are many lines
    return SO101Error(f"{path}: cannot be written ({reason}); free the disk, or name another place")


def silence_output() -> None:
    """Send what is printed from now on nowhere: the reader of stdout or stderr has gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())


def command_of(script: str) -> str:
    """How to start a script of the project from the working directory."""
    return shlex.join(["python", os.path.relpath(Path(__file__).resolve().with_name(script))])


class Interrupts:
    """Ctrl+C, SIGTERM and a vanished terminal only ask: the loop goes on to where it can be continued to the bit."""

    def __init__(self) -> None:
        self.signum = 0  # 0 until something asks
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once

    def on_broken_pipe(self) -> None:
        """The reader of the progress bar has gone, as with `| head`."""
        silence_output()
        self.signum = signal.SIGPIPE


# ---------------------------------------------------------------------------------------------------------------------
# processes that train as one


class Processes:
    """The processes that torchrun has started to train one policy (gloo); without torchrun, this process alone.

    The environments are split among them in order, and all draw the same random numbers. The first speaks, evaluates
    and saves. An error of one ends them all: the first raises it, or says that a process was lost; the others just end.

    Raises SO101Error if they cannot find each other.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first, self.num_envs, self.own, self.num_threads = self.rank == 0, 0, slice(0), None
        if self.count > 1:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
            self.num_threads = max(1, (os.cpu_count() or 1) // local)  # of physics: processes share a machine's cores
            # a lost process closes its connections, at once; a first one that evaluates a slow base takes its time
            self._exchange(dist.init_process_group, "gloo", timeout=datetime.timedelta(days=1))
            atexit.register(dist.destroy_process_group)  # its threads, if they outlive Python, can abort the process

    def split(self, num_envs: int) -> int:
        """Share out num_envs environments; returns how many are this process's own, `own` of all.

        Raises SO101Error if there are fewer than processes.
        """
        if num_envs < self.count:
            raise SO101Error(f"--num-envs: {num_envs} environments are too few for {self.count} processes")
        bounds = [num_envs * rank // self.count for rank in (self.rank, self.rank + 1)]
        self.num_envs, self.own = num_envs, slice(*bounds)
        return bounds[1] - bounds[0]

    def own_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows of a batch (num_steps * num_envs, ...) of all, those that this process has, as rows of its batch."""
        if self.count == 1:
            return rows
        step, env = rows // self.num_envs, rows % self.num_envs
        mine = (env >= self.own.start) & (env < self.own.stop)
        return (step * (self.own.stop - self.own.start) + env - self.own.start)[mine]

    def share(self, state: Any) -> Any:
        """This process's own rows of a state of all environments: of every array and list in it.

        Raises ValueError for another number of environments.
        """
        if isinstance(state, Mapping):
            return {key: self.share(value) for key, value in state.items()}
        if len(state) != self.num_envs:
            raise ValueError(f"the state of {len(state)} environments instead of {self.num_envs}")
        return state[self.own]

    def join(self, state: Any) -> Any:
        """Inverse of share, for the first process; the others get their own back."""
        if self.count == 1:
            return state
        parts = [None] * self.count if self.first else None
        self._exchange(dist.gather_object, state, parts)

        def joined(parts: list[Any]) -> Any:
            if isinstance(parts[0], Mapping):
                return {key: joined([part[key] for part in parts]) for key in parts[0]}
            return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sum(parts, [])

        return joined(parts) if self.first else state

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in all of them."""
        values = [value] * self.count
        if self.count > 1:
            self._exchange(dist.all_gather_object, values, value)
        return values

    def together(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in every process; if it fails in one, none goes on."""
        result = error = None
        try:
            result = function(*args, **kwargs)
        except (SO101Error, FloatingPointError, OSError, SystemExit) as own_error:
            if self.count == 1:
                raise
            error = own_error
        if errors := [each for each in self.gather(error) if each is not None]:
            raise errors[0] if self.first or isinstance(errors[0], SystemExit) else SystemExit(2)
        return result

    def quietly(self, function: Callable[[], Any]) -> Any:
        """Call a function that prints the same in every process: the first prints for all."""
        with contextlib.ExitStack() as stack:
            if not self.first:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            return function()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, the same to the bit in each."""
        if self.count > 1:
            self._exchange(dist.all_reduce, tensor)
        return tensor

    def add_up_gradients(
        self, parameters: list[torch.nn.Parameter], metrics: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Add up the gradients of parameters, and metrics, which are returned, in one message."""
        if self.count == 1:
            return metrics
        parts = [*(parameter.grad for parameter in parameters), *metrics.values()]
        summed = self.add_up(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
        for parameter, gradient in zip(parameters, summed):
            parameter.grad.copy_(gradient.view_as(parameter))
        return dict(zip(metrics, (value[0] for value in summed[len(parameters) :])))

    def _exchange(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call a function of torch.distributed."""
        try:
            function(*args, **kwargs)
        except RuntimeError as error:  # gloo's, and those of the store in which processes find each other
            if not self.first:
                raise SystemExit(2) from error
            text = "another process of this run was lost; go on from its newest checkpoint with --resume"
            raise SO101Error(text) from error


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_flags(settings: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise SO101Error, naming the flag, for the first number that is not finite or out of its range."""
    check_ranges(settings, ranges, flag_of)


def check_run_name(name: str | None) -> None:
    """Raise SO101Error for a --run-name that is no name of a directory."""
    if name is not None and Path(name).parts != (name,):
        raise SO101Error(f"--run-name {name!r}: give a name; --log-dir says where")


def check_cameras(flag: str, cameras: tuple[str, ...]) -> None:
    """Raise SO101Error, naming the flag, for cameras that the scene does not have, none, or one twice."""
    if not cameras or len({*cameras}) < len(cameras) or not {*cameras} <= {*camera_names()}:
        known = " and ".join(camera_names())
        raise SO101Error(f"{flag} {' '.join(cameras)}: give one or more of {known}, each once")


def check_output(flag: str, path: str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raise SO101Error, before any work is done, if a result cannot be written to path; None is no path."""
    if path is None:
        return
    if suffixes and Path(path).suffix not in suffixes:
        raise SO101Error(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    if not Path(path).name or (suffixes and Path(path).is_dir()):
        raise SO101Error(f"{flag} {path!r}: is a directory; name a file in it")
    if not os.access(Path(path).resolve().parent, os.W_OK):
        raise SO101Error(f"{flag} {path}: its directory does not exist or cannot be written; create it or name another")


def check_rendering(envs: SO101ResidualVectorEnv, flag: str) -> None:
    """Raise SO101Error, naming the flag, if this machine cannot render off screen."""
    try:
        envs.render_state(envs.qpos[0])
    except SO101Error as error:
        raise SO101Error(f"{flag}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# files


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside path, flush it, rename it: whatever happens, path is complete or as it was.

    Raises SO101Error for a disk that is full or cannot be written.
    """
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain values."""
    buffer = io.BytesIO()  # torch's own writer does not say that the disk is full
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save as indented JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def to_plain(value: Any) -> Any:
    """Arrays as tensors, all the way down, so that a checkpoint loads with weights_only=True."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def to_numpy(value: Any) -> Any:
    """Inverse of to_plain."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_numpy(item) for item in value]
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


def make_run_dir(log_dir: str | Path, name: str, *subdirectories: str) -> Path:
    """A new directory for a run. Raises SO101Error if log_dir cannot be written."""
    for attempt in range(100):
        run_dir = Path(log_dir) / (name + (f"_{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
            for sub in subdirectories:
                (run_dir / sub).mkdir()
            return run_dir
        except FileExistsError:
            if not Path(log_dir).is_dir():
                break
        except OSError as error:
            text = f"--log-dir {log_dir}: cannot be written ({error.strerror}); name another directory"
            raise SO101Error(text) from error
    raise SO101Error(f"--log-dir {log_dir}: is not a directory; name another one")


def describe_run(script: str, args: Any) -> dict[str, Any]:
    """What config.json says: the script, its arguments, commit, versions, machine."""

    def git(*words: str) -> str | None:
        try:
            here = Path(__file__).resolve().parent
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except FileNotFoundError:  # no git on this machine: the commit is unknown
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = status = None
    if git("ls-files", "--error-unmatch", "so101_env.py"):  # else it is installed, perhaps within another repository
        # a sweep's own reports are no change of the code
        status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmark/results")
        commit = git("rev-parse", "HEAD")
    return {
        "script": script,
        "args": dataclasses.asdict(args),
        "git": {"commit": commit, "dirty": None if status is None else bool(status)},
        "versions": {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium", "numpy")},
        "machine": {"platform": platform.platform(), "python": sys.version.split()[0], "cpus": os.cpu_count()},
    }


def flat_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config.json or a checkpoint by flag name, without the groups they are kept in."""
    flat: dict[str, Any] = {}
    for key, value in args.items():
        flat |= flat_settings(value) if isinstance(value, Mapping) else {key: value}
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(
    act: Callable[[np.ndarray], np.ndarray],
    envs: SO101ResidualVectorEnv,
    seeds: list[int],
    trace: bool = False,
    qpos: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """One episode per seed, batched; envs have DISABLED autoreset.

    Args:
        act: residuals (num_envs, 6) for the observations of envs.
        trace: keep every state as "qpos" (length + 1, 10), the start included, every observation "obs" (length, 25),
            the joint targets commanded then, "command" (length, 6), rad, and "look_seed", see camera_images.
        qpos: (num_envs, 10) positions to start from instead of drawn ones.

    Returns:
        A dict per seed, in order: seed, success, return, length, final_distance_m, final_yaw_error_rad,
        residual_magnitude, failure ("", "non_finite" or "out_of_reach"), initial_distance_m, initial_yaw_rad; with a
        base policy also base_delta_rad and residual_delta_rad, the episode's mean absolute values per joint; with one
        that estimates where the sheet lies, estimate_error_m and estimate_error_rad, means over the steps in which it
        did, and their number, estimates. Fewer than the seeds if a person who is the base policy quits.
    """
    episodes: list[dict[str, Any]] = []
    for start in range(0, len(seeds), envs.num_envs):
        chunk = seeds[start : start + envs.num_envs]
        mask = np.arange(envs.num_envs) < len(chunk)
        padded = chunk + [0] * (envs.num_envs - len(chunk))
        obs, _ = envs.reset(seed=padded, options={"reset_mask": mask, "qpos": qpos})
        results: list[dict[str, Any]] = [{} for _ in chunk]
        running, states, observations, commands = mask.copy(), [envs.qpos], [], []
        deltas = np.zeros((2, envs.num_envs, ACT_DIM))  # sums of what base and residual moved the targets, rad
        misses = np.zeros((3, envs.num_envs))  # sums of how far estimates are from the sheet, m and rad; number of them
        seen = envs.full_observation
        initial_distance = np.linalg.norm(seen[:, OBS["tape_minus_sheet"]][:, :2], axis=1)
        initial_yaw, look_seed = sheet_pose(seen)[1], envs.look_seed
        while running.any():
            if envs.base_policy is not None and envs.base_policy.quit:
                return episodes
            action, sheet = act(obs), envs.qpos[:, 6:]
            if trace:
                observations.append(envs.full_observation)
            obs, _, terminated, truncated, infos = envs.step(action)
            if trace:
                states.append(envs.qpos)
                commands.append(envs.command)
            if envs.base_policy is not None:
                residual_delta = envs.task.alpha * envs.task.act_scale * np.clip(action, -1, 1)
                deltas += np.abs([infos["base_delta_rad"], residual_delta])
            if (estimate := getattr(envs.base_policy, "estimate", None)) is not None:
                seen = running & np.isfinite(estimate).all(1)
                off = np.linalg.norm(estimate[:, :2] - sheet[:, :2], axis=1), wrap_angle(estimate[:, 2] - sheet[:, 3])
                misses[:, seen] += np.abs([*off, np.ones(len(seen))])[:, seen]
            for i in np.flatnonzero(running & (terminated | truncated)):
                running[i] = False
                summary = {key: values[i] for key, values in infos["episode_summary"].items()}
                results[i] = {
                    "seed": chunk[i],
                    "success": bool(infos["is_success"][i]),
                    "return": float(summary["return"]),
                    "length": int(summary["length"]),
                    "final_distance_m": float(infos["distance_m"][i]),
                    "final_yaw_error_rad": float(infos["yaw_error_rad"][i]),
                    "residual_magnitude": float(summary["residual_magnitude"]),
                    "failure": next((k for k in ("non_finite", "out_of_reach") if infos[k][i]), ""),
                    "initial_distance_m": float(initial_distance[i]),
                    "initial_yaw_rad": float(initial_yaw[i]),
                }
                if envs.base_policy is not None:
                    means = deltas[:, i] / results[i]["length"]
                    results[i] |= {"base_delta_rad": means[0].tolist(), "residual_delta_rad": means[1].tolist()}
                if estimate is not None:
                    names, count = ("estimate_error_m", "estimate_error_rad"), max(misses[2, i], 1.0)
                    results[i] |= {name: float(sums[i] / count) for name, sums in zip(names, misses)}
                    results[i]["estimates"] = int(misses[2, i])
                if trace:
                    trajectories = {"qpos": states, "obs": observations, "command": commands}
                    results[i] |= {key: np.array([row[i] for row in rows]) for key, rows in trajectories.items()}
                    results[i]["look_seed"] = int(look_seed[i])
        episodes += results
    return episodes


def episode_mean(episodes: Iterable[dict[str, Any]], key: str) -> float:
    """Mean of a value over episodes."""
    return float(np.mean([episode[key] for episode in episodes]))


def no_residual(obs: Any) -> np.ndarray:
    """The base policy alone: residuals (N, 6) of zero, for observations of any kind."""
    return np.zeros((len(obs["state"] if isinstance(obs, dict) else obs), ACT_DIM), np.float32)


def residual_to_base(episodes: list[dict[str, Any]]) -> dict[str, float]:
    """Residual relative to the base action: ratio of mean absolute values, for the joints that the base moves."""
    if "base_delta_rad" not in episodes[0]:
        return {}
    base, residual = (
        np.average([e[key] for e in episodes], axis=0, weights=[e["length"] for e in episodes])
        for key in ("base_delta_rad", "residual_delta_rad")
    )
    return {joint: float(r / b) for joint, b, r in zip(JOINTS, base, residual) if b > 1e-9}


HOLD_S = 0.5  # how long a film shows the end of an episode


def write_video(
    envs: SO101ResidualVectorEnv,
    columns: Mapping[str, list[dict[str, Any]]],
    path: Path,
    size: tuple[int, int] | None = None,
    blind: Collection[str] = (),
) -> None:
    """Film traced episodes, one after the other: MP4 in real time, or a small GIF of every third frame.

    What a policy sees through cameras is shown in the corner.

    Args:
        columns: the episodes by what is written above them; several columns are shown side by side. How an episode
            ended, and when, is written below it; the next one follows when it has ended in all columns.
        path: ends in .mp4 or .gif.
        size: width and height of a column, pixels, even; None: 640 x 480, or 480 x 360 for a GIF.
        blind: columns whose policy does not look through the cameras of envs.
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

    def picture(title: str, episode: dict[str, Any], t: int) -> np.ndarray:
        step, text, seed = min(t, len(episode["qpos"]) - 1), height // 20, episode["look_seed"]
        qpos = episode["qpos"][step]
        image = Image.fromarray(envs.render_state(qpos, (height, width), seed))
        for number, camera in enumerate(cameras if title not in blind else ()):
            seen = envs.camera_images(qpos[None], camera, seen_size, np.array([seed]), np.array([step]))[0]
            inset_width = round(height / 3 * seen_size[1] / seen_size[0])
            inset = Image.fromarray(seen).resize((inset_width, height // 3), Image.Resampling.NEAREST)
            image.paste(inset, (width - inset_width, number * (height // 3 + 2)))
        draw = ImageDraw.Draw(image)
        draw.text((text // 2, text // 2), title, fill="black", font_size=text)
        if step == len(episode["qpos"]) - 1:
            end = "success" if episode["success"] else episode["failure"].replace("_", " ") or "no success"
            end += f", {episode['length'] / fps:.1f} s"
            draw.text(
                (text // 2, height - 2 * text), end, fill="white", stroke_width=1, stroke_fill="black", font_size=text
            )
        return np.asarray(image)

    rows = [(episodes, max(len(episode["qpos"]) for episode in episodes)) for episodes in zip(*columns.values())]
    steps = [(episodes, t) for episodes, length in rows for t in range(0, length + round(HOLD_S * fps), every)]

    def write(temporary: Path) -> None:
        if gif:  # one palette for all, without dithering: what rests is then stored once
            starts = [np.hstack([picture(*each, 0) for each in zip(columns, episodes)]) for episodes, _ in rows]
            palette = Image.fromarray(np.vstack(starts)).quantize(256)
        with imageio.get_writer(temporary, **options) as writer:
            for episodes, t in tqdm(steps, f"filming {path.name}", unit="frame", dynamic_ncols=True, leave=False):
                image = Image.fromarray(np.hstack([picture(*each, t) for each in zip(columns, episodes)]))
                if gif:
                    image = image.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")
                writer.append_data(np.asarray(image))

    write_atomically(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# what trainers keep of a run


# where the means over the last 100 training episodes, and of an evaluation, go in TensorBoard
ROLLOUT_TAGS = {
    "success": "success_rate_100", "return": "ep_reward", "length": "ep_length", "failure": "failure_rate_100"
}  # fmt: skip
BEST_BY = ("success_rate", "mean_return")  # the second where the first ties
FINALISTS = 3  # so many models are evaluated once more at the end,
RIVAL_EPISODES = 2  # if they succeeded in at most this many episodes fewer than the best
EVAL_TAGS = {"mean_return": "mean_reward", "mean_length": "mean_ep_length"}


def evaluate_agent(
    agent: Any, eval_envs: SO101ResidualVectorEnv, num_episodes: int, base_success: float | None, film: Path | None
) -> dict[str, float]:
    """Means over episodes on seeds that are used for nothing else, of an agent with `act`.

    base_success is that of the base policy alone, None to measure it; the first episode is filmed into film.
    """
    seeds = [VALIDATION_SEED + i for i in range(num_episodes)]
    episodes = evaluate(agent.act, eval_envs, seeds, trace=film is not None)
    success, magnitude = (episode_mean(episodes, key) for key in ("success", "residual_magnitude"))
    if base_success is None:  # at the start, most agents are their base
        base_success = episode_mean(evaluate(no_residual, eval_envs, seeds), "success") if magnitude else success
    if film:
        write_video(eval_envs, {"base and residual" if eval_envs.base_policy else "agent": episodes[:1]}, film)
    return {
        "success_rate": success,
        "mean_return": episode_mean(episodes, "return"),
        "mean_length": episode_mean(episodes, "length"),
        "residual_magnitude": magnitude,
        "base_success_rate": base_success,
        **{f"residual_to_base/{joint}": ratio for joint, ratio in residual_to_base(episodes).items()},
    }


def log_best(writer: Any, settings: dict[str, Any], best: dict[str, Any]) -> None:
    """Settings and the best model's scores, for the table of runs in TensorBoard's tab HPARAMS."""
    from torch.utils.tensorboard.summary import hparams

    plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
    scores = {f"best/{key}": best[key] for key in BEST_BY}
    for summary in hparams(plain, scores):  # SummaryWriter.add_hparams would open a second event file
        writer.file_writer.add_summary(summary)
    for tag, value in scores.items():
        writer.add_scalar(tag, value, best["step"])


def run_dir_of(path: str) -> Path:
    """The directory of the run that a checkpoint belongs to."""
    parent = Path(path).resolve().parent
    return parent.parent if parent.name in ("checkpoints", "best_model") else parent


def model_name(global_step: int) -> str:
    """File name of the model after so many steps."""
    return f"ppo_residual_{global_step}_steps.pt"


def ranking(evaluation: dict[str, Any]) -> list[float]:
    """What the best of several evaluations has most of."""
    return [evaluation[key] for key in (*BEST_BY, "step")]


def finalists_of(path: str, finalists: list[dict[str, Any]]) -> list[Path]:
    """The files that the run of a checkpoint keeps its best models in, for ever: best_model.pt may be a later one."""
    return [run_dir_of(path) / "best_model" / model_name(finalist["step"]) for finalist in finalists]


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; target is complete or as it was."""
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))
