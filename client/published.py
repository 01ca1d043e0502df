"""Models that a hub published: verified before they are kept, and again before they are used.

::

    SITE/hub-ca.crt             the hub's authority: who may sign
    SITE/models/<run>/          model.safetensors, model.json, report.html, signature.json
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from client.audit_log import AuditLogError
from client.folder import SiteFolder
from client.policy import PlanRefused, PolicyError, SitePolicy
from client.secret import write_secret
from conf.schema import FeatureConfig, ModelConfig, SettingError
from journeys.durable import sync_folder, write_durably
from journeys.features import feature_spec
from models.registry import shapes
from protocol.exchange import Parts, read_weights, reply_parts
from protocol.publication import (
    FILES,
    MANIFEST,
    MODEL,
    PUBLISH,
    REPORT,
    Publication,
    Statement,
    digests,
    files,
    read_publication,
    verify_publication,
)
from protocol.replies import SiteReceipt, weights_fault
from protocol.signature import SignatureError
from protocol.wire import WireError, from_text, to_text

SIGNATURE = "signature.json"

MOST_MODELS = 100
"""So many are kept; a hub cannot fill the disk."""
LONGEST_JOURNEY = 1_000
"""Touchpoints: what a model may ask to be scored on at once."""

_SKEW_S = 3_600
_STAGED = ".staged-"
_LONGEST_REFUSAL = 300
_REMEDY = (
    "a model from a hub is used only as it was signed: remove its folder, have it published again"
)


class PublicationRefused(ValueError):  # noqa: N818  (a refusal is an answer, not a fault)
    """The site does not take a publication. The message is fit for the coordinator."""

    def __init__(self, reason: str) -> None:
        # It may name a field as the message called it.
        super().__init__(reason[:_LONGEST_REFUSAL])


def accept(folder: SiteFolder, parts: Parts, now: int) -> Parts:
    """Take in a published model, and say so; the same one again changes nothing.

    What was signed must be of the hub's signer, both now and when it was signed; the model is for
    a federation and a purpose that the policy names, of a known architecture, no larger than the
    policy allows, finite. On disk, whole, and noted in the audit log when this returns.

    Raises:
        PublicationRefused: The site does not take it. Nothing is stored.
    """
    try:
        name = folder.config().name
        publication, model = read_publication(parts)
        authority = _authority(folder)
        for at in (publication.statement.time, now):
            verify_publication(publication, model, authority, at)
        policy = folder.policy()
        _check_statement(publication.statement, policy, now)
        _check_model(publication, model, policy)
        _keep(folder, publication, model)
    except PolicyError:
        raise PublicationRefused("this site's policy cannot be read") from None
    except SettingError:
        raise PublicationRefused("this site's settings cannot be read") from None
    except AuditLogError:
        raise PublicationRefused("this site's audit log cannot be written") from None
    except OSError as error:
        raise PublicationRefused(f"cannot be stored: {error.strerror}") from error
    except (WireError, SignatureError, PlanRefused) as error:
        raise PublicationRefused(str(error)) from error
    return reply_parts({PUBLISH: SiteReceipt(name, publication.statement.run)})


def check_signature(model: Path, folder: SiteFolder) -> bool:
    """Whether a model's file is a hub's, its signature sound; False for one from elsewhere.

    The signer's certificate must have been valid when it signed: that it is over since does no
    harm to a model that was taken in before.

    Raises:
        SignatureError: It lies where published models lie, and is not as it was signed.
    """
    models = _models(folder)
    # By the folder's name and by what it links to: no way around the signature. Not by what the
    # file itself links to, because its manifest is beside the link.
    named = Path(os.path.abspath(model))
    if not named.is_relative_to(os.path.abspath(models)):
        named = model.parent.resolve() / model.name
        if not named.is_relative_to(models.resolve()):
            return False
    try:
        signature, manifest, report = (
            (named.parent / name).read_bytes().decode() for name in (SIGNATURE, MANIFEST, REPORT)
        )
        publication = from_text(Publication, signature, manifest=manifest, report=report)
        statement = publication.statement
        if (named.parent.name, named.name) != (statement.run, MODEL):
            raise SignatureError(f"was signed as {statement.run}/{MODEL}")
        verify_publication(publication, named.read_bytes(), _authority(folder), statement.time)
    except OSError as error:
        raise SignatureError(f"{error.filename}: {error.strerror}; {_REMEDY}") from None
    except (WireError, UnicodeDecodeError, SignatureError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise SignatureError(f"{model}: {reason}; {_REMEDY}") from None
    return True


def _models(folder: SiteFolder) -> Path:
    return folder.path / "models"


def _authority(folder: SiteFolder) -> bytes:
    try:
        return (folder.path / "hub-ca.crt").read_bytes()
    except OSError:
        raise SignatureError(
            "hub-ca.crt: is missing at this site, which then trusts no hub; join again"
        ) from None


def _check_statement(statement: Statement, policy: SitePolicy, now: int) -> None:
    if statement.time > now + _SKEW_S:
        raise PublicationRefused("time: signed in the future; is a clock wrong?")
    for name, allowed in (("federation", policy.federations), ("purpose", policy.purposes)):
        asked = getattr(statement, name)
        if asked not in allowed:
            raise PublicationRefused(
                f"{name}={asked}: this site allows {', '.join(allowed)} (policy: {name}s)"
            )


def _check_model(publication: Publication, model: bytes, policy: SitePolicy) -> None:
    """Refuse what `models.load` could not use, or only with too much memory, before it tries."""
    try:
        manifest = json.loads(publication.manifest)
    except (ValueError, RecursionError):
        raise PublicationRefused(f"{MANIFEST}: not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise PublicationRefused(f"{MANIFEST}: not of format 1")
    if manifest.get("sha256") != publication.statement.sha256[MODEL]:
        raise PublicationRefused(f"{MANIFEST}: is of another model")
    config = from_text(ModelConfig, json.dumps(manifest.get("model")))
    features = from_text(FeatureConfig, json.dumps(manifest.get("features")))
    if features.max_touchpoints > LONGEST_JOURNEY:
        raise PublicationRefused(
            f"{MANIFEST}: max_touchpoints={features.max_touchpoints}: must be at most "
            f"{LONGEST_JOURNEY}"
        )
    expected = shapes(config, feature_spec(features))
    policy.check_parameters(sum(math.prod(shape) for shape in expected.values()))
    if fault := weights_fault(read_weights(model), expected):
        raise PublicationRefused(fault)


def _keep(folder: SiteFolder, publication: Publication, model: bytes) -> None:
    """Write the model's folder, whole or not at all, once the audit log has it."""
    models, statement = _models(folder), publication.statement
    said = {name: getattr(statement, name) for name in ("federation", "purpose", "run", "time")}
    said |= {"sha256": statement.sha256[MODEL]}
    signature = to_text(publication, leave_out=("manifest", "report")).encode()
    models.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.path)
    with (models / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What a killed process left.
        for path in models.glob(f"{_STAGED}*"):
            shutil.rmtree(path)
        kept = models / statement.run
        if os.path.lexists(kept):
            _check_same(kept, statement)
            if (kept / SIGNATURE).read_bytes() != signature:
                # Signed anew, perhaps by another authority: the newest counts.
                folder.audit_log.append("publication", said)
                write_durably(kept / SIGNATURE, signature)
            return
        if sum(path.is_dir() for path in models.iterdir()) >= MOST_MODELS:
            raise PublicationRefused(f"this site keeps {MOST_MODELS} models already, and no more")
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=models))
        try:
            for name, content in {**files(publication, model), SIGNATURE: signature}.items():
                write_secret(staged / name, content)
            sync_folder(staged)
            folder.audit_log.append("publication", said)
            staged.rename(kept)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync_folder(models)


def _check_same(kept: Path, statement: Statement) -> None:
    contents = {name: (kept / name).read_bytes() for name in FILES}
    if digests(contents) != statement.sha256:
        raise PublicationRefused(
            f"run={statement.run}: this site has other files under this name; publish the model "
            "under another, or have the site remove them"
        )
