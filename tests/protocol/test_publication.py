from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import LogisticConfig, OptimizerConfig, Unprotected
from protocol.exchange import Parts, Request, read_replies, read_request, reply_parts, request_parts
from protocol.plan import RoundPlan
from protocol.publication import (
    FILES,
    GUARD,
    LARGEST_BYTES,
    MANIFEST,
    MODEL,
    PUBLISH,
    REPORT,
    Publication,
    Statement,
    digests,
    publication_parts,
    read_publication,
    verify_publication,
)
from protocol.records import from_records, to_records
from protocol.replies import SiteReceipt, SiteRefusal
from protocol.signature import SignatureError
from protocol.wire import LARGEST_TEXT, WireError, to_text
from tests.publications import hub, signed
from tests.shop import CUT

NOW = 1_790_000_000
FILE_CONTENTS = {
    MODEL: b"the model \0\xff",
    MANIFEST: '{"ünï": "\u2028"}\n'.encode(),
    REPORT: f"{GUARD}<h1>Ünï</h1>\r\n".encode(),
}
PLAN = RoundPlan("f", "p", "r", 1, 3, 2, LogisticConfig(), OptimizerConfig(), Unprotected(), CUT)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub(tmp_path_factory.mktemp("hub") / "certificates", NOW)


@pytest.fixture(scope="module")
def parts(certificates: Path) -> Parts:
    return publication_parts(signed(certificates, FILE_CONTENTS), FILE_CONTENTS[MODEL])


def statement(**changes: Any) -> Statement:
    said = {"federation": "shops", "purpose": "p", "run": "r", "time": 1}
    return Statement(**{**said, "sha256": dict.fromkeys(FILES, "0"), **changes})


def check(parts: Parts, certificates: Path) -> Publication:
    publication, model = read_publication(parts)
    verify_publication(publication, model, (certificates / "ca.crt").read_bytes(), NOW)
    return publication


def changed(parts: Parts, **fields: Any) -> Parts:
    """The text with some fields of its JSON, by dots, put in another's place."""
    read = json.loads(parts.texts[PUBLISH])
    for name, value in fields.items():
        place = read
        *path, last = name.split("__")
        for key in path:
            place = place[key]
        place[last] = value
    return Parts({PUBLISH: json.dumps(read)}, parts.weights)


def test_a_publication_comes_back_to_the_last_bit(parts: Parts, certificates: Path) -> None:
    back = from_records(to_records(parts))
    publication = check(back, certificates)
    assert publication == signed(certificates, FILE_CONTENTS)
    assert publication.manifest.encode() == FILE_CONTENTS[MANIFEST]
    assert publication.report.encode() == FILE_CONTENTS[REPORT]
    assert back.weights == FILE_CONTENTS[MODEL]


def test_the_digests_are_those_that_sha256sum_prints() -> None:
    for name, digest in digests(FILE_CONTENTS).items():
        assert digest == hashlib.sha256(FILE_CONTENTS[name]).hexdigest()


# ---------------------------------------------------------------------------- nothing can change


def test_every_flipped_letter_of_the_text_is_refused(parts: Parts, certificates: Path) -> None:
    text = parts.texts[PUBLISH]
    for place, letter in enumerate(text):
        other = text[:place] + chr(ord(letter) ^ 1) + text[place + 1 :]
        with pytest.raises((WireError, SignatureError)):
            check(Parts({PUBLISH: other}, parts.weights), certificates)


def test_every_flipped_bit_of_the_model_is_refused(parts: Parts, certificates: Path) -> None:
    assert parts.weights is not None
    for place in range(len(parts.weights) * 8):
        model = bytearray(parts.weights)
        model[place // 8] ^= 1 << place % 8
        with pytest.raises(SignatureError, match=r"model\.safetensors: is not what was signed"):
            check(Parts(parts.texts, bytes(model)), certificates)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_other_text_passes(parts: Parts, certificates: Path, data: st.DataObject) -> None:
    text = parts.texts[PUBLISH]
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(begin + 9, len(text))))
    put = data.draw(st.text(max_size=4) | st.sampled_from([" ", "\n", ",", "}", '"', "\\u0020"]))
    other = text[:begin] + put + text[end:]
    if other != text:
        with pytest.raises((WireError, SignatureError)):
            check(Parts({PUBLISH: other}, parts.weights), certificates)


