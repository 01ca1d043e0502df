from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.secret import SecretError
from client.sources.matomo_db import MatomoDb
from client.sources.source import VISITS, Batch, SourceError
from conf.schema import SettingError
from conf.site import MatomoDbSource
from tests.mariadb import (
    Database,
    a_conversion,
    a_visit,
    load,
    mariadb,
    matomo_schema,
    random_visits,
    reader,
)

NOW = 1_790_000_000
NOON = 1_780_315_200
PASSWORD = "pässwörd-that-nobody-may-see-😀"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with mariadb(tmp_path_factory.mktemp("mariadb")) as database:
        yield database


@pytest.fixture
def database(server: Database) -> Database:
    """Matomo's tables, empty, and an account that may read them."""
    matomo_schema(server)
    reader(server)
    return server


def opened(server: Database, folder: Path, **settings: Any) -> MatomoDb:
    settings.setdefault("user", "reader")
    return MatomoDb(MatomoDbSource(port=server.port, **settings), folder)


def visits_of(batches: list[Batch]) -> pl.DataFrame:
    return pl.concat(batch.visits for batch in batches)


def utc(seconds: int) -> str:
    return str(pl.select(pl.from_epoch(pl.lit(seconds)).dt.strftime("%Y-%m-%d %H:%M:%S")).item())


# ---------------------------------------------------------------------------- what a visit becomes


def test_a_visit(database: Database, tmp_path: Path) -> None:
    visit = a_visit(
        7,
        idvisitor="C0FFEE0123456789",
        referer_type=6,
        referer_name="spring",
        referer_keyword="shoes",
        campaign_name="Spring sale",
        campaign_source="google",
        campaign_medium="cpc",
        config_device_type=1,
        location_country="FR",
        visitor_count_visits=3,
        custom_dimension_2="ads measuring",
    )
    load(database, "matomo_log_visit", [visit])
    conversions = [a_conversion(7, 2, revenue=10.5), a_conversion(7, 0, revenue=19.99)]
    load(database, "matomo_log_conversion", conversions)
    source = opened(
        database,
        tmp_path,
        consent_column="custom_dimension_1",
        purposes_column="custom_dimension_2",
    )
    source.check()
    [batch] = source.batches(None, NOW)
    assert batch.visits.schema == VISITS
    assert (batch.rows, batch.skipped) == (1, ())
    assert batch.visits.row(0, named=True) == dict.fromkeys(VISITS) | {
        "visitor_id": "c0ffee0123456789",
        "visit_id": "7",
        "time": NOON,
        "referrer_type": "campaign",
        "source": "google",
        "medium": "cpc",
        "campaign": "Spring sale",
        "keyword": "shoes",
        "device": "mobile",
        "country": "fr",
        "duration_s": 300.0,
        "page_views": 4,
        "visit_number": 3,
        "converted": True,
        "revenue": 30.49,
        "consent": "yes",
        "purposes": "ads measuring",
    }


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (
            {"referer_type": 2, "referer_name": "Google", "referer_keyword": "my illness"},
            {"referrer_type": "search", "source": "Google", "keyword": None, "campaign": None},
        ),
        (
            {"referer_type": 3, "referer_name": "example.org"},
            {"referrer_type": "website", "source": "example.org"},
        ),
        (
            {"referer_type": 6, "referer_name": "spring", "campaign_name": ""},
            {"referrer_type": "campaign", "campaign": "spring", "source": None},
        ),
        ({"referer_type": 7}, {"referrer_type": "social"}),
        ({"referer_type": 8, "referer_name": "ChatGPT"}, {"referrer_type": "ai assistant"}),
        ({"referer_type": 9}, {"referrer_type": None}),
        ({"referer_type": None}, {"referrer_type": None}),
        ({"config_device_type": 0}, {"device": "desktop"}),
        ({"config_device_type": 2}, {"device": "tablet"}),
        ({"config_device_type": 3}, {"device": "mobile"}),
        ({"config_device_type": 5}, {"device": "other"}),
        ({"config_device_type": 10}, {"device": "mobile"}),
        ({"config_device_type": 99}, {"device": "other"}),
        ({"config_device_type": None}, {"device": None}),
        ({"location_country": "xx"}, {"country": None}),
        ({"location_country": None}, {"country": None}),
        ({"visit_total_actions": None}, {"page_views": None, "converted": False, "revenue": 0.0}),
        ({"campaign_name": "tab\t, \\ and\n😀"}, {"campaign": "tab\t, \\ and\n😀"}),
        # It spans midnight.
        (
            {
                "visit_first_action_time": "2026-06-01 23:59:59",
                "visit_last_action_time": "2026-06-02 00:00:30",
            },
            {"time": NOON + 43199},
        ),
    ],
)
def test_columns(
    database: Database, tmp_path: Path, given_: dict[str, Any], expected: dict[str, Any]
) -> None:
    load(database, "matomo_log_visit", [a_visit(1, **given_)])
    [batch] = opened(database, tmp_path).batches(None, NOW)
    row = batch.visits.row(0, named=True)
    assert {name: row[name] for name in expected} == expected


