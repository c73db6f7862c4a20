"""The learner of so101.practice: SAC on the episodes of an arm, in a process of its own, and the files of the run.

After each episode the arm's process hands over a `Lesson`; the learner adds its steps to the replay buffer, does its
gradient steps, writes checkpoint and curves, and answers with the new weights. Algorithm and networks are those of
so101/sac.py.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from so101 import sac
from so101.arm_film import CameraFilm, Frame
from so101.checkpoints import CHECKPOINT, load_file, load_weights, restore_optimizer, restoring, save_tensors
from so101.distributed import World
from so101.files import DiskError, disk_error, write_atomic
from so101.loop import say
from so101.processes import spawn
from so101.run_dirs import open_curves
from so101_env import OBS, TAPE_CENTER_M, Scene, SO101ResidualVectorEnv, sheet_pose
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ

MODEL, EPISODES, FILM = "practice_model.pt", "episodes.jsonl", "last_episode.mp4"  # in the run's directory
UPDATES_AT_ONCE = 16  # gradient steps in a call of sac.update
RECENT = 20  # episodes that the success rate averages over
FILM_EVERY = 3  # control steps per picture of a film
GIF_WIDTH = 160  # pixels
NICENESS = 5  # the learner's process: the arm's comes first
TAKE_S, UPDATE_S = 120.0, 0.1  # s; longest wait for a lesson: a fixed time, and a time per gradient step
CLOSE_S = 20.0  # s; longest wait for a learner that closes its files


class Episode(NamedTuple):
    """T steps of an arm, as it has measured and seen them."""

    obs: np.ndarray  # (T + 1, 25 to 37) float32: before each step, and after the last one
    actions: np.ndarray  # (T, 6) float32, residuals in [-1, 1]
    rewards: np.ndarray  # (T,) float32, with shaping
    terminated: bool  # by success; otherwise truncated


class Lesson(NamedTuple):
    """What the arm's process hands over after an episode of the arm."""

    episode: Episode
    record: dict[str, Any]  # the line about it in episodes.jsonl
    arm: dict[str, Any]  # from which the arm's process can be resumed: plain values and tensors, only stored
    film: list[Frame]  # pictures of the reset and the episode; empty if they were not filmed


def seen_scene(obs: np.ndarray) -> Scene:
    """The scene as it is in observations (N, 25 or more): measured tips and seen sheets."""
    sheet, yaw = sheet_pose(obs.astype(np.float64))
    return Scene(obs[:, OBS["tip_pos"]].astype(np.float64), sheet, yaw, np.hypot(*(sheet - TAPE_CENTER_M).T))


class Judge:
    """Computes the rewards of the task from observations, hence from what an arm and its camera give.

    Args:
        task_env: one environment of the task, for its reward terms and its potential; it is never stepped.
        gamma: discount of the shaping; None: no shaping.
    """

    def __init__(self, task_env: SO101ResidualVectorEnv, gamma: float | None):
        self.env, self.gamma = task_env, gamma

    def rewards(self, obs: np.ndarray, actions: np.ndarray, success: bool) -> np.ndarray:
        """Rewards (T,) float32 of an episode, of which nothing may be left; arguments as in Episode."""
        if not len(actions):
            return np.zeros(0, np.float32)
        ended = success & (np.arange(len(actions)) == len(actions) - 1)
        terms = self.env.reward_terms(seen_scene(obs[1:]), actions.astype(np.float64), ended, np.zeros_like(ended))
        rewards = sum(terms.values()).astype(np.float32)
        if self.gamma is not None:  # the potential is zero at terminal states, as in the environment
            potential = self.env.potential(seen_scene(obs))
            rewards += (self.gamma * potential[1:] * ~ended - potential[:-1]).astype(np.float32)
        return rewards


