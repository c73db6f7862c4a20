"""Going on with a training run: the command line of a training script with --resume, and the directory of the run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from so101.checkpoints import SCHEMAS, load_file
from so101.cli import OF_A_RUN, flag_of, flat_settings, parse
from so101.run_dirs import is_run_dir
from so101.settings import restore_args
from so101.torchrun import is_launched
from so101.trust import trust_of
from so101_sim.errors import SO101Error

Settings = TypeVar("Settings")

# Flags that may differ from those of the run that is resumed. None changes what is learned, except that a larger budget
# lets the learning rate fall more slowly. The model of a distillation may lie elsewhere; its weights are compared.
RESUMABLE = {*OF_A_RUN, "total_timesteps", "model"}


def parse_run(
    cls: type[Settings], description: str, script: str, kind: str, check_args: Callable[[Settings], None],
    one_rank: bool = False,
) -> tuple[Settings, dict[str, Any] | None]:  # fmt: skip
    """The command line of a training script; with --resume also the checkpoint, whose settings are then the defaults.

    Args:
        cls: the script's Args, with a Run (see so101.recorder) in `run`, and `total_timesteps`.
        description: the script's docstring.
        script: the script's file name.
        kind: format of its checkpoints, see so101.checkpoints.
        check_args: raises SO101Error for arguments that cannot be used.
        one_rank: whether the script cannot train in several ranks.
    """
    if one_rank and is_launched():
        raise SO101Error(f"{script} trains in one process: start it without torchrun")
    args = parse(cls, description)
    args.run.check_used()
    if (path := args.run.resume) is None:
        check_args(args)
        if hasattr(args, "base"):
            args.base.server.check_used(args.base.base_policy)
        return args, None
    saved = load_file(path, kind)
    if saved["script"] != script:
        raise SO101Error(f"--resume {path}: written by {saved['script']}; resume it with that script")
    named = args.base.base_policy if hasattr(args, "base") else None
    then = restore_args(cls, check_args, saved["args"], path, trust_of(args).also(named))
    own = {field.name: field.default for field in dataclasses.fields(then.run) if field.name in RESUMABLE}
    then.run = dataclasses.replace(then.run, **own)
    args = parse(cls, description, default=then)
    before, after = flat_settings(dataclasses.asdict(then)), flat_settings(dataclasses.asdict(args))
    for name, new in after.items():
        if new != before[name] and name not in RESUMABLE:
            raise SO101Error(f"{flag_of(name)} {new}: {path} was trained with {before[name]}; drop the flag")
    if args.total_timesteps < saved["global_step"]:
        raise SO101Error(f"--total-timesteps {args.total_timesteps}: {path} has {saved['global_step']} steps already")
    check_args(args)
    return args, saved


def reason_for_new_dir(run_dir: Path, step: int) -> str:
    """Why a run cannot go on in its own directory from a checkpoint of this step; "" if it can."""
    if not is_run_dir(run_dir):
        return f"{run_dir} is not the directory of a run"
    if (run_dir / "final_model.pt").exists():
        return f"the run in {run_dir} is finished"
    later = [path for path in run_dir.glob("checkpoints/*_steps.pt") if step_of(path) > step]
    if later or ((run_dir / "interrupted_model.pt").is_file() and step_of(run_dir / "interrupted_model.pt") > step):
        return f"the run in {run_dir} went further than step {step}"
    return ""


def step_of(path: Path) -> int:
    """Environment steps of a model file."""
    with contextlib.suppress(ValueError):
        return int(path.stem.removesuffix("_steps").rpartition("_")[2])
    return load_file(path, *SCHEMAS)["global_step"]
