"""A finished model that the coordinator hands to the sites, with its report, signed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.exchange import Parts
from protocol.signature import Signature, SignatureError, verify
from protocol.wire import LARGEST_TEXT, WireError, from_text, to_text

PUBLISH = "publish"
"""What is asked; never together with anything else."""

MODEL, MANIFEST, REPORT = "model.safetensors", "model.json", "report.html"
FILES = (MODEL, MANIFEST, REPORT)
"""As they are called in a run's folder and at a site."""

LARGEST_BYTES = 50_000_000
"""Of a whole publication."""
LARGEST_REPORT = 800_000
"""Characters of a report as JSON: what a text that travels holds, less room for the rest."""

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
GUARD = (
    f'<!doctype html><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
)
"""How a report begins. Somebody at the site will open it: it may run no script, load nothing."""
_UNGUARDED = re.compile(
    r'<link|<meta(?! charset="utf-8">| name="[a-z-]+" content="[^"<>&]*">)', re.IGNORECASE
)
"""What reaches out in spite of `GUARD`: links that are looked up ahead, a page that moves on.

Text in a report is escaped, so that these are never in it by chance.
"""


@dataclass(frozen=True)
class Statement:
    """What is signed: for whom and for what the model is, and the digest of each file."""

    federation: str
    """A site takes models of federations that its policy names."""
    purpose: str
    """And for purposes that it names."""
    run: str
    """The run's name, and that of the model's folder at a site."""
    time: int
    """UTC seconds of the signing."""
    sha256: dict[str, str]
    """By file: all three."""

    def __post_init__(self) -> None:
        for name in ("federation", "purpose"):
            if not 1 <= len(getattr(self, name)) <= 200:
                raise ValueError(f"{name}: must have 1 to 200 characters")
        # It becomes a folder's name: no slash, no leading dot.
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.run):
            raise ValueError(
                "run: must be 1 to 100 letters, digits, dots, hyphens and underscores, beginning "
                "with a letter or digit"
            )
        if self.sha256.keys() != set(FILES):
            raise ValueError(f"sha256: must be of {', '.join(FILES)}")

    @property
    def document(self) -> bytes:
        """The bytes that are signed."""
        return to_text(self).encode()


@dataclass(frozen=True)
class Publication:
    """What travels with a model."""

    statement: Statement
    signature: Signature
    """Of the statement."""
    manifest: str
    """`model.json`."""
    report: str
    """`report.html`."""


def files(publication: Publication, model: bytes) -> dict[str, bytes]:
    """The files' contents by name."""
    return {
        MODEL: model,
        MANIFEST: publication.manifest.encode(),
        REPORT: publication.report.encode(),
    }


def digests(contents: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def verify_publication(
    publication: Publication, model: bytes, authority_pem: bytes, at: int
) -> None:
    """Check that the authority's signer signed, as of `at`, exactly these files.

    Raises:
        SignatureError: It did not.
    """
    verify(publication.statement.document, publication.signature, authority_pem, at)
    for name, digest in digests(files(publication, model)).items():
        if publication.statement.sha256[name] != digest:
            raise SignatureError(f"{name}: is not what was signed")


def publication_parts(publication: Publication, model: bytes) -> Parts:
    """A publication, to be sent. Raises `WireError` for what `read_publication` would refuse."""
    parts = Parts({PUBLISH: to_text(publication)}, model)
    read_publication(parts)
    return parts


def read_publication(parts: Parts) -> tuple[Publication, bytes]:
    """What `publication_parts` wrote, and the model's bytes, which are not read here.

    Nothing of it is verified yet. Raises `WireError`.
    """
    if parts.texts.keys() != {PUBLISH} or parts.weights is None:
        raise WireError("a publication is one text and a model")
    text = parts.texts[PUBLISH]
    if len(text) > LARGEST_TEXT or len(text) + len(parts.weights) > LARGEST_BYTES:
        raise WireError(
            f"a publication is at most {LARGEST_BYTES:,} bytes with the model, and "
            f"{LARGEST_TEXT:,} characters without"
        )
    publication = from_text(Publication, text)
    # What is signed has one form, so what carries it has no other either.
    if to_text(publication) != text:
        raise WireError("a publication that is not written as it should be")
    if not publication.report.startswith(GUARD) or _UNGUARDED.search(
        publication.report, len(GUARD)
    ):
        raise WireError(f"{REPORT}: a report that could do more than be looked at")
    return publication, parts.weights
