"""Gymnasium environments for tasks of SO-101 arms: seeding, autoreset, pixel observations, rendering, saving.

A task is a subclass of `ArmVectorEnv`: see its docstring for the methods to write, so101_env.py and
examples/push_cube_env.py for two examples. `ArmEnv` turns it into a single environment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit

from so101_sim.batch import Arms
from so101_sim.control import ACT_DIM, JOINT_MIRROR, JOINTS, clamp
from so101_sim.errors import LARGEST, SO101Error, check_arrays, require
from so101_sim.scene import CONTROL_HZ, Look, Renderer, VisualRandomization, add_noise, camera_names
from so101_sim.viewer import Viewer, check_display

UNSEEN_STEPS = CONTROL_HZ // 2  # longest time that `ArmVectorEnv.lose_view` hides an object for
IMAGES = "observation.images."  # prefix of a camera's name, as LeRobot has it


class Part(NamedTuple):
    """A named part of the observation, and how a network should see it: as (x - mean) / scale."""

    names: tuple[str, ...]  # its components
    mean: Any
    scale: Any
    mirror: Any  # sign of each component in the left-right mirror image of the scene


# The load on each joint, rad, see Controller.load: an arm feels contacts in it
LOAD = Part(tuple(f"{joint}.load" for joint in JOINTS), 0.0, 0.02, JOINT_MIRROR)


def slices(parts: Mapping[str, Part]) -> dict[str, slice]:
    """Where each part lies in an observation."""
    ends = np.cumsum([len(part.names) for part in parts.values()]).tolist()
    return {name: slice(end - len(part.names), end) for (name, part), end in zip(parts.items(), ends)}


class BaseObservation(Mapping):
    """What a policy that acts within the environment sees: arrays by name, and pictures that are rendered when read.

    Pictures are observation.images.CAMERA (n, H, W, 3) uint8. Call `obs.rows(mask)` first to render only these rows.

    Args:
        arrays: (n, ...) by name.
        cameras: names of the cameras.
        render: pictures of a camera in the environments ids, (n,), of a size.
        size: height and width of the pictures, pixels.
        ids: (n,) numbers of the environments; None: all.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        cameras: tuple[str, ...] = (),
        render: Callable[[str, np.ndarray, tuple[int, int]], np.ndarray] | None = None,
        size: tuple[int, int] = (96, 96),
        ids: np.ndarray | None = None,
    ):
        self._arrays, self._cameras, self._render, self._size = dict(arrays), cameras, render, tuple(size)
        self._ids = np.arange(len(next(iter(arrays.values())))) if ids is None else ids

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._arrays and key.removeprefix(IMAGES) in self._cameras and key.startswith(IMAGES):
            self._arrays[key] = self._render(key.removeprefix(IMAGES), self._ids, self._size)
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._arrays, *(IMAGES + camera for camera in self._cameras)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def rows(self, mask: np.ndarray) -> BaseObservation:
        """The rows of the environments in mask, (N,) bool."""
        arrays = {key: array[mask] for key, array in self._arrays.items()}
        return BaseObservation(arrays, self._cameras, self._render, self._size, self._ids[mask])

    def replace(self, arrays: Mapping[str, np.ndarray]) -> BaseObservation:
        """A copy with other arrays by name."""
        return BaseObservation({**self._arrays, **arrays}, self._cameras, self._render, self._size, self._ids)

    def sized(self, size: tuple[int, int]) -> BaseObservation:
        """The same with pictures of another height and width, pixels."""
        if tuple(size) == self._size:
            return self
        arrays = {key: array for key, array in self._arrays.items() if not key.startswith(IMAGES)}
        return BaseObservation(arrays, self._cameras, self._render, size, self._ids)


