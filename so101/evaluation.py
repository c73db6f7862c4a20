"""Evaluation: one episode per seed, batched; seeds of their own for every purpose; summaries with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from so101.stats import wilson
from so101_sim.control import ACT_DIM, JOINTS
from so101_sim.geometry import wrap_angle
from so101_sim.vector import ArmVectorEnv

# Training, evaluations during training, demonstrations, and eval_so101.py never share the seed of an episode: the best
# model is chosen on the second and reported on the last.
VALIDATION_SEED, RECORD_SEED, TEST_SEED = 1_000_000_000, 1_400_000_000, 2_000_000_000
BLOCK = 1_000_000  # eval_so101.py --seed K starts K blocks further


def training_seeds(seed: int, num_envs: int) -> list[int]:
    """Seeds of the training environments of a run."""
    return [int(each) for each in np.random.SeedSequence(seed).generate_state(num_envs) % VALIDATION_SEED]


def evaluate(
    act: Callable[[Any], np.ndarray],
    envs: ArmVectorEnv,
    seeds: list[int],
    trace: bool = False,
    qpos: np.ndarray | None = None,
    done: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One episode per seed, batched; envs have DISABLED autoreset.

    Args:
        act: residuals (num_envs, 6) for the observations of envs.
        trace: keep every state as "qpos" (length + 1, nq), including the start, every observation "obs" (length, D),
            the joint targets commanded then, "command" (length, 6), rad, and "look_seed", see camera_images.
        qpos: (num_envs, nq) start positions instead of drawn ones.
        done: a list to add the episodes to. If anything is raised, it has those that were complete.

    Returns:
        A dict per seed, in order: seed, success, return, length, residual_magnitude, failure ("", "non_finite" or
        "out_of_reach"), and initial_X and final_X for each of envs.metrics. With a base policy also base_delta_rad and
        residual_delta_rad, the episode's mean absolute values per joint. With a base policy that estimates the sheet's
        pose also estimate_error_m and estimate_error_rad, means over the steps with an estimate, and estimates, the
        number of these steps. Fewer than the seeds if a person who is the base policy quits.
    """
    episodes: list[dict[str, Any]] = [] if done is None else done
    for start in range(0, len(seeds), envs.num_envs):
        chunk = seeds[start : start + envs.num_envs]
        mask = np.arange(envs.num_envs) < len(chunk)
        padded = chunk + [0] * (envs.num_envs - len(chunk))
        obs, infos = envs.reset(seed=padded, options={"reset_mask": mask, "qpos": qpos})
        initial = {f"initial_{name}": infos[name].copy() for name in envs.metrics}
        results: list[dict[str, Any]] = [{} for _ in chunk]
        running, states, observations, commands = mask.copy(), [envs.qpos], [], []
        deltas = np.zeros((2, envs.num_envs, ACT_DIM))  # sums of the joint deltas of base and residual, rad
        misses = np.zeros((3, envs.num_envs))  # sums of the estimate's errors, m and rad; number of estimates
        look_seed = envs.look_seed
        try:
            while running.any():
                if envs.base_policy is not None and envs.base_policy.quit:
                    return episodes
                action, before = act(obs), envs.qpos
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
                    seen, (x, y, yaw) = running & np.isfinite(estimate).all(1), before[:, [6, 7, 9]].T
                    off = np.hypot(estimate[:, 0] - x, estimate[:, 1] - y), wrap_angle(estimate[:, 2] - yaw)
                    misses[:, seen] += np.abs([*off, np.ones(len(seen))])[:, seen]
                for i in np.flatnonzero(running & (terminated | truncated)):
                    running[i] = False
                    summary = {key: values[i] for key, values in infos["episode_summary"].items()}
                    result = {
                        "seed": chunk[i],
                        "success": bool(infos["is_success"][i]),
                        "return": float(summary["return"]),
                        "length": int(summary["length"]),
                        "residual_magnitude": float(summary["residual_magnitude"]),
                        "failure": next((k for k in ("non_finite", "out_of_reach") if infos[k][i]), ""),
                        **{name: float(values[i]) for name, values in initial.items()},
                        **{f"final_{name}": float(infos[name][i]) for name in envs.metrics},
                    }
                    if envs.base_policy is not None:
                        means = deltas[:, i] / result["length"]
                        result |= {"base_delta_rad": means[0].tolist(), "residual_delta_rad": means[1].tolist()}
                    if estimate is not None:
                        names, count = ("estimate_error_m", "estimate_error_rad"), max(misses[2, i], 1.0)
                        result |= {name: float(sums[i] / count) for name, sums in zip(names, misses)}
                        result["estimates"] = int(misses[2, i])
                    if trace:
                        trajectories = {"qpos": states, "obs": observations, "command": commands}
                        result |= {key: np.array([row[i] for row in rows]) for key, rows in trajectories.items()}
                        result["look_seed"] = int(look_seed[i])
                    results[i] = result  # only now: it may be interrupted
        finally:
            episodes += [result for result in results if result]
    return episodes


def episode_mean(episodes: Iterable[dict[str, Any]], key: str) -> float:
    """Mean of a value over the episodes that have it."""
    return float(np.mean([episode[key] for episode in episodes if key in episode]))


def no_residual(obs: Any) -> np.ndarray:
    """The base policy alone: residuals (N, 6) of zero, for observations of any kind."""
    return np.zeros((len(obs["state"] if isinstance(obs, dict) else obs), ACT_DIM), np.float32)


def residual_to_base(episodes: list[dict[str, Any]]) -> dict[str, float]:
    """Ratio of the mean absolute joint deltas of residual and base, for the joints that the base moves."""
    if "base_delta_rad" not in episodes[0]:
        return {}
    base, residual = (
        np.average([e[key] for e in episodes], axis=0, weights=[e["length"] for e in episodes])
        for key in ("base_delta_rad", "residual_delta_rad")
    )
    return {joint: float(r / b) for joint, b, r in zip(JOINTS, base, residual) if b > 1e-9}


def summarize(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over episodes, and the success rate's Wilson 95 % interval."""
    successes, weights = sum(e["success"] for e in episodes), [max(e.get("estimates", 1), 1) for e in episodes]
    final = [name for name in episodes[0] if name.startswith("final_")]
    estimates = [name for name in ("estimate_error_m", "estimate_error_rad") if name in episodes[0]]
    return {
        "success_rate": successes / len(episodes),
        "success_ci95": wilson(successes / len(episodes), len(episodes)),
        "mean_return": episode_mean(episodes, "return"),
        "mean_length": episode_mean(episodes, "length"),
        **{f"mean_{name}": episode_mean(episodes, name) for name in final},
        "mean_residual_magnitude": episode_mean(episodes, "residual_magnitude"),
        "failures": {kind: sum(e["failure"] == kind for e in episodes) for kind in ("non_finite", "out_of_reach")},
        **{f"mean_{name}": float(np.average([e[name] for e in episodes], weights=weights)) for name in estimates},
    }
