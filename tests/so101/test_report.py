"""python -m so101.report: what it reads, what it compares, and that page and JSON have the same numbers."""

import json
import os
import re
import shutil
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT, error_of, module_of, run_script

from so101 import stats

DATA = ROOT / "tests" / "data"
RESULTS = ROOT / "benchmark" / "results"


def ours(success, seeds=None, **changes) -> dict:
    """The content of a file of eval_so101.py --json, as far as the report reads it."""
    success = [bool(each) for each in success]
    seeds = range(len(success)) if seeds is None else seeds
    episodes = [{"seed": seed, "success": s, "initial_distance_m": float(seed)} for seed, s in zip(seeds, success)]
    content = {"task": {"tape_margin": 0.04, "alpha": 0.7}, "success_rate": np.mean(success), "episodes": len(success)}
    return {**content, "episode_list": episodes, **changes}


def lerobot(success, **total) -> dict:
    """The content of an eval_info.json."""
    tasks = [{"task_group": "g", "task_id": 0, "metrics": {"successes": success, "sum_rewards": [0.0] * len(success)}}]
    return {"per_task": tasks, "overall": {"pc_success": 100 * float(np.mean(success)), **total}}


def report(monkeypatch, *flags) -> tuple[dict, str]:
    """Run the script in this process, in the working directory; returns report.json and report.md."""
    monkeypatch.setattr(sys, "argv", ["so101.report", "--results", *flags])
    assert module_of("so101.report").main() == 0
    with open("report/report.json") as file:
        return json.load(file), open("report/report.md").read()


def numbers(*flags) -> dict:
    """What report.json would contain, without writing it."""
    script = module_of("so101.report")
    seed = int(flags[-1]) if "--lerobot-seed" in flags else None
    results = tuple(flag for flag in flags if "=" in flag)
    return script.evaluate(script.read_policies(script.Args(results, lerobot_seed=seed)))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes JSON to a file in the working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda name, content: (tmp_path / name).write_text(json.dumps(content))


