"""Uploads to a stand-in for the Hugging Face Hub: what arrives there, what is refused, what is lost when it fails."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import run_script
from fake_hub import TOKEN, fake_hub

from so101.hub import CARD, card, connect, files_of, kind_of
from so101_sim.control import JOINTS
from so101_sim.errors import SO101Error

pytest.importorskip("huggingface_hub")
INFO = {
    "codebase_version": "v3.0", "total_episodes": 2, "total_frames": 90, "fps": 30, "robot_type": "so101_follower",
    "features": dict.fromkeys(("action", "observation.state"), {"shape": [6], "names": list(JOINTS), "unit": "deg"}),
}  # fmt: skip
REPO, KEY = "me/demos", "datasets/me/demos"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that the library talks to, with the token of a user who may write."""
    from huggingface_hub import constants

    with fake_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def demos(tmp_path):
    """The directory of a dataset; its content does not matter to the hub."""
    path = tmp_path / "demos"
    (path / "meta").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(INFO))
    (path / "data").mkdir()
    (path / "data" / "file-000.parquet").write_bytes(b"rows")
    (path / ".cache").mkdir()
    (path / ".cache" / "secret").write_text("not to be uploaded")
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def test_a_dataset_is_uploaded_whole_private_and_with_the_tag_of_its_format(hub, demos):
    before = contents(demos)
    address = connect("--push-to-hub", REPO, "dataset").push(demos)
    assert address == f"{hub.url}/datasets/{REPO}"
    assert hub.tags[KEY] == {"v3.0"} and hub.private[KEY] is True
    arrived = {name: data for name, data in hub.repos[KEY].items() if name not in (CARD, ".gitattributes")}
    assert arrived == {name: data for name, data in before.items() if not name.startswith(".cache")}
    assert contents(demos) == before


def test_the_card_of_a_dataset_is_what_the_hub_and_lerobot_look_for(demos):
    yaml = pytest.importorskip("yaml")
    _, head, body = card(demos, REPO).split("---\n")
    head = yaml.safe_load(head)
    assert "LeRobot" in head["tags"] and head["task_categories"] == ["robotics"] and head["license"]
    assert list(Path(demos).glob(head["configs"][0]["data_files"].replace("*/*", "*"))) and "2 episodes" in body


def test_a_policy_is_uploaded_with_a_card_of_its_own_or_the_one_it_has(hub, tmp_path):
    file, folder = tmp_path / "policy.onnx", tmp_path / "policy"
    file.write_bytes(b"weights")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / CARD).write_text("its own card")
    connect("--push-to-hub", "lab/one", "model").push(file)
    connect("--push-to-hub", "lab/two", "model").push(folder)
    one, two = hub.repos["models/lab/one"], hub.repos["models/lab/two"]
    assert {*one} == {".gitattributes", "policy.onnx", CARD} and one["policy.onnx"] == b"weights"
    assert b"--model policy.onnx" in one[CARD] and two[CARD] == b"its own card" and "config.json" in two
    assert not hub.tags["models/lab/one"] and (kind_of(file), kind_of(folder)) == ("model", "model")


@pytest.mark.parametrize(
    "repo, message",
    [
        ("demos", "give NAME/REPOSITORY"),
        ("me/de mos", "give NAME/REPOSITORY"),
        ("a/b/c", "give NAME/REPOSITORY"),
        ("https://host/me/demos", "give NAME/REPOSITORY"),
        ("other/demos", "the token is for lab, me"),
    ],
)
def test_refused_names(hub, repo, message):
    with pytest.raises(SO101Error, match=message):
        connect("--push-to-hub", repo, "dataset")
    assert not hub.repos


def test_no_library_and_no_token(hub, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SO101Error, match=r"huggingface_hub: pip install .*\[hub\]"):
        patch.setitem(__import__("sys").modules, "huggingface_hub", None)
        connect("--push-to-hub", REPO, "dataset")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SO101Error, match="needs a token; log in"):
        connect("--push-to-hub", REPO, "dataset")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SO101Error, match="does not accept the token") as caught:
        connect("--push-to-hub", REPO, "dataset")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.role = "read"
    with pytest.raises(SO101Error, match="can only read") as caught:
        connect("--push-to-hub", REPO, "dataset")
    assert TOKEN not in str(caught.value) and not hub.repos


