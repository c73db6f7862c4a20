"""Report on evaluations: success rates with intervals, comparisons, and where the numbers come from, as one page.

    python -m so101.report --results act=act.json residual=residual.json --out report
    python -m so101.report --results act=act/eval_info.json residual=residual/eval_info.json --lerobot-seed 1000
    python -m so101.report --results 'ppo=logs/benchmark/standard_50k/seed_*/final_model.json'
    python -m so101.report --results residual=result.json --base

A file is of eval_so101.py --json, of lerobot-eval (eval_info.json), or a results.json in benchmark/results. Several
files of one name are training runs of one policy. The first policy is the one that all others are compared with.
docs/evaluation.md explains the numbers.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from so101 import stats
from so101.cli import check_output, check_unused, command_line, parse, run_script
from so101.files import write_atomic, write_json
from so101.result_files import NOT_RECORDED, Policy, commit_of, episodes_differ, read_policy, versions_of
from so101.run_dirs import describe_run
from so101_env import SO101Error

FORMAT = "so101 report 1"
FILES = ("report.json", "report.md", "report.png")
LEVEL = 0.05  # level of significance
CODE_CHARACTERS = 4000  # longest text that is taken from a file


@dataclasses.dataclass
class Args:
    results: tuple[str, ...]
    """NAME=FILE for each policy; FILE may be a pattern, in quotation marks, of several training runs"""
    out: str = "report"
    """directory to write report.md, report.png and report.json into"""
    base: bool = False
    """also report the base policy alone, whose episodes the first policy's files contain"""
    lerobot_seed: int | None = None
    """--seed of lerobot-eval, which its files do not contain: without it they are not compared episode by episode"""


# ---------------------------------------------------------------------------------------------------------------------
# the numbers


def read_policies(args: Args) -> list[Policy]:
    """All policies in the order of the command line. Raises SO101Error for names and files that are given twice."""
    policies: list[Policy] = []
    for each in args.results:
        name, _, pattern = each.partition("=")
        if not pattern or not re.fullmatch(r"[\w.+ -]{1,40}", name) or not name.strip():
            raise SO101Error(f"--results {each}: write NAME=FILE, with a name of letters, digits, spaces and . + - _")
        if name in [policy.name for policy in policies]:
            raise SO101Error(f"--results: the name {name} is given twice; rename one")
        policies.append(read_policy(name, pattern, False, args.lerobot_seed))
    if not policies:
        raise SO101Error("--results: give at least one NAME=FILE")
    if not any("--lerobot-seed" in str(source.get("seed")) for policy in policies for source in policy.sources):
        check_unused(args, ["lerobot_seed"], "none of --results is of lerobot-eval, whose seed it states")
    seen: dict[str, str] = {}
    for source in (source for policy in policies for source in policy.sources):
        if other := seen.get(source["SHA-256"]):
            raise SO101Error(f"--results: {source['file']} and {other} are the same result; drop one")
        seen[source["SHA-256"]] = source["file"]
    if args.base:
        alone = read_policy("base alone", args.results[0].partition("=")[2], True, args.lerobot_seed)
        if (alone.outcomes != alone.outcomes[0]).any():
            raise SO101Error(f"--base: the runs of {policies[0].name} have different base policies; drop --base")
        if "base alone" in [policy.name for policy in policies]:
            raise SO101Error("--base: the name base alone is taken by --results; rename it there")
        one = {"rates": alone.rates[:1], "outcomes": alone.outcomes[:1], "sources": alone.sources[:1]}
        policies.insert(0, dataclasses.replace(alone, **one))
    return policies


def describe(policy: Policy) -> dict[str, Any]:
    """The numbers of a policy, for report.json."""
    rates = policy.rates
    return {
        "name": policy.name,
        "runs": len(rates),
        "episodes_per_run": policy.episodes,
        "successes": round(float(rates.sum()) * policy.episodes),
        "success_rate": float(rates.mean()),
        "success_ci95": stats.rate_interval(rates, policy.episodes, policy.outcomes),
        "success_by_run": rates.tolist(),
        "worst_run": float(rates.min()),
        "interquartile_mean": float(stats.interquartile_mean(rates)) if len(rates) > 1 else None,
        "interquartile_mean_ci95": [*map(float, stats.bootstrap_interval(rates))] if len(rates) >= stats.MANY else None,
        "episode_seeds": policy.seeds,
        "sources": policy.sources,
    }


