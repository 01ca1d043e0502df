"""From a source's settings to the source."""

from __future__ import annotations

from pathlib import Path

from client.sources.source import Source, SourceError
from conf.site import (
    CriteoSource,
    FilesSource,
    Ga4Source,
    MatomoApiSource,
    MatomoDbSource,
    SourceConfig,
    SqlSource,
)


def open_source(config: SourceConfig, folder: Path) -> Source:
    """The source that `config` describes; its relative paths are meant from `folder`.

    Raises:
        SourceError: A library that it needs is not installed, or its settings cannot be used.
        SecretError: Its password or token cannot be used.
    """
    try:
        return _opened(config, folder)
    except ModuleNotFoundError as error:
        raise SourceError(
            f"source.name={config.name}: {error.name} is missing; pip install -e '.[site]'"
        ) from error


def _opened(config: SourceConfig, folder: Path) -> Source:
    # Each import is paid by those who use it.
    match config:
        case MatomoDbSource():
            from client.sources.matomo_db import MatomoDb

            return MatomoDb(config, folder)
        case MatomoApiSource():
            from client.sources.matomo_api import MatomoApi

            return MatomoApi(config, folder)
        case Ga4Source():
            from client.sources.ga4 import Ga4

            return Ga4(config, folder)
        case CriteoSource():
            from client.sources.criteo import Criteo

            return Criteo(config, folder)
        case SqlSource():
            from client.sources.sql import Sql

            return Sql(config, folder)
        case FilesSource():
            from client.sources.files import Files

            return Files(config, folder)
    raise TypeError(f"no source for {type(config).__name__}")
