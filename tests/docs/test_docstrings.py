"""Every example in the docstring of a public name runs, and gives what it says."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
from docs_pages import ROOT

import privrec

NAMES = sorted(set(privrec.__all__) - {"__version__"})


def examples(thing: Any, name: str) -> list[doctest.DocTest]:
    """Those of an object itself and of the members that it defines."""
    found = doctest.DocTestFinder(exclude_empty=True).find(
        thing, name, module=False, globs={"__name__": "__docstring__"}
    )
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", ["privrec", *NAMES])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVREC_STATE", str(tmp_path / "state"))
    tests = (
        [doctest.DocTestParser().get_doctest(privrec.__doc__ or "", {}, name, None, None)]
        if name == "privrec"
        else examples(getattr(privrec, name), name)
    )
    for test in tests:
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert not failed, test.name


def test_an_example_that_is_wrong_is_found() -> None:
    def wrong() -> None:
        """Say what is not so.

        Examples:
            >>> 1 + 1
            3
        """

    (test,) = examples(wrong, "wrong")
    assert doctest.DocTestRunner().run(test, out=lambda _: None).failed


def test_a_public_name_is_what_its_list_says() -> None:
    assert set(privrec.__all__) == {*privrec._LAZY, "__version__"}
    assert dir(privrec) == sorted(privrec.__all__)
    for name in NAMES:
        assert inspect.getdoc(getattr(privrec, name)), name
    with pytest.raises(AttributeError, match="no attribute 'cake'"):
        privrec.cake  # noqa: B018