@pytest.mark.parametrize(
    "fields",
    [
        {"statement__federation": "rivals"},
        {"statement__purpose": "advertising"},
        {"statement__run": "autumn"},
        {"statement__time": NOW + 1},
        {"manifest": "{}"},
        {"report": f"{GUARD}<h1>Other</h1>"},
    ],
)
def test_all_of_it_is_signed(parts: Parts, certificates: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(SignatureError, match=r"not of this document|not what was signed"):
        check(changed(parts, **fields), certificates)


@pytest.mark.parametrize("name", FILES)
def test_a_digest_is_of_its_file(parts: Parts, certificates: Path, name: str) -> None:
    """Signed by the signer, but the statement does not say what the file is."""
    said = {**digests(FILE_CONTENTS), name: "0" * 64}
    publication = signed(certificates, FILE_CONTENTS, sha256=said)
    with pytest.raises(SignatureError, match=f"{name}: is not what was signed"):
        check(publication_parts(publication, FILE_CONTENTS[MODEL]), certificates)


def test_the_same_said_in_another_way_is_refused(parts: Parts) -> None:
    text = parts.texts[PUBLISH]
    read = json.loads(text)
    twice = text.replace('"time": ', '"time": 1, "time": ')
    spaced = json.dumps(read, indent=1)
    turned = json.dumps(dict(reversed(read.items())))
    unescaped = json.dumps(read, ensure_ascii=False)
    for other in (twice, spaced, turned, unescaped, f"{text} "):
        with pytest.raises(WireError, match="not written as it should be"):
            read_publication(Parts({PUBLISH: other}, parts.weights))


# ---------------------------------------------------------------------------- refused unread


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"further": 1}, "further: unknown field"),
        ({"statement__further": 1}, "further: unknown field"),
        ({"signature__further": 1}, "further: unknown field"),
        ({"statement__time": "1"}, "time: not of type"),
        ({"statement__time": 1.5}, "time: not of type"),
        ({"statement__sha256": {}}, "sha256: must be of"),
        ({"statement__sha256": {**dict.fromkeys(FILES, ""), "more": ""}}, "sha256: must be of"),
        ({"statement__federation": ""}, "federation: must have"),
        ({"statement__purpose": "p" * 201}, "purpose: must have"),
        ({"manifest": None}, "manifest: not of type"),
        ({"manifest": "x" * LARGEST_TEXT}, "at most"),
        ({"signature": None}, "signature: not an object"),
    ],
)
def test_what_is_no_publication_is_named(
    parts: Parts, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        read_publication(changed(parts, **fields))


@pytest.mark.parametrize(
    "run",
    ["", ".", "..", "../x", "x/y", "/x", "x\\y", ".hidden", "-x", "x\n", "x\0", "a" * 101, "ü",
     "x y", "~", "a:b"],
)  # fmt: skip
def test_a_runs_name_is_no_path(run: str) -> None:
    with pytest.raises(ValueError, match="run: must be"):
        statement(run=run)


@pytest.mark.parametrize("run", ["2026-11-24_16-00-00", "2026-11-24_16-00-00-2", "a", "A..b"])
def test_an_ordinary_runs_name(run: str) -> None:
    assert statement(run=run).run == run


def test_a_publication_travels_alone(parts: Parts) -> None:
    plan = to_text(PLAN)
    for texts in ({"train": plan}, {**parts.texts, "train": plan}, {}):
        with pytest.raises(WireError, match="one text and a model"):
            read_publication(Parts(texts, parts.weights))
    with pytest.raises(WireError, match="one text and a model"):
        read_publication(Parts(parts.texts, None))
    for more in ({}, request_parts(Request({"train": PLAN})).texts):
        with pytest.raises(WireError, match="something else"):
            read_request(Parts({**more, **parts.texts}, parts.weights))


def test_a_receipt_counts_where_a_publication_was_sent(parts: Parts) -> None:
    replies = {PUBLISH: SiteReceipt("shop", "spring")}
    answer = from_records(to_records(reply_parts(replies)))
    assert answer.weights is None
    assert read_replies(answer, (PUBLISH,)) == replies
    with pytest.raises(WireError, match="something else than describe, evaluate, train"):
        read_replies(answer)
    with pytest.raises(WireError, match="something else than publish"):
        read_replies(reply_parts({"train": SiteRefusal("shop", 1, "no")}), (PUBLISH,))


def test_what_is_too_large_is_refused(certificates: Path) -> None:
    contents = {**FILE_CONTENTS, MODEL: bytes(LARGEST_BYTES)}
    publication = signed(certificates, contents)
    with pytest.raises(WireError, match="at most 50,000,000 bytes"):
        publication_parts(publication, contents[MODEL])
    with pytest.raises(WireError, match="at most 50,000,000 bytes"):
        read_publication(Parts({PUBLISH: to_text(publication)}, contents[MODEL]))


# ---------------------------------------------------------------------------- the report


@pytest.mark.parametrize(
    "report",
    [
        "",
        "<h1>Report</h1>",
        GUARD[1:],
        " " + GUARD,
        GUARD.upper(),
        GUARD + "<meta http-equiv=refresh content='0;url=https://evil.example'>",
        GUARD + "<META\nhttp-equiv=refresh content='0;url=https://evil.example'>",
        GUARD + '<meta name="a" http-equiv="refresh" content="0;url=https://evil.example">',
        GUARD + '<meta name="a" content="a" http-equiv="refresh">',
        GUARD + '<meta charset="utf-8" http-equiv="refresh">',
        GUARD + "<meta/http-equiv=refresh>",
        GUARD + "<link rel=dns-prefetch href=//evil.example>",
        GUARD + "<Link>",
    ],
)
def test_a_report_that_could_reach_out_is_refused(parts: Parts, report: str) -> None:
    with pytest.raises(WireError, match=r"report\.html: a report that could do more"):
        read_publication(changed(parts, report=report))


def test_a_report_may_talk_of_tags(parts: Parts) -> None:
    report = f'{GUARD}<meta name="viewport" content="width=device-width, initial-scale=1"><h1>'
    report += "&lt;link&gt; &lt;meta http-equiv=refresh&gt;</h1>"
    assert read_publication(changed(parts, report=report))[0].report == report


@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_report(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser: install Chromium, e.g. apt-get install chromium")
    (tmp_path / "other.html").write_text("<p>framed</p>")
    (tmp_path / "other.js").write_text("document.title = 'ran'")
    hostile = """<!doctype html><html lang="en"><head><title>still</title>
        <meta name="color-scheme" content="light dark"><style>h1 { color: rgb(1, 2, 3) }</style>
        <script>document.title = 'ran'</script><script src="other.js"></script></head>
        <body onload="document.title = 'ran'"><h1>Shown</h1>
        <img src="x" onerror="document.title = 'ran'">
        <svg><script>document.title = 'ran'</script></svg>
        <iframe srcdoc="<script>parent.document.title = 'ran'</script>"></iframe>
        <iframe src="javascript:parent.document.title = 'ran'"></iframe></body></html>"""
    for guard, title in (("", "ran"), (GUARD, "still")):
        page = tmp_path / "page.html"
        page.write_text(guard + hostile)
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom")
        shown = subprocess.run(
            [browser, *options, f"--user-data-dir={tmp_path / 'browser'}", page.as_uri()],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        assert f"<title>{title}</title>" in shown
        assert "<h1>Shown</h1>" in shown


def test_nothing_else_is_in_a_publication(certificates: Path) -> None:
    publication = signed(certificates, FILE_CONTENTS)
    assert set(json.loads(to_text(publication))) == {
        "statement", "signature", "manifest", "report",
    }  # fmt: skip
    assert json.loads(publication.statement.document) == {
        "federation": "shops",
        "purpose": "conversion-model",
        "run": "spring",
        "time": NOW,
        "sha256": digests(FILE_CONTENTS),
    }
