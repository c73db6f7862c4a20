"""The documentation site: README.md and the pages below docs/, as they stand in the repository.

`sphinx-build -W --keep-going -c docs/site . build/site` makes it; a broken link or anchor, a missing picture and a page
that nav.md leaves out are errors. README.md is the start page, and nav.md the navigation. The site asks no other server
for anything: system fonts, its own search index, no badges.
"""

import tomllib
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# address of the repository, without a slash at the end
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

project = "Residual PPO for the SO-101"
html_title = f"{project} {yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version']}"
project_copyright = "MIT licence"

root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/*.ipynb", "assets/*.md", "benchmark/**.md"]
exclude_patterns = ["**/.*", "logs", "outputs", "wandb", "build", "dist", "tests", "extras"]
extensions = ["myst_nb"]
myst_heading_anchors = 4
myst_disable_syntax = ["myst_line_comment", "myst_block_break", "myst_target"]  # GitHub prints these lines
smartquotes = False
highlight_language = "none"  # for blocks that do not name theirs, as on GitHub
nb_execution_mode = "off"  # the notebook is shown with the outputs that it holds; .ci/run executes it
suppress_warnings = ["misc.highlighting_failure"]  # shell lines of the notebook that end with a backslash

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "",
    "top_of_page_buttons": ["view"],
}
pygments_style = "friendly"  # with colours for the lines of a diff


def complete_source(app: Sphinx, name: str, source: list[str]) -> None:
    """Add what GitHub must not show: the navigation below the start page, and the head of the reports of sweeps.

    Links lead to these reports; navigation and search leave them out.
    """
    if name == root_doc:
        source[0] += (HERE / "nav.md").read_text()
    elif name.startswith("benchmark/results/"):
        source[0] = "---\norphan: true\nnosearch: true\n---\n" + source[0]


def point_to_repository(app: Sphinx, page: nodes.document) -> None:
    """Let links to files that are no pages lead to the repository, and drop pictures that other servers send."""
    folder = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(page.findall(addnodes.download_reference)):
        file = (folder / link["reftarget"]).resolve().relative_to(app.srcdir)
        link.replace_self(nodes.reference("", "", *link.children, refuri=f"{REPOSITORY}/blob/main/{file}"))
    for picture in list(page.findall(nodes.image)):
        if "://" in picture["uri"]:
            shown = picture.parent if isinstance(picture.parent, nodes.reference) else picture
            shown.parent.remove(shown)
    for paragraph in list(page.findall(nodes.paragraph)):
        if not paragraph.astext().strip() and not list(paragraph.findall(nodes.image)):
            paragraph.parent.remove(paragraph)


def redirect_to_start_page(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which leads to the start page."""
    if error is None and app.builder.format == "html":
        text = f'<!doctype html><title>{project}</title><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (app.outdir / "index.html").write_text(text)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete_source)
    app.connect("doctree-read", point_to_repository, priority=100)  # before Sphinx copies what links lead to
    app.connect("build-finished", redirect_to_start_page)
