"""A finished run's model and report, signed for the sites (`Federation.publish`)."""

from __future__ import annotations

import json
from pathlib import Path

from conf.compose import from_yaml
from protocol.exchange import Parts
from protocol.publication import (
    FILES,
    GUARD,
    LARGEST_REPORT,
    MANIFEST,
    MODEL,
    REPORT,
    Publication,
    Statement,
    digests,
    publication_parts,
    verify_publication,
)
from protocol.signature import SignatureError, sign
from protocol.wire import WireError


class PublicationError(ValueError):
    """A run that cannot be published. The message says why and what to do."""


def signed_run(run: Path, certificates: Path, now: int) -> Parts:
    """The publication of the run in folder `run`, signed by the keys in folder `certificates`.

    Raises:
        PublicationError: The run is not finished, the publication would be too large, or its
            signature would not hold.
        SettingError: The run's `config.yaml` cannot be read.
    """
    contents = {name: _read(run / name) for name in FILES}
    contents[REPORT] = _guarded(contents[REPORT])
    config = from_yaml(run / "config.yaml")
    key, certificate, authority = (
        _read(certificates / name) for name in ("signing.key", "signing.crt", "ca.crt")
    )
    model = contents[MODEL]
    try:
        statement = Statement(
            config.federation, config.purpose, run.resolve().name, now, digests(contents)
        )
        signature = sign(statement.document, key, certificate)
        manifest, report = contents[MANIFEST].decode(), contents[REPORT].decode()
        publication = Publication(statement, signature, manifest, report)
        # What every site would refuse is better known before.
        verify_publication(publication, model, authority, now)
        return publication_parts(publication, model)
    except SignatureError as error:
        raise PublicationError(f"{certificates}: {error}") from None
    except (WireError, ValueError) as error:
        raise PublicationError(f"{run}: {error}") from None


def _guarded(report: bytes) -> bytes:
    """The report as a page that can only be looked at; of one that is too large, a note."""
    text = report.decode(errors="replace")
    if len(json.dumps(text)) > LARGEST_REPORT:
        text = (
            "<title>Report</title><p>The report of this run is too large to be published. Ask who "
            "coordinates the federation for it.</p>\n"
        )
    return (GUARD + text).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PublicationError(f"{path}: missing; is the run finished?") from None
    except OSError as error:
        raise PublicationError(f"{path}: cannot be read: {error.strerror}") from None