def common_seeds(one: Policy, other: Policy) -> list[int]:
    """The training seeds by which two policies can be paired: all of the one with fewer runs; else none.

    None either if all differences are equal, because then the spread is unknown.
    """
    mine, theirs = (dict(zip(each.training_seeds or [], each.rates)) for each in (one, other))
    common = sorted(mine.keys() & theirs.keys())
    whole = len(common) > 1 and len(common) == min(len(mine), len(theirs))
    return common if whole and np.ptp([theirs[seed] - mine[seed] for seed in common]) > 1e-9 else []


def compare(one: Policy, other: Policy) -> dict[str, Any]:
    """The numbers of a comparison, for report.json; differences are other - one."""
    rates = [float(policy.rates.mean()) for policy in (one, other)]
    runs, reason = (len(one.rates), len(other.rates)), episodes_differ(one, other)
    result: dict[str, Any] = {"first": one.name, "second": other.name, "paired": not reason, "not_paired": reason}
    correlation, table = 0.0, None
    result["training_seeds"] = seeds = common_seeds(one, other)
    if seeds:
        pairs = [each.rates[[each.training_seeds.index(seed) for seed in seeds]] for each in (one, other)]
        rates = [float(each.mean()) for each in pairs]
        _, bounds, p_value = stats.paired_difference(*pairs)
        test = "paired t test"
    elif max(runs) > 1:
        variances = [stats.rate_variance(each.rates, each.episodes, each.outcomes) for each in (one, other)]
        p_value, bounds = stats.welch(rates[1] - rates[0], (variances[0], variances[1]), runs)
        test = "Welch's t test"
    else:
        if reason:
            counts = [round(rate * each.episodes) for rate, each in zip(rates, (one, other))]
            p_value = stats.fisher((counts[0], counts[1]), (one.episodes, other.episodes))
            test = "Fisher's exact test"
        else:
            a, b = one.outcomes[0], other.outcomes[0]
            table = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
            correlation = stats.paired_correlation(table)
            test, p_value = "McNemar's exact test", stats.mcnemar(int(table[0, 1]), int(table[1, 0]))
        intervals = [stats.wilson(rate, each.episodes) for rate, each in zip(rates, (one, other))]
        bounds = stats.difference_interval(rates[0], intervals[0], rates[1], intervals[1], correlation)
    result |= {
        "table": None if table is None else table.tolist(),
        "difference": rates[1] - rates[0],
        "difference_ci95": bounds,
        "test": test,
        "p_value": p_value,
    }
    if min(runs) > 1:
        result["probability_of_improvement"] = stats.probability_of_improvement(one.rates, other.rates)
        many = min(runs) >= stats.MANY
        result["probability_of_improvement_ci95"] = stats.improvement_interval(one.rates, other.rates) if many else None
    return result


def evaluate(policies: list[Policy]) -> dict[str, Any]:
    """All numbers of the report."""
    comparisons = [compare(policies[0], other) for other in policies[1:]]
    for each, corrected in zip(comparisons, stats.holm([each["p_value"] for each in comparisons])):
        each |= {"p_holm": corrected, "significant": corrected < LEVEL}
    return {"policies": [describe(policy) for policy in policies], "comparisons": comparisons}


# ---------------------------------------------------------------------------------------------------------------------
# the page


def percent(rate: float, bounds: list[float] | None = None) -> str:
    """A rate, with its interval in brackets."""
    return f"{100 * rate:.1f} %" + (f" [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]" if bounds else "")