def test_texts_of_every_size_and_kind(database: Database, tmp_path: Path) -> None:
    database.execute("ALTER TABLE matomo_log_visit MODIFY campaign_name mediumtext")
    # Somebody made it binary once, and bytes went in that are no UTF-8.
    database.execute("ALTER TABLE matomo_log_visit MODIFY campaign_source varbinary(99)")
    load(database, "matomo_log_visit", [a_visit(1, campaign_name="😀" * 25_000), a_visit(2)])
    database.execute("UPDATE matomo_log_visit SET campaign_source = x'ff41fe' WHERE idvisit = 2")
    [batch] = opened(database, tmp_path).batches(None, NOW)
    assert batch.visits["campaign"].to_list() == ["😀" * 25_000, None]
    assert batch.visits["visit_id"].to_list() == ["1", "2"]


@pytest.mark.parametrize("zone", ["+00:00", "-11:00", "+13:00"])
def test_times_are_utc_whatever_zone_the_server_is_in(
    database: Database, tmp_path: Path, zone: str
) -> None:
    load(database, "matomo_log_visit", [a_visit(1)])
    database.execute(f"SET GLOBAL time_zone = '{zone}'")
    try:
        [batch] = opened(database, tmp_path).batches(None, NOW)
        assert batch.visits["time"].to_list() == [NOON]
        assert list(opened(database, tmp_path).batches(None, NOON + 300 + 3600)) == []
        assert list(opened(database, tmp_path).batches(None, NOON + 301 + 3600)) != []
    finally:
        database.execute("SET GLOBAL time_zone = '+00:00'")


@pytest.mark.parametrize(
    ("goals", "conversions", "converted", "revenue"),
    [
        ([], [(3, 5.5), (4, 2.0)], True, 7.5),
        ([], [(3, None)], True, 0.0),
        ([], [(3, None), (0, 19.99)], True, 19.99),
        ([], [(-1, 70.0)], False, 0.0),
        ([-1], [(-1, 70.0)], False, 0.0),
        ([0], [(3, 5.0)], False, 0.0),
        ([3, 5], [(4, 1.0), (3, 5.0), (0, 9.0)], True, 5.0),
    ],
)
def test_conversions(
    database: Database,
    tmp_path: Path,
    goals: list[int],
    conversions: list[tuple[int, float | None]],
    converted: bool,
    revenue: float,
) -> None:
    load(database, "matomo_log_visit", [a_visit(1), a_visit(2)])
    rows = [a_conversion(1, number, revenue=revenue) for number, revenue in conversions]
    load(database, "matomo_log_conversion", rows)
    visits = visits_of(list(opened(database, tmp_path, goals=goals).batches(None, NOW)))
    assert visits.select("converted", "revenue").rows() == [(converted, revenue), (False, 0.0)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            "visit_first_action_time = '0000-00-00 00:00:00'",
            'column "visit_first_action_time": is empty or no time',
        ),
        (
            "visit_first_action_time = '1985-01-01 00:00:00'",
            'column "visit_first_action_time": is before 1990 or after 2100',
        ),
        ("visit_total_time = -5", 'column "visit_total_time": is below 0'),
        ("idvisitor = x'c0ffee'", 'column "idvisitor": is not 8 bytes'),
        ("idvisitor = ''", 'column "idvisitor": is empty'),
        ("idvisitor = NULL", 'column "idvisitor": is empty'),
    ],
)
def test_a_row_that_cannot_be_read_is_left_out(
    database: Database, tmp_path: Path, bad: str, reason: str
) -> None:
    database.execute(
        "ALTER TABLE matomo_log_visit MODIFY idvisitor varbinary(8) NULL, "
        "MODIFY visit_total_time int"
    )
    load(database, "matomo_log_visit", [a_visit(n) for n in range(1, 6)])
    database.execute(f"UPDATE matomo_log_visit SET {bad} WHERE idvisit IN (3, 5)")
    [batch] = opened(database, tmp_path).batches(None, NOW)
    assert batch.visits["visit_id"].to_list() == ["1", "2", "4"]
    assert batch.rows == 5
    [skipped] = batch.skipped
    assert (skipped.reason, skipped.count, skipped.first) == (reason, 2, "visit 3")


