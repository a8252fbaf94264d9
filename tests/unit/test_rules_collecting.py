"""File names, and which files are deleted: first tables of inputs and results, then properties of any input."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from orchestrator.rules import collecting
from orchestrator.rules.checkpoint_names import checkpoint_stem, chunk_of, generation_of, record_name
from tests.support.rules import (
    PROPERTY,
)

OURS = "g00000007-c00000003"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(f"{OURS}.pt", 7, id="a checkpoint"),
        pytest.param(f"{OURS}.json", 7, id="its record"),
        pytest.param(f".tmp-{OURS}.pt-4711", 7, id="a checkpoint that is being written"),
        pytest.param(f".tmp-{OURS}.json-4711", 7, id="a record that is being written"),
        pytest.param("g123456789-c00000003.pt", 123456789, id="more claims than eight digits hold"),
        pytest.param("README", None, id="a file of the user"),
        pytest.param("gpu-notes.txt", None, id="that begins with g"),
        pytest.param("g1-notes.txt", None, id="that begins with g and a digit"),
        pytest.param("backup-g00000007-c00000003.pt", None, id="a copy that the user made"),
        pytest.param(".nfs000000000123", None, id="what NFS leaves behind"),
        pytest.param("g-c.pt", None, id="no number"),
        pytest.param("g²-c1.pt", None, id="a digit that is not decimal"),
        pytest.param("", None, id="no name"),
    ],
)
def test_the_generation_in_the_name_of(name, expected):
    assert generation_of(name) == expected


@PROPERTY
@given(
    st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from(["", ".tmp-"]), st.sampled_from([".pt", ".json"])
)
def test_every_file_of_a_claim_holds_its_generation_and_its_chunk(generation, chunk_id, prefix, suffix):
    name = f"{prefix}{checkpoint_stem(generation, chunk_id)}{suffix}{'-99' if prefix else ''}"
    assert (generation_of(name), chunk_of(name)) == (generation, chunk_id)


def test_a_record_has_the_name_of_its_checkpoint():
    assert record_name(f"{OURS}.pt") == f"{OURS}.json"


STEM = re.compile(r"(\.tmp-)?g[0-9]{8,}-c[0-9]{8,}[.-].*", re.DOTALL)


@PROPERTY
@given(st.text(max_size=20) | st.from_regex(r"\A(\.tmp-)?[gG]\d*-?c?\d*(\.pt|\.json|-x)?\Z"))
@example("g²-c1.pt")
def test_a_file_that_no_claim_wrote_has_no_generation(name):
    assume(not STEM.fullmatch(name))
    assert generation_of(name) is None


REFERENCED, LIVE = f"{OURS}.pt", 9


@pytest.mark.parametrize(
    ("name", "collected"),
    [
        pytest.param(REFERENCED, False, id="what an entry or a claim refers to stays"),
        pytest.param("g00000009-c00000004.pt", False, id="what a live claim has just written stays"),
        pytest.param(".tmp-g00000009-c00000004.pt-12", False, id="and what it is writing"),
        pytest.param("g00000008-c00000004.pt", True, id="a candidate that nothing refers to goes"),
        pytest.param("g00000008-c00000004.json", True, id="and its record"),
        pytest.param(".tmp-g00000008-c00000004.pt-12", True, id="and what its writer left when it was killed"),
        pytest.param("g00000010-c00000004.pt", True, id="a claim that is newer and not live any more"),
        pytest.param("notes.txt", False, id="a foreign file stays"),
    ],
)
def test_of_the_files_in_the_folder(name, collected):
    assert collecting.collectable([name], {REFERENCED}, {LIVE}) == ([name] if collected else [])


names = st.builds(
    "{}g{:08d}-c{:08d}{}".format,
    st.sampled_from(["", ".tmp-"]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([".pt", ".json"]),
)


@PROPERTY
@given(
    st.lists(names | st.text(max_size=8), unique=True),
    st.frozensets(names),
    st.frozensets(st.integers(1, 12)),
    st.integers(0, 12),
)
def test_only_files_of_claims_that_nothing_needs_are_collected(listed, others, live, referenced_too):
    referenced = others | set(listed[:referenced_too])
    unneeded = collecting.collectable(listed, referenced, live)
    for name in listed:
        generation = re.fullmatch(r"(?:\.tmp-)?g(\d{8})-c\d{8}\.(pt|json)", name)
        expected = generation is not None and int(generation[1]) not in live and name not in referenced
        assert (name in unneeded) == expected
    assert unneeded == [name for name in listed if name in unneeded], "in their order, each once"