def test_two_evaluations_as_a_user_makes_them(tmp_path, monkeypatch):
    """Two policies on the same episodes, and one of them against its base policy from its own file."""
    monkeypatch.chdir(tmp_path)
    for name, flags in (("pusher", "--base-policy jacobian"), ("trained", f"--model {ROOT}/assets/pretrained.pt")):
        flags = f"{flags} --tape-margin 0.02 --episodes 14 --json {name}.json"
        monkeypatch.setattr(sys, "argv", ["eval_so101.py", *flags.split()])
        assert module_of("eval_so101.py").main() == 0
    done = run_script("so101.report", "--results", "pusher=pusher.json", "trained=trained.json")
    assert done.returncode == 0, done.stderr
    files = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert {path.name for path in files} == {"report.json", "report.md", "report.png"}
    assert iio.imread(tmp_path / "report" / "report.png").std() > 10
    content, page = report(monkeypatch, "pusher=pusher.json", "trained=trained.json")  # replaces its own files
    assert files == {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    (pair,) = content["comparisons"]
    lists = [json.loads((tmp_path / f"{name}.json").read_text())["episode_list"] for name in ("pusher", "trained")]
    one, other = (np.array([episode["success"] for episode in each]) for each in lists)
    assert pair["paired"] and pair["test"] == "McNemar's exact test"
    assert pair["table"] == [[(one & other).sum(), (one & ~other).sum()], [(~one & other).sum(), (~one & ~other).sum()]]
    assert pair["difference"] == pytest.approx(other.mean() - one.mean())
    source = content["policies"][1]["sources"][0]
    assert "Seeds of the episodes: 2000000000 to 2000000013." in page
    for known in ("SHA-256", "command", "versions", "SHA-256 of the model", "task"):
        assert source[known] != "not recorded" and f"`{source[known]}`" in page
    content, _ = report(monkeypatch, "trained=trained.json", "--base")
    assert [each["name"] for each in content["policies"]] == ["base alone", "trained"]
    assert content["comparisons"][0]["table"] == [[0, 0], [other.sum(), 14 - other.sum()]]  # the base policy is at rest


def test_page_and_json_have_the_same_numbers(write, monkeypatch):
    rng = np.random.default_rng(0)
    for seed in range(12):
        write(f"seed_{seed}.json", ours(rng.random(50) < 0.9))
    write("b.json", ours(rng.random(50) < 0.6))
    write("c.json", lerobot([True] * 30 + [False] * 10))
    content, page = report(monkeypatch, "a=seed_*.json", "b=b.json", "c=c.json")
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in page.splitlines() if line.startswith("| ")]
    for each in content["policies"]:
        (row,) = [row for row in rows if row[0] == each["name"] and row[1] == str(each["runs"])]
        low, high = each["success_ci95"]
        assert row[2:4] == [str(each["episodes_per_run"]), str(each["successes"])]
        assert row[4] == f"{100 * each['success_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert row[5] == (f"{100 * each['worst_run']:.1f} %" if each["runs"] > 1 else "-")
        assert f"The 95 % interval is {100 * low:.1f} to {100 * high:.1f} %." in page
    assert [each["runs"] for each in content["policies"]] == [12, 1, 1]
    assert [source["file"] for source in content["policies"][0]["sources"]][1:3] == ["seed_1.json", "seed_2.json"]
    for each in content["comparisons"]:
        (row,) = [row for row in rows if row[:2] == [each["second"], "a"]]
        low, high = each["difference_ci95"]
        assert row[2] == f"{100 * each['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        assert row[3] == each["test"] and row[6] == ("yes" if each["significant"] else "no")
    assert page.count("is a single model. The comparison is about this model") == 2  # b and c against the runs of a
    corrected = stats.holm([each["p_value"] for each in content["comparisons"]])
    assert [each["p_holm"] for each in content["comparisons"]] == corrected
    assert content["comparisons"][0]["significant"] and corrected[0] < 0.001  # 90 % against 60 % of 50
    outcomes = np.array([
        [episode["success"] for episode in json.loads(open(f"seed_{seed}.json").read())["episode_list"]]
        for seed in range(12)
    ])  # fmt: skip
    expected = stats.rate_interval(outcomes.mean(1), 50, outcomes.astype(float))
    np.testing.assert_allclose(content["policies"][0]["success_ci95"], expected)


@pytest.mark.parametrize(
    "other, reason",
    [
        (ours([1, 0, 1, 1]), ""),
        (ours([1, 0, 1, 1], task={"tape_margin": 0.04, "alpha": 0.3}), ""),
        (ours([1, 0, 1, 1], task={"tape_margin": 0.02, "alpha": 0.7}), "tape_margin is 0.04 and 0.02"),
        (ours([1, 0, 1, 1], range(1, 5)), "seeds of the episodes differ"),
        (ours([1, 0, 1]), "4 and 3 episodes"),
        (ours([1, 0, 1], task={"tape_margin": 0.02}), "tape_margin is 0.04 and 0.02"),
        (ours([1, 0, 1, 1]) | {"episode_list": [
            {"seed": seed, "success": seed != 1, "initial_distance_m": 0.1} for seed in range(4)
        ]}, "different states"),
        (lerobot([True, False, True, True]), "not recorded"),
        ({"per_episode": [{"seed": seed, "success": seed != 1} for seed in range(4)],
          "aggregated": {"pc_success": 75.0}}, ""),
        ({"per_episode": [{"seed": None, "success": True}] * 4, "aggregated": {"pc_success": 100.0}}, "not recorded"),
    ],
)  # fmt: skip
def test_pairs_only_if_the_episodes_are_the_same(write, other, reason):
    write("a.json", ours([1, 1, 0, 0], note="another file"))
    write("b.json", other)
    (pair,) = numbers("a=a.json", "b=b.json")["comparisons"]
    assert pair["paired"] == (not reason) and reason in pair["not_paired"]
    assert pair["test"] == ("Fisher's exact test" if reason else "McNemar's exact test")
    assert (pair["table"] is None) == bool(reason)
    assert not pair["significant"]  # at best one of eight equally likely outcomes
    if not reason:
        assert pair["table"] == [[1, 1], [2, 0]]


