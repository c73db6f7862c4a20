"""Damaged and foreign policy files: noticed, and one line."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from conftest import error_of, load

from so101.checkpoints import CHECKPOINT, SCHEMAS, load_checkpoint, save_tensors
from so101_env import SO101Error


def test_flipped_bits_are_noticed(small_run, tmp_path):
    """Anywhere in the file: weights, names, the archive's own records, the checksum."""
    content, path = (small_run / "final_model.pt").read_bytes(), tmp_path / "flipped.pt"
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(content), 60), *range(len(content) - 200, len(content), 5)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(SO101Error, match=str(path)):
            load_checkpoint(path)


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


def changed(mapping: dict, *path: str, to: Any) -> dict:
    key, *rest = path
    value = changed(mapping[key], *rest, to=to) if rest else to
    return [value if i == key else item for i, item in enumerate(mapping)] if isinstance(mapping, list) else {
        **mapping, key: value
    }  # fmt: skip


def state_of(saved: dict) -> torch.Tensor:
    return saved["ranks"][0]["envs"]["arms"]["batch"]


def generator(counter: dict, **values: Any) -> Any:
    """Damage of a random generator's state: values of its counter, and of what it has kept."""

    def damage(saved: dict) -> dict:
        own = saved["ranks"][0]["envs"]["rngs"][0]
        return changed(saved, *OWN, "envs", "rngs", 0, to={**own, "state": {**own["state"], **counter}, **values})

    return damage


def moments(function: Any) -> Any:
    """Damage of a parameter's first moments."""
    return lambda s: changed(s, "optimizer", "state", 1, "exp_avg", to=function(s["optimizer"]["state"][1]["exp_avg"]))


def records(**values: Any) -> Any:
    """Damage of what is known about episodes and best models."""
    return lambda s: {**s, "recorder": {**s["recorder"], **values}}