class Learner:
    """Agent, optimisers and replay buffer of one arm.

    Args:
        args: settings of so101/sac.py, complete.
        capacity: steps that the buffer keeps at most.
    """

    def __init__(self, args: sac.Args, capacity: int):
        self.args, self.generator = args, World().seed(args.seed)
        self.agent = sac.Agent(args)
        self.optimizers = sac.make_optimizers(self.agent, args.sac)
        self.buffer = sac.ReplayBuffer(min(capacity, args.sac.buffer_size), 1, self.agent.features.dim)
        self.first_rows = 0  # steps of prior or demonstrations, or else of the base alone; they are the first

    def _load_networks(self, saved: Mapping[str, Any], path: str | Path) -> None:
        """Take over weights and optimisers of a checkpoint. Raises SO101Error if they do not fit."""
        load_weights(self.agent, saved["agent"], path)
        with restoring(path):
            begun = saved["global_step"] > self.args.sac.learning_starts + saved["num_envs"]
            for name, optimizer in self.optimizers.items():
                restore_optimizer(optimizer, saved["optimizer"][name], begun)

    def load_prior(self, saved: Mapping[str, Any], path: str | Path) -> None:
        """Begin with the networks of the checkpoint at path, whose content is `saved`, and with its steps as the first.

        It is one of so101/sac.py with the same settings. Raises SO101Error if it does not fit.
        """
        self._load_networks(saved, path)
        with restoring(path):
            (own,) = saved["ranks"]
            rows = {name: array.clone() for name, array in own["buffer"].items()}
            rows["dones"][-1] = True  # what follows is another environment
            rows = {name: array.transpose(0, 1).flatten(0, 1).unsqueeze(1) for name, array in rows.items()}
            rows = {name: array[-self.buffer.capacity :] for name, array in rows.items()}
            self.first_rows = len(rows["x"])
            self.buffer.load_state_dict(rows, self.first_rows)

    def learn(
        self, episode: Episode, idle: Callable[[], Any] | None = None, demonstration: bool = False
    ) -> dict[str, float]:  # fmt: skip
        """Keep an episode, and do the gradient steps it is worth; returns their mean metrics.

        A demonstration belongs to the first rows, and so does an episode that begins within the first learning_starts
        steps. `idle` is called every UPDATES_AT_ONCE gradient steps.
        """
        settings, before, steps = self.args.sac, self.buffer.rows, len(episode.actions)
        if steps:
            x = self.agent.features(episode.obs)[:, 0]
            last = np.arange(steps) == steps - 1
            for i in range(steps):
                self.buffer.add(
                    x=x[i : i + 1], next_x=x[i + 1 : i + 2], actions=episode.actions[i : i + 1],
                    rewards=episode.rewards[i : i + 1], terminations=last[i : i + 1] & episode.terminated,
                    dones=last[i : i + 1],
                )  # fmt: skip
        if demonstration or before < settings.learning_starts:
            self.first_rows = self.buffer.rows
        left = steps * settings.updates_per_step * (self.buffer.rows >= settings.learning_starts)
        history: list[dict[str, float]] = []
        while left:
            count = min(left, UPDATES_AT_ONCE)
            history.append(
                sac.update(
                    self.agent, self.optimizers, self.buffer, settings, count, self.first_rows, self.generator
                )  # fmt: skip
            )
            left -= count
            if idle is not None:
                idle()
        return {key: float(np.mean([each[key] for each in history])) for key in history[0]} if history else {}

    def weights(self) -> dict[str, np.ndarray]:
        """A copy of the agent's weights, by name."""
        return {name: tensor.numpy().copy() for name, tensor in self.agent.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in the parts of a checkpoint."""
        own = {
            "generator": self.generator.get_state(), "buffer": self.buffer.newest(self.buffer.size),
            "first_rows": self.first_rows,
        }  # fmt: skip
        return {
            "agent": copy.deepcopy(self.agent.state_dict()), "ranks": [own],
            "optimizer": {name: copy.deepcopy(each.state_dict()) for name, each in self.optimizers.items()},
            "global_step": self.buffer.rows, "num_envs": 1,
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any], path: str | Path) -> None:
        """Continue from the checkpoint at path, whose content is `saved`. Raises SO101Error if it does not fit."""
        self._load_networks(saved, path)
        with restoring(path):
            (own,) = saved["ranks"]
            self.generator.set_state(own["generator"])
            self.buffer.load_state_dict(own["buffer"], saved["global_step"])
            self.first_rows = own["first_rows"]
            if type(self.first_rows) is not int or not 0 <= self.first_rows <= self.buffer.rows:
                raise ValueError(f"first_rows is {self.first_rows!r:.80}")


@dataclasses.dataclass
class Run:
    """What the learner's process needs to know."""

    args: sac.Args  # complete settings of so101/sac.py
    capacity: int  # steps that the buffer keeps at most
    run_dir: Path
    base_fingerprint: str  # see BasePolicy.fingerprint
    resume: str | None = None  # checkpoint to continue
    prior: str | None = None  # checkpoint to begin with


class Worker:
    """The learner with its files: what runs in the learner's process."""

    def __init__(self, run: Run):
        self.run, self.learner = run, Learner(run.args, run.capacity)
        self.records: list[dict[str, Any]] = []
        if run.resume is not None:
            saved = load_file(run.resume, CHECKPOINT)
            self.learner.load_state_dict(saved, run.resume)
            self.records = saved["recorder"]["recent_episodes"]
            # after a power loss the last line may be missing or torn
            write_atomic(run.run_dir / EPISODES, lambda file: file.write_text("".join(map(_line, self.records))))
        elif run.prior is not None:
            self.learner.load_prior(load_file(run.prior, CHECKPOINT), run.prior)
        self.writer = open_curves(run.run_dir)

    def work(self, lesson: Lesson, idle: Callable[[], Any] | None = None) -> dict[str, np.ndarray]:
        """Learn from a lesson, and write everything; returns the new weights. See Learner.learn for idle.

        Raises SO101Error: a disk that is full, or a loss that is not finite.
        """
        metrics = self._learn(lesson.episode, idle)
        self.records.append(lesson.record)
        content = self.learner.state_dict()
        content["ranks"][0]["arm"] = lesson.arm
        settings = dataclasses.asdict(self.run.args)
        head = {"format": CHECKPOINT, "script": sac.SCRIPT, "args": settings}
        recorder = {"recent_episodes": self.records, "finalists": [], "evaluation_due": False}
        content |= {"base_fingerprint": self.run.base_fingerprint, "recorder": recorder}
        try:
            self._save(head | content)
            with open(self.run.run_dir / EPISODES, "a") as file:
                file.write(_line(lesson.record))
            self._log(lesson, metrics)
        except (OSError, DiskError) as error:
            if not (self.run.run_dir / MODEL).exists():  # it was removed with its directory
                self._save(head | content)
            if isinstance(error, DiskError):
                raise
            raise disk_error(error.filename or self.run.run_dir, error) from error
        return self.learner.weights()

    def study(
        self, demonstrations: Sequence[Episode], idle: Callable[[], Any] | None = None
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Learn from demonstrations before the first lesson; returns the new weights. Nothing is written.

        Raises SO101Error: a loss that is not finite.
        """
        for episode in demonstrations:
            self._learn(episode, idle, demonstration=True)
        return self.learner.weights()

    def _learn(self, episode: Episode, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See Learner.learn. Raises SO101Error: a loss that is not finite."""
        try:
            return self.learner.learn(episode, *args, **kwargs)
        except FloatingPointError as error:
            raise SO101Error(f"NaN or Inf in the {error}: a new run needs a lower --learning-rate") from error

    def _save(self, content: dict[str, Any]) -> None:
        """Write the checkpoint, also into a directory that was removed meanwhile."""
        try:
            self.run.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.run.run_dir, error) from error
        save_tensors(self.run.run_dir / MODEL, content)

    def _log(self, lesson: Lesson, metrics: dict[str, float]) -> None:
        """Write an episode's curves and film for TensorBoard; the horizontal axis is arm time in s."""
        record, second = lesson.record, round(lesson.record["arm_time_s"])
        scalars = {f"train/{key}": value for key, value in metrics.items()}
        scalars |= {
            "Success/practice": float(np.mean([each["success"] for each in self.records[-RECENT:]])),
            "practice/arm_minutes": record["arm_time_s"] / 60, "practice/return": record["return"],
            "practice/residual_magnitude": record["residual_magnitude"],
        }  # fmt: skip
        for key in ("steps", "reset_ticks", "hands", "missed", "waited_s"):
            scalars[f"practice/{key}"] = record[key]
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, second)
        if lesson.film:
            from tensorboard.compat.proto.summary_pb2 import Summary

            width, height, content = make_gif(lesson.film)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="last_episode", image=image)]), second)
            film = CameraFilm(
                str(self.run.run_dir / FILM), self.run.args.task.tape_margin, every=FILM_EVERY, progress=False
            )  # fmt: skip
            film.frames = lesson.film
            film.save()
        self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        self.writer.close()