def test_files_of_both_versions_of_lerobot(tmp_path, monkeypatch):
    """Real ones. They do not contain the seed, so the comparison is only paired if it is given."""
    monkeypatch.chdir(tmp_path)
    names = {name: DATA / f"lerobot_{name}_eval_info.json" for name in ("044", "061", "061_residual")}
    flags = [f"{name}={path}" for name, path in names.items()]
    content, page = report(monkeypatch, *flags)
    for each in content["policies"]:
        raw = json.loads(names[each["name"]].read_text())["overall"]
        assert each["success_rate"] == pytest.approx(raw["pc_success"] / 100)
        assert each["episodes_per_run"] == raw["n_episodes"] == 8
        assert each["sources"][0]["versions"] == each["sources"][0]["command"] == "not recorded"
    assert not any(each["paired"] for each in content["comparisons"]) and "Seeds of the episodes: not recorded." in page
    content, page = report(monkeypatch, *flags, "--lerobot-seed", "1000")
    assert all(each["paired"] for each in content["comparisons"]) and "1000 to 1007" in page
    assert content["policies"][0]["sources"][0]["seed"] == "1000, as stated by --lerobot-seed"


def test_several_tasks_of_lerobot_are_told_apart(write):
    def tasks(*ids):
        each = [{"task_group": "g", "task_id": i, "metrics": {"successes": [1.0, 0.0]}} for i in ids]
        return {"per_task": each, "overall": {"pc_success": 50.0, "n_episodes": 2 * len(ids)}}

    write("a.json", tasks(0, 1))
    write("b.json", tasks(0, 1) | {"note": "another file"})
    write("c.json", tasks(1, 0))
    content = numbers("a=a.json", "b=b.json", "c=c.json", "--lerobot-seed", "5")
    assert [each["paired"] for each in content["comparisons"]] == [True, False]
    assert content["policies"][0]["episode_seeds"][3] == ("g, task 1", 6)


def sweep(rates: dict[int, list[int]], **changes) -> dict:
    """The content of a results.json: successes of the held-out episodes by training seed."""
    rows = [
        {"seed": seed, "final_success": float(np.mean(each)), "final_outcomes": "".join(map(str, each))}
        for seed, each in rates.items()
    ]
    return {"seeds": rows, "episodes": len(rows[0]["final_outcomes"]), "command": "python a.py", **changes}


