"""Directories of training runs: where a run goes, and what config.json says about it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from so101 import __version__
from so101.files import disk_error
from so101_sim.errors import SO101Error

ROOT = Path(__file__).resolve().parent.parent
MAX_SAME_NAME = 100  # runs of one name; further ones are refused


def new_run_dir(log_dir: Path, name: str, *subdirectories: str) -> Path:
    """A new directory for a run. Raises SO101Error if log_dir cannot be written."""
    for attempt in range(MAX_SAME_NAME):
        run_dir = log_dir / (name + (f"_{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
            for each in subdirectories:
                (run_dir / each).mkdir()
            return run_dir
        except FileExistsError:
            if not log_dir.is_dir():
                break
        except OSError as error:
            text = f"--log-dir {log_dir}: cannot be written ({error.strerror}); name another directory"
            raise SO101Error(text) from error
    if log_dir.is_dir():
        raise SO101Error(f"--run-name {name}: {log_dir} has {MAX_SAME_NAME} runs of this name; give another")
    raise SO101Error(f"--log-dir {log_dir}: is not a directory; name another one")


def open_curves(run_dir: Path, **options: Any) -> Any:
    """TensorBoard's SummaryWriter of a run. An error of its own thread is raised where it is used, and only there.

    Raises DiskError if it cannot write.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    threading.excepthook = _report_unless_kept
    try:
        return SummaryWriter(str(run_dir / "tensorboard"), **options)
    except OSError as error:
        raise disk_error(error.filename or run_dir / "tensorboard", error) from error


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Report a disk or run directory that fails meanwhile as DiskError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error.filename or run_dir, error) from error


def _report_unless_kept(args: threading.ExceptHookArgs) -> None:
    """Report an error that ended a thread, unless TensorBoard's writer keeps it."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


def run_dir_of(path: str) -> Path:
    """The directory of the run that a checkpoint, or a symbolic link to one, belongs to."""

    def above(file: Path) -> Path:
        return file.parents[1 if file.parent.name in ("checkpoints", "best_model") else 0]

    named, real = above(Path(os.path.abspath(path))), above(Path(path).resolve())
    run_dir = next((each for each in (named, real) if is_run_dir(each)), named)
    return run_dir.relative_to(Path.cwd()) if Path.cwd() in run_dir.parents else run_dir


def is_run_dir(directory: Path) -> bool:
    """Whether it is the directory of a run."""
    return (directory / "config.json").is_file()


def stem_of(script: str) -> str:
    """A script's name in the names of runs and models: ppo_residual, ppo_rgb, distill."""
    return Path(script).stem.removesuffix("_so101")


def describe_run(script: str, args: Any) -> dict[str, Any]:
    """The content of config.json: script, arguments, commit, versions, machine."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:  # no git on this machine: the commit is unknown
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = status = None
    if git("ls-files", "--error-unmatch", "so101_env.py"):  # else it is installed, perhaps within another repository
        # reports of sweeps are not changes of the code
        status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmark/results")
        commit = git("rev-parse", "HEAD")
    return {
        "script": script,
        "args": dataclasses.asdict(args),
        "git": {"commit": commit, "dirty": None if status is None else bool(status)},
        "version": __version__,
        "versions": {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium", "numpy")},
        "machine": {"platform": platform.platform(), "python": sys.version.split()[0], "cpus": os.cpu_count()},
    }
