"""Run management: run directory, curves, evaluations, best models, checkpoints, signals, progress bar, summary."""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from so101.checkpoints import BEST_BY, is_rate, load_file, load_weights, rating, restoring, save_tensors
from so101.cli import (
    check_plain_name,
    check_rendering,
    check_unused,
    command_of,
    flat_settings,
    is_ignored,
    silence_output,
)
from so101.distributed import World
from so101.evaluation import VALIDATION_SEED, episode_mean, evaluate, no_residual, residual_to_base
from so101.files import DiskError, copy_file, disk_error, write_atomic, write_json
from so101.films import write_video
from so101.resume import reason_for_new_dir, step_of
from so101.run_dirs import ROOT, describe_run, is_run_dir, new_run_dir, open_curves, run_dir_of, stem_of, writing
from so101.torchrun import RankError
from so101.trust import allow_flags, trust_of
from so101_env import BasePolicyError, SO101Error, SO101ResidualVectorEnv
from so101_sim.errors import strict_json

RECENT = 100  # training episodes that the curves under rollout/ average over
# tags of values that have another name in TensorBoard; all others keep theirs
ROLLOUT_TAGS = {
    "success": "success_rate_100",
    "return": "ep_reward",
    "length": "ep_length",
    "failure": "failure_rate_100",
}
EVAL_TAGS = {"mean_return": "mean_reward", "mean_length": "mean_ep_length"}
FINALISTS = 2  # number of best models that are evaluated on more episodes at the end,
RIVAL_EPISODES = 2  # if they succeeded in at most this many episodes fewer than the best


@dataclasses.dataclass
class Run:
    """What is written, how often, and where."""

    log_dir: str = "logs"
    """directory that gets one directory per run"""
    run_name: str | None = None
    """name of that directory, and of the run at Weights & Biases (default: the script's name, the time and the seed)"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    checkpoint_every: int = 10_000
    """steps between checkpoints"""
    eval_every: int = 10_000
    """steps between evaluations, which also choose the best model; 0 for none"""
    eval_episodes: int = 16
    """episodes per evaluation, on fixed held-out seeds; 16 take about a fifth of the time of a default run"""
    final_eval_episodes: int = 64
    """episodes on which the best models are compared at the end if the evaluations cannot separate them"""
    resume: str | None = None
    """checkpoint to continue exactly, with the settings it was started with"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "ppo-residual-so101"
    """project of --track"""
    capture_video: bool = False
    """save a video of the first episode of every evaluation"""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "num_threads": (1, 1024), "checkpoint_every": (1, 10**10), "eval_every": (0, 10**10),
        "eval_episodes": (1, 4096), "final_eval_episodes": (0, 100_000),
    }  # fmt: skip

    @property
    def eval_envs(self) -> int:
        """Number of environments for evaluations: the largest number of episodes that run at once."""
        return max(self.eval_episodes, self.final_eval_episodes - self.eval_episodes)

    def check_name(self) -> None:
        """Raise SO101Error for a run name that is not a name of a directory in log_dir."""
        check_plain_name("--run-name", self.run_name)

    def check_used(self) -> None:
        """Raise SO101Error for the first flag that does nothing in what the others ask for."""
        if not self.track:
            check_unused(self, ("wandb_project_name",), "needs --track")
        if not self.eval_every:
            check_unused(self, ("capture_video",), "films evaluations, and --eval-every 0 has none")