def _line(record: dict[str, Any]) -> str:
    """The line of an episode's record in episodes.jsonl."""
    return json.dumps(record) + "\n"


def make_gif(frames: list[Frame]) -> tuple[int, int, bytes]:
    """Width, height and content of a small GIF, which repeats, of the pictures of a film."""
    pictures = []
    for frame in frames:
        picture = Image.open(io.BytesIO(frame.jpeg.tobytes()))
        pictures.append(picture.resize((GIF_WIDTH, round(GIF_WIDTH * picture.height / picture.width))))
    content = io.BytesIO()
    period_ms = round(1000 * FILM_EVERY / CONTROL_HZ)
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=period_ms, loop=0)
    return *pictures[0].size, content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# in this process, or in one of its own


class LocalLearner:
    """The learner in this process: `take` learns.

    The weights that `take` returns are those after everything that was given.
    """

    def __init__(self, run: Run):
        self.worker = Worker(run)
        self.lesson: Lesson | None = None
        self.lost = 0  # how many lessons were given and have not been learned: 0 or 1

    def study(self, demonstrations: Sequence[Episode], idle: Callable[[], Any] | None = None) -> None:
        """Learn from demonstrations before the first lesson; `idle` as in `take`."""
        self.worker.study(demonstrations, idle)

    def give(self, lesson: Lesson) -> None:
        """Hand over an episode; `take` must be called before the next one."""
        self.lesson, self.lost = lesson, 1

    def take(self, idle: Callable[[], Any] | None = None) -> dict[str, np.ndarray]:
        """The weights after the last lesson, by name; at first those that the run starts with.

        Args:
            idle: called several times per second while the learner is waited for, so that the arm is watched.
        """
        lesson, self.lesson = self.lesson, None  # one that is interrupted is not learned again
        if lesson is None:
            return self.worker.learner.weights()
        weights, self.lost = self.worker.work(lesson, idle), 0
        return weights

    def close(self) -> None:
        """Learn what was given, and close the files."""
        try:
            self.take()
        finally:
            self.worker.close()


