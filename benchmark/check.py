"""Check a published result: train its command on fresh seeds and compare the mean success.

    python benchmark/check.py --list
    python benchmark/check.py --row standard_50k --seeds 5

The same seed gives other weights on another processor, so only means over seeds can be compared. The exit code is 0 if
the mean of the fresh seeds agrees with the published seeds, 1 if not, and 2 for a user error.
benchmark/ppo_residual_so101.sh trains and evaluates, JOBS processes at a time; an interrupted check continues.
"""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import report
import tyro
from scipy.stats import t

from so101.checkpoints import load_script
from so101.cli import check_unused, flat_settings, parse, run_script, training_command
from so101.files import is_file
from so101.stats import rate_interval
from so101.trust import FILES, Trust
from so101_env import SO101Error

ROOT = report.ROOT


@dataclasses.dataclass
class Args:
    row: str | None = None
    """published row: the name of a directory in benchmark/results"""
    seeds: int = 5
    """number of fresh seeds"""
    first_seed: int = 301
    """the first of them; none may be a published seed of the row"""
    list: bool = False
    """list the rows with the time per seed, and why some cannot be checked"""
    results: str = str(ROOT / "benchmark" / "results")
    """directory of the rows"""
    runs: str = str(ROOT / "logs" / "check")
    """directory of the runs, with one directory per row; finished seeds in it are not trained again"""
    trust: Trust = dataclasses.field(default_factory=Trust)