def test_runs_with_the_same_training_seeds_are_paired(write):
    """Whatever their order, and if one policy has more of them; else the test is Welch's."""
    rng = np.random.default_rng(0)
    outcomes = {name: {seed: list(rng.integers(0, 2, 20)) for seed in range(6)} for name in "ab"}
    write("a.json", sweep(outcomes["a"]))
    few = {seed: outcomes["b"][seed] for seed in (4, 1, 3)}
    write("b.json", sweep(few))
    for seed, each in few.items():
        write(f"run_{seed}.json", ours(each, training_seed=seed))
    write("other.json", sweep({seed + 3: each for seed, each in outcomes["b"].items()}))
    found = numbers("a=a.json", "b=b.json", "runs=run_*.json", "other=other.json")
    from scipy.stats import ttest_rel

    expected = ttest_rel(*([np.mean(outcomes[name][seed]) for seed in (1, 3, 4)] for name in "ba"))
    for each in found["comparisons"][:2]:
        assert each["test"] == "paired t test" and each["training_seeds"] == [1, 3, 4]
        assert each["p_value"] == pytest.approx(expected.pvalue)
        assert each["difference"] == pytest.approx(np.mean([np.mean(outcomes["b"][s]) for s in few])
                                                   - np.mean([np.mean(outcomes["a"][s]) for s in few]))  # fmt: skip
        assert each["difference_ci95"] == pytest.approx(list(expected.confidence_interval(0.95)))
    assert found["comparisons"][2]["test"] == "Welch's t test" and not found["comparisons"][2]["training_seeds"]
    write("better.json", sweep({seed: [1] * 20 for seed in range(6)}))
    write("best.json", sweep({seed: [1] * 20 for seed in range(6)}, command="python b.py"))
    (same,) = numbers("better=better.json", "best=best.json")["comparisons"]
    assert same["test"] == "Welch's t test" and same["p_value"] == 1.0  # equal in every seed: no spread to test by
    # the interval of a sweep contains the choice of its episodes
    rates, listed = (np.array([f(each) for each in outcomes["a"].values()]) for f in (np.mean, list))
    assert found["policies"][0]["success_ci95"] == stats.rate_interval(rates, 20, listed)


