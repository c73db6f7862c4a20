"""What all scripts do with their command line: parsing, argument checks, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import shlex
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro

from so101.base import camera_names
from so101.extras import CLONE
from so101.files import DISK_ERRORS, disk_error
from so101.torchrun import RankError, is_main
from so101_env import SO101ResidualVectorEnv
from so101_sim.errors import SO101Error, check_ranges

ROOT = Path(__file__).resolve().parent.parent
Settings = TypeVar("Settings")
RANK_0_S = 10.0  # how much later rank 0 may report an error that all ranks have

# what other projects call a flag, and what it is called here
USUAL_NAMES = {
    "lr": "learning-rate", "n-envs": "num-envs", "n-steps": "num-steps", "rollout-steps": "num-steps",
    "batch-size": "minibatch-size", "mini-batch-size": "minibatch-size", "epochs": "update-epochs",
    "n-epochs": "update-epochs", "num-epochs": "update-epochs", "ppo-epochs": "update-epochs",
    "timesteps": "total-timesteps", "n-timesteps": "total-timesteps", "total-steps": "total-timesteps",
    "num-timesteps": "total-timesteps", "max-steps": "total-timesteps", "steps": "total-timesteps",
    "lam": "gae-lambda", "lambda": "gae-lambda", "clip": "clip-coef", "clip-range": "clip-coef",
    "clip-param": "clip-coef", "clip-eps": "clip-coef", "entropy-coef": "ent-coef", "value-coef": "vf-coef",
    "grad-clip": "max-grad-norm", "hidden-dim": "hidden-size", "hidden": "hidden-size", "name": "run-name",
    "exp-name": "run-name", "experiment-name": "run-name", "logdir": "log-dir", "output-dir": "log-dir",
    "save-dir": "log-dir", "out-dir": "log-dir", "checkpoint": "model", "ckpt": "model", "model-path": "model",
    "policy": "model", "policy-path": "model", "teacher": "model", "load": "model", "wandb": "track",
    "use-wandb": "track", "wandb-project": "wandb-project-name", "n-episodes": "episodes",
    "num-episodes": "episodes", "eval-episodes": "episodes", "n-eval-episodes": "episodes",
    "threads": "num-threads", "n-threads": "num-threads", "num-workers": "num-threads", "render": "render-mode",
    "demos": "dataset", "data": "dataset", "record": "dataset", "save-freq": "checkpoint-every",
    "eval-freq": "eval-every", "resume-from": "resume", "save-video": "video", "max-episode-steps": "episode-steps",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# scripts


def run_script(main: Callable[[], int]) -> int:
    """Run a script's main; returns its exit code. A user error or a full disk is one line and exit code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with its descriptor closed
            setattr(sys, name, open(os.devnull, "w"))
    try:
        code = main()
        sys.stdout.flush()  # here, where a closed pipe is caught
        return code
    except SO101Error as error:
        message: Any = error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's words
            raise
        message = "out of memory: lower the numbers of environments and samples, or the sizes of pictures and networks"
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            silence_output()
            return 128 + signal.SIGPIPE
        if error.errno not in DISK_ERRORS:
            raise
        message = disk_error(error.filename or "standard output", error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Stop as stop:
        return 128 + stop.signum
    if not (is_main() or isinstance(message, RankError)):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(RANK_0_S)  # if rank 0 has the same error, it reports it, and torchrun ends this process
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(message))  # one line, as it is
    with contextlib.suppress(OSError):  # nobody can read it
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr, flush=True)
    return 2


def print_line(line: str) -> None:
    """Print a line. If nobody can read it any more, what is to be written is written all the same."""
    try:
        print(line, flush=True)
    except OSError:
        silence_output()


def silence_output() -> None:
    """Discard all further output: the reader of stdout or stderr is gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())


def use_one_torch_thread() -> None:
    """Leave the other cores to the simulation or the camera, if a policy has loaded torch; not every one needs it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def is_ignored(signum: int) -> bool:
    """Whether a signal was switched off before the script started, as `nohup` does with that of a closed terminal."""
    return signal.getsignal(signum) == signal.SIG_IGN