class Recorder:
    """Manages one training run.

        with Recorder(...) as recorder:
            while steps remain and not recorder.stopped():
                ...
                recorder.record(global_step, metrics, episodes)
            return recorder.finish()

    It draws no random numbers. Of the trainer it uses `agent.act`, `agent`'s weights and `checkpoint`. Only rank 0
    writes, evaluates and prints; the methods must be called on all ranks. A failing base policy, lost ranks and
    non-finite numbers end the run with one line; Ctrl+C, SIGTERM and a closed terminal request a stop after the present
    iteration, from where the run can be resumed exactly.

    Args:
        script: file name of the training script.
        kind: format of its checkpoints, see so101.checkpoints.
        args: its arguments, with seed, total_timesteps and `run`, a Run.
        agent: the module that is trained.
        act: residuals (N, 6) for observations of eval_envs; None: agent.act.
        envs: the training environments; closed at the end.
        eval_envs: environments with DISABLED autoreset; closed at the end.
        checkpoint: returns everything that a resumed run needs; called on all ranks.
        saved: the checkpoint that is resumed, if any.
        reference: what a policy is compared with: its name, and its success in evaluations, None to measure that of a
            zero residual.
        fallible: whether a policy within the training environments can fail; None: whether they have a base policy.
        world: the ranks.
    """

    def __init__(
        self,
        script: str,
        kind: str,
        args: Any,
        agent: nn.Module,
        envs: SO101ResidualVectorEnv,
        eval_envs: SO101ResidualVectorEnv,
        checkpoint: Callable[[], dict[str, Any]],
        saved: dict[str, Any] | None = None,
        act: Callable[[Any], np.ndarray] | None = None,
        reference: tuple[str, float | None] = ("base policy alone", None),
        fallible: bool | None = None,
        world: World | None = None,
    ):
        self.script, self.kind, self.args, self.run, self.agent = script, kind, args, args.run, agent
        self.envs, self.eval_envs, self.checkpoint, self.world = envs, eval_envs, checkpoint, world or World()
        self.act = act or agent.act
        self.reference, self.reference_success = reference
        if self.reference_success is None and eval_envs.base_policy is None:
            self.reference_success = 0.0  # an arm that rests moves nothing, and no episode starts with success
        self.fallible = envs.base_policy is not None if fallible is None else fallible
        self.start_time, self.start_cpu, self.eval_time_s = time.perf_counter(), time.process_time(), 0.0
        self.global_step = self.first_step = saved["global_step"] if saved else 0
        self.recent: deque[dict[str, float]] = deque(maxlen=RECENT)  # training episodes
        self.finalists: list[dict[str, Any]] = []  # steps and scores of the best models, best first
        self.metrics: dict[str, float] = {}
        self.result: dict[str, Any] | None = None  # result of the last evaluation
        self.fresh = saved is None
        self.signum = 0  # signal that requests a stop, on this rank
        self.stop_signum = 0  # the one that all ranks have agreed on
        self.evaluation_due = False  # whether this iteration's evaluation is still to be done
        self.before: dict[str, Any] | None = None  # checkpoint from which to resume if the base policy fails
        self.weights: dict[int, dict[str, torch.Tensor]] = {}  # weights of the finalists, by step
        if saved:
            with restoring(self.run.resume):
                self.recent.extend(dict(episode) for episode in saved["recorder"]["recent_episodes"])
                self.evaluation_due = saved["recorder"]["evaluation_due"]
            self._find_finalists(saved["recorder"]["finalists"])
        if self.run.capture_video:
            check_rendering(eval_envs, "--capture-video")
        if self.run.track and self.world.is_main:
            try:
                import wandb  # noqa: F401
            except ImportError as error:
                raise SO101Error("--track needs Weights & Biases: pip install wandb") from error

    # -- the run's life

    def __enter__(self) -> Recorder:
        if self.run.track and self.world.is_main:
            self._open_wandb()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if not is_ignored(signum):
                signal.signal(signum, self._on_signal)
        self.run_dir = self._make_run_dir() if self.world.is_main else Path()
        if self.world.is_main:
            self._open_logs()
        # the delay: nothing is drawn before _show, which handles a closed pipe
        self.bar = tqdm(
            total=self.args.total_timesteps, initial=self.global_step, unit="step", dynamic_ncols=True, delay=1e-3,
            disable=not self.world.is_main,
        )  # fmt: skip
        try:
            # before training there is something to evaluate only if it is a base policy whose success is not known
            due = self.evaluation_due or (self.fresh and self.reference_success is None)
            self.evaluation_due = bool(self.run.eval_every) and self.world.gather(due)[0]
            self._keep_resumable()
            if self.evaluation_due:
                self.evaluate()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.envs.close()
        self.eval_envs.close()
        try:
            self.bar.close()
        except OSError:
            self._on_closed_output()
        try:
            if self.world.is_main:
                self.writer.close()
        except OSError as lost:  # an error that the writer's own thread has kept
            error = error or disk_error(self.run_dir, lost)
        if isinstance(error, DiskError):
            raise SO101Error(f"{error}; {self._rescue()}") from error
        if isinstance(error, SO101Error):
            text = f"{self._base_flag()}: {error}" if isinstance(error, BasePolicyError) else str(error)
            if not self.world.is_main:
                raise RankError(f"rank {self.world.rank}: {text}") from error
            if self.before is not None:
                path = self.run_dir / "interrupted_model.pt"
                save_tensors(path, self.before)
                text += f"; resume {self.before['global_step']} steps with {self._resume_flags(path)}"
            raise SO101Error(text) from error
        if isinstance(error, FloatingPointError):
            text = f"NaN or Inf in the {error} after {self.global_step} steps; try a lower --learning-rate"
            if self.world.is_main and any(self.run_dir.glob("checkpoints/*.pt")):
                text += f"; the checkpoints in {self.run_dir} are from before"
            raise RankError(text) from error

    def _rescue(self) -> str:
        """Save the run's state although its disk or directory has failed, if that is possible; what came of it."""
        if self.world.size > 1:
            return "the newest checkpoint can be resumed"
        path = self.run_dir / "interrupted_model.pt"
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_tensors(path, self._content())
        except (OSError, DiskError):
            return "the run's state could not be saved"
        return f"resume {self.global_step} steps with {self._resume_flags(path)}"

    def stopped(self) -> bool:
        """Whether a signal requested a stop on any rank: the same answer on all of them."""
        self.stop_signum = max(self.world.gather(self.signum))  # one that comes meanwhile stays for the next call
        return bool(self.stop_signum)

    def record(self, global_step: int, metrics: dict[str, float], episodes: list[dict[str, float]]) -> None:
        """Log an iteration; evaluate and save a checkpoint when it is time.

        Args:
            global_step: environment steps so far.
            metrics: logged under train/.
            episodes: finished in this iteration; every value in them is averaged over the last 100, under rollout/.
        """
        before, self.global_step = self.global_step, global_step
        ranks = self.world.gather((metrics, episodes))
        self.metrics = {key: float(np.mean([each[key] for each, _ in ranks])) for key in metrics}
        self.recent.extend(episode for _, each in ranks for episode in each)
        if self.world.is_main:
            means = self._recent_means()
            fps = (global_step - self.first_step) / (time.perf_counter() - self.start_time)
            scalars = {f"train/{key}": value for key, value in self.metrics.items()} | {"time/fps": fps}
            scalars |= {f"rollout/{ROLLOUT_TAGS.get(key, key)}": value for key, value in means.items()}
            if "success" in means:
                scalars["Success/training"] = means["success"]
            with writing(self.run_dir):
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, global_step)
            self._show(steps=global_step - before)
        every = self.run.eval_every
        self.evaluation_due = bool(every) and global_step // every > before // every
        self._keep_resumable()
        if self.evaluation_due:  # first, so that a checkpoint of the same step contains the best model
            self.evaluate()
        if global_step // self.run.checkpoint_every > before // self.run.checkpoint_every:
            content = self._content()
            if self.world.is_main:
                save_tensors(self.run_dir / "checkpoints" / self._model_name(global_step), content)

    def evaluate(self) -> None:
        """Evaluate the agent, log it, and keep its model if it is among the best so far."""
        self.evaluation_due = True  # until its results are on disk: a run that fails before repeats it when resumed
        content = self._content()
        if not self.world.is_main:
            self.evaluation_due = False
            return
        start, step = time.perf_counter(), self.global_step
        film = self.run_dir / "eval_results" / f"step_{step}.mp4" if self.run.capture_video else None
        self._show("evaluating")
        self.result = {"step": step, **self._evaluate(film)}
        own = {key: self.result[key] for key in ("step", *BEST_BY)}
        others = [each for each in self.finalists if each["step"] != step]  # a resumed run may evaluate a step again
        best = sorted([*others, own], key=rating, reverse=True)[:FINALISTS]
        if own in best:
            recorder = self._own_state() | {"finalists": best, "evaluation_due": False}
            save_tensors(self.run_dir / "best_model" / self._model_name(step), content | {"recorder": recorder})
            self.finalists, self.weights[step] = best, copy.deepcopy(self.agent.state_dict())
            if own == best[0]:
                self._place_best(step)
        with writing(self.run_dir), open(self.run_dir / "eval_results" / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(self.result) + "\n")
        self.evaluation_due = False
        with writing(self.run_dir):
            for name, value in self.result.items():
                tag = name if "/" in name else f"eval/{EVAL_TAGS.get(name, name)}"
                if name not in ("step", "reference_success_rate"):
                    self.writer.add_scalar(tag, value, step)
            self.writer.add_scalar("Success/evaluation", self.result["success_rate"], step)
        if self.run.track and film:
            import wandb

            wandb.log({"eval/video": wandb.Video(str(film), format="mp4"), "global_step": step})
        if self.before is not None:
            self.before["recorder"] = self._own_state()
        self.eval_time_s += time.perf_counter() - start

    def finish(self) -> int:
        """Evaluate, choose the best model, save the last one, and print how it went; returns the exit code."""
        evaluated = self.result is not None and self.result["step"] == self.global_step
        if self.run.eval_every and not self.world.gather(evaluated)[0] and not self.stopped():
            self.evaluate()
        stop, content = self.stopped(), self._content()
        if not self.world.is_main:
            return 128 + self.stop_signum if stop else 0
        best = {**self.finalists[0], "episodes": self.run.eval_episodes} if self.finalists else None
        if best and not stop:
            self._show("choosing the best model")
            start = time.perf_counter()
            best = self._choose_best()
            self._place_best(best["step"])
            self.eval_time_s += time.perf_counter() - start
            with writing(self.run_dir):
                self._log_best()
        self._show()
        model = self.run_dir / ("interrupted_model.pt" if stop else "final_model.pt")
        save_tensors(model, content)
        summary = self._summary(best, model)
        write_json(self.run_dir / "training_summary.json", summary)
        self.bar.close()
        self._print_end(summary, best, model)
        return 128 + self.stop_signum if stop else 0

    # -- signals and printing

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.signum = signum
        # a second one ends the program at once; but system and shell may both report that the terminal is closed
        signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else signal.SIG_DFL)

    def _on_closed_output(self) -> None:
        """Stop as for a signal: the terminal, or the reader of a pipe, is gone."""
        silence_output()
        self.signum = self.signum or signal.SIGPIPE

    def _say(self, text: str) -> None:
        """Print a line."""
        try:
            print(text, flush=True)
        except OSError:
            self._on_closed_output()

    def _show(self, doing: str = "", steps: int = 0) -> None:
        """Show on the progress bar what is being done, or how good the agent is, and steps that were done."""
        means = self._recent_means()
        text = doing or (f"success {means['success']:.2f}" if "success" in means else "training")
        text += f", evaluation {self.result['success_rate']:.2f}" if self.result and not doing else ""
        try:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(steps) if steps else self.bar.refresh()
        except OSError:
            self._on_closed_output()

    def _print_end(self, summary: dict[str, Any], best: dict[str, Any] | None, model: Path) -> None:
        speed = f"{summary['steps_per_second']:.0f} steps/s"
        if summary["base_time_s"]:
            speed += f", {summary['base_time_s'] / summary['wall_time_s']:.0%} of the time for the base policy"
        steps = f"steps {self.first_step} to {self.global_step}" if self.first_step else f"{self.global_step} steps"
        self._say(f"{steps} in {summary['wall_time_s']:.1f} s ({speed}), saved in {self.run_dir}")
        if self.stop_signum:
            self._say(f"resume:   {self._own_command()} {self._resume_flags(model)}")
            return
        if best:
            text = f"success: best model (step {best['step']}, {best['episodes']} episodes) {best['success_rate']:.2f}"
            text += f", last {self.result['success_rate']:.2f}" if self.result else ""
            self._say(f"{text}, {self.reference} {self.reference_success:.2f}")
        allow = self._allow_flags(self.script)
        self._say(f"evaluate: {command_of('eval_so101.py')} --model {shlex.quote(summary['best_checkpoint'])}{allow}")

    def _base_flag(self) -> str:
        """The flag that names the base policy of the training environments."""
        return (
            f"--base-policy {self.args.base.base_policy}"
            if hasattr(self.args, "base")
            else f"--model {self.args.model}"
        )

    def _allow_flags(self, *script: str) -> str:
        """The flag that lets a command use the base policy of this run's files, and the script that wrote them."""
        spec = self.args.base.base_policy if hasattr(self.args, "base") else "zero"
        return allow_flags([*script, spec], trust_of(self.args))

    def _resume_flags(self, model: Path) -> str:
        """The flags that resume a model of this run."""
        return f"--resume {shlex.quote(str(model))}{self._allow_flags()}"

    def _own_command(self) -> str:
        name = Path(self.script)
        return command_of(f"so101.{name.stem}" if (ROOT / "so101" / name).is_file() else self.script)

    # -- files

    def _content(self) -> dict[str, Any]:
        """A complete checkpoint."""
        settings = dataclasses.asdict(self.args)
        settings["run"]["resume"] = None
        head = {"format": self.kind, "script": self.script, "args": settings}
        return {**head, **self.checkpoint(), "recorder": self._own_state()}

    def _own_state(self) -> dict[str, Any]:
        """The Recorder's part of a checkpoint."""
        due = {"evaluation_due": self.evaluation_due}
        return {"recent_episodes": list(self.recent), "finalists": self.finalists, **due}

    def _keep_resumable(self) -> None:
        """Keep a checkpoint of now if the base policy can fail at any step: the next rollout changes no weights."""
        if self.fallible:
            self.before = self._content()

    def _model_name(self, step: int) -> str:
        """File name of the model after a number of steps."""
        return f"{stem_of(self.script)}_{step}_steps.pt"

    def _find_finalists(self, finalists: list[dict[str, Any]]) -> None:
        """The best models of the resumed run, if its directory has them still; prints which are missing."""
        directory, lost = run_dir_of(self.run.resume) / "best_model", []
        shapes = {name: tensor.shape for name, tensor in self.agent.state_dict().items()}
        for each in finalists:
            path = directory / self._model_name(each["step"])
            saved = load_file(path, self.kind) if path.is_file() else None
            if (  # otherwise it is of another run
                saved
                and saved["global_step"] == each["step"]
                and each in saved["recorder"]["finalists"]
                and {name: tensor.shape for name, tensor in saved["agent"].items()} == shapes
            ):
                self.finalists.append(each)
                self.weights[each["step"]] = saved["agent"]
            else:
                lost.append(path.name)
        if lost and self.world.is_main:
            print(f"missing in {directory}: {', '.join(lost)}; the best model is chosen without", flush=True)

    def _make_run_dir(self) -> Path:
        """The directory of the run: that of the resumed one if the checkpoint is where it stopped, or a new one."""
        subdirectories = ("checkpoints", "best_model", "eval_results", "tensorboard")
        name, log_dir = self.run.run_name, Path(self.run.log_dir)
        self.continued = False
        if self.run.resume:
            old = run_dir_of(self.run.resume)
            reason = reason_for_new_dir(old, self.global_step) or ("--run-name" if name else "")
            reason = reason or ("--log-dir" if log_dir != Path(Run.log_dir) else "")
            self.continued = not reason
            if self.continued:
                return old
            if is_run_dir(old):  # else it is a lone checkpoint, anywhere
                log_dir = old.parent if log_dir == Path(Run.log_dir) else log_dir
                name = name or old.name
            if not reason.startswith("--"):
                self._say(f"{reason}; the resumed run gets a directory of its own")
        name = name or f"{stem_of(self.script)}_{time.strftime('%Y%m%d-%H%M%S')}_s{self.args.seed}"
        run_dir = new_run_dir(log_dir, name, *subdirectories)
        for each in self.finalists:  # of the resumed run
            model = self._model_name(each["step"])
            copy_file(run_dir_of(self.run.resume) / "best_model" / model, run_dir / "best_model" / model)
        return run_dir

    def _open_wandb(self) -> None:
        """Start the run at Weights & Biases. It fails before anything is written, for example without an API key."""
        import wandb

        settings = flat_settings(dataclasses.asdict(self.args))
        try:
            wandb.init(project=self.run.wandb_project_name, config=settings, sync_tensorboard=True)
        except (wandb.errors.Error, ValueError) as error:  # ValueError: settings, as a WANDB_MODE that does not exist
            text = " ".join(str(error).split())
            raise SO101Error(f"--track: {text} Run `wandb login`, or set WANDB_MODE=offline") from error

    def _open_logs(self) -> None:
        """Open TensorBoard's event file, and write the configuration."""
        total = self.args.total_timesteps
        steps = f"from step {self.first_step} to {total}" if self.first_step else f"training for {total} steps"
        num_envs = self.envs.num_envs * self.world.size
        ranks = f", {self.world.size} ranks" if self.world.size > 1 else ""
        base = f", base policy {self.args.base.base_policy}" if hasattr(self.args, "base") else ""
        self._say(f"{steps} in {num_envs} environments{ranks}{base}, seed {self.args.seed}")
        self._say(f"{'continuing in' if self.continued else 'everything goes to'} {self.run_dir}")
        settings = flat_settings(dataclasses.asdict(self.args))
        if self.run.track:
            import wandb

            wandb.run.name = self.run_dir.name
        best = self.run_dir / "best_model" / "best_model.pt"
        if self.finalists:
            self._place_best(self.finalists[0]["step"])
        elif best.is_file() and step_of(best) > self.first_step:  # it will be made again
            best.unlink()
        evaluations = self.run_dir / "eval_results" / "evaluations.jsonl"
        if self.continued and evaluations.is_file():  # what was evaluated after the checkpoint is evaluated again
            lines = self._evaluations(evaluations)
            write_atomic(evaluations, lambda temporary: temporary.write_text("".join(line + "\n" for line in lines)))
            self.result = json.loads(lines[-1]) if lines else None
            if self.result and self.reference_success is None:
                self.reference_success = self.result["reference_success_rate"]
        purge = self.first_step + 1 if self.continued else None
        self.writer = open_curves(self.run_dir, purge_step=purge)  # after wandb, which patches TensorBoard's writer
        if not self.continued:
            write_json(self.run_dir / "config.json", describe_run(self.script, self.args))
            table = "".join(f"|{key}|{value}|\n" for key, value in settings.items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}")
        self.writer.add_text("command", shlex.join(["python", *sys.argv]), self.first_step)

    def _evaluations(self, path: Path) -> list[str]:
        """The lines of evaluations.jsonl up to the resumed step; one that was cut off when the run died is left out."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            try:
                json.loads(lines[-1] if lines else "{}")
            except json.JSONDecodeError:
                lines.pop()
            evaluations = [strict_json(line) for line in lines]
            for each in evaluations:
                rates = each["success_rate"], each["reference_success_rate"]
                if type(each["step"]) is not int or each["step"] < 0 or not all(map(is_rate, rates)):
                    raise ValueError(f"step {each['step']!r:.80}, success {rates!r:.80}")
            known = self.first_step - self.evaluation_due  # the last step whose evaluation is complete
            return [line for line, each in zip(lines, evaluations) if each["step"] <= known]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SO101Error(f"{path}: damaged ({error!r:.200}); move it away") from error

    # -- evaluation

    def _recent_means(self) -> dict[str, float]:
        """Means of every value over the last training episodes."""
        keys = dict.fromkeys(key for episode in self.recent for key in episode)
        return {key: episode_mean(self.recent, key) for key in keys}

    def _evaluate(self, film: Path | None) -> dict[str, float]:
        """Means over the episodes of an evaluation, whose seeds are used for nothing else; films the first one."""
        seeds = [VALIDATION_SEED + i for i in range(self.run.eval_episodes)]
        episodes = evaluate(self.act, self.eval_envs, seeds, trace=film is not None)
        success, magnitude = (episode_mean(episodes, key) for key in ("success", "residual_magnitude"))
        if self.reference_success is None:  # at the start most agents are their base
            alone = evaluate(no_residual, self.eval_envs, seeds) if magnitude else episodes
            self.reference_success = episode_mean(alone, "success")
        if film:
            title = "agent" if self.eval_envs.base_policy is None else "base and residual"
            write_video(self.eval_envs, {title: episodes[:1]}, film)
        estimates = [name for name in ("estimate_error_m", "estimate_error_rad") if name in episodes[0]]
        return {
            "success_rate": success,
            "mean_return": episode_mean(episodes, "return"),
            "mean_length": episode_mean(episodes, "length"),
            "residual_magnitude": magnitude,
            "reference_success_rate": self.reference_success,
            **{f"mean_{name}": episode_mean(episodes, name) for name in estimates},
            **{f"residual_to_base/{joint}": ratio for joint, ratio in residual_to_base(episodes).items()},
        }

    def _place_best(self, step: int) -> None:
        """Make the model of this step best_model.pt."""
        copy_file(self.run_dir / "best_model" / self._model_name(step), self.run_dir / "best_model" / "best_model.pt")

    def _choose_best(self) -> dict[str, Any]:
        """The best of the finalists, with its means over final_eval_episodes, those of its evaluation and more."""
        run, finalists = self.run, self.finalists
        more = [VALIDATION_SEED + i for i in range(run.eval_episodes, run.final_eval_episodes)]
        needed = finalists[0]["success_rate"] - RIVAL_EPISODES / run.eval_episodes
        rivals = [each for each in finalists if each["success_rate"] >= needed]
        if not more or len(rivals) < 2:
            return {**finalists[0], "episodes": run.eval_episodes}
        share, compared = len(more) / run.final_eval_episodes, []
        last = copy.deepcopy(self.agent.state_dict())
        try:
            for each in rivals:
                load_weights(self.agent, self.weights[each["step"]], self._model_name(each["step"]))
                episodes = evaluate(self.act, self.eval_envs, more)
                means = dict(zip(BEST_BY, (episode_mean(episodes, key) for key in ("success", "return"))))
                compared.append({key: (1 - share) * each[key] + share * means[key] for key in BEST_BY})
                compared[-1] |= {"step": each["step"], "episodes": run.final_eval_episodes}
        finally:
            self.agent.load_state_dict(last)  # also if the base policy fails: it is what a resumed run goes on from
        return max(compared, key=rating)

    def _log_best(self) -> None:
        """Settings and the last evaluation, for the table of runs in TensorBoard's tab HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        settings = flat_settings(dataclasses.asdict(self.args))
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
        for summary in hparams(plain, {"eval/success_rate": 0.0, "eval/mean_reward": 0.0}):  # names; values are logged
            self.writer.file_writer.add_summary(summary)

    def _summary(self, best: dict[str, Any] | None, model: Path) -> dict[str, Any]:
        """What training_summary.json holds."""
        wall_time, means = time.perf_counter() - self.start_time, self._recent_means()
        base_time = sum(getattr(envs, "base_time_s", 0.0) for envs in (self.envs, self.eval_envs))
        return {
            "total_timesteps": self.global_step,
            "wall_time_s": wall_time,
            "cpu_time_s": time.process_time() - self.start_cpu,
            "steps_per_second": (self.global_step - self.first_step) / wall_time,
            "eval_time_s": self.eval_time_s,
            "ranks": self.world.size,
            "base_time_s": base_time,
            "interrupted": bool(self.stop_signum),
            "success_rate_100": means.get("success"),
            "mean_return_100": means.get("return"),
            "mean_length_100": means.get("length"),
            **self.metrics,
            "final_eval_success_rate": self.result["success_rate"] if self.result else None,
            "final_eval_mean_return": self.result["mean_return"] if self.result else None,
            "reference_eval_success_rate": self.reference_success,
            "best_eval_success_rate": best["success_rate"] if best else None,
            "best_eval_step": best["step"] if best else None,
            "best_eval_episodes": best["episodes"] if best else None,
            "best_checkpoint": str(self.run_dir / "best_model" / "best_model.pt" if best else model),
        }
