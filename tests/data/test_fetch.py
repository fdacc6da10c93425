from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privrec.data import catalogue as module
from privrec.data.catalogue import ARCHIVES, TERMS, cache_dir, fetch
from privrec.errors import DataError, UsageError

CONTENT = b"not really an archive"


class Source:
    """Stands for the publisher's server."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.asked: list[str] = []

    def __call__(self, url: str, output_file: Any, pooch: Any) -> None:
        self.asked.append(url)
        Path(output_file).write_bytes(self.content)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    archives = {name: replace(archive, md5=md5) for name, archive in ARCHIVES.items()}
    monkeypatch.setattr(module, "ARCHIVES", archives)


def test_every_archive_comes_over_https_with_a_checksum() -> None:
    assert set(ARCHIVES) == {"ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m"}
    for name, archive in ARCHIVES.items():
        assert archive.url.startswith("https://")
        assert archive.url.endswith(f"/{name}.zip")
        assert len(bytes.fromhex(archive.md5)) == 16
    assert len({archive.md5 for archive in ARCHIVES.values()}) == 5


@pytest.mark.usefixtures("known")
def test_an_archive_is_downloaded_once_and_its_terms_shown_once(tmp_path: Path) -> None:
    source, said = Source(), list[str]()
    path = fetch("ml-1m", directory=tmp_path, echo=said.append, downloader=source)
    assert path == tmp_path / "ml-1m.zip"
    assert path.read_bytes() == CONTENT
    assert said == [TERMS]
    assert "redistributed" in TERMS
    again = fetch("ml-1m", directory=tmp_path, echo=said.append, downloader=source)
    assert (again, source.asked) == (path, [ARCHIVES["ml-1m"].url])
    assert len(said) == 1
    fetch("ml-100k", directory=tmp_path, echo=said.append, downloader=source)
    assert len(said) == 2


@pytest.mark.usefixtures("known")
def test_a_damaged_copy_is_downloaded_again(tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(b"half of it")
    source = Source()
    path = fetch("ml-1m", directory=tmp_path, echo=lambda text: None, downloader=source)
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_no_archive(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(DataError, match=r"ml-1m\.zip: .*c4d9eecfca2ab87c1945afe126590906"):
        fetch("ml-1m", directory=tmp_path, echo=said.append, downloader=Source(b"forged"))
    assert not (tmp_path / "ml-1m.zip").exists()
    assert said == []


def test_a_failed_download_says_so(tmp_path: Path) -> None:
    def offline(url: str, output_file: Any, pooch: Any) -> None:
        raise ConnectionError("no route")

    with pytest.raises(DataError, match=r"could not be downloaded \(no route\).*--data"):
        fetch("ml-1m", directory=tmp_path, echo=lambda text: None, downloader=offline)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'netflix': only ml-100k, ml-1m"):
        fetch("netflix", directory=tmp_path, echo=lambda text: None)


def test_downloads_go_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVREC_DATA", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("PRIVREC_DATA")
    assert cache_dir().name == "privrec"