def points(difference: float, bounds: list[float] | None = None) -> str:
    """A difference of rates in percentage points, with its interval in brackets."""
    return f"{100 * difference:+.1f}" + (f" [{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else "")


def p_text(value: float) -> str:
    """A p value."""
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def code(text: str) -> str:
    """A text from a file or the command line, which Markdown shows as it is, on one line."""
    plain = "".join(each if each.isprintable() else " " for each in text).replace("`", "'")
    return f"`{plain[:CODE_CHARACTERS]}{'...' * (len(plain) > CODE_CHARACTERS)}`"


def sentences(report: dict[str, Any]) -> list[str]:
    """What was found, in words."""
    found = []
    for each in report["policies"]:
        runs, count = each["runs"], each["episodes_per_run"]
        text = f"**{each['name']}** succeeds in {percent(each['success_rate'])} of {count} episodes"
        if runs > 1:
            text += f", as the mean of {runs} training runs. The worst run has {percent(each['worst_run'])}"
        low, high = each["success_ci95"]
        found.append(f"{text}. The 95 % interval is {100 * low:.1f} to {100 * high:.1f} %.")
    for each in report["comparisons"]:
        one, other, gap = each["first"], each["second"], each["difference"]
        low, high = (100 * bound for bound in each["difference_ci95"])
        interval, p_value = f"The 95 % interval is {low:+.1f} to {high:+.1f} points", p_text(each["p_holm"])
        if each["significant"]:
            more = "more" if gap > 0 else "less"
            text = f"**{other}** succeeds {more} often than **{one}**: {points(gap)} percentage points. {interval}"
        else:
            text = f"No difference is shown between **{other}** and **{one}**: {points(gap)} points. {interval}"
        word = "corrected p" if len(report["comparisons"]) > 1 else "p"
        found.append(f"{text}, {word} {'' if p_value.startswith('<') else '= '}{p_value}.")
    return found


def how_compared(each: dict[str, Any], policies: dict[str, dict[str, Any]]) -> list[str]:
    """The details of a comparison."""
    one, other = each["first"], each["second"]
    runs = max(policies[one]["runs"], policies[other]["runs"])
    lines = [f"### {other} and {one}", ""]
    if each["table"]:
        (a, b), (c, d) = each["table"]
        lines += [
            f"Both had the same {a + b + c + d} episodes:", "",
            f"| | {other} succeeds | {other} fails |", "|---|---|---|",
            f"| {one} succeeds | {a} | {b} |", f"| {one} fails | {c} | {d} |", "",
            f"McNemar's test only looks at the {b + c} episodes in which one of the two succeeds.",
        ]  # fmt: skip
    elif each["test"] == "paired t test":
        seeds = " ".join(map(str, each["training_seeds"]))
        lines += [f"Compared on the training seeds that both have, {seeds}: the mean of their differences."]
    elif runs > 1:
        lines += ["The test looks at the means of the training runs, and at how much the runs of a policy differ."]
    else:
        lines += ["The comparison is unpaired, as if each policy had episodes of its own. Pairs need fewer episodes."]
    single = [name for name in (one, other) if policies[name]["runs"] == 1]
    if len(single) == 1:
        lines += [
            "",
            f"{single[0]} is a single model. The comparison is about this model, not about how it was trained.",
        ]
    if each["not_paired"]:
        lines += ["", f"The episodes are not known to be the same: {code(each['not_paired'])}."]
    if "probability_of_improvement" in each:
        chance = percent(each["probability_of_improvement"], each["probability_of_improvement_ci95"])
        lines += ["", f"Probability of improvement: {chance}. In this share of all pairs of runs, {other} is better."]
    return [*lines, ""]


def markdown(report: dict[str, Any]) -> str:
    """The content of report.md."""
    policies = {each["name"]: each for each in report["policies"]}
    lines = ["# Evaluation report", "", "## What was found", "", *(f"- {each}" for each in sentences(report)), ""]
    lines += ["![success rates and differences](report.png)", "", "## Success, with 95 % intervals", ""]
    titles = "policy", "runs", "episodes per run", "successes", "success rate", "worst run", "interquartile mean"
    lines += [f"| {' | '.join(titles)} |", "|---|---|---|---|---|---|---|"]
    for name, each in policies.items():
        middle = each["interquartile_mean"]
        of_runs = ["-", "-"]
        if each["runs"] > 1:
            of_runs = [percent(each["worst_run"]), percent(middle, each["interquartile_mean_ci95"])]
        cells = [name, each["runs"], each["episodes_per_run"], each["successes"]]
        cells += [percent(each["success_rate"], each["success_ci95"]), *of_runs]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [""]
    if any(each["runs"] == 1 for each in policies.values()):
        lines += [
            "The interval of a single run contains the choice of the episodes, not that of the training seed.",
            "",
        ]
    if report["comparisons"]:
        lines += ["## Comparisons", ""]
        lines += ["| policy | compared with | points, 95 % interval | test | p | p, corrected | significant |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for each in report["comparisons"]:
            cells = [each["second"], each["first"], points(each["difference"], each["difference_ci95"]), each["test"]]
            cells += [p_text(each["p_value"]), p_text(each["p_holm"]), "yes" if each["significant"] else "no"]
            lines.append("| " + " | ".join(cells) + " |")
        count = len(report["comparisons"])
        corrected = f" after Holm's correction for {count} comparisons" * (count > 1)
        lines += [
            "",
            f"Significant: p is below {LEVEL}{corrected}. The intervals are not corrected. A difference that is not",
        ]
        lines += ["significant may still exist.", ""]
        lines += [line for each in report["comparisons"] for line in how_compared(each, policies)]
    lines += ["## Where the numbers come from", "", f"This page: {code(report['command'])}, commit"]
    lines += [f"{commit_of(report) or NOT_RECORDED}, with {versions_of(report)}.", ""]
    for name, each in policies.items():
        lines += [f"### Files of {name}", "", f"Seeds of the episodes: {seeds_text(each['episode_seeds'])}.", ""]
        for source in each["sources"]:
            shown = {key: value if value == NOT_RECORDED else code(value) for key, value in source.items()}
            lines += [f"{'-' if key == 'file' else '  -'} {key}: {value}" for key, value in shown.items()]
        lines += [""]
    return "\n".join(lines)


def seeds_text(seeds: list[Any] | None) -> str:
    """The seeds of the episodes in words."""
    if seeds is None:
        return NOT_RECORDED
    if all(isinstance(seed, int) for seed in seeds) and seeds == [*range(seeds[0], seeds[0] + len(seeds))]:
        return f"{seeds[0]} to {seeds[-1]}"
    return f"{len(seeds)}, listed in report.json"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the success rates, each run as a small dot, and the differences from the first policy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies, pairs = report["policies"], report["comparisons"]
    size = (10 if pairs else 6, 1.4 + 0.5 * len(policies))
    figure, axes = plt.subplots(1, 2 if pairs else 1, figsize=size, layout="constrained", squeeze=False)
    panels = [(axes[0, 0], policies, "success_rate", "success_ci95", "success rate in %, 95 % interval", "name")]
    if pairs:
        label = f"percentage points more than {pairs[0]['first']}"
        panels.append((axes[0, 1], pairs, "difference", "difference_ci95", label, "second"))
        axes[0, 1].axvline(0, color="gray", linewidth=1)
    for axis, rows, key, bounds, label, name in panels:
        for place, row in enumerate(rows):
            low, high = (100 * bound for bound in row[bounds])
            axis.plot([low, high], [place, place], color="tab:blue", linewidth=2)
            axis.plot(100 * row[key], place, "o", color="tab:blue", markersize=7)
            if row.get("runs", 1) > 1:
                values = 100 * np.array(row["success_by_run"])
                axis.plot(values, np.full(len(values), place + 0.22), "|", color="tab:orange", markersize=7)
        axis.set_yticks(range(len(rows)), [row[name] for row in rows], parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel(label, parse_math=False)
        axis.grid(axis="x", alpha=0.3)
    if any(each["runs"] > 1 for each in policies):
        axes[0, 0].set_title("orange: single training runs", fontsize=9)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)


def check_out(path: str) -> Path:
    """The directory for the report. Raises SO101Error if it would replace a file that is not of an older report."""
    check_output("--out", path)
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise SO101Error(f"--out {path}: is not a directory; name another one")
    present = [name for name in FILES if (out / name).exists() or (out / name).is_symlink()]
    if present:
        try:
            ours = (out / FILES[0]).is_file() and json.loads((out / FILES[0]).read_text()).get("format") == FORMAT
        except (OSError, ValueError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise SO101Error(f"--out {path}: contains {present[0]}, which is not of a report; name another directory")
    return out


def main() -> int:
    """Read the results and write the report; returns the exit code."""
    args = parse(Args, __doc__)
    out = check_out(args.out)
    policies = read_policies(args)
    run = describe_run("so101.report", args)
    report = {"format": FORMAT, "command": command_line("so101.report"), **run, **evaluate(policies)}
    out.mkdir(exist_ok=True)
    write_json(out / FILES[0], report)
    write_atomic(out / FILES[1], lambda temporary: temporary.write_text(markdown(report)))
    write_atomic(out / FILES[2], lambda temporary: plot(report, temporary))
    print(*sentences(report), f"Report: {out / FILES[1]}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
