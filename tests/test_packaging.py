"""What is published: one version everywhere, links that hold on a package index, a notebook with its outputs."""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import so101

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLUGIN = tomllib.loads((ROOT / "extras/lerobot_plugin/pyproject.toml").read_text())
PAGES = [PROJECT["project"]["readme"], "extras/env_hub/README.md", "extras/lerobot_plugin/README.md"]
LINK = re.compile(r"\]\(([^)]+)\)|\b(?:src|href)=\"([^\"]+)\"")


def links_of(text: str) -> list[str]:
    """Targets of the links and pictures of a Markdown text."""
    return ["".join(found) for found in LINK.findall(text)]


def test_one_version_everywhere():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "so101.__version__"}
    cited = re.search(r'^version: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert {cited, latest, PLUGIN["project"]["version"]} == {so101.__version__}


def test_setuptools_reads_the_version_without_importing_anything():
    tree = ast.parse((ROOT / "so101" / "__init__.py").read_text())
    (value,) = [each.value for each in tree.body if isinstance(each, ast.Assign)]
    assert ast.literal_eval(value) == so101.__version__


@pytest.mark.parametrize("path", PAGES)
def test_links_of_pages_outside_the_repository_are_absolute(path):
    text = (ROOT / path).read_text()
    assert all(link.startswith(("https://", "#")) for link in links_of(text)), path


def test_links_are_found():
    """The test above would pass if no link was seen at all."""
    found = links_of('![a](assets/demo.gif) [b](https://x.org) <img src="c.png">')
    assert found == ["assets/demo.gif", "https://x.org", "c.png"]


def test_the_page_of_the_index_has_the_commands_of_an_installed_package():
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    modules = re.findall(r"python -m (\S+?)[\s`]", text)
    own = {"ppo_residual_so101", "eval_so101", *(f"so101.{path.stem}" for path in (ROOT / "so101").glob("*.py"))}
    assert len(modules) > 5 and {*modules} <= own
    assert not re.search(r"python \w+\.py|pip install -e|assets/", text)
    extras = re.search(r"ppo-residual-so101\[(.*?)\]", text)[1]
    assert {*extras.split(",")} <= {*PROJECT["project"]["optional-dependencies"]}


def test_the_source_distribution_has_every_tracked_directory():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone")
    grafted = re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    packages = {*PROJECT["tool"]["setuptools"]["packages"]}
    tracked = {Path(line).parts[0] for line in done.stdout.splitlines() if "/" in line}
    assert tracked - {".ci", ".github"} <= {*grafted} | packages


def test_the_notebook_has_outputs_and_nothing_of_the_machine():
    path = ROOT / "docs" / "quickstart.ipynb"
    text = path.read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    silent = re.compile(r"^(import |from |run = |if |\s+os\.|$)")
    for number, cell in enumerate(cells, 1):
        source, outputs = "".join(cell["source"]), cell["outputs"]
        assert cell["execution_count"] == number, source
        assert outputs or all(silent.match(line) for line in source.splitlines()), source
        assert not any(each["output_type"] == "error" for each in outputs), source
        printed = "".join("".join(each.get("text", "")) for each in outputs)
        assert "Traceback" not in printed and "error:" not in printed and "\r" not in printed, source
        assert not re.search(r"/(home|root|tmp|Users)/", printed), source
        if "plt.imshow" in source or "plt.plot" in source:
            assert any("image/png" in each.get("data", {}) for each in outputs), source
        if "Video(" in source:
            assert "<video" in "".join(outputs[0]["data"]["text/html"])
    assert len(text) < 1_500_000 and len(cells) > 5