class Stop(BaseException):
    """A signal has asked the script to stop; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Stoppable:
    """A `with` block that Ctrl+C, SIGTERM and a closed terminal end by raising Stop.

    After `finishing` was called the first signal is only kept in `signum`, so that what has been done is still written.
    A second signal raises Stop in any case, except that of a closed terminal, which system and shell may both report.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signum, self._finishing = 0, False

    def __enter__(self) -> Stoppable:
        self._handlers = {each: signal.signal(each, self._on_signal) for each in self.SIGNALS if not is_ignored(each)}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def finishing(self) -> None:
        """From now on, what has been done is written."""
        self._finishing = True

    def _on_signal(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            silence_output()
            if self.signum:
                return
        first, self.signum = not self.signum, signum
        if not (first and self._finishing):
            raise Stop(signum)


def command_of(script: str) -> str:
    """How to start a script of the project from the working directory: "eval_so101.py" or "so101.clone"."""
    if not CLONE and Path(script).parent == Path():  # an installed script is a module
        script = script.removesuffix(".py")
    if script.endswith(".py"):
        return shlex.join(["python", os.path.relpath(ROOT / script)])
    return shlex.join(["python", "-m", script])


def command_line(script: str) -> str:
    """The command that has started this script, see `command_of`, to type again in the same directory."""
    return shlex.join([*shlex.split(command_of(script)), *sys.argv[1:]])


# settings of one run that do not change what is learned
OF_A_RUN = {
    "resume", "log_dir", "run_name", "num_threads", "track", "wandb_project_name", "capture_video", "allow",
    "allow_remote", "send_token",
}  # fmt: skip


def training_command(script: types.ModuleType, settings: Mapping[str, Any]) -> str:
    """The command line of a training script for these flat settings, without those that have their default value."""
    path, fields = Path(script.__file__), dataclasses.fields(script.Args)
    words = ["python", *(["-m", f"so101.{path.stem}"] if path.parent == ROOT / "so101" else [path.name])]
    required = {each.default for each in fields if each.default_factory is dataclasses.MISSING}
    defaults = {} if dataclasses.MISSING in required else flat_settings(dataclasses.asdict(script.Args()))
    for name in defaults or settings:
        default, value = (
            list(each) if isinstance(each, tuple) else each for each in (defaults.get(name), settings.get(name))
        )
        if name in OF_A_RUN or name not in settings or (name in defaults and value == default):
            continue
        if isinstance(value, bool):
            words.append(flag_of(name if value else f"no_{name}"))
        else:
            words += [flag_of(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# parsing


def parse(cls: type[Settings], description: str, default: Settings | None = None) -> Settings:
    """The command line as an instance of a dataclass, whose fields, also those of nested dataclasses, are flags.

    Raises SO101Error for a flag that does not exist, with the one that is probably meant, and for a value that cannot
    be read, or that is an empty text.
    """
    _check_names(default or cls)
    options, errors = {} if default is None else {"default": default}, io.StringIO()
    with contextlib.ExitStack() as stack:
        if not is_main():  # all ranks parse the same command line; rank 0 prints the help
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            settings = tyro.cli(cls, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            # tyro draws a box: a title, what is wrong, and after a line the help text of the flag
            lines = [line.strip("│ ") for line in errors.getvalue().splitlines() if not line.startswith(("╭", "╰"))]
            wrong = itertools.takewhile(lambda line: not line.startswith("──"), lines)
            raise SO101Error(f"{' '.join(wrong)}; --help describes all flags") from stop
    _check_texts(settings)
    return settings


def _check_texts(settings: Any) -> None:
    """Raise SO101Error, naming the flag, for the first text in a dataclass that is empty or not UTF-8, also in tuples.

    An empty instruction is none: policies without language ignore it.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            _check_texts(value)
        for text in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(text, str) and text.encode(errors="ignore").decode() != text:
                raise SO101Error(f"{flag_of(field.name)} {text!a}: is not UTF-8; rename it")
            if isinstance(text, str) and not text.strip() and field.name != "instruction":
                raise SO101Error(f"{flag_of(field.name)} is empty: give it a value, or drop it for the default")


def _check_names(settings: Any) -> None:
    """Raise SO101Error for a flag on the command line that no field of a dataclass has."""
    known = {"help"}
    for name in _field_names(settings):
        known |= {name.replace("_", "-"), f"no-{name.replace('_', '-')}"}
    for word in sys.argv[1:]:
        flag = word.split("=")[0].removeprefix("--").replace("_", "-")
        if not word.startswith("--") or flag in known:
            continue
        usual = USUAL_NAMES.get(flag)
        nearest = [usual] if usual in known else difflib.get_close_matches(flag, known, 1, 0.7)
        hint = f"did you mean --{nearest[0]}?" if nearest else "--help lists all flags"
        raise SO101Error(f"--{flag}: there is no such flag; {hint}")


def _field_names(settings: Any) -> list[str]:
    """Names of the fields of a dataclass, or of an instance, without those that only group others."""
    names: list[str] = []
    for field in dataclasses.fields(settings):
        value = field.default_factory() if isinstance(settings, type) and callable(field.default_factory) else None
        value = getattr(settings, field.name, value)
        names += _field_names(value) if dataclasses.is_dataclass(value) else [field.name]
    return names


def flat_settings(args: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config.json or a checkpoint by flag name, without the groups they are kept in."""
    flat: dict[str, Any] = {}
    for key, value in args.items():
        flat |= flat_settings(value) if isinstance(value, Mapping) else {key: value}
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# argument checks


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_flags(settings: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise SO101Error, naming the flag, for the first number that is not finite or out of its range."""
    check_ranges(settings, ranges, flag_of)


def check_unused(settings: Any, names: Iterable[str], why: str) -> None:
    """Raise SO101Error, naming the flag, for the first of these settings that is not the default: it would do nothing.

    Args:
        settings: the dataclass instance.
        names: fields that have no effect here.
        why: what they need, or what has no use for them.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in names and value != default:
            raise SO101Error(f"{flag_of(f'no_{field.name}' if value is False else field.name)}: {why}; drop the flag")


def check_plain_name(flag: str, name: str | None) -> None:
    """Raise SO101Error, naming the flag, unless a name can be that of one file in any directory; None passes."""
    if name is not None and (Path(name).parts != (name,) or name == ".." or not name.isprintable()):
        raise SO101Error(f"{flag} {name!r}: must be a plain name, without directories and control characters")
    if name is not None and (name.strip() != name or name.startswith("-") or len(name.encode()) > 200):
        raise SO101Error(f"{flag} {name!r:.80}: is too long, begins with -, or has a space at an end; shorten it")


def check_cameras(flag: str, cameras: tuple[str, ...]) -> None:
    """Raise SO101Error, naming the flag, unless cameras are one or more of the scene's, each once."""
    if not cameras or len({*cameras}) < len(cameras) or not {*cameras} <= {*camera_names()}:
        known = " and ".join(camera_names())
        raise SO101Error(f"{flag} {' '.join(cameras)}: give one or more of {known}, each once")


def check_memory(flags: str, need_bytes: int) -> None:
    """Raise SO101Error, naming the flags to lower, if the machine has less memory. Linux would allocate it anyway."""
    have_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need_bytes > have_bytes:
        need, have = need_bytes / 1e9, have_bytes / 1e9
        raise SO101Error(f"needs {need:.1f} GB of memory, and this machine has {have:.1f} GB: lower {flags}")


def check_output(flag: str, path: str | None, suffixes: tuple[str, ...] = (), source: str | None = None) -> None:
    """Raise SO101Error, before any work is done, if a result cannot be written to path; None passes.

    Args:
        flag: the flag that names it.
        path: where symbolic links lead counts, too; what lies there is only replaced if it is a file of such a result.
        suffixes: possible ends; none for a directory.
        source: an input file, which must not be replaced, or an input directory, which must stay as it is.
    """
    if path is None:
        return
    target = Path(os.path.realpath(path))
    if suffixes and not {Path(path).suffix, target.suffix} <= {*suffixes}:
        raise SO101Error(f"{flag} {path}: must end in {' or '.join(suffixes)}, also where a link leads")
    if not Path(path).name or (suffixes and target.is_dir()):
        raise SO101Error(f"{flag} {path!r}: is a directory; name {'a file' if suffixes else 'a new directory'} in it")
    if suffixes and os.path.lexists(target) and not target.is_file():
        raise SO101Error(f"{flag} {path}: exists and is not a file; name another one")
    if source is not None and target.is_relative_to(os.path.realpath(source)):
        raise SO101Error(f"{flag} {path}: is or lies in {source}, which is only read; name another place")
    if not os.access(target.parent, os.W_OK):
        raise SO101Error(f"{flag} {path}: its directory does not exist or cannot be written; create it or name another")


def check_rendering(envs: SO101ResidualVectorEnv, flag: str) -> None:
    """Raise SO101Error, naming the flag, if this machine cannot render off screen."""
    try:
        envs.render_state(envs.qpos[0])
    except SO101Error as error:
        raise SO101Error(f"{flag}: {error}") from error
