"""The documentation is whole: pages, links, names, commands, pictures and the notebook."""

import dataclasses
import importlib
import json
import os
import posixpath
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import yaml

import hf_normswap
from hf_normswap import NormSwapSeq2SeqTrainingArguments, get_norm
from hf_normswap.cli import VERBS, _make_parser
from hf_normswap.cli.reports import to_markdown
from hf_normswap.core.norm_properties import rows_of_norms


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOK = DOCS / "first_hour.ipynb"
LINK = re.compile(r"\[[^\]\[]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
IDENTIFIERS = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def pages_in(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values():
                yield from pages_in([below] if isinstance(below, str) else below)


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def fetched_from_outside(site):
    """What a browser would fetch from another host: scripts, pictures, styles and fonts."""
    of_page = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"' >]*)"
    of_link = r"<link\b[^>]*\bhref=[\"']?((?:https?:)?//[^\"' >]*)"
    of_style = r"url\(\s*[\"']?((?:https?:)?//[^\"')]*)|@import\s+[\"']((?:https?:)?//[^\"']*)"
    pattern = re.compile("|".join((of_page, of_link, of_style)))
    texts = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert {".html", ".css"} == {path.suffix for path in texts}
    return [(path.name, match[0]) for path in texts for match in pattern.finditer(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<script src="https://cdn.example/katex.js"></script>'),
        ("page.html", "<link rel=stylesheet href=//cdn.example/katex.css>"),
        ("page.html", '<link href="https://fonts.example/css?family=Roboto" rel="stylesheet">'),
        ("style.css", "@font-face{src:url(https://fonts.example/a.woff2)}"),
        ("style.css", "@import '//cdn.example/more.css';"),
    ],
)
def test_a_fetch_from_outside_is_seen(name, text, tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://arxiv.org">a link that a reader follows</a>')
    (tmp_path / "style.css").write_text("@font-face{src:url(fonts/a.woff2)}")
    assert not fetched_from_outside(tmp_path)
    (tmp_path / name).write_text(text)
    assert fetched_from_outside(tmp_path)


def check_formulas(pages):
    """KaTeX of the site reads every formula of the pages, where Node.js is at hand."""
    formulas = [
        (name, unescape(formula))
        for name, page in pages.items()
        for formula in re.findall(r"class=\"?arithmatex\"?>\\[(\[](.*?)\\[)\]]<", page, re.DOTALL)
    ]
    assert len(formulas) > 50
    for name in {name for name, _ in formulas}:
        for asset in ("katex/katex.min.js", "katex/katex.min.css", "formulas.js"):
            assert f"assets/{asset}" in pages[name]
    node = shutil.which("node")
    if node is None:
        return
    script = """
const katex = require(process.argv[1]);
for (const [page, formula] of JSON.parse(require("fs").readFileSync(0, "utf8")))
  try { katex.renderToString(formula, { strict: "error" }); }
  catch (error) { console.log(page, formula, error.message); }
"""
    command = [node, "-e", script, str(DOCS / "assets" / "katex" / "katex.min.js")]
    read = subprocess.run(command, input=json.dumps(formulas), capture_output=True, text=True, check=True)
    assert not read.stdout, read.stdout


def test_the_fonts_of_formulas_are_in_the_site():
    katex = DOCS / "assets" / "katex"
    fonts = set(re.findall(r"fonts/[\w-]+\.woff2", (katex / "katex.min.css").read_text(encoding="utf-8")))
    assert fonts == {f"fonts/{path.name}" for path in (katex / "fonts").iterdir()}
    assert "MIT License" in (katex / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_width_of_a_page(page):
    fences = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert not [line for fence in fences for line in fence.splitlines() if len(line) > 88]


def test_pages_use_the_glossary():
    entries = set(slugs(DOCS / "glossary.md"))
    for page in PAGES:
        if page.name != "glossary.md" and page.parent.name != "api":
            linked = re.findall(r"\(\S*glossary\.md(?:#([\w-]+))?\)", page.read_text(encoding="utf-8"))
            assert linked, name_of(page)
            assert set(filter(None, linked)) <= entries


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    # Strict: a link or anchor that leads nowhere, a page outside of the navigation, an unknown object fail the build.
    assert built.returncode == 0, built.stderr

    for page in PAGES:
        assert (tmp_path / page.relative_to(DOCS).with_suffix(".html")).exists()
    assert (tmp_path / NOTEBOOK.name).exists()
    assert not list(tmp_path.rglob("*.py*"))
    html = {
        page.relative_to(tmp_path).as_posix(): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")
    }
    assert not fetched_from_outside(tmp_path)
    check_formulas(html)
    api = "".join(page for name, page in html.items() if name.startswith("api/"))
    for name in IDENTIFIERS:
        assert f'id="{name}"' in api, name
    assert "<autoref" not in api
    assert "[<code>" not in api  # a reference in the style of Hugging Face that was not read
    for verb in VERBS:
        assert f"usage: normswap {verb.__name__.rpartition('.')[2]} " in html["cli.html"]


def test_the_table_of_norms_is_up_to_date():
    """Of the norms of the package: other tests may have registered some of their own."""
    heading, *rows = rows_of_norms()
    rows = [row for row in rows if get_norm(row[0]).__module__.startswith("hf_normswap.")]
    text = (DOCS / "norms.md").read_text(encoding="utf-8")
    assert f"<!-- norms -->\n\n{to_markdown([heading, *rows])}\n\n" in text, "paste that of normswap norms --markdown"
    for name, *_ in rows:
        assert f"`{name}`" in text, name


def test_every_public_name_is_in_the_reference():
    documented = {}
    for name in IDENTIFIERS:
        module, _, attribute = name.rpartition(".")
        documented[attribute] = getattr(importlib.import_module(module), attribute)
    for name in set(hf_normswap.__all__) - {"__version__"}:
        assert documented.get(name) is getattr(hf_normswap, name), f"{name} has no entry in docs/api"


def slugs(page):
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        kept = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower()
        yield re.sub(r"[-\s]+", "-", kept)


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("*/README.md"), *PAGES], ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path = Path(posixpath.normpath(page.parent / target)) if target else page
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        if anchor:
            assert anchor in slugs(path), f"{target}#{anchor}"


def commands():
    """The lines of the shell in the documentation."""
    for page in (ROOT / "README.md", ROOT / "recipes" / "README.md", *PAGES):
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                yield name_of(page), " ".join(line.split())


def test_commands_parse():
    parser, seen = _make_parser(), set()
    for page, line in commands():
        if match := re.match(r"(?:normswap|python -m hf_normswap) (.*)", line):
            words = shlex.split(match[1], comments=True)
            try:
                parser.parse_args(words)
            except ValueError as error:
                pytest.fail(f"{page}: {line}: {error}")
            seen.add(words[0])
    assert {"inspect", "calibrate", "fold", "push"} <= seen


def test_recipes_of_commands_exist():
    options = {field.name for field in dataclasses.fields(NormSwapSeq2SeqTrainingArguments)}
    for recipe in (ROOT / "recipes").glob("*.py"):
        options |= set(re.findall(r"^    (\w+): .*= field", recipe.read_text(encoding="utf-8"), re.MULTILINE))
    count = 0
    for page, line in commands():
        if match := re.search(r"-m recipes\.(\w+)(.*)", line):
            assert (ROOT / "recipes" / f"{match[1]}.py").exists(), f"{page}: {line}"
            for path in re.findall(r"recipes/[\w/.-]+\.\w+(?=\s|$)", line):
                assert (ROOT / path).exists(), f"{page}: {path}"
            for option in re.findall(r"--(\w+)", match[2]):
                assert option in options, f"{page}: {line}: --{option}"
            count += 1
    assert count > 5


def test_the_page_of_the_command_line_has_every_verb():
    verbs = re.findall(r"^<!-- help (\w+) -->$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(verbs) == sorted(verb.__name__.rpartition(".")[2] for verb in VERBS)


def test_pictures_are_those_that_the_script_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    script = runpy.run_path(str(DOCS / "draw_concepts.py"))
    script["draw"](tmp_path)
    assert len(script["PICTURES"]) == len(list(tmp_path.iterdir())) == 3
    for drawn in tmp_path.iterdir():
        kept = (DOCS / "pictures" / drawn.name).read_text(encoding="utf-8")
        assert len(kept) < 100_000
        assert f"pictures/{drawn.name}" in (DOCS / "concepts.md").read_text(encoding="utf-8")
        if f"Matplotlib {matplotlib.__version__}<" not in kept:
            pytest.skip("another version of matplotlib drew them")
        assert drawn.read_text(encoding="utf-8") == kept, drawn.name


def cells_of_notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_has_no_outputs():
    for cell in cells_of_notebook():
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of_notebook()):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    scores = {name: namespace["accuracy"](namespace[name]) for name in ("original", "naive", "converted", "folded")}
    # What its text says: calibration keeps most of what a naive swap loses, and folding loses nothing more.
    assert scores["naive"] + 0.05 < scores["converted"], scores
    assert scores["folded"] == pytest.approx(scores["converted"], abs=0.01)
    assert not hf_normswap.find_norms(namespace["folded"])
