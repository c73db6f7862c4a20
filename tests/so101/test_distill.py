"""Students that see: DAgger, and what becomes of a student."""

import dataclasses
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, error_of, load, module_of, run_script, train
from gymnasium.vector import AutoresetMode

from so101 import distill
from so101.base import flat_observation, with_sheet
from so101.checkpoint_policy import CheckpointPolicy
from so101.checkpoints import save_tensors
from so101.distill import Args, DAgger, Dagger, Networks, Samples, Student, measured
from so101.evaluation import evaluate, no_residual
from so101.networks import sheet_to_tip
from so101.policies import load_policy
from so101_env import OBS, TAPE_CENTER_M, SO101ResidualVectorEnv, base_observation, sheet_pose
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

NET = Networks(image_size=32, hidden_size=32)
# a few seconds that still have every part: the teacher acts, the student acts, checkpoints, evaluations, a short end
TINY = (
    "--total-timesteps 1000 --num-envs 8 --num-steps 16 --teacher-steps 256 --updates 3 --minibatch-size 15 "
    "--image-size 32 --hidden-size 32 --train-episode-steps 20 --checkpoint-every 500 --eval-every 500 "
    "--eval-episodes 2 --final-eval-episodes 0 --visual-randomization"
).split()


def distil(log_dir: Path, *flags: str) -> Path:
    """Distil to the end, in this process; returns the run's directory."""
    return train(log_dir, *flags, script="so101.distill")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A residual on the pusher that is worth distilling: it moves."""
    flags = "--base-policy jacobian --total-timesteps 2048 --eval-every 0 --tape-margin 0.03".split()
    return str(train(tmp_path_factory.mktemp("teacher"), *flags) / "final_model.pt")


@pytest.fixture(scope="session")
def run(teacher, tmp_path_factory) -> Path:
    """The directory of a finished tiny distillation, as a user starts it."""
    log_dir = tmp_path_factory.mktemp("distill")
    done = run_script("so101.distill", "--model", teacher, "--log-dir", str(log_dir), *TINY)
    assert done.returncode == 0, done.stderr
    (run,) = log_dir.iterdir()
    assert f"--model {run / 'best_model' / 'best_model.pt'}" in done.stdout and ", teacher " in done.stdout
    return run


# -- what the student may know, and what it is told


@pytest.mark.parametrize("base", ["zero", "jacobian"])
def test_a_student_acts_on_what_a_real_arm_has(teacher, base, tmp_path):
    """Elsewhere in the observation, not in the pictures, the sheet is moved: nothing that the student does changes."""
    torch.manual_seed(0)
    path = teacher if base == "jacobian" else str(Path(distill.ASSETS) / "pretrained.pt")
    rng, answers = np.random.default_rng(0), []
    flat = rng.normal(0, 0.1, (2, 25)).astype(np.float32)
    images, command = rng.integers(0, 255, (2, 32, 32, 3)).astype(np.uint8), rng.normal(0, 0.1, (2, 6))
    student = Student(NET)
    for _ in range(2):
        checkpoint = CheckpointPolicy(path)
        policy = distill.StudentPolicy(student, checkpoint.base, NET, checkpoint.args.task)
        policy.reset(np.ones(2, bool))
        obs = base_observation(flat, command, cameras=("top",), render=lambda camera, ids, size: images[ids])
        answers.append([policy.act(obs, np.ones(2, bool)) for _ in range(3)])
        for name in ("sheet_pos", "sheet_quat", "tape_minus_sheet"):
            flat[:, OBS[name]] += 0.3
    np.testing.assert_array_equal(*answers)
    assert np.abs(answers[0]).max() > 0
    images = images[::-1].copy()  # and it does look
    obs = base_observation(flat, command, cameras=("top",), render=lambda camera, ids, size: images[ids])
    assert not np.array_equal(policy.act(obs, np.ones(2, bool)), answers[0][2])


def test_estimated_observation_puts_the_sheet_where_it_is_thought_to_be():
    rng = np.random.default_rng(0)
    envs = SO101ResidualVectorEnv(4, "jacobian")
    envs.reset(seed=0)
    envs.step(rng.uniform(-1, 1, (4, 6)))
    obs = base_observation(envs.full_observation, envs.command)
    xy, yaw = sheet_pose(envs.full_observation)
    told = flat_observation(with_sheet(obs, np.column_stack([xy, yaw])))
    np.testing.assert_allclose(told, envs.full_observation, atol=1e-4)  # the sheet's height is that at rest
    elsewhere = with_sheet(obs, np.column_stack([xy + 0.02, yaw - 0.1]))
    moved_xy, moved_yaw = sheet_pose(flat_observation(elsewhere))
    np.testing.assert_allclose(moved_xy, xy + 0.02, atol=1e-6)
    np.testing.assert_allclose(moved_yaw, yaw - 0.1, atol=1e-6)
    student, state = Student(NET), torch.from_numpy(measured(obs))
    pose = np.column_stack([xy - TAPE_CENTER_M, yaw]) / distill.POSE_SCALE
    gap = student.finder.sheet_to_tip(torch.tensor(pose, dtype=torch.float32), state)
    np.testing.assert_allclose(gap, sheet_to_tip(envs.full_observation), atol=1e-4)


def test_while_the_teacher_acts_episodes_are_its_own_and_every_answer_is_kept(teacher):
    """To the bit, over resets; the kept poses are where the sheets are, the kept answers what moved the arm."""
    policy = CheckpointPolicy(teacher)
    task = policy.args.task
    kwargs = {"task": task, "max_episode_steps": 40}
    alone = SO101ResidualVectorEnv(3, CheckpointPolicy(teacher), **kwargs)
    dagger, samples = Dagger(Student(NET), policy, NET, task), Samples(180, NET)
    envs = SO101ResidualVectorEnv(3, dagger, **kwargs)
    dagger.teacher_acts = True
    alone.reset(seed=4)
    envs.reset(seed=4)
    sheets, deltas, episodes = [], [], []
    for _ in range(60):
        sheets.append(envs.qpos[:, 6:])
        episodes += distill.rollout(envs, dagger, samples, 1)
        *_, info = alone.step(np.zeros((3, ACT_DIM)))
        deltas.append(info["base_delta_rad"])  # of an episode that has ended, the next one's: left out below
        np.testing.assert_array_equal(envs.qpos, alone.qpos)
    assert samples.count == 180 and set(samples.rows["steps"]) == set(range(40))
    assert len(episodes) >= 3 and all(episode["length"] <= 40 and episode["return"] < 10 for episode in episodes)
    sheets = np.concatenate(sheets)
    pose = samples.rows["pose"] * distill.POSE_SCALE
    np.testing.assert_allclose(pose[:, :2] + TAPE_CENTER_M, sheets[:, :2], atol=1e-5)
    np.testing.assert_allclose(pose[:, 2], sheets[:, 3], atol=1e-5)
    moved = samples.rows["base_delta"] * task.act_scale + samples.rows["residual"] * task.alpha * task.act_scale
    goes_on = np.append(samples.rows["steps"], envs.steps)[3:] > 0
    np.testing.assert_allclose(moved[goes_on], np.concatenate(deltas)[goes_on], atol=1e-6)
    assert goes_on.sum() > 160


def test_an_update_follows_the_gradient_of_the_whole_minibatch():
    """The halves that two threads take add up to what one thread computes of all of it."""
    torch.manual_seed(0)
    student, samples, rng = Student(NET), Samples(64, NET), np.random.default_rng(0)
    rows = {name: rng.normal(0, 1, array.shape).astype(array.dtype) for name, array in samples.rows.items()}
    pictures = rng.integers(0, 255, (64, 32, 32, 3)).astype(np.uint8)
    samples.add([pictures], **rows)
    args = DAgger(updates=1, minibatch_size=16, max_grad_norm=1e6, pose_coef=0.7)
    chosen = torch.randint(64, (16,), generator=torch.Generator().manual_seed(3)).numpy()
    state, base, residual, pose = (torch.from_numpy(rows[name][chosen]) for name in
                                   ("measured", "base_delta", "residual", "pose"))  # fmt: skip
    found, estimate = student.finder([torch.from_numpy(pictures[chosen])], state)
    loss = (student.act(found, state, base) - residual).abs().mean() + 0.7 * (estimate - pose).abs().mean()
    expected = torch.autograd.grad(loss, list(student.parameters()))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    with ThreadPoolExecutor(2) as pool:
        errors = distill.update(student, optimizer, samples, args, torch.Generator().manual_seed(3), pool)
    for parameter, gradient in zip(student.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    off = (estimate - pose).detach().numpy() * distill.POSE_SCALE
    assert errors["position_error_m"] == pytest.approx(np.linalg.norm(off[:, :2], axis=1).mean(), rel=1e-4)
    assert errors["yaw_error_rad"] == pytest.approx(np.abs(off[:, 2]).mean(), rel=1e-4)


# -- the script as a user runs it


def test_artefacts(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "best_model", "checkpoints", "config.json", "eval_results", "final_model.pt", "tensorboard",
        "training_summary.json",
    }  # fmt: skip
    steps = [json.loads(line)["step"] for line in (run / "eval_results" / "evaluations.jsonl").read_text().splitlines()]
    assert steps == [512, 1000] and {path.name for path in (run / "checkpoints").iterdir()} == {
        "distill_512_steps.pt", "distill_1000_steps.pt"
    }  # fmt: skip
    saved = load(run / "final_model.pt")
    assert saved["training"] is None and saved["global_step"] == 1000 and saved["task"]["tape_margin"] == 0.03
    assert (run / "final_model.pt").stat().st_size < 1e6


@pytest.mark.slow
def test_every_resume_equals_the_uninterrupted_run_whatever_the_threads(run, teacher, tmp_path):
    """Its pictures are drawn again, with the noise that they had."""
    again = distil(tmp_path, "--model", teacher, "--num-threads", "1", *TINY)
    first = run / "checkpoints" / "distill_512_steps.pt"
    assert_same(load(again / "checkpoints" / first.name)["training"], load(first)["training"])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy / "run")
    resumed = distil(copy, "--resume", str(copy / "run" / "checkpoints" / first.name), "--num-threads", "1")
    assert_same(load(resumed / "final_model.pt")["agent"], load(run / "final_model.pt")["agent"])


@pytest.mark.slow
def test_a_distillation_that_is_stopped_in_its_last_step_can_be_resumed(run, teacher, tmp_path, monkeypatch):
    script = module_of("so101.distill")
    update = script.update

    def interrupted(student, optimizer, samples, *others):
        if samples.count == 1000:
            signal.raise_signal(signal.SIGINT)
        return update(student, optimizer, samples, *others)

    with monkeypatch.context() as patch:
        patch.setattr(script, "update", interrupted)
        stopped = train(tmp_path, "--model", teacher, *TINY, script="so101.distill", code=128 + signal.SIGINT)
    moved = shutil.copy(teacher, tmp_path / "moved.pt")
    resumed = distil(tmp_path / "resumed", "--resume", str(stopped / "interrupted_model.pt"), "--model", str(moved))
    for name in ("final_model.pt", "best_model/best_model.pt"):
        assert_same(load(resumed / name)["agent"], load(run / name)["agent"], name)


@pytest.mark.slow
def test_a_student_is_evaluated_beside_its_teacher_filmed_and_recorded(run, tmp_path):
    flags = ["--model", str(run / "final_model.pt"), "--episodes", "2"]
    result, film, demos = tmp_path / "result.json", tmp_path / "film.gif", tmp_path / "demos"
    done = run_script(
        "eval_so101.py",
        *flags,
        "--json",
        str(result),
        "--video",
        str(film),
        "--video-episodes",
        "1",
        "--size",
        "96",
        "96",
    )
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout and "teacher" in done.stdout and "visual too" in done.stdout
    content = json.loads(result.read_text())
    teacher = content["base"]
    assert teacher["success_rate"] == content["base_success_rate"] and "mean_estimate_error_m" not in teacher
    assert 0.001 < content["mean_estimate_error_m"] < 0.5 and film.stat().st_size > 1000
    assert content["task"]["visual_randomization"] is True
    done = run_script("eval_so101.py", *flags, "--no-base", "--no-visual-randomization", "--json", str(result))
    assert done.returncode == 0 and json.loads(result.read_text())["task"]["visual_randomization"] is False
    done = run_script("so101.record", *flags, "--dataset", str(demos), "--cameras", "top")
    assert done.returncode == 0 and (demos / "meta" / "info.json").is_file(), done.stderr


@pytest.mark.slow
def test_a_student_can_be_corrected(run, tmp_path):
    """As a base policy it does what it does alone, to the bit, until a residual is learned; and the run resumes."""
    spec = f"checkpoint:{run / 'final_model.pt'}"
    flags = (
        "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-timesteps 128 --checkpoint-every 64 --eval-every 128 "
    )
    flags += "--eval-episodes 2 --final-eval-episodes 0 --visual-randomization --tape-margin 0.03"
    whole = train(tmp_path, "--base-policy", spec, *flags.split())
    first = json.loads((whole / "eval_results" / "evaluations.jsonl").read_text().splitlines()[0])
    student = load_policy(spec)
    envs = SO101ResidualVectorEnv(2, student, student.task, autoreset_mode=AutoresetMode.DISABLED)
    episodes = evaluate(no_residual, envs, [distill.VALIDATION_SEED, distill.VALIDATION_SEED + 1])
    assert first["mean_return"] == np.mean([episode["return"] for episode in episodes])
    resumed = train(tmp_path, "--resume", str(whole / "checkpoints" / "ppo_residual_64_steps.pt"))
    assert_same(load(resumed / "final_model.pt")["agent"], load(whole / "final_model.pt")["agent"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--model nowhere.pt", "nowhere.pt: no such file"),
        ("--model STUDENT", "not a checkpoint of this version"),
        ("--cameras roof", "--cameras roof: give one or more of top and wrist"),
        ("--cameras top top", "--cameras top top"),
        ("--image-size 4", "--image-size"),
        ("--updates 0", "--updates"),
        ("--minibatch-size 1", "--minibatch-size"),
        ("--run-name a/b", "--run-name 'a/b'"),
        ("--resume STUDENT", "is finished, and has no samples to go on with"),
        ("--resume STUDENT --total-timesteps 2000", "is finished, and has no samples to go on with"),
        ("--resume FIRST --updates 7", "--updates 7: FIRST was trained with 3"),
    ],
)
def test_bad_flags_are_refused(run, tmp_path, monkeypatch, flags, words):
    names = {"STUDENT": str(run / "final_model.pt"), "FIRST": str(run / "checkpoints" / "distill_512_steps.pt")}
    for name, path in names.items():
        flags, words = flags.replace(name, path), words.replace(name, path)
    line = error_of(monkeypatch, "so101.distill", "--log-dir", str(tmp_path / "logs"), *flags.split())
    assert words in line and "\n" not in line and not (tmp_path / "logs").exists()


def test_students_that_cannot_be_used_end_with_one_line(run, tmp_path, monkeypatch):
    finished, first = load(run / "final_model.pt"), load(run / "checkpoints" / "distill_512_steps.pt")
    path = tmp_path / "damaged.pt"
    for damaged in (
        {**finished, "args": {**finished["args"], "networks": {"cameras": ("top",)}}},
        {**finished, "base_fingerprint": "other"},
        {**finished, "agent": {}},
        {**finished, "task": {}},
        {key: value for key, value in finished.items() if key != "base"},
    ):
        save_tensors(path, damaged)
        with pytest.raises(SO101Error, match=str(path)):
            load_policy(f"checkpoint:{path}")
    for key, value in (
        ("samples", {}), ("optimizer", {}), ("envs", {}), ("generator", torch.zeros(3)),
        ("samples", {name: rows[1:] for name, rows in first["training"]["samples"].items()}),
        ("samples", {**first["training"]["samples"], "qpos": first["training"]["samples"]["qpos"] + 1e30}),
    ):  # fmt: skip
        save_tensors(path, {**first, "training": {**first["training"], key: value}})
        line = error_of(monkeypatch, "so101.distill", "--resume", str(path), "--log-dir", str(tmp_path / "logs"))
        assert line.startswith(f"{path}: cannot be continued") and not (tmp_path / "logs").exists()
    for rate in (2.0, -0.5):
        save_tensors(path, {**first, "teacher_success": rate})
        line = error_of(monkeypatch, "so101.distill", "--resume", str(path), "--log-dir", str(tmp_path / "logs"))
        assert line.startswith(f"{path}: cannot be continued") and not (tmp_path / "logs").exists()
    save_tensors(path, {**first, "teacher_fingerprint": "other"})
    line = error_of(monkeypatch, "so101.distill", "--resume", str(path), "--log-dir", str(tmp_path / "logs"))
    assert "its teacher has other weights now" in line
    monkeypatch.setattr(module_of("eval_so101.py"), "evaluate", lambda *_, **__: pytest.fail("found out too late"))
    for damaged, words in (
        ({**finished, "args": finished["args"] | {"model": "gone.pt"}}, "its teacher, gone.pt, is missing"),
        ({**finished, "teacher_fingerprint": "other"}, "has other weights now; evaluate without it: --no-base"),
    ):
        save_tensors(path, damaged)
        assert words in error_of(monkeypatch, "eval_so101.py", "--model", str(path))


def test_settings_are_those_of_the_file(run):
    """No default of today decides about a student of yesterday."""
    student = load_policy(f"checkpoint:{run / 'final_model.pt'}")
    assert dataclasses.asdict(student.task) == load(run / "final_model.pt")["task"]
    assert student.task.visual_randomization and Args().networks.image_size != 32 == student.image_size[0]


FLAKY = """
from pathlib import Path
from so101.pusher import JacobianPolicy
from so101_env import BasePolicyError