# ---------------------------------------------------------------------------- batches, windows


@pytest.mark.parametrize("batch", [1, 3, 10, 1000])
def test_every_visit_comes_once(database: Database, tmp_path: Path, batch: int) -> None:
    # Another site has most of the ids, and there are gaps.
    visits = [a_visit(n, idsite=1 if n % 5 == 0 else 2) for n in range(1, 60)]
    visits += [a_visit(n) for n in (5_000_000_000, 5_000_000_001, 2**63 + 5)]
    load(database, "matomo_log_visit", visits)
    load(database, "matomo_log_conversion", [a_conversion(n, 1) for n in (10, 2**63 + 5)])
    batches = list(opened(database, tmp_path, batch=batch).batches(None, NOW))
    read = visits_of(batches)
    wanted = [*range(5, 60, 5), 5_000_000_000, 5_000_000_001, 2**63 + 5]
    assert read["visit_id"].to_list() == [str(n) for n in wanted]
    assert read.filter("converted")["visit_id"].to_list() == ["10", str(2**63 + 5)]
    assert all(0 < b.visits.height <= 1.5 * batch for b in batches)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_stopped_ingest_goes_on_where_it_was(
    database: Database, tmp_path: Path, kept: int
) -> None:
    load(database, "matomo_log_visit", [a_visit(n) for n in range(1, 21)])
    first = opened(database, tmp_path, batch=6).batches(None, NOW)
    stored = [next(first) for _ in range(kept)]
    first.close()  # type: ignore[attr-defined]
    # It is an hour later, and two more visits have ended.
    late = {"visit_last_action_time": utc(NOW)}
    load(database, "matomo_log_visit", [a_visit(n, **late) for n in (21, 22)])
    cursor = json.loads(json.dumps(stored[-1].cursor)) if stored else None
    stored += opened(database, tmp_path, batch=7).batches(cursor, NOW + 7200)
    assert visits_of(stored)["visit_id"].to_list() == [str(n) for n in range(1, 23)]


def test_the_next_window_begins_where_the_last_one_ended(
    database: Database, tmp_path: Path
) -> None:
    source = opened(database, tmp_path, settle_minutes=60)
    settled = NOW - 3600
    ends = {1: settled - 1, 2: settled, 3: NOW - 5, 4: settled}
    load(
        database,
        "matomo_log_visit",
        [a_visit(n, visit_last_action_time=utc(end)) for n, end in ends.items()],
    )
    [batch] = source.batches(None, NOW)
    assert batch.visits["visit_id"].to_list() == ["1"]
    assert list(source.batches(batch.cursor, NOW)) == []
    assert list(source.batches(batch.cursor, NOW - 9999)) == []  # the clock was put back
    # Visit 2 went on and converted before the next ingest, visit 1 after it was read.
    for number, minute in ((2, 1), (1, 3)):
        end = utc(NOW + 60 * minute)
        database.execute(
            f"UPDATE matomo_log_visit SET visit_last_action_time = '{end}' WHERE idvisit = {number}"
        )
    load(database, "matomo_log_conversion", [a_conversion(2, 0, revenue=5)])
    [again] = source.batches(batch.cursor, NOW + 7200)
    read = again.visits.select("visit_id", "converted").rows()
    assert read == [("1", False), ("2", True), ("3", False), ("4", False)]
    assert list(source.batches(again.cursor, NOW + 7200)) == []


def test_no_visits_no_batch(database: Database, tmp_path: Path) -> None:
    load(database, "matomo_log_visit", [a_visit(1)])
    source = opened(database, tmp_path, site_id=3)
    source.check()
    assert list(source.batches(None, NOW)) == []


