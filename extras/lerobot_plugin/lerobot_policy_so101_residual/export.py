"""Write a residual and its base policy as a policy directory of LeRobot: eval_so101.py --export-lerobot DIR."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature

from lerobot_policy_so101_residual.configuration_so101_residual import ACTION, IMAGES, STATE, SO101ResidualConfig
from lerobot_policy_so101_residual.modeling_so101_residual import BASE, RESIDUAL, SO101ResidualPolicy
from lerobot_policy_so101_residual.processor_so101_residual import make_so101_residual_pre_post_processors
from so101.camera import CAMERA
from so101.checkpoints import CHECKPOINT, load_file
from so101.onnx import OnnxPolicy
from so101.onnx_export import export_onnx
from so101.opencv import OpenCVPolicy
from so101.server import ChunkPolicy
from so101.trust import SERVED, Trust
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

ALONE = ("zero", "jacobian")  # base policies that are part of the project, and so of no directory
TRAINING = "train_config.json"  # the base's; it has paths of the machine that trained it, and no part in its actions

CARD = """---
library_name: lerobot
pipeline_tag: robotics
tags: [robotics, lerobot, so101, residual-policy, reinforcement-learning]
---

# Paper in square: a residual on {base}

This policy of LeRobot slides an A5 sheet of paper over a table into a rectangle of red tape, with an SO-101 arm. The
tape leaves {margin_mm:.0f} mm between sheet and tape on every side. Its action is that of a base policy, {base}, plus a
residual, which PPO has trained in simulation.

Thirty times a second the policy finds tape and sheet in the picture of `{camera}` with OpenCV, computes joint targets,
and limits them so that a fingertip presses lightly. If it does not see the sheet, the base acts alone, and the log says
so.

## Success in simulation

| | episodes | success | 95 % interval (Wilson) |
|---|---|---|---|
{rows}

All rows are the same held-out episodes, seeds {first_seed} to {last_seed}, with {physics}. This is one training run,
seed {train_seed}: runs with other seeds differ by several percent.

## Run it

```bash
pip install ppo-residual-so101 lerobot_policy_so101_residual    # beside LeRobot
lerobot-eval --policy.path=DIR --env.type=so101_residual --eval.n_episodes=50 --eval.batch_size=10
lerobot-rollout --policy.path=DIR --strategy.type=base --task="{instruction}" --duration=20 \\
  --robot.type=so101_follower --robot.port=/dev/ttyACM0 --robot.id=my_arm \\
  --robot.cameras="{{{camera}: {{type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}}}"
```

LeRobot 0.4.4 has `lerobot-record --policy.path=DIR` instead of `lerobot-rollout`. Run at 30 frames per second.

An arm that is not near the start pose first moves there, slowly and from above. `--policy.start_at_home=false` switches
this off. Other options: `--policy.firmware_p`, `--policy.servo_gain`, `--policy.tape_margin`, `--policy.marks=tags`,
`--policy.camera_turned=true`.

## Inputs and outputs

{features}

Joints are in LeRobot's {units}.

## Limits

- Trained and measured in simulation only. It has not run on a real arm.
- The camera must see the whole rectangle and stand opposite the arm (or `--policy.camera_turned=true`).
- {base_limit}

## Origin

