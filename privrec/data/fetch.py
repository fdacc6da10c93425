"""Downloads of public data sets: over https, checked, with the publisher's terms shown once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privrec.data.catalogue import ARCHIVES
from privrec.data.files import bad_file
from privrec.errors import UsageError

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
    """Download the archive of a data set, unless it is on this machine and intact.

    Its checksum is verified. The readers take the archive as it is; nothing is unpacked.

    Args:
        directory: where to keep it; None for :func:`cache_dir`.
        echo: shows the publisher's terms, once for each data set and directory.
        downloader: pooch's downloader; None for https.

    Raises:
        UsageError: when there is no data set of that name.
        DataError: when the download fails or its checksum is wrong.
    """
    if name not in ARCHIVES:
        raise UsageError(
            f"data set {name!r}: only {', '.join(ARCHIVES)} can be downloaded; choose one of them, "
            "or point --data at files of your own"
        )
    archive, folder = ARCHIVES[name], directory or cache_dir()
    pooch = _pooch()
    pooch.get_logger().setLevel(logging.WARNING)
    label, offline = str(folder / f"{name}.zip"), f"get {archive.url} some other way"
    try:
        path = pooch.retrieve(
            archive.url,
            known_hash=f"md5:{archive.md5}",
            fname=f"{name}.zip",
            path=folder,
            downloader=downloader or pooch.HTTPDownloader(timeout=60),
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
    shown = folder / f".{name}.terms-shown"
    if not shown.exists():
        echo(archive.terms)
        shown.touch()
    return Path(path)


def _pooch() -> Any:
    """Imported when it is needed: it costs a tenth of a second, and most runs fetch nothing."""
    import pooch  # type: ignore[import-untyped]

    return pooch
