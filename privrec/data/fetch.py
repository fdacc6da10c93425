"""Downloads of public data sets: over https, checked, with the publisher's terms shown once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privrec.data.problems import bad_file
from privrec.errors import UsageError

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_TERMS = (
    "MovieLens data sets are published by GroupLens Research, University of Minnesota, for "
    "research. By using one you agree to its README: no endorsement may be implied, the data may "
    "not be redistributed or used commercially without permission, and publications cite "
    "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, "
    "ACM TiiS 5(4), 2015."
)


@dataclass(frozen=True)
class Archive:
    """A data set that can be downloaded.

    Args:
        name: what ``privrec data fetch`` calls it.
        url: where its publisher keeps it.
        md5: checksum of the archive.
        size: what is in it, in words.
        terms: the publisher's terms, to be shown before first use.
    """

    name: str
    url: str
    md5: str
    size: str
    terms: str


ARCHIVES: Mapping[str, Archive] = {
    name: Archive(name, f"{_GROUPLENS}/{name}.zip", md5, size, _TERMS)
    for name, md5, size in (
        ("ml-100k", "0e33842e24a9c977be4e0107933c0723",
         "943 users, 1,682 items, 100,000 ratings, 5 MB"),
        ("ml-1m", "c4d9eecfca2ab87c1945afe126590906",
         "6,040 users, 3,706 items, 1,000,209 ratings, 6 MB"),
        ("ml-10m", "ce571fd55effeba0271552578f2648bd",
         "69,878 users, 10,677 items, 10,000,054 ratings, 63 MB"),
        ("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3",
         "138,493 users, 26,744 items, 20,000,263 ratings, 190 MB"),
        ("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada",
         "162,541 users, 59,047 items, 25,000,095 ratings, 250 MB"),
    )
}  # fmt: skip

Downloader = Callable[[str, str, Any], None]


def cache_dir() -> Path:
    """Where downloads go: ``$PRIVREC_DATA``, else the user's cache directory."""
    if own := os.environ.get("PRIVREC_DATA"):
        return Path(own)
    return Path(_pooch().os_cache("privrec"))


def fetch(
    name: str,
    *,
    directory: Path | None = None,
    echo: Callable[[str], None],
    downloader: Downloader | None = None,
) -> Path:
    """The archive of a data set on this machine, downloaded unless it is there and intact.

    The readers take the archive as it is; nothing is unpacked.

    Args:
        name: one of :data:`ARCHIVES`.
        directory: where to keep it; None for :func:`cache_dir`.
        echo: shows the publisher's terms, once for each data set and directory.
        downloader: pooch's downloader; None for https.

    Returns:
        Path of the zip archive, its checksum verified.

    Raises:
        UsageError: when there is no data set of that name.
        DataError: when the download fails or its checksum is wrong.
    """
    archive = _archive(name)
    folder = directory or cache_dir()
    path = _download(archive, folder, downloader)
    _show_terms_once(archive, folder, echo)
    return path


def _pooch() -> Any:
    """Imported when it is needed: it costs a tenth of a second, and most runs fetch nothing."""
    import pooch  # type: ignore[import-untyped]

    return pooch


def _archive(name: str) -> Archive:
    if name in ARCHIVES:
        return ARCHIVES[name]
    raise UsageError(
        f"data set {name!r}: only {', '.join(ARCHIVES)} can be downloaded; choose one of them, or "
        "point --data at files of your own"
    )


def _download(archive: Archive, folder: Path, downloader: Downloader | None) -> Path:
    pooch = _pooch()
    pooch.get_logger().setLevel(logging.WARNING)
    label, offline = str(folder / f"{archive.name}.zip"), f"get {archive.url} some other way"
    try:
        return Path(
            pooch.retrieve(
                archive.url,
                known_hash=f"md5:{archive.md5}",
                fname=f"{archive.name}.zip",
                path=folder,
                downloader=downloader or pooch.HTTPDownloader(timeout=60),
            )
        )
    except ValueError as error:
        found = "what was downloaded has another checksum than the publisher's archive"
        rule = f"its MD5 must be {archive.md5}"
        raise bad_file(label, found, rule, f"try again, or {offline}") from error
    except OSError as error:  # requests' errors are OSErrors too
        found = f"{archive.url} could not be downloaded ({error})"
        rule = "a download needs the network and a folder to write to"
        remedy = f"check both, or {offline} and point --data at it"
        raise bad_file(label, found, rule, remedy) from error


def _show_terms_once(archive: Archive, folder: Path, echo: Callable[[str], None]) -> None:
    marker = folder / f".{archive.name}.terms-shown"
    if not marker.exists():
        echo(archive.terms)
        marker.touch()