def test_many_visits(database: Database, tmp_path: Path) -> None:
    visits, conversions = random_visits(30_000, seed=1)
    load(database, "matomo_log_visit", visits)
    load(database, "matomo_log_conversion", conversions)
    batches = list(opened(database, tmp_path, batch=10_000).batches(None, NOW))
    assert [b.visits.height for b in batches] == [10_000] * 3
    read = visits_of(batches)
    assert read["visitor_id"].n_unique() == visits["idvisitor"].n_unique()
    assert read["converted"].sum() == conversions.height
    assert read["revenue"].sum() == pytest.approx(conversions["revenue"].sum())
    kinds = dict(visits.group_by("referer_type").len().iter_rows())
    named = dict(read.group_by("referrer_type").len().iter_rows())
    assert named == {
        "direct": kinds[1],
        "search": kinds[2],
        "website": kinds[3],
        "campaign": kinds[6],
        "social": kinds[7],
    }


def test_a_batch_costs_what_it_holds(database: Database, tmp_path: Path) -> None:
    visits, conversions = random_visits(20_000, seed=2)
    load(database, "matomo_log_visit", visits)
    load(database, "matomo_log_conversion", conversions)
    database.execute("ANALYZE TABLE matomo_log_visit, matomo_log_conversion")
    with database.listening() as statements:
        list(opened(database, tmp_path, batch=10_000).batches(None, NOW))
    ranges = [s for s in statements if "BETWEEN" in s]
    assert len(ranges) == 4
    for statement in ranges:
        [(_, _, _, how, _, key, *_)] = database.execute(f"EXPLAIN {statement}")
        assert (how, key) == ("range", "PRIMARY")


# ---------------------------------------------------------------------------- what is asked

COLUMNS = (
    "idvisit, idsite, idvisitor, visit_first_action_time, visit_last_action_time, "
    "visit_total_time, visit_total_actions, referer_type, referer_name"
)
CONVERSION = "idvisit, idsite, idgoal, revenue"
GRANTS = (
    f"SELECT ({COLUMNS}) ON matomo.matomo_log_visit;"
    f"SELECT ({CONVERSION}) ON matomo.matomo_log_conversion"
)


def test_no_statement_asks_for_more_than_it_needs(database: Database, tmp_path: Path) -> None:
    load(database, "matomo_log_visit", [a_visit(n) for n in range(1, 9)])
    source = opened(database, tmp_path, batch=3, consent_column="custom_dimension_1", goals=[1])
    with database.listening() as statements:
        source.check()
        list(source.batches(None, NOW))
    assert len(statements) > 10
    for statement in statements:
        assert statement.startswith(
            (
                "SELECT ",
                "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
                "ROLLBACK",
                "SET AUTOCOMMIT = 0",
                "SET NAMES utf8mb4",
            )
        )
        for word in ("location_ip", "user_id", "url", "*", "idorder", "config_id", "city"):
            assert word not in statement
    assert any("custom_dimension_1" in statement for statement in statements)


def test_an_account_that_may_read_just_the_columns(database: Database, tmp_path: Path) -> None:
    reader(database, "narrow", on=GRANTS)
    load(database, "matomo_log_visit", [a_visit(1)])
    source = opened(database, tmp_path, user="narrow")
    source.check()
    [batch] = source.batches(None, NOW)
    # What it may not read is as if Matomo had no such column.
    row = batch.visits.row(0, named=True)
    assert (row["country"], row["device"], row["visit_number"]) == (None, None, None)
    assert row["time"] == NOON


def test_an_account_that_is_given_views(database: Database, tmp_path: Path) -> None:
    load(database, "matomo_log_visit", [a_visit(1)])
    load(database, "matomo_log_conversion", [a_conversion(1, 0, revenue=5)])
    for table, columns in (("log_visit", COLUMNS), ("log_conversion", CONVERSION)):
        database.execute(f"CREATE VIEW shown_{table} AS SELECT {columns} FROM matomo_{table}")
    views = ";".join(f"SELECT ON matomo.shown_log_{t}" for t in ("visit", "conversion"))
    reader(database, "viewer", on=views)
    source = opened(database, tmp_path, user="viewer", prefix="shown_")
    source.check()
    assert visits_of(list(source.batches(None, NOW)))["revenue"].to_list() == [5.0]


