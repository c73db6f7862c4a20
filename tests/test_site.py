"""The documentation site, GitHub's files, and the address of the repository in them."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, environment

from so101.cli import _field_names

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FOLDERS = ["assets", "benchmark", "docs", "examples", "extras", "so101", "so101_sim", "tests"]


def parsed(path: Path) -> dict:
    """A YAML file."""
    return pytest.importorskip("yaml").safe_load(path.read_text())


def steps(path: Path) -> list[dict]:
    """The steps of all jobs of a workflow."""
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def files_named(path: Path) -> set[str]:
    """The files and directories that the steps of a workflow name."""
    named = set()
    for step in steps(path):
        named |= set(re.findall(r"(?:bash|-r|-c) (\S+)", step.get("run", "")))
        named |= set(step.get("with", {}).get("cache-dependency-path", "").split())
    return named


def test_the_workflow_runs_ci_on_the_supported_python():
    job = parsed(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["everything"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert [f">={step['with']['python-version']}" for step in job["steps"] if "setup-python" in str(step)] == [required]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_names_files_that_exist_and_may_only_read(path):
    assert files_named(path)
    for name in files_named(path):
        assert list(ROOT.glob(name)), name
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    allowed = {("docs.yml", "deploy"): {"pages": "write", "id-token": "write"}}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == allowed.get((path.name, name)), name
        assert job["timeout-minutes"] <= 150
    for action in [step["uses"] for step in steps(path) if "uses" in step]:
        assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action), (
            f"{action}: not GitHub's own, or no exact version"
        )


def test_ci_checks_what_github_reads():
    script = (ROOT / ".ci" / "run").read_text()
    assert "sphinx -q -W --keep-going -c docs/site . " in script
    commands = " ".join(line for line in script.splitlines() if line.startswith("check-jsonschema"))
    patterns = re.findall(r"\.github/\S+", commands)
    listed = " ".join(patterns)
    assert ".github/workflows/*.yml" in patterns
    assert FORMS and all(form.stem in listed for form in FORMS)


def test_the_form_for_arms_asks_what_decides():
    fields = {each["id"]: each["validations"]["required"] for each in parsed(FORMS[0])["body"]}
    assert FORMS[0].name == "arm.yml"
    assert {"command", "check", "voltage", "lerobot"} <= {name for name, required in fields.items() if required}


def test_the_address_of_the_repository_is_the_same_everywhere():
    """Whoever publishes the repository replaces the address in pyproject.toml, and this test finds the rest."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner, name = repository.rsplit("/", 2)[1:]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.yml"), ROOT / "pyproject.toml"]
    found = {}
    for path in pages:
        for each in re.findall(rf"([\w-]+)/{name}\b", path.read_text()):
            found.setdefault(each, []).append(path.name)
    assert {*found} == {owner}, found
    assert {"README.md", "config.yml", "pyproject.toml"} <= {*found[owner]}


def test_pages_name_files_that_exist():
    """Files of the repository that a page names without a link; the build checks the links."""
    named = [
        (page.name, name)
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
        if page.name != "CHANGELOG.md"  # it names files of earlier versions, too
        for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", page.read_text())
    ]
    assert len(named) > 20
    assert [each for each in named if not (ROOT / each[1]).exists()] == []


def build(source: Path, out: Path, builder: str) -> subprocess.CompletedProcess:
    """Build the site as `.ci/run` does; the builder "dummy" checks every page and link, and writes nothing."""
    flags = ["-q", "-W", "--keep-going", "-b", builder, "-c", str(source / "docs" / "site")]
    words = [sys.executable, "-m", "sphinx", *flags, str(source), str(out)]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)


BREAKS = {  # what is put at the end of a page, and what the build must say about it
    "See [this](result.md).": "result.md",
    "See [this](results.md#on-a-camera-police).": "on-a-camera-police",
    "See [this](#opencw).": "opencw",
    "See [this](../so101/network.py).": "network.py",
    "![this](../assets/camera.png)": "camera.png",
}


@pytest.mark.slow
def settings_of(script: str) -> type | None:
    """The dataclass with the flags of a script; None if it has none, as so101.serve."""
    path = next((p for p in (ROOT / script, ROOT / f"{script.replace('.', '/')}.py") if p.is_file()), None)
    if path is None:  # an example of a script of your own
        return None
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [name for name in vars(module) if name.endswith("Args") and vars(module)[name].__module__ == spec.name]
    return vars(module)[names[0]] if len(names) == 1 else None


def test_the_flags_of_documented_commands_exist(monkeypatch):
    """On the pages, in the docstrings of scripts, and in the scripts that call them; the rest may be placeholders."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    files = {*ROOT.rglob("*.md"), *ROOT.rglob("*.sh"), *ROOT.glob("*.py"), *ROOT.glob("so101/*.py"), ROOT / ".ci/run"}
    files |= {*ROOT.glob("benchmark/*.py")}
    found: dict[str, set[tuple[str, str]]] = {}
    for file in files - {ROOT / "CHANGELOG.md"}:  # it also has flags that are gone
        text = re.sub(r"\\+\n\s*", " ", file.read_text())  # commands of several lines
        for script, rest in re.findall(r"python3? (?:-m )?([\w./]+)((?: [^\n`|;&>#]*)?)", text):
            for flag in re.findall(r"(?<= )--([a-z][a-z0-9-]*)", rest):
                found.setdefault(script, set()).add((flag, file.name))
    ours = {script: settings for script in found if (settings := settings_of(script))}
    assert {"eval_so101.py", "ppo_residual_so101.py", "so101.drive", "benchmark/check.py"} <= {*ours}
    unknown = []
    for script, settings in ours.items():
        names = {name.replace("_", "-") for name in _field_names(settings)}
        unknown += [(script, *each) for each in found[script] if each[0].removeprefix("no-") not in {*names, "help"}]
    assert not unknown


def test_a_broken_link_fails_the_build(tmp_path):
    pytest.importorskip("myst_nb")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "logs", "outputs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    with open(source / "docs" / "vision.md", "a") as page:
        page.write("".join(f"\n{sentence}\n" for sentence in BREAKS))
    (source / "docs" / "new.md").write_text("# New\n\nThe navigation leaves this page out.\n")
    done = build(source, tmp_path / "out", "dummy")
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for said in [*BREAKS.values(), "new.md"]:
        assert len([line for line in warnings if said in line]) == 1, (said, done.stderr)
    assert len(warnings) == len(BREAKS) + 1, done.stderr  # and nothing else is broken


@pytest.mark.slow
def test_the_site_works_without_other_servers(tmp_path):
    """Every link within the site leads to a file and an element of it, and no page loads anything from elsewhere."""
    pytest.importorskip("myst_nb")
    done = build(ROOT, tmp_path / "out", "html")
    assert done.returncode == 0, done.stderr
    pages = {path: path.read_text() for path in (tmp_path / "out").rglob("*.html")}
    assert len(pages) > 20
    for path, html in pages.items():
        loaded = re.findall(r'<(?:img|script|source|video|iframe)[^>]*\ssrc="([^"]+)"', html)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="([^"]+)"', html)
        assert path.name == "index.html" or loaded
        assert not [each for each in loaded if "//" in each and not each.startswith("data:")], path
        for link in re.findall(r'<a [^>]*href="([^"]+)"', html):
            if "://" not in link:
                file, _, anchor = link.partition("#")
                target = (path.parent / file).resolve() if file else path
                assert target.is_file(), f"{path}: {link}"
                assert not anchor or f'id="{anchor}"' in pages[target], f"{path}: {link}"