WEIGHT, OWN = "actor_mean.0.weight", ("ranks", 0)
BEST = {"step": 64, "success_rate": 0.5, "mean_return": 1.0}
DAMAGE = {
    "no format": lambda s: without(s, "format"),
    "old format": lambda s: {**s, "format": "ppo_residual_so101 checkpoint 5"},
    "foreign": lambda s: {"model": torch.zeros(3)},
    "a list": lambda s: [1, 2],
    **{f"no {key}": lambda s, key=key: without(s, key) for key in SCHEMAS[CHECKPOINT]},
    "agent is a number": lambda s: {**s, "agent": 3},
    "a weight is text": lambda s: changed(s, "agent", WEIGHT, to="hello"),
    "a weight is NaN": lambda s: changed(s, "agent", WEIGHT, to=s["agent"][WEIGHT] * torch.nan),
    "a weight is missing": lambda s: {**s, "agent": without(s["agent"], WEIGHT)},
    "a weight has another shape": lambda s: changed(s, "agent", WEIGHT, to=torch.zeros(3, 3)),
    "unknown flag": lambda s: changed(s, "args", "ppo", to={**s["args"]["ppo"], "magic": 1}),
    "missing flag": lambda s: changed(s, "args", "ppo", to=without(s["args"]["ppo"], "gamma")),
    "missing group": lambda s: {**s, "args": without(s["args"], "task")},
    "absurd flag": lambda s: changed(s, "args", "networks", "hidden_size", to=10**9),
    "flag of another type": lambda s: changed(s, "args", "networks", "symmetry", to=["yes"]),
    "no such unit": lambda s: changed(s, "args", "base", "server", "units", to="grad"),
    "another script": lambda s: {**s, "script": "no_such_script.py"},
    "a path as script": lambda s: {**s, "script": "../ppo_residual_so101.py"},
    "a script that is no trainer": lambda s: {**s, "script": "so101_env.py"},
    "an unknown key": lambda s: {**s, "magic": 1},
    "a weight of another type": lambda s: changed(s, "agent", WEIGHT, to=s["agent"][WEIGHT].double()),
    "a sparse weight": lambda s: changed(s, "agent", WEIGHT, to=s["agent"][WEIGHT].to_sparse()),
    "a negative step": lambda s: {**s, "global_step": -64},
    "a step that is true": lambda s: {**s, "global_step": True},
    "an endless number of environments": lambda s: {**s, "num_envs": 10**30},
    "a flag without end": lambda s: changed(s, "args", "ppo", "learning_rate", to=10**400),
    "a flag that is not finite": lambda s: changed(s, "args", "task", "alpha", to=float("nan")),
    "a setting out of range": lambda s: changed(s, "args", "run", "num_threads", to=0),
    "NaN in the environments": lambda s: changed(s, *OWN, "envs", "arms", "batch", to=state_of(s) * torch.nan),
    "an infinite score": lambda s: changed(s, "recorder", to={**s["recorder"], "finalists": [{"step": float("inf")}]}),
    "more environments than there can be": lambda s: {**s, "num_envs": 10**11},
    "an episode of text": records(recent_episodes=[{"success": 1.0, "length": "long"}]),
    "an episode with more than success": records(recent_episodes=[{"success": 1e30}]),
    "no episodes": records(recent_episodes=None),
    "an evaluation that is maybe due": records(evaluation_due="yes"),
    "a best model twice": records(finalists=[BEST, BEST]),
    "best models in another order": records(finalists=[BEST, {**BEST, "step": 128}]),
    "a best model of later": records(finalists=[{**BEST, "step": 10**6}]),
    "a best model with an unknown value": records(finalists=[{**BEST, "magic": 1}]),
    "missing base": lambda s: changed(s, "args", "base", "base_policy", to="bc:nowhere.pt"),
}
DAMAGE_FOR_RESUME = {
    "another number of environments": lambda s: {**s, "num_envs": 3},
    "another number of ranks": lambda s: {**s, "ranks": s["ranks"] * 2},
    "no environments": lambda s: changed(s, *OWN, "envs", to={}),
    "no fields": lambda s: changed(s, *OWN, "envs", "arms", "fields", to={}),
    "ragged states": lambda s: changed(s, *OWN, "envs", "arms", "batch", to=torch.zeros(2, 3)),
    "states of text": lambda s: changed(s, *OWN, "envs", "_steps", to="hello"),
    "generators of text": lambda s: changed(s, *OWN, "envs", "rngs", to=["hello"] * 4),
    "an empty optimiser": lambda s: {**s, "optimizer": {}},
    "moments of another shape": lambda s: changed(s, "optimizer", "state", 1, "exp_avg", to=torch.zeros(2)),
    "moments of one layer only": lambda s: changed(s, "optimizer", "state", to={1: s["optimizer"]["state"][1]}),
    "a negative second moment": lambda s: changed(
        s, "optimizer", "state", 1, "exp_avg_sq", to=-1 - s["optimizer"]["state"][1]["exp_avg_sq"]
    ),
    "moments of another type": moments(torch.Tensor.half),
    "complex moments": moments(lambda tensor: tensor.to(torch.complex64)),
    "no moments": lambda s: changed(s, "optimizer", "state", to={}),
    "half a step of the optimiser": lambda s: changed(s, "optimizer", "state", 1, "step", to=torch.tensor(0.5)),
    "no learning rate": lambda s: changed(s, "optimizer", "param_groups", 0, "lr", to="fast"),
    "a generator without end": lambda s: changed(s, *OWN, "envs", "rngs", 0, "has_uint32", to=10**30),
    "a generator of fractions": generator({"state": 1.5}),
    "a generator with another flag": generator({}, has_uint32=2),
    "a generator that cannot be": generator({"inc": 4}),
    "a generator with an unknown value": generator({}, magic=1),
    "an endless episode": lambda s: changed(s, *OWN, "envs", "_steps", to=torch.full((4,), 2**62)),
    "an object out of view for ever": lambda s: changed(s, *OWN, "envs", "_unseen", to=torch.full((4,), 2**62)),
    "an unknown field": lambda s: changed(
        s, *OWN, "envs", "arms", "fields", to={**s["ranks"][0]["envs"]["arms"]["fields"], "magic": torch.zeros(4)}
    ),
    "a short generator": lambda s: changed(s, *OWN, "generator", to=s["ranks"][0]["generator"][:8]),
    "an observation of another size": lambda s: changed(s, *OWN, "envs", "_obs", to=torch.zeros(4, 31)),
    "episodes of another kind": records(recent_episodes=[3]),
    "a best model without steps": records(finalists=[{"success_rate": 1.0}]),
    "more steps than the budget": lambda s: {**s, "global_step": 10**7},
}


@pytest.mark.parametrize("kind", [*DAMAGE, *DAMAGE_FOR_RESUME])
def test_damaged_checkpoints_end_with_one_line(small_run, monkeypatch, kind):
    path = small_run / "checkpoints" / "damaged.pt"
    save_tensors(path, (DAMAGE | DAMAGE_FOR_RESUME)[kind](load(small_run / "final_model.pt")))
    logs = ["--log-dir", str(small_run / "refused")]
    try:
        line = error_of(monkeypatch, "ppo_residual_so101.py", "--resume", str(path), *logs)
        assert (str(path) in line or "nowhere.pt" in line) and "\n" not in line
        if kind in DAMAGE:
            line = error_of(monkeypatch, "eval_so101.py", "--model", str(path), "--episodes", "1")
            assert (str(path) in line or "nowhere.pt" in line) and "\n" not in line
    finally:
        path.unlink()
        shutil.rmtree(small_run / "refused", ignore_errors=True)


def test_truncated_and_missing_files(small_run, tmp_path, monkeypatch):
    path = tmp_path / "bad.pt"
    for content in (None, b"", b"hello", (small_run / "final_model.pt").read_bytes()[:5000]):
        if content is not None:
            path.write_bytes(content)
        for script, flag in (("eval_so101.py", "--model"), ("ppo_residual_so101.py", "--resume")):
            assert str(path) in error_of(monkeypatch, script, flag, str(path))