def prediction_interval(values: np.ndarray, count: int, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Interval in which the mean of `count` fresh seeds lies with 95 % probability if nothing has changed.

    Student's prediction interval: mean +- t(n - 1) s sqrt(1/n + 1/count), within 0 and 1. The root contains the
    uncertainty of both means. It assumes independent seeds whose mean is about normal. Near 1.0, where a few seeds can
    be equal by chance, s is at least the standard deviation of a single evaluation.

    Resampled from the committed rows, 3, 5 and 10 fresh seeds: rows of ten seeds or more contain 92 to 97 % of the
    means. Rows of five contain fewer, mostly 90 to 95 %, and 77 to 85 % if four of the five are at 1.0: a disagreement
    with such a row is weak evidence. Of two alternatives on the same rows, a logit scale contained more for five seeds
    but was three to eight times as wide there, and an arcsine scale was about the same.

    Args:
        values: success rates of the published seeds, (..., n), n >= 2.
        count: number of fresh seeds.
        episodes: episodes per success rate.

    Returns:
        Lower and upper bound, each (...,).
    """
    n = values.shape[-1]
    mean = values.mean(-1)
    rate = (mean * n * episodes + 0.5) / (n * episodes + 1)  # not 1.0, however many episodes succeeded
    variance = np.maximum(values.var(-1, ddof=1), rate * (1 - rate) / episodes)
    half = t.ppf(0.975, n - 1) * np.sqrt(variance * (1 / n + 1 / count))
    return np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)


def read_row(path: Path) -> tuple[dict[int, float], int, float, list[str]]:
    """Success by seed, episodes, minutes per seed and words of the command in a results.json of a sweep.

    Raises SO101Error if it is not one.
    """
    try:
        results = json.loads(path.read_text())
        success = {int(row["seed"]): float(row["final_success"]) for row in results["seeds"]}
        minutes = sum(float(row["wall_time_s"]) for row in results["seeds"]) / len(success) / 60
        known = all(isinstance(results[key], str) for key in ("command", "version")) and int(results["episodes"]) > 0
        if not known or not all(0 <= value <= 1 for value in success.values()):
            raise ValueError(results)
        return success, int(results["episodes"]), minutes, shlex.split(results["command"])
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        text = f"{path}: not the report of a seed sweep, which benchmark/report.py writes; name another row"
        raise SO101Error(text) from error


def trainer(words: list[str], seeds: int, path: Path, trust: Trust) -> tuple[types.ModuleType, str, str]:
    """The script of a row's command, the command as it would be written today, and its base policy.

    The command is data: only what today's script would write passes. It names the flags that differ from the defaults
    of its day, so one that names a default of today would train something else now.

    Raises:
        SO101Error: the command is stale, uses code or a server that the person has not allowed, or had one seed.
    """
    start = 3 if words[1:2] == ["-m"] else 2
    name = "".join(words[start - 1 : start]).removeprefix("so101.") + ".py" * (start == 3)
    stale = f"{path}: has a stale command"
    if not any((place / name).is_file() for place in (ROOT, ROOT / "so101")):
        raise SO101Error(f"{stale}: {name!r} is not a script of the project; name another row, --list shows them")
    script, output = load_script(name, path, trust), io.StringIO()
    if "base" not in {field.name for field in dataclasses.fields(script.Args)}:
        raise SO101Error(f"{path}: {name} is not a trainer that a sweep can run; name another row")
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            args = tyro.cli(script.Args, args=words[start:], config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        raise SO101Error(f"{stale}: {name} cannot read {shlex.join(words[start:])!r}; name another row") from error
    script.check_args(args)
    plain = json.loads(json.dumps(dataclasses.asdict(args)))
    command = training_command(script, report.settings({"config": {"args": plain}}))
    if sorted(shlex.split(command)) != sorted(words):
        odd = shlex.join(sorted({*words} - {*shlex.split(command)})) or shlex.join(words)
        raise SO101Error(f"{stale}: {name} would not write {odd}, its defaults were others then; name another row")
    base = flat_settings(plain)["base_policy"]
    kind, _, file = base.partition(":")
    if kind in FILES and not is_file(file):
        raise SO101Error(f"{path}: needs {file}; benchmark/README.md has the commands that make it")
    trust.resolve(base, path)
    if seeds < 2:
        raise SO101Error(f"{path}: has one seed, so nothing is known about the spread; name another row")
    return script, command, base


def train(row: str, script: types.ModuleType, command: str, seeds: range, episodes: int, runs: Path) -> list[float]:
    """Train and evaluate the seeds; returns the success rates of the final models. SO101Error: a seed failed."""
    path, directory = Path(script.__file__), (runs / row).resolve()
    variables = {
        "SCRIPT": os.path.relpath(path, ROOT), "NAME": row, "SEEDS": " ".join(map(str, seeds)), "RUNS": str(directory),
        "EPISODES": str(episodes), "OUT": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    flags = shlex.split(command)[3 if path.parent == ROOT / "so101" else 2 :]
    sweep = ["bash", str(ROOT / "benchmark" / "ppo_residual_so101.sh"), *flags]
    if subprocess.run(sweep, env={**os.environ, **variables}).returncode != 0:
        raise SO101Error(f"--row {row}: a seed failed, its line is above; the same command continues")
    results = {each: report.read_seed(directory / f"seed_{each}") for each in seeds}
    for seed, each in results.items():
        if (training_command(script, report.settings(each)), each["final"]["episodes"]) != (command, episodes):
            raise SO101Error(f"{directory}/seed_{seed}: has other flags or episodes; delete it, or name other --runs")
    return [each["final"]["success_rate"] for each in results.values()]


def describe(path: Path, trust: Trust) -> str:
    """A row in a line: its seeds and their cost, or why it cannot be checked."""
    try:
        success, _, minutes, words = read_row(path)
        trainer(words, len(success), path, trust)
        return f"{len(success)} seeds, {minutes:.1f} minutes each"
    except SO101Error as error:
        return str(error).removeprefix(f"{path}: ")


def main() -> int:
    """Check one row, or list them; returns the exit code."""
    args = parse(Args, __doc__)
    rows = {path.parent.name: path for path in sorted(Path(args.results).glob("*/results.json"))}
    if args.list:
        check_unused(args, ("row", "seeds", "first_seed", "runs"), "--list checks nothing")
        print("\n".join(f"{row:29} {describe(path, args.trust)}" for row, path in rows.items()))
        return 0
    if args.row not in rows:
        raise SO101Error(f"--row {args.row or 'is missing'}: there is no such row; --list describes {', '.join(rows)}")
    fresh = range(args.first_seed, args.first_seed + args.seeds)
    if not (1 <= args.seeds <= 1000 and 0 <= fresh.start and fresh.stop <= 2**32):
        raise SO101Error(f"--seeds {args.seeds} --first-seed {args.first_seed}: give 1 to 1000 seeds of 0 to 2**32 - 1")
    success, episodes, minutes, words = read_row(rows[args.row])
    script, command, base = trainer(words, len(success), rows[args.row], args.trust)
    if used := sorted({*fresh} & {*success}):
        raise SO101Error(f"--first-seed {args.first_seed}: {args.row} was published with seed {used[0]}; take 301")

    values = np.array([*success.values()])
    low, high = rate_interval(values, episodes)
    print(f"published: mean {values.mean():.3f} [{low:.3f}, {high:.3f}] (95 %, over seeds), {len(values)} seeds from "
          f"{min(success)} to {max(success)}, each {values.min():.3f} to {values.max():.3f}")  # fmt: skip
    print(f"training: {command}, about {minutes * args.seeds:.1f} minutes on one core, and {2 * episodes} episodes per "
          f"seed to evaluate; finished seeds stay in {args.runs}")  # fmt: skip
    needs = f"needs the policy server {base}, see docs/cameras_and_servers.md\n" * ("server:" in base)
    print(needs, end="", flush=True)
    result = train(args.row, script, command, fresh, episodes, Path(args.runs))
    low, high = prediction_interval(values, args.seeds, episodes)
    agrees = low - 1e-9 <= np.mean(result) <= high + 1e-9
    print("fresh: " + ", ".join(f"seed {seed} {value:.3f}" for seed, value in zip(fresh, result)))
    print(f"mean of the fresh seeds: {np.mean(result):.3f}; 95 % prediction interval [{low:.3f}, {high:.3f}]")
    print(f"{args.row}: the mean {'agrees' if agrees else 'does not agree'} with the published seeds."
          + " One check in twenty ends so by chance; check other seeds with --first-seed." * (not agrees))  # fmt: skip
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
