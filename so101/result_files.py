"""Results of evaluations in files: of eval_so101.py --json, of lerobot-eval, and of whole sweeps."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from so101.files import check_file, is_file, sha256
from so101_sim.errors import SO101Error, strict_json

NOT_RECORDED = "not recorded"
# settings that belong to a policy or its training: the episodes are the same with any of them
OF_THE_POLICY = {"alpha", "act_scale", "residual_penalty", "arrival_yaw_weight", "observe_load"}


@dataclasses.dataclass
class Policy:
    """The evaluations of a policy: n runs on the same m episodes."""

    name: str
    rates: np.ndarray  # (n,) success rate of each run
    episodes: int  # m
    outcomes: np.ndarray  # (n, m) success
    seeds: list[Any] | None  # one per episode, if known
    starts: list[Any] | None  # one per episode, if known
    settings: dict[str, Any] | None  # the task's, if known
    training_seeds: list[int] | None  # one per run, if known
    sources: list[dict[str, str]]  # what is known about each file


def get(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """A value of a JSON file, if it is of this kind. Raises ValueError, naming what it is."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{what} is missing or of a wrong type")
    return value


def success_of(values: Any) -> np.ndarray:
    """Successes (m,) as booleans. LeRobot's environments may give 0.0 and 1.0. Raises ValueError for anything else."""
    if not get(values, list, "the list of episodes"):
        raise ValueError("has no episodes")
    if bad := [each for each in values if not isinstance(each, bool | int | float) or each not in (0, 1)]:
        raise ValueError(f"the success of an episode is {str(bad[0])[:40]!r} instead of true or false")
    return np.array(values, dtype=bool)


def check_rate(stated: Any, success: np.ndarray, percent: int) -> None:
    """Raise ValueError if the file's own success rate, in units of 1 / percent, is not that of its episodes."""
    if not math.isclose(get(stated, (int, float), "the success rate"), percent * success.mean(), abs_tol=1e-6):
        raise ValueError(f"states a success rate of {stated / percent:.1%}, but its episodes have {success.mean():.1%}")


def commit_of(run: dict[str, Any]) -> str | None:
    """The commit in a description of so101.run_dirs; None if it is not known."""
    git = get(run.get("git", {}), dict, "git")
    return git.get("commit") and f"{git['commit']}{' with local changes' * bool(git.get('dirty'))}"


