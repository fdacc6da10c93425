from __future__ import annotations

import ast

import mutate
import pytest

LISTED = mutate.mutants()


@pytest.mark.parametrize("mutant", LISTED, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_what_stands_there_and_names_tests(mutant: mutate.Mutant) -> None:
    source = (mutate.ROOT / mutant.file).read_text("utf-8")
    mutated = mutant.applied(source)
    assert mutated != source
    if mutant.file.endswith(".py"):
        ast.parse(mutated)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in (mutate.ROOT / file).read_text("utf-8")


def test_the_list_is_as_long_as_was_promised() -> None:
    assert len(LISTED) >= 60


@pytest.mark.parametrize("source", ["", "x = 1\nx = 1\n"])
def test_a_text_that_is_gone_or_stands_twice_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match="must once"):
        mutate.Mutant("a", "b.py", "x = 1", "x = 2", ()).applied(source)