def test_content_of_others_is_not_replaced(hub, demos):
    target = connect("--push-to-hub", REPO, "dataset")
    hub.repos[KEY], hub.tags[KEY], hub.private[KEY] = {"notes.txt": b"mine"}, set(), True  # during the recording
    with pytest.raises(SO101Error, match="has files already"):
        target.push(demos)
    with pytest.raises(SO101Error, match="has files already"):
        connect("--push-to-hub", REPO, "dataset")
    assert hub.repos[KEY] == {"notes.txt": b"mine"}


def test_files_of_strangers(demos):
    """A link is not followed out of the directory; metadata that are not those of an SO-101 make no card."""
    (demos / "data" / "key").symlink_to(__file__)
    with pytest.raises(SO101Error, match="is a link to a file outside"):
        files_of(demos)
    (demos / "data" / "key").unlink()
    evil = {**INFO, "features": {**INFO["features"], "x\n---\nlicense: other": {}}}
    (demos / "meta" / "info.json").write_text(json.dumps(evil))
    assert "license: other" not in card(demos, REPO)
    for content in ("{", json.dumps({**INFO, "robot_type": "`\n# other"}), json.dumps({**INFO, "features": {}})):
        (demos / "meta" / "info.json").write_text(content)
        with pytest.raises(SO101Error, match="info.json"):
            card(demos, REPO)


FAILURES = [
    ("whoami", 401, "log in"),
    ("whoami", 500, "HTTP 500"),
    ("whoami", 0, "check the network"),
    ("repos/create", 403, "make a token that can write"),
    ("repos/create", 500, "HTTP 500"),
    ("preupload", 403, "make a token that can write"),
    ("objects/batch", 403, "make a token that can write"),
    ("commit", 409, "try later"),
    ("commit", 500, "HTTP 500"),
    ("commit", 0, "check the network"),
    ("/tag/", 500, "HTTP 500"),
    ("/tag/", 0, "check the network"),
]


@pytest.mark.parametrize("part, status, message", FAILURES)
def test_a_failure_is_one_line_and_the_next_upload_completes(hub, demos, part, status, message):
    before = contents(demos)
    hub.failures = {part: status}
    with pytest.raises(SO101Error, match=message) as caught:
        connect("--push-to-hub", REPO, "dataset").push(demos)
    text = str(caught.value)
    assert text.startswith(f"--push-to-hub {REPO}: ") and "\n" not in text and TOKEN not in text
    if part != "whoami":  # which fails before there is anything to upload
        again = shlex.split(text.partition("upload it again: ")[2])
        assert again[1:] == ["-m", "so101.hub", "--path", str(demos), "--repo", REPO]
    assert contents(demos) == before
    hub.failures = {}
    connect("--repo", REPO, "dataset", {*files_of(demos), CARD}).push(demos)
    assert hub.tags[KEY] == {"v3.0"} and hub.repos[KEY]["data/file-000.parquet"] == b"rows"
    with pytest.raises(SO101Error, match="has files already"):
        connect("--repo", REPO, "dataset", {*files_of(demos), CARD})


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch):
    """A recording whose upload fails keeps its dataset, and the printed command uploads it."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    with fake_hub() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        variables["HF_HUB_OFFLINE"] = None
        flags = ["--base-policy", "jacobian", "--dataset", "demos", "--episodes", "2", "--push-to-hub", REPO]
        done = run_script("so101.record", *flags, **variables | {"HF_TOKEN": "hf_wrong"})
        assert done.returncode == 2 and not Path("demos").exists() and done.stderr.count("\n") == 1, done.stderr
        hub.failures = {"commit": 500}
        done = run_script("so101.record", *flags, **variables)
        line = done.stderr.splitlines()[-1]
        assert (
            done.returncode == 2
            and "HTTP 500" in line
            and json.loads(Path("demos/meta/info.json").read_text())["total_episodes"] == 2
        )
        hub.failures = {}
        words = shlex.split(re.search(r"upload it again: python -m (.*)$", line)[1])
        done = run_script(*words, **variables)
        assert done.returncode == 0 and f"{hub.url}/{KEY}" in done.stdout, done.stderr
        assert hub.tags[KEY] == {"v3.0"} and "meta/info.json" in hub.repos[KEY]
        done = run_script("eval_so101.py", "--push-to-hub", "me/policy", **variables)
        assert done.returncode == 2 and "--export" in done.stderr
        done = run_script("so101.hub", "--path", "nothing", "--repo", REPO, **variables)
        assert done.returncode == 2 and "--path nothing" in done.stderr