def test_published_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"{name}={RESULTS}/{name}/results.json" for name in ("standard_50k", "no_symmetry", "precise_1M")]
    content, page = report(monkeypatch, *flags)
    for each, runs in zip(content["policies"], (20, 10, 5)):
        published = json.loads((RESULTS / each["name"] / "results.json").read_text())
        assert each["runs"] == runs and each["success_rate"] == pytest.approx(published["final_success_mean"])
        assert each["interquartile_mean"] == pytest.approx(published["final_success_iqm"])
        assert each["success_ci95"] == pytest.approx(published["final_success_mean_ci95"])
        middle = published["final_success_iqm_ci95"] if runs >= 10 else None
        assert each["interquartile_mean_ci95"] == (pytest.approx(middle) if middle else None)
    first, second = (np.array(each["success_by_run"]) for each in content["policies"][:2])
    chance = np.mean([np.mean((second > rate) + (second == rate) / 2) for rate in first])
    found = content["comparisons"][0]["probability_of_improvement"]
    assert found == pytest.approx(chance) and f"Probability of improvement: {100 * found:.1f} % [" in page


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "no such file"),
        ("{", "is not readable JSON"),
        ("\x00\xff", "is not readable JSON"),
        pytest.param("[" * 100_000, "a.json", id="deep"),
        ("[]", "is not a result of"),
        ('{"rows": []}', "is not a result of"),
        (ours([1, 0]) | {"episode_list": []}, "has no episodes"),
        (ours([1, 0]) | {"episode_list": {}}, "episode_list is missing or of a wrong type"),
        (ours([1, 0]) | {"episode_list": [{"seed": 0}, {"seed": 1}]}, "the success of an episode is 'None'"),
        (ours([1, 0], success_rate=0.9), "states a success rate of 90.0%, but its episodes have 50.0%"),
        (ours([1, 0], success_rate=10**400), "a.json"),
        (ours([1, 0], success_rate=float("nan")), "contains NaN"),
        (json.dumps(ours([1, 0])).replace("{", '{"episodes": 2, ', 1), "contains 'episodes' twice"),
        (ours([1, 0], episodes=3), "states 3 episodes, but lists 2"),
        (ours([1, 0], training_seed="1"), "a training seed is missing or of a wrong type"),
        (sweep({1: [1, 0]}, episodes=3), "final_outcomes must have 3 digits, 0 or 1, for each seed"),
        (
            sweep({1: [1, 0]}) | {"seeds": [{"seed": 1, "final_success": 0.5, "final_outcomes": "1x"}]},
            "must have 2 digits",
        ),
        (sweep({1: [1, 0]}) | {"seeds": [{"seed": 1, "final_success": 1.0, "final_outcomes": "10"}]}, "states a"),
        (ours([1, 0], [7, 7]), "lists an episode twice"),
        (ours([1, 0], ["7", "8"]), "the seed of an episode"),
        (ours([1, 0], task=3), "task is missing or of a wrong type"),
        (lerobot([1.0, 0.5], pc_success=75.0), "the success of an episode is '0.5'"),
        (lerobot([1.0, 0.0], pc_success=0.5), "states a success rate of 0.5%, but its episodes have 50.0%"),
        (lerobot([True, False], n_episodes=3), "states 3 episodes, but lists 2"),
        (lerobot([float("nan"), True], pc_success=100.0), "contains NaN"),
        ({"per_task": [], "overall": {}}, "has no episodes"),
        ({"per_task": [{"metrics": {"pc_success": 50.0}}]}, "successes is missing"),
        ({"seeds": [1, 2]}, "a seed is missing or of a wrong type"),
        ({"seeds": [{"final_success": 97.0}], "episodes": 200}, "no success rates from 0 to 1"),
        ({"seeds": [{"final_success": 0.97}], "episodes": 0}, "states 0 episodes"),
    ],
)
def test_a_bad_file_is_one_line(write, monkeypatch, tmp_path, text, words):
    if isinstance(text, str):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    elif text is not None:
        write("a.json", text)
    line = error_of(monkeypatch, "so101.report", "--results", "a=a.json")
    assert words in line and "a.json" in line and "\n" not in line and not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "--results"),
        ("a.json", "write NAME=FILE"),
        ("a=", "write NAME=FILE"),
        ("=a.json", "write NAME=FILE"),
        ("a|b=a.json", "write NAME=FILE"),
        ("a=a.json a=b.json", "the name a is given twice"),
        ("a=a.json b=copy.json", "copy.json and a.json are the same result"),
        ("a=a.json b=other_*.json", "b=other_*.json: no such file"),
        ("a=[ab].json", "a.json and b.json are not runs on the same episodes (2 and 3 episodes)"),
        ("l=l[12].json", "give --lerobot-seed"),
        ("a=a.json --base", "has no episodes of the base policy"),
        ("l=l1.json --base", "--base needs a file of eval_so101.py"),
        (". a=a.json", "write NAME=FILE"),
        ("a=a.json --out a.json", "--out a.json: is not a directory"),
        ("a=a.json --out no/where", "--out no/where"),
        ("a=a.json --out taken", "--out taken: contains report.md, which is not of a report"),
        ("a=a.json --out other", "--out other: contains report.json, which is not of a report"),
    ],
)
def test_bad_flags(write, monkeypatch, tmp_path, flags, words):
    write("a.json", ours([1, 0]))
    write("b.json", ours([1, 0, 1]))
    shutil.copy("a.json", "copy.json")
    write("l1.json", lerobot([True, False]))
    write("l2.json", lerobot([False, True]))
    for name, file in (("taken", "report.md"), ("other", "report.json")):
        os.mkdir(name)
        write(f"{name}/{file}", {"mine": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = error_of(monkeypatch, "so101.report", "--results", *flags.split())
    assert words in line and "\n" not in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_texts_of_files_stay_texts(write, monkeypatch):
    """A file from a stranger cannot write headings, links or HTML into the page."""
    evil = "`x`\n# Heading\n[link](http://example.com) <script>"
    write("a.json", ours([1, 0], base_policy=evil, provenance={"command": evil}))
    write("b.json", ours([1, 1], task={"tape_margin": evil}))
    content, page = report(monkeypatch, "a=a.json", "b=b.json")
    assert content["policies"][0]["sources"][0]["command"] == evil
    assert "\n# Heading" not in page and page.count("<script>") == 4
    for line in page.splitlines():
        if "<script>" in line:  # within one pair of backticks
            assert line.count("`") == 2 and line.index("`") < line.index("<script>") < line.rindex("`")