def _run_learner(pipe: Connection, run: Run) -> None:
    """The learner's process: weights at first, then for everything given; a text is an error, and the last word."""
    os.nice(NICENESS)
    worker, told = None, False
    try:
        worker = Worker(run)
        pipe.send(worker.learner.weights())
        while True:
            try:
                given = pipe.recv()
            except (EOFError, OSError):  # the arm's process has closed the pipe, or has ended: so does this one
                return
            pipe.send(worker.work(given) if isinstance(given, Lesson) else worker.study(given))
    except ConnectionError:
        return
    except SO101Error as error:
        told = True
        try:
            pipe.send(str(error))
        except ConnectionError:  # the arm's process does not read any more: a person may
            print(f"the learner has stopped: {error}", file=sys.stderr, flush=True)
    finally:
        if worker is not None:
            try:
                worker.close()
            except OSError as error:
                if not told:  # otherwise it is the same error again
                    print(f"the curves are incomplete: {disk_error(run.run_dir, error)}", file=sys.stderr, flush=True)


class LearnerProcess:
    """The learner in a process of its own; with the methods of LocalLearner. They raise SO101Error if it has ended."""

    def __init__(self, run: Run):
        self.process, self.pipe = spawn(_run_learner, run, blocked=(signal.SIGINT, signal.SIGHUP))
        self.updates_per_step, self.limit_s = run.args.sac.updates_per_step, TAKE_S
        self.pending, self.lost = True, 0  # whether an answer is due, at first the weights of the beginning
        self.weights: dict[str, np.ndarray] = {}  # the last answer

    def study(self, demonstrations: Sequence[Episode], idle: Callable[[], Any] | None = None) -> None:
        """See LocalLearner."""
        self._send(list(demonstrations), sum(len(episode.actions) for episode in demonstrations))
        self.take(idle)

    def give(self, lesson: Lesson) -> None:
        """See LocalLearner. Returns at once."""
        self.lost = 1
        self._send(lesson, len(lesson.episode.actions))

    def _send(self, given: Lesson | list[Episode], steps: int) -> None:
        """Hand over something to learn from, with so many steps."""
        self.limit_s, self.pending = TAKE_S + UPDATE_S * self.updates_per_step * steps, True
        try:
            self.pipe.send(given)
        except OSError as error:
            raise self._ended() from error

    def take(self, idle: Callable[[], Any] | None = None) -> dict[str, np.ndarray]:
        """See LocalLearner. Waits for the learner, at most limit_s."""
        if self.pending:
            self.weights, self.lost = self._answer(idle), 0
        return self.weights

    def _answer(self, idle: Callable[[], Any] | None) -> dict[str, np.ndarray]:
        """Wait for the learner's next answer."""
        try:
            deadline = time.monotonic() + self.limit_s
            while not self.pipe.poll(1 / CONTROL_HZ):
                if time.monotonic() > deadline:
                    self.pending = False
                    raise SO101Error(f"the learner has not answered for {self.limit_s:.0f} s")
                if idle is not None:
                    idle()
            self.pending = False
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, str):
            raise SO101Error(f"the learner has stopped: {answer}")
        return answer

    def _ended(self) -> SO101Error:
        self.pending = False
        self.process.join(1.0)
        return SO101Error(f"the learner's process has ended (exit code {self.process.exitcode})")

    def close(self) -> None:
        """Wait until the learner has learned and saved the last lesson, and end its process; print what is lost."""
        calls, waiting = itertools.count(1), "the learner finishes the last episode; Ctrl+C drops it"
        try:
            if self.lost:
                self.take(lambda: next(calls) == CONTROL_HZ and say(waiting))
            if self.pending:  # it still begins, or learns from demonstrations: nothing of that is kept
                self.process.kill()
            self.pipe.close()
            self.process.join(CLOSE_S)
        except SO101Error as error:
            say(str(error))
        finally:
            self.process.kill()
            self.pipe.close()
            if self.lost:
                say("the last episode is lost")


def set_weights(agent: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Give an agent the weights that a learner has returned."""
    agent.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