{origin}
"""


class Draft:
    """A policy directory that is being written. It appears, whole, when `finish` is called.

    Args:
        model: a checkpoint of a training script, or an ONNX file.
        directory: where the policy goes; must not exist.
        trust: the permissions of the person who runs the command, with lerobot:DIR of the base policy.

    Raises:
        SO101Error: the model, or its base policy, cannot be part of such a directory.
    """

    def __init__(self, model: str, directory: str, trust: Trust):
        self.model, self.directory = model, Path(directory)
        self._temporary = tempfile.TemporaryDirectory(prefix=".", dir=self.directory.absolute().parent)
        self.path = Path(self._temporary.name) / self.directory.name
        self.path.mkdir()
        self.train_seed: int | None = None
        if Path(model).suffix == ".onnx":
            shutil.copyfile(model, self.path / RESIDUAL)
        else:
            export_onnx(model, self.path / RESIDUAL, trust)
            self.train_seed = load_file(model, CHECKPOINT)["args"].get("seed")
        residual = OnnxPolicy(str(self.path / RESIDUAL), trust)
        self.metadata, self.task, base = residual.metadata, residual.task, residual.base
        self.spec, _ = trust.resolve(self.metadata["base_policy"], model)
        features, self.cameras = {}, {}
        if self.spec.startswith(SERVED):
            kind, _, source = self.spec.partition(":")
            if kind != "lerobot":
                raise SO101Error(f"{model}: its base policy is behind {self.spec}; name its files: --allow lerobot:DIR")
            shutil.copytree(source, self.path / BASE, ignore=lambda folder, names: {TRAINING} & {*names})
            self.cameras = dict(base.camera_of)
            features = {IMAGES + name: tuple(base.client.policy.images[name]) for name in self.cameras}
        elif self.spec not in ALONE:
            raise SO101Error(
                f"{model}: its base policy is {self.spec}, which no directory can hold; only a policy of LeRobot, "
                f"{' and '.join(ALONE)} can be exported with their residual"
            )
        if CAMERA not in self.cameras.values():
            self.cameras[CAMERA] = CAMERA
            features[IMAGES + CAMERA] = (3, *OpenCVPolicy.own_size)
        config = SO101ResidualConfig(cameras=self.cameras, device="cpu")
        config.input_features = {STATE: PolicyFeature(FeatureType.STATE, (ACT_DIM,))}
        config.input_features |= {key: PolicyFeature(FeatureType.VISUAL, shape) for key, shape in features.items()}
        config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (ACT_DIM,))}
        for pipeline in make_so101_residual_pre_post_processors(config):
            pipeline.save_pretrained(self.path)
        config.save_pretrained(self.path)
        self.base_name = "an arm at rest" if self.spec == "zero" else "the scripted pusher"
        if isinstance(base, ChunkPolicy):
            self.base_name = f"a policy of type {base.client.policy.config.type}"
        # as anybody will load it
        self.policy = SO101ResidualPolicy.from_pretrained(self.path).arms.policy

    def finish(self, columns: dict[str, dict[str, Any]], seeds: list[int], task: Any) -> None:
        """Write the model card, and put the directory in place.

        Args:
            columns: summaries of the evaluations, by title.
            seeds: seeds of their episodes.
            task: settings of the task in the evaluations.
        """
        rows = []
        for title, summary in columns.items():
            low, high = summary["success_ci95"]
            rate = f"{summary['success_rate']:.3f} | {low:.3f} to {high:.3f}"
            rows.append(f"| {title} | {len(seeds)} | {rate} |")
        inputs = PreTrainedConfig.from_pretrained(self.path).input_features
        shapes = [f"- `{key}` {tuple(feature.shape)}" for key, feature in inputs.items()]
        meta = self.metadata
        wide = "arm" if task.arm_randomization else "full" if task.full_randomization else ""
        git, versions = meta.get("git", {}), meta.get("versions", {})
        origin = [f"- residual: {meta.get('script', 'not recorded')}, {meta['global_step']} steps"]
        origin += [f"- commit: {git.get('commit') or 'not recorded'}"]
        origin += [f"- {name}: {version}" for name, version in versions.items()]
        served = self.spec.startswith(SERVED)
        text = CARD.format(
            base=self.base_name, margin_mm=1000 * task.tape_margin, rows="\n".join(rows),
            first_seed=seeds[0], last_seed=seeds[-1],
            camera=next(name for name, camera in self.cameras.items() if camera == CAMERA),
            physics=f"{wide or ('default' if task.randomize else 'no')} randomisation",
            train_seed="not recorded" if self.train_seed is None else self.train_seed, features="\n".join(shapes),
            instruction=meta["server"].instruction,
            units={"deg": "degrees, the gripper in 0 to 100", "norm": "-100 to 100, the gripper in 0 to 100"}.get(
                meta["server"].units or "deg", meta["server"].units
            ),
            base_limit="The base in `base/` acts as it was saved; retrained, it needs a new residual." if served else
            "Without a view of the sheet the arm rests, because the base does not see.",
            origin="\n".join(origin),
        )  # fmt: skip
        (self.path / "README.md").write_text(text, encoding="utf-8")
        os.rename(self.path, self.directory)
        self._temporary.cleanup()