class Flaky(JacobianPolicy):
    def act(self, obs, mask):
        left = Path("calls_left")  # until it fails; without the file it does not
        if left.exists():
            left.write_text(str(int(left.read_text()) - 1))
            if int(left.read_text()) < 0:
                raise BasePolicyError("the cable is out")
        return super().act(obs, mask)
"""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [60, 370])
def test_a_base_policy_that_fails_loses_nothing(calls, tmp_path, monkeypatch):
    """Whether in a rollout or, later, in an evaluation: what is resumed equals the run in which it did not fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flaky.py").write_text(FLAKY)
    flags = "--base-policy flaky:Flaky --total-timesteps 512 --eval-every 0 --eval-episodes 1 --final-eval-episodes 0"
    path = str(train(tmp_path / "teacher", *flags.split()) / "final_model.pt")
    flags = ["--model", path, "--allow", "flaky:Flaky", *TINY]
    flags[flags.index("--eval-every") + 1] = "300"
    whole = distil(tmp_path / "whole", *flags)
    # before: evaluations of 400 steps, of the teacher and at step 384
    (tmp_path / "calls_left").write_text(str(calls + 800))
    line = error_of(monkeypatch, "so101.distill", "--log-dir", str(tmp_path / "logs"), *flags)
    (run,) = (tmp_path / "logs").iterdir()
    model = run / "interrupted_model.pt"
    assert "the cable is out" in line and line.endswith(f"--resume {model} --allow flaky:Flaky")
    assert 0 < load(model)["global_step"] < 1000
    (tmp_path / "calls_left").unlink()
    resumed = distil(tmp_path / "logs", "--resume", str(model), "--allow", "flaky:Flaky")
    assert_same(load(resumed / "final_model.pt")["agent"], load(whole / "final_model.pt")["agent"])