def test_an_older_matomo(database: Database, tmp_path: Path) -> None:
    matomo_schema(database, "piwik_", campaigns=False)
    database.execute(
        "ALTER TABLE piwik_log_visit DROP visitor_count_visits, DROP location_country, "
        "DROP config_device_type, MODIFY idvisit int unsigned"
    )
    visit = a_visit(1, referer_type=6, referer_name="spring", referer_keyword="shoes")
    for name in ("visitor_count_visits", "location_country", "config_device_type"):
        del visit[name]
    load(database, "piwik_log_visit", [visit])
    source = opened(database, tmp_path, prefix="piwik_")
    source.check()
    row = visits_of(list(source.batches(None, NOW))).row(0, named=True)
    assert (row["campaign"], row["keyword"], row["medium"]) == ("spring", "shoes", None)
    assert (row["visit_number"], row["country"], row["device"]) == (None, None, None)


# ---------------------------------------------------------------------------- failures


def refused(source: MatomoDb) -> str:
    """What both ways into the source say, which must be the same and hold no password."""
    said = set()
    for use in (source.check, lambda: list(source.batches(None, NOW))):
        with pytest.raises(SourceError) as caught:
            use()
        said.add(str(caught.value))
        linked: BaseException | None = caught.value
        while linked is not None:
            assert PASSWORD not in f"{linked!r} {vars(linked)}"
            linked = linked.__cause__ or linked.__context__
            assert linked is None
    [message] = said
    return message


def password_file(folder: Path, password: str = PASSWORD) -> str:
    file = folder / "password"
    file.write_text(password)
    file.chmod(0o600)
    return "password"


def test_a_password(database: Database, tmp_path: Path) -> None:
    reader(database, "careful", PASSWORD)
    file = password_file(tmp_path)
    opened(database, tmp_path, user="careful", password_file=file).check()
    assert "the user or the password is wrong" in refused(
        opened(database, tmp_path, user="careful")
    )
    assert "the user or the password is wrong" in refused(
        opened(database, tmp_path, user="reader", password_file=file)
    )
    (tmp_path / file).chmod(0o644)
    with pytest.raises(SecretError):
        opened(database, tmp_path, user="careful", password_file=file)


