"""docs/architecture.md lists exactly the files and the floors that the code has."""

from __future__ import annotations

import re

import pytest

from tests.unit.test_import_rule import FILES, FLOORS, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.findall(r"^\| `((?:orchestrator|jobs)/\S+\.py)` \| (\S.*) \|$", PAGE, re.MULTILINE)


def test_the_page_names_every_file_once_and_no_other():
    there = sorted(str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py")
    assert sorted(name for name, _ in NAMED) == there


@pytest.mark.parametrize(("name", "line"), NAMED, ids=[name for name, _ in NAMED])
def test_each_file_is_told_in_one_line(name, line):
    assert 10 <= len(line) <= 120


def test_the_page_draws_the_floors_as_the_import_rule_has_them():
    drawn = re.search(r"```floors\n(.*?)```", PAGE, re.DOTALL)
    assert drawn is not None
    floors = [tuple(sorted(line.split("#")[0].split())) for line in drawn[1].splitlines()]
    assert floors == [tuple(sorted(parts)) for parts in FLOORS if parts != ("orchestrator", "jobs")]


def test_every_file_that_the_page_links_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_path_that_the_page_writes_is_there():
    paths = re.findall(r"`((?:orchestrator|jobs|tests|settings|slurm|docs|benchmarks)/[\w./]+)`", PAGE)
    assert [path for path in paths if not (ROOT / path).exists()] == []
