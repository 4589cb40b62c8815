"""README and docs: one screen, an index, links and commands that exist."""

import re

import pytest

from .pages import DOCUMENTS, ROOT, blocks_of

README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def named(path):
    return str(path.relative_to(ROOT))


def anchors_of(text):
    """Those of GitHub."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_says_what_it_is_on_one_screen():
    before_more = README.split("\nMore: ")[0]
    assert before_more != README and len(before_more.split()) <= 500
    assert len(README.split()) <= 600


def test_make_demo_and_make_test_are_the_readme_s_first_commands():
    lines = blocks_of(README, "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in lines] == ["make demo", "make test"]


def test_the_index_names_each_page():
    index = (ROOT / "docs/README.md").read_text()
    use, trust = index.split("\n## Trust it\n")
    assert "\n## Use it\n" in use
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))
    assert "(install.md)" in use and "(compatibility.md)" in trust


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        linked = document.parent / file if file else document
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked.read_text()), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_exist(document):
    text = document.read_text()
    text = re.sub(r"<!-- (\S+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)  # results record old commands
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *blocks_of(text, "sh")])
    for target in re.findall(r"\bmake ([a-z]+)\b", code):
        assert target in TARGETS, f"make {target}"
    for module in re.findall(r"-m ((?:fastclip|examples|benchmarks|studies|tests)[\w.]*)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"python -m {module}"