def versions_of(run: dict[str, Any]) -> str:
    """The known versions in a description of so101.run_dirs."""
    machine = get(run.get("machine", {}), dict, "machine")
    versions = {"ppo-residual-so101": run.get("version"), "python": machine.get("python")}
    versions |= get(run.get("versions", {}), dict, "versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def read_ours(content: dict[str, Any], base: bool) -> dict[str, Any]:
    """The fields of a Policy in a file of eval_so101.py --json."""
    key = "base_episode_list" if base else "episode_list"
    listed = content.get(key)
    if base and listed is None:
        raise ValueError("has no episodes of the base policy: evaluate the residual again, without --no-base")
    episodes = [get(each, dict, "an episode") for each in get(listed, list, key)]
    success = success_of([each.get("success") for each in episodes])
    summary = get(content.get("base"), dict, "base") if base else content
    check_rate(summary.get("success_rate"), success, 1)
    if not base and content.get("episodes") != len(success):
        raise ValueError(f"states {content.get('episodes')} episodes, but lists {len(success)}")
    seeds = [get(each.get("seed"), int, "the seed of an episode") for each in episodes]
    if len({*seeds}) < len(seeds):
        raise ValueError("lists an episode twice: two of its seeds are equal")
    starts = [{name: value for name, value in each.items() if name.startswith("initial_")} for each in episodes]
    run = get(content.get("provenance", {}), dict, "provenance")
    sources = {
        "written by": "eval_so101.py",
        "command": run.get("command"),
        "commit": commit_of(run),
        "versions": versions_of(run),
        "base policy": content.get("base_policy"),
        "task": json.dumps(content.get("task")) if content.get("task") else None,
    }
    if content.get("model") and not base:
        sources |= {"model": content["model"], "SHA-256 of the model": content.get("model_sha256")}
    return {
        "rates": np.array([success.mean()]), "episodes": len(success), "outcomes": success[None],
        "seeds": seeds, "starts": starts,
        "settings": get(content.get("task", {}), dict, "task"), "sources": sources,
        "training_seeds": None if base else seeds_of_training([content.get("training_seed")]),
    }  # fmt: skip


def read_lerobot(content: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """The fields of a Policy in lerobot-eval's eval_info.json, or in the result of its eval_policy for one task."""
    seeds: list[Any] | None = None
    if "per_task" in content:
        values, names, seeds = [], [], []
        for task in get(content["per_task"], list, "per_task"):
            name = f"{get(task, dict, 'a task').get('task_group')}, task {task.get('task_id')}"
            done = get(get(task.get("metrics"), dict, "metrics").get("successes"), list, "successes")
            names.append(name)
            values += done
            seeds += [(name, i) for i in range(len(done))]
        total = get(content.get("overall"), dict, "overall")
        seeds = [(seed + i if len(names) == 1 else (name, seed + i)) for name, i in seeds] if seed is not None else None
    else:
        listed = [get(each, dict, "an episode") for each in get(content["per_episode"], list, "per_episode")]
        values, names = [each.get("success") for each in listed], []
        total = get(content.get("aggregated"), dict, "aggregated")
        if listed and all(isinstance(each.get("seed"), int) for each in listed):
            seeds = [each["seed"] for each in listed]
    success = success_of(values)
    check_rate(total.get("pc_success"), success, 100)
    if total.get("n_episodes", len(success)) != len(success):
        raise ValueError(f"states {total['n_episodes']} episodes, but lists {len(success)}")
    sources = {
        "written by": "lerobot-eval", "command": None, "commit": None, "versions": None, "model": None,
        "task": "; ".join(names), "seed": None if seed is None else f"{seed}, as stated by --lerobot-seed",
    }  # fmt: skip
    return {
        "rates": np.array([success.mean()]), "episodes": len(success), "outcomes": success[None], "seeds": seeds,
        "starts": None, "settings": None, "training_seeds": None, "sources": sources,
    }  # fmt: skip


def seeds_of_training(given: list[Any]) -> list[int] | None:
    """The training seeds of runs; None if one is not recorded. Raises ValueError for what is not a seed."""
    return None if None in given else [get(seed, int, "a training seed") for seed in given]


def read_sweep(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Policy in a results.json of benchmark/report.py."""
    rows = [get(each, dict, "a seed") for each in get(content["seeds"], list, "seeds")]
    rates = np.array([get(row.get("final_success"), (int, float), "final_success") for row in rows])
    if not len(rates) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("has no success rates from 0 to 1")
    episodes = get(content.get("episodes"), int, "episodes")
    if not 1 <= episodes <= 10**9:
        raise ValueError(f"states {episodes} episodes")
    texts = [row.get("final_outcomes") for row in rows]
    if any(not isinstance(text, str) or len(text) != episodes or {*text} - {*"01"} for text in texts):
        raise ValueError(f"final_outcomes must have {episodes} digits, 0 or 1, for each seed")
    outcomes = np.array([[digit == "1" for digit in text] for text in texts])
    for rate, row in zip(rates, outcomes):
        check_rate(float(rate), row, 1)
    commits = ", ".join(map(str, get(content.get("commits", []), list, "commits")))
    sources = {
        "written by": "benchmark/report.py", "command": content.get("command"), "commit": commits,
        "versions": content.get("version") and f"ppo-residual-so101 {content['version']}",
        "training seeds": " ".join(str(row.get("seed")) for row in rows),
    }  # fmt: skip
    return {
        "rates": rates, "episodes": episodes, "outcomes": outcomes, "seeds": None, "starts": None, "settings": None,
        "training_seeds": seeds_of_training([row.get("seed") for row in rows]), "sources": sources,
    }  # fmt: skip


def read_file(path: str, base: bool, seed: int | None) -> dict[str, Any]:
    """The fields of a Policy in a file of any of the three kinds. Raises SO101Error, naming the file."""
    check_file(path, "--results")
    try:
        content = strict_json(Path(path).read_text())
        if isinstance(content, dict) and "episode_list" in content:
            fields = read_ours(content, base)
        elif isinstance(content, dict) and base:
            raise ValueError("--base needs a file of eval_so101.py --json, which lists the base policy's episodes")
        elif isinstance(content, dict) and ("per_task" in content or "per_episode" in content):
            fields = read_lerobot(content, seed)
        elif isinstance(content, dict) and "seeds" in content:
            fields = read_sweep(content)
        else:
            raise ValueError("is not a result of eval_so101.py --json, lerobot-eval or benchmark/report.py")
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        reason = f"is not readable JSON ({error})" if isinstance(error, json.JSONDecodeError | UnicodeError) else error
        raise SO101Error(f"--results: {path}: {reason}; evaluate again or name another file") from error
    known = {name: str(value) if value else NOT_RECORDED for name, value in fields["sources"].items()}
    return fields | {"sources": {"file": path, "SHA-256": sha256(path), **known}}


def read_policy(name: str, pattern: str, base: bool, seed: int | None) -> Policy:
    """All runs of a policy. Raises SO101Error if there are none, or if they had different episodes."""
    paths = [pattern] if is_file(pattern) else sorted(glob.glob(pattern), key=natural)
    if not paths:
        raise SO101Error(f"--results {name}={pattern}: no such file")
    runs = [read_file(path, base, seed) for path in paths]
    first = runs[0]
    for path, run in zip(paths[1:], runs[1:]):
        if len(run["rates"]) > 1 or len(first["rates"]) > 1:
            raise SO101Error(f"--results: {path}: is a whole sweep; give it a NAME of its own")
        if reason := episodes_differ(Policy(name, **first), Policy(name, **run)):
            raise SO101Error(
                f"--results: {paths[0]} and {path} are not runs on the same episodes ({reason}); give them two names"
            )
    outcomes = np.concatenate([run["outcomes"] for run in runs])
    trained = [seed for run in runs for seed in run["training_seeds"] or [None]]
    fields = {"rates": outcomes.mean(1), "outcomes": outcomes, "sources": [run["sources"] for run in runs]}
    fields["training_seeds"] = None if None in trained or len({*trained}) < len(trained) else trained
    return Policy(**{"name": name, **first, **fields})


def natural(path: str) -> list[Any]:
    """A key that sorts seed_2 before seed_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def episodes_differ(one: Policy, other: Policy) -> str:
    """Why the episodes of two policies are not known to be the same; "" if they are."""
    mine, theirs = one.settings or {}, other.settings or {}
    for name in sorted(({*mine} & {*theirs}) - OF_THE_POLICY):
        if mine[name] != theirs[name]:
            return f"{name} is {mine[name]} and {theirs[name]}"
    if one.episodes != other.episodes:
        return f"{one.episodes} and {other.episodes} episodes"
    if one.seeds is None or other.seeds is None:
        return "the seeds of the episodes are not recorded; of lerobot-eval, give --lerobot-seed"
    if one.seeds != other.seeds:
        return "the seeds of the episodes differ"
    if one.starts and other.starts and one.starts != other.starts:
        return "the same seeds start in different states"
    return ""
