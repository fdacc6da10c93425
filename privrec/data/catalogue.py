"""The known public sets: how big they are, where they come from, and how their files are laid out.

Source of MovieLens: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from privrec.scenario.kinds import PUBLISHED

_TERMS = (
    "MovieLens data sets are published by GroupLens Research, University of Minnesota, for "
    "research. By using one you agree to its README: no endorsement may be implied, the data may "
    "not be redistributed or used commercially without permission, and publications cite "
    "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, "
    "ACM TiiS 5(4), 2015."
)


@dataclass(frozen=True)
class Layout:
    """How the files of a release are written.

    Args:
        ratings: file of the ratings.
        separator: between its fields.
        columns: of user, item, rating and time: in its header, or by number.
        titles: file of the titles.
        title_separator: between its fields; a comma: with quotes.
        title_columns: of item and title.
        old: whether the titles are Latin-1, where nobody has made them UTF-8.
    """

    ratings: str
    separator: str
    columns: tuple[str | int, ...]
    titles: str
    title_separator: str
    title_columns: tuple[str | int, ...] = (1, 2)
    old: bool = True


@dataclass(frozen=True)
class Archive:
    """A data set that can be downloaded.

    Args:
        name: what a scenario, ``privrec data fetch`` and its folder call it.
        md5: checksum of the archive.
        size: of the archive, in MB.
        layout: of its files.
        other_folders: more names that its folder goes by.
        terms: the publisher's terms, to be shown before first use.
    """

    name: str
    md5: str
    size: int
    layout: Layout
    other_folders: tuple[str, ...] = ()
    terms: str = _TERMS

    @property
    def folders(self) -> tuple[str, ...]:
        """Names that its folder goes by."""
        return self.name, *self.other_folders

    @property
    def url(self) -> str:
        """Where its publisher keeps it."""
        return f"https://files.grouplens.org/datasets/movielens/{self.name}.zip"

    @property
    def holds(self) -> str:
        """What is in it, in words."""
        users, items, ratings = PUBLISHED[self.name]
        return f"{users:,} users, {items:,} items, {ratings:,} ratings, {self.size} MB"


_TABS = Layout("u.data", "\t", (1, 2, 3, 4), "u.item", "|")
_COLONS = Layout("ratings.dat", "::", (1, 2, 3, 4), "movies.dat", "::")
_NAMED = ("userId", "movieId", "rating", "timestamp")
_COMMAS = Layout("ratings.csv", ",", _NAMED, "movies.csv", ",", ("movieId", "title"), False)

ARCHIVES: Mapping[str, Archive] = {
    archive.name: archive
    for archive in (
        Archive("ml-100k", "0e33842e24a9c977be4e0107933c0723", 5, _TABS),
        Archive("ml-1m", "c4d9eecfca2ab87c1945afe126590906", 6, _COLONS),
        Archive("ml-10m", "ce571fd55effeba0271552578f2648bd", 63, _COLONS, ("ml-10M100K",)),
        Archive("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3", 190, _COMMAS),
        Archive("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada", 250, _COMMAS),
    )
}
