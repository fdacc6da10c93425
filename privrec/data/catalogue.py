"""The known public sets: how big they are, how their files are laid out, and their download.

Downloads go over https, are checked, and show the publisher's terms once.

Source of MovieLens: Harper & Konstan, "The MovieLens Datasets" (TiiS 2015).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privrec.data.files import bad_file
from privrec.errors import UsageError
from privrec.scenario.kinds import PUBLISHED

TERMS = (
    "MovieLens data sets are published by GroupLens Research, University of Minnesota, for "
    "research. By using one you agree to its README: no endorsement may be implied, the data may "
    "not be redistributed or used commercially without permission, and publications cite "
    "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, "
    "ACM TiiS 5(4), 2015."
)


@dataclass(frozen=True)
class Layout:
    """How the files of a release are written.

    Attributes:
        columns: of user, item, rating and time: in the header, or by number.
        title_separator: a comma: with quotes.
        title_columns: of item and title.
        genres: columns of an item's genres: one with their names, or one for each that says 0 or 1.
        old: whether the titles are Latin-1, where nobody has made them UTF-8.
    """

    ratings: str
    separator: str
    columns: tuple[str | int, ...]
    titles: str
    title_separator: str
    title_columns: tuple[str | int, ...] = (1, 2)
    old: bool = True
    genres: tuple[str | int, ...] = (3,)


@dataclass(frozen=True)
class Archive:
    """A data set that can be downloaded, of ``size`` MB; its folder may have other names too."""

    name: str
    md5: str
    size: int
    layout: Layout
    other_folders: tuple[str, ...] = ()

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


_TABS = Layout("u.data", "\t", (1, 2, 3, 4), "u.item", "|", genres=tuple(range(6, 25)))
_COLONS = Layout("ratings.dat", "::", (1, 2, 3, 4), "movies.dat", "::")
_NAMED = ("userId", "movieId", "rating", "timestamp")
_COMMAS = Layout(
    "ratings.csv", ",", _NAMED, "movies.csv", ",", ("movieId", "title"), False, ("genres",)
)

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


def cache_dir() -> Path:
    """Where downloads go: ``$PRIVREC_DATA``, else the user's cache directory."""
    own = os.environ.get("PRIVREC_DATA")
    return Path(own or _pooch().os_cache("privrec"))


def fetch(
    name: str,
    *,
    directory: Path | None = None,
    echo: Callable[[str], None],
    downloader: Callable[[str, str, Any], None] | None = None,
) -> Path:
    """Download the archive of a data set, unless it is on this machine and intact.

    Its checksum is verified. The readers take the archive as it is; nothing is unpacked. ``echo``
    shows the publisher's terms, once for each data set and ``directory`` (None: :func:`cache_dir`).

    Raises:
        DataError: when the download fails or its checksum is wrong.
    """
    if name not in ARCHIVES:
        raise UsageError(
            f"data set {name!r}: only {', '.join(ARCHIVES)} can be downloaded; choose one of them, "
            "or point --data at files of your own"
        )
    archive, folder, pooch = ARCHIVES[name], directory or cache_dir(), _pooch()
    pooch.get_logger().setLevel(logging.WARNING)
    file, offline = folder / f"{name}.zip", f"get {archive.url} some other way"
    try:
        pooch.retrieve(
            archive.url,
            known_hash=f"md5:{archive.md5}",
            fname=file.name,
            path=folder,
            downloader=downloader or pooch.HTTPDownloader(timeout=60),
        )
    except ValueError as error:
        found = "what was downloaded has another checksum than the publisher's archive"
        rule = f"its MD5 must be {archive.md5}"
        raise bad_file(file, found, rule, f"try again, or {offline}") from error
    except OSError as error:  # requests' errors are OSErrors too
        # What requests says is its own retries and sockets: the kind of its error tells enough.
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
        why = error.strerror or (str(error) if len(str(error)) < 60 else kind)
        found = f"{archive.url} could not be downloaded ({why})"
        rule = "a download needs the network and a folder to write to"
        remedy = f"check both, or {offline} and point --data at it"
        raise bad_file(file, found, rule, remedy) from error
    shown = folder / f".{name}.terms-shown"
    if not shown.exists():
        echo(TERMS)
        shown.touch()
    return file


def _pooch() -> Any:
    """Imported when it is needed: it costs a tenth of a second, and most runs fetch nothing."""
    import pooch  # type: ignore[import-untyped]

    return pooch