def test_no_server(database: Database, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = MatomoDbSource(user="reader", port=port, password_file=password_file(tmp_path))
    assert f"127.0.0.1:{port}: the server cannot be reached" in refused(MatomoDb(config, tmp_path))


@pytest.mark.parametrize(
    ("change", "settings_", "told"),
    [
        ("", {"database": "shop"}, 'database "shop" at 127.0.0.1'),
        (
            "",
            {"prefix": "piwik_"},
            'table "piwik_log_visit": there is none, or the account may not read it; '
            "source.prefix may be wrong, there is matomo_log_visit",
        ),
        ("DROP TABLE matomo_log_conversion", {}, 'table "matomo_log_conversion": there is none'),
        (
            "ALTER TABLE matomo_log_visit DROP idvisitor, DROP KEY index_idsite_idvisitor_time",
            {},
            'table "matomo_log_visit", column "idvisitor": there is none',
        ),
        (
            "ALTER TABLE matomo_log_conversion DROP revenue",
            {},
            'table "matomo_log_conversion", column "revenue": there is none',
        ),
        ("", {"consent_column": "custom_dimension_7"}, 'column "custom_dimension_7": there is'),
    ],
)
def test_what_is_missing_is_named(
    database: Database, tmp_path: Path, change: str, settings_: dict[str, Any], told: str
) -> None:
    if change:
        database.execute(change)
    assert told in refused(opened(database, tmp_path, **settings_))


@pytest.mark.parametrize(
    ("grants", "told"),
    [
        ("SELECT ON matomo.matomo_log_visit", 'table "matomo_log_conversion": there is none, or'),
        (GRANTS.replace(", idgoal", ""), 'column "idgoal": there is none, or the account may not'),
        (
            "INSERT ON matomo.matomo_log_visit;SELECT ON matomo.matomo_log_conversion",
            "it needs SELECT on matomo_log_visit and matomo_log_conversion",
        ),
        ("USAGE ON mysql.*", "the account may not use this database"),
    ],
)
def test_an_account_that_may_too_little(
    database: Database, tmp_path: Path, grants: str, told: str
) -> None:
    reader(database, "poor", on=grants)
    assert told in refused(opened(database, tmp_path, user="poor"))


def test_a_connection_that_is_lost(database: Database, tmp_path: Path) -> None:
    load(database, "matomo_log_visit", [a_visit(n) for n in range(1, 9)])
    batches = opened(database, tmp_path, batch=3).batches(None, NOW)
    good = next(batches)
    for (connection,) in database.execute(
        "SELECT id FROM information_schema.processlist WHERE user = 'reader'"
    ):
        database.execute(f"KILL {connection}")
    with pytest.raises(SourceError, match=r"the connection was lost|the server is gone"):
        next(batches)
    rest = visits_of(list(opened(database, tmp_path).batches(good.cursor, NOW)))
    assert good.visits.height + rest.height == 8


# ---------------------------------------------------------------------------- TLS


class Authority:
    """A certificate authority, as a site would have one for its database."""

    def __init__(self, name: str) -> None:
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        own = x509.BasicConstraints(ca=True, path_length=None)
        self.certificate = self._signed(self._name, self._key, own, days=9)

    def issue(self, host: str, folder: Path, *, days: int = 9) -> list[str]:
        """The options of a server that is `host`, until so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        hosts = x509.SubjectAlternativeName([x509.DNSName(host)])
        (folder / "server.pem").write_bytes(self._signed(name, key, hosts, days))
        (folder / "server.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return [f"--ssl-cert={folder}/server.pem", f"--ssl-key={folder}/server.key"]

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType,
        days: int,
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=99))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("our authority")


@pytest.fixture(scope="module")
def encrypted(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A server with a certificate for `localhost`, and an account that comes by TLS alone."""
    folder = tmp_path_factory.mktemp("encrypted")
    with mariadb(folder, *authority.issue("localhost", folder)) as database:
        matomo_schema(database)
        reader(database, "reader", PASSWORD)
        database.execute("ALTER USER reader REQUIRE SSL")
        load(database, "matomo_log_visit", [a_visit(1)])
        yield database


def trusting(server: Database, folder: Path, authority: Authority, **settings: Any) -> MatomoDb:
    (folder / "ca.pem").write_bytes(authority.certificate)
    settings = {"host": "localhost", "tls_ca": "ca.pem", **settings}
    return opened(server, folder, password_file=password_file(folder), **settings)


def test_by_tls(encrypted: Database, authority: Authority, tmp_path: Path) -> None:
    source = trusting(encrypted, tmp_path, authority)
    source.check()
    assert visits_of(list(source.batches(None, NOW)))["visit_id"].to_list() == ["1"]


def test_whose_certificate_is_another_authority_s(encrypted: Database, tmp_path: Path) -> None:
    # Of the same name, as an impostor's would be.
    message = refused(trusting(encrypted, tmp_path, Authority("our authority")))
    assert "its certificate is refused" in message
    assert "source.tls_ca must be the authority that signed it" in message


def test_whose_certificate_is_for_another_host(
    encrypted: Database, authority: Authority, tmp_path: Path
) -> None:
    message = refused(trusting(encrypted, tmp_path, authority, host="127.0.0.1"))
    assert "its certificate is refused" in message
    assert "mismatch" in message


def test_whose_certificate_is_over(authority: Authority, tmp_path: Path) -> None:
    options = authority.issue("localhost", tmp_path, days=-1)
    with mariadb(tmp_path, *options) as database:
        assert "has expired" in refused(trusting(database, tmp_path, authority))


def test_no_password_goes_to_a_server_without_tls(
    database: Database, authority: Authority, tmp_path: Path
) -> None:
    reader(database, "reader", PASSWORD)
    assert "the server offers no TLS" in refused(trusting(database, tmp_path, authority))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "source.tls_ca=ca: cannot be read: No such file"),
        (b"", "source.tls_ca=ca: holds no certificate"),
        (b"\0\xff secret", "source.tls_ca=ca: holds no certificate"),
        (
            b"-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIB\n-----END CERTIFICATE-----\n",
            "source.tls_ca=ca: holds no certificate",
        ),
    ],
)
def test_an_authority_that_is_none(
    database: Database, tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "ca").write_bytes(content)
    message = refused(opened(database, tmp_path, tls_ca="ca"))
    assert told in message
    assert "secret" not in message


@pytest.mark.parametrize("host", ["db.example.org", "10.0.0.7", "localhost.example.org", "::2", ""])
def test_a_server_elsewhere_needs_an_authority(host: str) -> None:
    with pytest.raises(SettingError, match=r"^source.tls_ca=: must name .* by a tunnel$"):
        MatomoDbSource(user="reader", host=host)
    MatomoDbSource(user="reader", host=host, tls_ca="ca.pem")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_server_on_this_machine_needs_none(host: str) -> None:
    MatomoDbSource(user="reader", host=host)
