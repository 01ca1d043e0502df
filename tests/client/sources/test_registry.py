from __future__ import annotations

import sys
from pathlib import Path

import pytest

from client.sources.files import Files
from client.sources.registry import open_source
from client.sources.source import SourceError
from conf.site import FilesSource, MatomoDbSource, SqlSource


def test_a_source_is_opened_by_its_settings(tmp_path: Path) -> None:
    assert isinstance(open_source(FilesSource(path="*.csv"), tmp_path), Files)


@pytest.mark.parametrize(
    ("config", "library"),
    [
        (MatomoDbSource(user="reader"), "pymysql"),
        (SqlSource(url="sqlite:///x", query="SELECT 1"), "sqlalchemy"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MatomoDbSource, library: str
) -> None:
    monkeypatch.delitem(sys.modules, f"client.sources.{config.name}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sys.meta_path", [_Missing(library), *sys.meta_path])
    with pytest.raises(SourceError, match=rf"{library} is missing; pip install -e '.\[site\]'"):
        open_source(config, tmp_path)


class _Missing:
    def __init__(self, library: str) -> None:
        self._library = library

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == self._library:
            raise ModuleNotFoundError(name, name=self._library)
