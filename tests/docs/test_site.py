"""The documentation builds without a warning: no dead link, no missing anchor, no page left out of the navigation."""

import html
import logging
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("material", reason="needs the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    keep = logging.Handler(logging.WARNING)
    keep.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(keep)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out)))  # strict: a warning ends it as well
    finally:
        logging.getLogger("mkdocs").removeHandler(keep)
    assert warnings == []
    return out


def test_every_page_of_docs_is_in_the_navigation(site):
    index = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file() and f'href="{page.stem}.html"' in index, page.name


def test_no_row_has_fallen_out_of_its_table(site):
    import markdown

    pages = {path.name: path.read_text() for path in site.rglob("*.html")}
    for path in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        pages[str(path.relative_to(ROOT))] = markdown.markdown(path.read_text(), extensions=["tables", "fenced_code"])
    assert [name for name, page in pages.items() if "<p>|" in page] == []


def test_every_group_has_a_page_with_its_choices_and_options(site):
    for group in (path for path in (ROOT / "conf").iterdir() if any(path.glob("*.yaml"))):
        page = (site / "configuration" / f"{group.name}.html").read_text()
        for choice in group.glob("*.yaml"):
            assert f"<code>{choice.stem}</code>" in page, f"{group.name}={choice.stem}"
    for key in [f"trainer.{key}" for key in yaml.safe_load((ROOT / "conf" / "trainer" / "default.yaml").read_text())]:
        if not key.endswith("_target_"):
            assert f'id="{key}"' in (site / "configuration" / "trainer.html").read_text(), key


def test_an_option_has_its_type_range_default_and_comment(site):
    peft, data = (
        re.sub(r"<[^>]+>|&para;", "", (site / "configuration" / f"{group}.html").read_text())
        for group in ("peft", "data")
    )
    assert re.search(r"peft\.rank\s+int, at least 1, at most 65536, default 16\s+width of the low-rank products", peft)
    assert re.search(r"data\.max_validation_rows\s+int \| None, default null\s+Most conversations of each split", data)


def test_every_command_is_described(site):
    from posttrain.cli import subcommands

    page = (site / "commands.html").read_text()
    for name, _ in subcommands.summaries(ROOT / "posttrain"):
        assert f"<code>{name}</code>" in page, name


def test_examples_are_in_their_page(site):
    pages = (site / "extending.html").read_text() + (site / "objectives.html").read_text()
    page = html.unescape(re.sub(r"<[^>]+>", "", pages))
    for example in (ROOT / "docs" / "examples").glob("*.py"):
        assert example.read_text().splitlines()[-1] in page, example.name


def test_a_dead_link_ends_the_build(tmp_path):
    """The settings that make the build strict are in force."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0].replace("hooks: [scripts/docs_pages.py]\n", "")
    (tmp_path / "mkdocs.yml").write_text(settings)
    for text in ("[x](nowhere.md)", "[x](index.md#nowhere)"):
        (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{text}\n")
        with pytest.raises(Abort):
            build(load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))


def test_every_field_of_a_config_json_is_in_its_table(site):
    """With a mark for each family: honoured, without effect, or none for refused."""
    from posttrain.models.families import families

    page = (site / "config_fields.html").read_text()
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    marks = {row[0]: row[2:] for row in rows if len(row) == 2 + len(families())}
    for index, family in enumerate(families()):
        for name, rule in family.rules.items():
            mark = "●" if rule.honoured else "○"
            assert f"<code>{name}</code>" in page
            assert marks.get(f"<code>{name}</code>", [mark] * len(families()))[index] == mark, (family.model_type, name)
    assert marks["<code>mlp_bias</code>"].count("●") == 1