class ArmVectorEnv(gym.vector.VectorEnv):
    """N arms at the same task, stepped together. Action: (N, 6) in [-1, 1]. The base class of a task.

    A task sets `parts` and writes these methods:
        draw_qpos(rng): start positions (nq,) of an episode
        scene(): the true state now, in any form, which the next methods get
        observe(mask, scene): observations (N, D)
        joint_targets(action, active): joint targets (N, 6) for clipped actions (N, 6)
        judge(scene, action, active, broken): what step returns besides the observation
        describe(scene), blank_results(): the info, of the state and of an episode without steps
    and, where needed, resample(i, rng), prepare_step(active), begin(ids, scene) and extend_observation(mask).

    Args:
        arms: the physics.
        max_episode_steps: control steps until truncation.
        extra_parts: parts appended to those that `observe` returns; `extend_observation` writes them, but for LOAD,
            which is named "load".
        observe_pixels: the observation is a dict: pixels_CAMERA (N, H, W, 3) uint8 for each camera, and state, the
            parts named by measured. The full observation is then info["full_observation"].
        measured: names of the parts that a real arm can measure.
        cameras, image_size: cameras of pixel observations; height and width of their pictures.
        visuals: visual randomisation; None: nominal look.
        render_mode: None or "rgb_array".
        width, height: size of rendered frames, pixels.
        camera_name: camera of rendered frames; None looks from the side.
        autoreset_mode: SAME_STEP, NEXT_STEP, or DISABLED: then a finished environment rests, unsimulated, until it is
            reset.

    Raises:
        SO101Error: an argument is outside its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    parts: Mapping[str, Part]
    _spec: EnvSpec | None = None
    # arrays with a row per environment, saved
    _STATE: tuple[str, ...] = ("_steps", "_done", "_obs", "_look_seed", "_unseen")

    def __init__(
        self,
        arms: Arms,
        max_episode_steps: int,
        extra_parts: Mapping[str, Part] | None = None,
        observe_pixels: bool = False,
        measured: tuple[str, ...] = (),
        cameras: tuple[str, ...] = ("top",),
        image_size: tuple[int, int] = (96, 96),
        visuals: VisualRandomization | None = None,
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
        camera_name: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    ):
        known = camera_names(arms.model)
        whole = isinstance(max_episode_steps, (int, np.integer)) and not isinstance(max_episode_steps, bool)
        fits = whole and max_episode_steps >= 1
        require(fits, "max_episode_steps", repr(max_episode_steps), "a whole number, at least 1")
        require(render_mode in (None, "rgb_array"), "render_mode", render_mode, "None or 'rgb_array'")
        require(all(8 <= side <= 4096 for side in (width, height)), "width, height", (width, height), "in [8, 4096]")
        require(camera_name in (None, *known), "camera_name", camera_name, " or ".join(known))
        fits = bool(cameras) and len({*cameras}) == len(cameras) and {*cameras} <= {*known}
        require(fits, "cameras", cameras, f"of {known}, each once")
        require(all(8 <= side <= 1024 for side in image_size), "image_size", image_size, "in [8, 1024]")
        self.arms, self.model, self.num_envs = arms, arms.model, arms.num_arms
        self.max_episode_steps, self.visuals = max_episode_steps, visuals
        self.render_mode, self.width, self.height, self.camera_name = render_mode, width, height, camera_name
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode(autoreset_mode)}
        self._own_dim = sum(len(part.names) for part in self.parts.values())
        self.parts = {**self.parts, **(extra_parts or {})}
        self._where = slices(self.parts)
        obs_dim = sum(len(part.names) for part in self.parts.values())
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.observe_pixels, self.image_size = observe_pixels, tuple(image_size)
        self.cameras = tuple(cameras) if observe_pixels else ()
        if observe_pixels:
            columns = [self._where[name] for name in (*measured, *(extra_parts or {}))]
            self._measured = np.concatenate([np.arange(obs_dim)[each] for each in columns])
            picture = gym.spaces.Box(0, 255, (*self.image_size, 3), np.uint8)
            state = gym.spaces.Box(-np.inf, np.inf, (len(self._measured),), np.float32)
            spaces = {f"pixels_{camera}": picture for camera in self.cameras} | {"state": state}
            self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (ACT_DIM,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)

        n = self.num_envs
        self._rngs: list[np.random.Generator] = [None] * n
        self._steps = np.zeros(n, np.int64)
        self._done = np.ones(n, bool)
        self._unseen = np.zeros(n, np.int64)  # control steps for which the object stays out of view, see lose_view
        self._obs = np.zeros((n, obs_dim), np.float32)
        self._look_seed = np.zeros(n, np.int64)  # seed of the episode's look
        self._pixels = {camera: np.zeros((n, *self.image_size, 3), np.uint8) for camera in self.cameras}
        self._looks_by_seed: dict[int, Look] = {}
        # made when first used, freed by close; by the picture's size, and whether it is for policies
        self._renderers: dict[tuple[tuple[int, int], bool], Renderer] = {}

    @property
    def spec(self) -> EnvSpec | None:
        """How gym.make_vec made this environment, with the max_episode_steps that it has."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec) -> None:
        self._spec, spec.max_episode_steps = spec, self.max_episode_steps

    # -- the task: what a subclass writes

    def draw_qpos(self, rng: np.random.Generator) -> np.ndarray:
        """Start positions (nq,) of an episode, the joints at home."""
        raise NotImplementedError

    def scene(self) -> Any:
        """The true state now."""
        raise NotImplementedError

    def observe(self, mask: np.ndarray, scene: Any) -> np.ndarray:
        """Observations (N, D) of `parts`; rows that are not in mask, (N,) bool, may hold anything."""
        raise NotImplementedError

    def joint_targets(self, action: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Joint targets (N, 6), rad in encoder coordinates, for actions (N, 6) in [-1, 1]."""
        raise NotImplementedError

    def judge(
        self, scene: Any, action: np.ndarray, active: np.ndarray, broken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """What a step was worth (N,), which episodes it terminated (N,), and its part of the info.

        Args:
            scene: the state at the end of the step.
            action: (N, 6), clipped.
            active: the environments that were stepped, (N,) bool.
            broken: those whose simulation diverged, (N,) bool.
        """
        raise NotImplementedError

    def describe(self, scene: Any) -> dict[str, Any]:
        """The part of the info that describes the state and the episode so far."""
        return {}

    def blank_results(self) -> dict[str, Any]:
        """What `judge` adds to the info, for episodes that have no steps yet: the same keys, all zero."""
        raise NotImplementedError

    def resample(self, i: int, rng: np.random.Generator) -> None:
        """Draw the physics of the next episode of environment i."""
        self.arms.resample(i, rng)

    def begin(self, ids: np.ndarray, scene: Any) -> None:
        """Reset what the task remembers of the episodes of the environments ids."""

    def prepare_step(self, active: np.ndarray) -> None:
        """Called before the physics of a control step of the environments in active, (N,) bool."""

    def extend_observation(self, mask: np.ndarray) -> None:
        """Write the columns of extra_parts but "load" into self._obs for the environments in mask, (N,) bool."""

    def lose_view(self, mask: np.ndarray, probability: float) -> np.ndarray:
        """In which environments in mask, (N,) bool, a camera does not see the object now, (N,) bool; call once a step.

        In each step, but not at the start of an episode, the view is lost with this probability, for up to
        UNSEEN_STEPS steps, drawn from the episode's generator.
        """
        for i in np.flatnonzero(mask & (self._steps > 0)):
            lost = self._rngs[i].random() < probability
            self._unseen[i] = self._rngs[i].integers(UNSEEN_STEPS) + 1 if lost else max(self._unseen[i] - 1, 0)
        return mask & (self._unseen > 0)

    # -- Gymnasium API

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: environment i gets seed + i, or seed[i] of a list; None continues with the present generators.
            options: {"reset_mask": (N,) bool} resets only those environments; {"qpos": (N, nq)} starts them at rest at
                these positions instead of drawn ones.

        Returns:
            Observations and info as from step, for episodes that have no steps yet.

        Raises:
            ValueError: the mask, the seeds or the positions do not fit.
        """
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
                raise ValueError("options['reset_mask'] must be bool of shape (num_envs,) with at least one True")
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        elif len(seed) == self.num_envs:
            seeds = list(seed)
        else:
            raise ValueError(f"reset got {len(seed)} seeds for {self.num_envs} environments")
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or self._rngs[i] is None:
                self._rngs[i] = seeding.np_random(seeds[i])[0]
        qpos = options.get("qpos") if options else None
        if qpos is not None:
            qpos, shape = np.asarray(qpos, np.float64), (self.num_envs, self.model.nq)
            if qpos.shape != shape or not (np.abs(qpos) <= LARGEST).all():
                raise SO101Error(f"options['qpos'] must be finite positions {shape}, got shape {qpos.shape}")
        self._start_episodes(np.flatnonzero(mask), qpos)
        return self.observation, self._info(self.scene())

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step, 1/30 s.

        Args:
            actions: (N, 6), clipped to [-1, 1].

        Returns:
            As Gymnasium's vector environments. With SAME_STEP autoreset, observation and info of a finished environment
            are the first of the next episode, and info has final_obs and final_info, valid where _final_obs and
            _final_info are True. With NEXT_STEP they are those of the next episode in the step after, whose action is
            ignored.

        Raises:
            SO101Error: actions of another shape, or not finite.
            RuntimeError: DISABLED autoreset and every environment has finished, or step before reset.
        """
        active, restarting = ~self._done, np.zeros(self.num_envs, bool)
        if self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP and None not in self._rngs:
            restarting = ~active
        elif not active.any():
            raise RuntimeError("step() needs a running episode: call reset() first")
        action = np.asarray(actions, np.float64)
        if action.shape != (self.num_envs, ACT_DIM) or not np.isfinite(action).all():
            found = f"{action.shape}" + ", with numbers that are not finite" * (not np.isfinite(action).all())
            raise SO101Error(f"actions must be finite, of shape ({self.num_envs}, {ACT_DIM}); the policy gives {found}")
        action = clamp(action, -1.0, 1.0)

        targets = self.joint_targets(action, active)
        self.prepare_step(active)
        broken = self.arms.step(targets, active)
        scene = self.scene()
        self._steps += active
        self._update_observation(active, scene)
        value, terminated, results = self.judge(scene, action, active, broken)
        truncated = active & (self._steps >= self.max_episode_steps) & ~terminated
        info, finished = self._info(scene, results), terminated | truncated
        self._done |= finished
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and finished.any():
            final = {"final_obs": self._final_observation(finished), "final_info": info}
            info = self._restart(finished, info) | final | {f"_{name}": finished for name in final}
        if restarting.any():
            info = self._restart(restarting, info)
        return self.observation, value, terminated, truncated, info

    @property
    def observation(self) -> Any:
        """Copy of the observation that reset or step returned last."""
        if not self.observe_pixels:
            return self._obs.copy()
        pixels = {f"pixels_{camera}": pixels.copy() for camera, pixels in self._pixels.items()}
        return pixels | {"state": self._obs[:, self._measured]}

    @property
    def full_observation(self) -> np.ndarray:
        """Copy of the observation (N, D) of `observe`, also when pixels are observed."""
        return self._obs[:, : self._own_dim].copy()

    @property
    def qpos(self) -> np.ndarray:
        """Copy of the generalised positions (N, nq): joints (6, rad), then the task's own."""
        return self.arms.qpos.copy()

    @property
    def command(self) -> np.ndarray:
        """Copy of the last commanded joint targets (N, 6), rad, in encoder coordinates."""
        return self.arms.command.copy()

    @property
    def steps(self) -> np.ndarray:
        """Copy of the control steps (N,) that the present episodes have had."""
        return self._steps.copy()

    @property
    def look_seed(self) -> np.ndarray:
        """Copy of the seeds (N,) of the episodes' looks under visual randomisation, see camera_images."""
        return self._look_seed.copy()

    # -- rendering

    def render(self) -> tuple[np.ndarray, ...] | None:
        """RGB frames (height, width, 3) uint8 of all environments; None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(self.render_state(qpos, None, seed) for qpos, seed in zip(self.arms.qpos, self._look_seed))

    def render_state(
        self, qpos: np.ndarray, size: tuple[int, int] | None = None, look_seed: int | None = None
    ) -> np.ndarray:
        """The RGB frame (H, W, 3) uint8 of positions (nq,), for people.

        Args:
            size: height and width, pixels; None: those of the environment.
            look_seed: seed of the episode's look under visual randomisation; None: the nominal look.

        Raises:
            SO101Error: off-screen rendering does not work on this machine.
        """
        renderer = self._renderer(size or (self.height, self.width), fast=False)
        return renderer.render(qpos, self.camera_name, self._look(look_seed))

    def camera_images(
        self,
        qpos: np.ndarray,
        camera: str,
        size: tuple[int, int],
        look_seed: np.ndarray | None = None,
        steps: np.ndarray | None = None,
    ) -> np.ndarray:
        """Pictures (n, H, W, 3) uint8 of positions (n, nq) through a camera of the scene, for policies.

        Recording, training and evaluation all use this function, so a policy gets pictures like those it was trained
        on: without antialiasing, and without shadows unless visual randomisation draws them.

        Args:
            size: height and width, pixels.
            look_seed: seeds (n,) of the episodes' looks under visual randomisation; None: the nominal look.
            steps: control steps (n,) since the episodes began, on which image noise depends.

        Raises:
            SO101Error: no such camera, or off-screen rendering does not work on this machine.
        """
        names = camera_names(self.model)
        if camera not in names:
            raise SO101Error(f"camera {camera}: the scene has no such camera, it has {' and '.join(names)}")
        pictures, number = np.empty((len(qpos), *size, 3), np.uint8), names.index(camera)
        renderer = self._renderer(size, fast=True)
        for i, row in enumerate(qpos):
            look = None if look_seed is None else self._look(look_seed[i])
            pictures[i] = renderer.render(row, camera, look)
            if look is not None:
                add_noise(pictures[i], look, 0 if steps is None else int(steps[i]), number)
        return pictures

    def _current_images(self, camera: str, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Pictures (n, H, W, 3) uint8 of the present states of the environments ids."""
        return self.camera_images(self.arms.qpos[ids], camera, size, self._look_seed[ids], self._steps[ids])

    def _renderer(self, size: tuple[int, int], fast: bool) -> Renderer:
        """A renderer of this thread: Mesa's software OpenGL crashes, rarely, when two threads draw at once."""
        if (size, fast) not in self._renderers:
            self._renderers[size, fast] = Renderer(self.model, size, fast)
        return self._renderers[size, fast]

    def _look(self, seed: int | None) -> Look | None:
        """The look of an episode; None, the nominal one, without visual randomisation."""
        if self.visuals is None or seed is None:
            return None
        if seed not in self._looks_by_seed:
            if len(self._looks_by_seed) > 4 * self.num_envs:
                self._looks_by_seed.clear()
            self._looks_by_seed[seed] = self.visuals.draw(self.model, int(seed))
        return self._looks_by_seed[seed]

    def close_extras(self, **kwargs: Any) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    # -- saving and restoring

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on: arrays, and the random generators as dicts."""
        return {
            "arms": self.arms.get_state(),
            "rngs": [None if rng is None else rng.bit_generator.state for rng in self._rngs],
            **{name: getattr(self, name).copy() for name in self._STATE},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where get_state was called.

        Raises SO101Error, and changes nothing, for a state that does not fit this environment.
        """
        own, generators = {name: getattr(self, name) for name in self._STATE}, state.get("rngs")
        self.arms.check_state(state.get("arms"))
        check_arrays(own, state)
        if (state["_steps"] > self.max_episode_steps).any() or (state["_unseen"] > UNSEEN_STEPS).any():
            raise SO101Error("state of the environments: an episode is longer than any can be")
        if not isinstance(generators, list) or len(generators) != self.num_envs:
            raise SO101Error(f"state of the environments: rngs must be {self.num_envs} generators")
        rngs = [np.random.Generator(np.random.PCG64()) for _ in generators]
        for rng, rng_state in zip(rngs, generators):
            set_generator(rng, rng_state)
        for name, array in own.items():
            array[...] = state[name]
        self._rngs = rngs
        self.arms.set_state(state["arms"])
        for camera, pixels in self._pixels.items():
            pixels[:] = self._current_images(camera, np.arange(self.num_envs), self.image_size)

    # -- internals

    def _start_episodes(self, ids: np.ndarray, qpos: np.ndarray | None = None) -> None:
        """Start new episodes in the environments ids, each resampled from its own generator; qpos as in reset."""
        for i in ids:
            drawn = self.draw_qpos(self._rngs[i])
            self.arms.qpos[i] = drawn if qpos is None else qpos[i]
            self.resample(i, self._rngs[i])
            if self.visuals is not None:  # read, not drawn: episodes are otherwise the same with and without it
                self._look_seed[i] = self._rngs[i].bit_generator.state["state"]["state"] % 2**63
        self.arms.start(ids, at_home=qpos is None)
        self._steps[ids], self._unseen[ids] = 0, 0
        self._done[ids] = False
        scene = self.scene()
        self.begin(ids, scene)
        mask = np.zeros(self.num_envs, bool)
        mask[ids] = True
        self._update_observation(mask, scene)

    def _update_observation(self, mask: np.ndarray, scene: Any) -> None:
        """Update the observations of the environments in mask."""
        obs = self.observe(mask, scene)
        if obs.shape != (self.num_envs, self._own_dim):
            expected = (self.num_envs, self._own_dim)
            raise ValueError(f"observe() must return {expected}, as `parts` says; got {obs.shape}")
        if mask.all():
            self._obs[:, : self._own_dim] = obs
        else:
            self._obs[mask, : self._own_dim] = obs[mask]
        if "load" in self.parts:
            self._obs[mask, self._where["load"]] = self.arms.load[mask]
        self.extend_observation(mask)
        for camera, pixels in self._pixels.items() if mask.any() else ():
            pixels[mask] = self._current_images(camera, np.flatnonzero(mask), self.image_size)

    def _final_observation(self, finished: np.ndarray) -> np.ndarray:
        """info["final_obs"], a row per environment; with pixels an object array of dicts, as Gymnasium has it."""
        obs = self.observation
        if not self.observe_pixels:
            return obs
        rows = np.full(self.num_envs, None)
        for i in np.flatnonzero(finished):
            rows[i] = _one_observation(obs, i)
        return rows

    def _info(self, scene: Any, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """The info of a step with these results; without results, of episodes that have just begun."""
        results = self.blank_results() if results is None else results
        if self.observe_pixels:
            results = {**results, "full_observation": self.full_observation}
        return {**self.describe(scene), **results}

    def _restart(self, mask: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Start the next episodes of the environments in mask; returns info with theirs in place of the last ones'."""
        self._start_episodes(np.flatnonzero(mask))

        def merge(now: Any, new: Any) -> Any:
            if isinstance(now, dict):
                return {key: merge(value, new[key]) for key, value in now.items()}
            return np.where(mask.reshape(-1, *[1] * (now.ndim - 1)), new, now)

        return merge(info, self._info(self.scene()))


def set_generator(rng: np.random.Generator, state: Any) -> None:
    """Go on with a random generator from its bit generator's state. Raises SO101Error for any other value."""
    try:
        rng.bit_generator.state = state
        # NumPy converts numbers of other types, ignores what it does not know, and takes any increment and flag
        same = repr(rng.bit_generator.state) == repr(state)
        if not same or state["state"]["inc"] % 2 == 0 or state["has_uint32"] not in (0, 1):
            raise ValueError("other values than it can have")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SO101Error(f"state of the environments: not the state of a generator ({error})") from error


def episode_steps(env: gym.Env, own: int) -> int:
    """Control steps until the episode that starts now is truncated; to be called in env.reset.

    It is the lowest number of the TimeLimit wrappers around env; without any, `own`. gym.make gives its
    max_episode_steps to such a wrapper only, and hides it from the environment. But the wrapper calls reset, so it is
    among the callers.
    """
    limits, frame = [], sys._getframe()
    while frame := frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, TimeLimit) and caller.unwrapped is env:
            limits.append(caller._max_episode_steps)
    return min(limits, default=own)


class ArmEnv(gym.Env):
    """One arm: the vector environment of a task with a batch of one, which gives the same numbers.

    A subclass sets `vector_env`. Within Gymnasium's TimeLimit, which gym.make adds, the number of that wrapper is the
    vector environment's max_episode_steps from the next reset on. render_mode "human" opens MuJoCo's passive viewer
    and runs in real time. info is that of the vector environment, as plain floats, ints and bools, with the same keys
    in every step and from reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": CONTROL_HZ}
    vector_env: type[ArmVectorEnv]

    def __init__(self, *args: Any, render_mode: str | None = None, **kwargs: Any):
        require(render_mode in (None, *self.metadata["render_modes"]), "render_mode", render_mode, "human or rgb_array")
        require("num_envs" not in kwargs, "num_envs", kwargs.get("num_envs"), "left to the vector environment")
        self.render_mode = render_mode
        self._envs = self.vector_env(
            1,
            *args,
            render_mode="rgb_array" if render_mode == "rgb_array" else None,
            num_threads=1,
            autoreset_mode=AutoresetMode.DISABLED,
            **kwargs,
        )
        self._own_steps = self._envs.max_episode_steps
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._data = mujoco.MjData(self._envs.model)
        self._viewer: Viewer | None = None
        if render_mode == "human":
            check_display()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; returns the observation and info. options {"qpos": (nq,)} as in the vector environment."""
        super().reset(seed=seed)
        self._envs.max_episode_steps = episode_steps(self, self._own_steps)
        self._envs._rngs[0] = self.np_random  # one generator, so that env.np_random is the one in use
        qpos = (options or {}).get("qpos")
        obs, info = self._envs.reset(options=None if qpos is None else {"qpos": np.asarray(qpos)[None]})
        if self.render_mode == "human":
            self.render()
        return _one_observation(obs), _first(info)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One control step with an action (6,)."""
        obs, value, terminated, truncated, info = self._envs.step(np.asarray(action)[None])
        if self.render_mode == "human":
            self.render()
        return _one_observation(obs), float(value[0]), bool(terminated[0]), bool(truncated[0]), _first(info)

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene, with nominal parameters."""
        return self._envs.model

    @property
    def data(self) -> mujoco.MjData:
        """Copy of the simulation's present state, always in the same object. To set a state, see reset."""
        return self._envs.arms.batch.get_data(0, self._data)

    def render(self) -> np.ndarray | None:
        """An RGB frame (height, width, 3) uint8 in mode rgb_array; mode human updates the viewer."""
        if self.render_mode == "rgb_array":
            return self._envs.render()[0]
        if self.render_mode == "human":
            if self._viewer is None:
                self._viewer = Viewer(self._envs.model, self._envs.camera_name)
            self._viewer.show(self._envs.qpos[0])
        return None

    def close(self) -> None:
        """Close the viewer and the simulation."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        self._envs.close()


def _one_observation(obs: Any, i: int = 0) -> Any:
    """The observation of one environment."""
    return {key: array[i] for key, array in obs.items()} if isinstance(obs, dict) else obs[i]


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """Environment 0 of a dict of arrays (N, ...), numbers as plain Python values."""
    first = {key: _first(value) if isinstance(value, dict) else value[0] for key, value in info.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in first.items()}
