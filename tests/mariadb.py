"""A real MariaDB server in a folder of its own, with Matomo's tables and made-up visits.

`with mariadb(folder) as database`, then `matomo_schema(database)` and
`load(database, "matomo_log_visit", rows)`, with rows of `a_visit` or of `random_visits`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pymysql
import pytest

NAME = "matomo"
"""The database that `matomo_schema` makes."""


class Database:
    """A running server. Its `root` has no password and comes by the socket alone."""

    def __init__(self, folder: Path, socket_file: Path, port: int) -> None:
        self.port = port
        self._log = folder / "statements.log"
        self.socket = str(socket_file)

    def connect(self, database: str | None = None) -> Any:
        return pymysql.connect(
            unix_socket=self.socket,
            user="root",
            database=database,
            charset="utf8mb4",
            autocommit=True,
            local_infile=True,
        )

    def execute(self, sql: str, rows: Sequence[Sequence[Any]] | None = None) -> list[Any]:
        """Run a statement in `NAME`, where that exists: once, or once a row."""
        with self.connect() as connection, connection.cursor() as cursor:
            if cursor.execute("SHOW DATABASES LIKE %s", (NAME,)):
                cursor.execute(f"USE {NAME}")
            # As Matomo does: no strict mode.
            cursor.execute("SET sql_mode = ''")
            if rows is None:
                cursor.execute(sql)
            else:
                cursor.executemany(sql, rows)
            return list(cursor.fetchall())

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[str]]:
        """The statements that reach the server meanwhile; complete when the block has ended."""
        self._log.write_text("")
        self.execute("SET GLOBAL general_log = ON")
        heard: list[str] = []
        yield heard
        self.execute("SET GLOBAL general_log = OFF")
        for line in self._log.read_text().splitlines():
            _, query, statement = line.partition("Query\t")
            if query:
                heard.append(statement)
            elif heard and "\t" not in line:
                heard[-1] += f"\n{line}"
        # What `execute` says to switch it on and off.
        own = ("SHOW DATABASES", f"USE {NAME}", "SET sql_mode", "SET GLOBAL")
        heard[:] = [statement for statement in heard if not statement.startswith(own)]


@contextlib.contextmanager
def mariadb(folder: Path, *options: str) -> Iterator[Database]:
    """A new server with its data in `folder`; gone when the block ends, or this process.

    `options`: further ones of the server.
    """
    server, install = (shutil.which(p, path=_PATH) for p in ("mariadbd", "mariadb-install-db"))
    if server is None or install is None:
        pytest.skip("MariaDB is not installed: apt-get install mariadb-server")
    data = folder / "data"
    common = ["--no-defaults", f"--datadir={data}"]
    if os.geteuid() == 0:
        common.append("--user=root")
    made = [*common, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run([install, *made], check=True, capture_output=True)
    # The path of a socket may be 107 characters long at most.
    log = folder / "server.log"
    with tempfile.TemporaryDirectory(prefix="db") as short, log.open("w") as heard:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        database = Database(folder, Path(short) / "s", port)
        process = subprocess.Popen(
            [
                server,
                *common,
                f"--socket={short}/s",
                f"--pid-file={short}/pid",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                "--skip-name-resolve",
                f"--general-log-file={folder}/statements.log",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-buffer-pool-size=256M",
                "--local-infile=1",
                *options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=heard,
            preexec_fn=_die_with_parent,
        )
        try:
            _wait(database, process, log)
            yield database
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def _die_with_parent() -> None:
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _wait(database: Database, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(database.socket) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"MariaDB did not start:\n{log.read_text()[-2000:]}")


# ---------------------------------------------------------------------------- Matomo's tables

_VISIT = """
    idvisit bigint(10) unsigned NOT NULL AUTO_INCREMENT,
    idsite int(10) unsigned NOT NULL DEFAULT 1,
    idvisitor binary(8) NOT NULL,
    visit_last_action_time datetime NOT NULL,
    visit_first_action_time datetime NOT NULL,
    visit_total_time int(11) unsigned NOT NULL,
    visit_total_actions int(11) unsigned DEFAULT NULL,
    visitor_returning tinyint(1) DEFAULT NULL,
    visitor_count_visits int(11) unsigned NOT NULL DEFAULT 0,
    referer_type tinyint(1) unsigned DEFAULT NULL,
    referer_name varchar(255) DEFAULT NULL,
    referer_keyword varchar(255) DEFAULT NULL,
    referer_url varchar(1500) DEFAULT NULL,
    visit_entry_idaction_url int(11) unsigned DEFAULT NULL,
    config_device_type tinyint(100) DEFAULT NULL,
    location_ip varbinary(16) NOT NULL,
    location_country char(3) DEFAULT NULL,
    user_id varchar(200) DEFAULT NULL,
    custom_dimension_1 varchar(255) DEFAULT NULL,
    custom_dimension_2 varchar(255) DEFAULT NULL,
    PRIMARY KEY (idvisit),
    KEY index_idsite_datetime (idsite, visit_last_action_time),
    KEY index_idsite_idvisitor_time (idsite, idvisitor, visit_last_action_time DESC)
"""
_CAMPAIGNS = """,
    campaign_name varchar(255) DEFAULT NULL,
    campaign_source varchar(255) DEFAULT NULL,
    campaign_medium varchar(255) DEFAULT NULL,
    campaign_keyword varchar(255) DEFAULT NULL
"""
_CONVERSION = """
    idvisit bigint(10) unsigned NOT NULL,
    idsite int(10) unsigned NOT NULL DEFAULT 1,
    idvisitor binary(8) NOT NULL,
    server_time datetime NOT NULL,
    idgoal int(10) NOT NULL,
    buster int(10) unsigned NOT NULL,
    idorder varchar(100) DEFAULT NULL,
    url varchar(4096) NOT NULL,
    revenue float DEFAULT NULL,
    PRIMARY KEY (idvisit, idgoal, buster),
    KEY index_idsite_datetime (idsite, server_time)
"""


def matomo_schema(database: Database, prefix: str = "matomo_", *, campaigns: bool = True) -> None:
    """Make `NAME` anew, with the columns of Matomo 5's tables that matter here.

    `campaigns`: as with the plugin MarketingCampaignsReporting.
    """
    database.execute(f"DROP DATABASE IF EXISTS {NAME}")
    database.execute(f"CREATE DATABASE {NAME} CHARACTER SET utf8mb4")
    plugin = _CAMPAIGNS if campaigns else ""
    database.execute(f"CREATE TABLE {prefix}log_visit ({_VISIT}{plugin}) ENGINE=InnoDB")
    database.execute(f"CREATE TABLE {prefix}log_conversion ({_CONVERSION}) ENGINE=InnoDB")


def reader(database: Database, user: str = "reader", password: str = "", on: str = "") -> None:
    """An account that may SELECT: on all of `NAME`, or on what `on` says, such as a table."""
    database.execute(f"CREATE OR REPLACE USER '{user}'@'%' IDENTIFIED BY '{password}'")
    for grant in on.split(";") if on else [f"SELECT ON {NAME}.*"]:
        database.execute(f"GRANT {grant} TO '{user}'@'%'")


# ---------------------------------------------------------------------------- visits


def a_visit(number: int, **changed: Any) -> dict[str, Any]:
    """A row of log_visit: direct, on a desktop, five minutes on 1 June 2026 at noon."""
    return {
        "idvisit": number,
        "idsite": 1,
        "idvisitor": f"{number:016x}",
        "visit_last_action_time": "2026-06-01 12:05:00",
        "visit_first_action_time": "2026-06-01 12:00:00",
        "visit_total_time": 300,
        "visit_total_actions": 4,
        "visitor_count_visits": 1,
        "referer_type": 1,
        "config_device_type": 0,
        "location_ip": "0a000001",
        "location_country": "de",
        "user_id": "somebody@example.org",
        "referer_url": "https://example.org/private?q=1",
        "custom_dimension_1": "yes",
        **changed,
    }


def a_conversion(visit: int, goal: int, **changed: Any) -> dict[str, Any]:
    """A row of log_conversion."""
    return {
        "idvisit": visit,
        "idsite": 1,
        "idvisitor": f"{visit:016x}",
        "server_time": "2026-06-01 12:04:00",
        "idgoal": goal,
        "buster": 0,
        "url": "https://example.org/thanks",
        **changed,
    }


def load(database: Database, table: str, rows: pl.DataFrame | Sequence[dict[str, Any]]) -> None:
    """Add rows to a table. Binary columns (idvisitor, location_ip) are given in hexadecimal."""
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
    escaped = pl.col(pl.String).str.replace_all(r"([\\\t\n])", r"\$1")
    with tempfile.NamedTemporaryFile(suffix=".tsv") as file:
        frame.with_columns(escaped).write_csv(
            file.name,
            include_header=False,
            separator="\t",
            quote_style="never",
            null_value=r"\N",
        )
        binary = [c for c in ("idvisitor", "location_ip") if c in frame.columns]
        columns = ", ".join(f"@{c}" if c in binary else c for c in frame.columns)
        unhex = ", ".join(f"{c} = UNHEX(@{c})" for c in binary)
        database.execute(
            f"LOAD DATA LOCAL INFILE '{file.name}' INTO TABLE {table} CHARACTER SET utf8mb4 "
            f"({columns})" + (f" SET {unhex}" if unhex else "")
        )


def random_visits(
    count: int, *, seed: int = 0, days: int = 90, until: int = 1_788_220_800, lift: float = 1
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows of log_visit and of log_conversion: `count` visits that begin in `days` before `until`.

    `until` is in UTC seconds, else 1 September 2026. About a third as many visitors. Who comes by
    a campaign, and who came before, converts more often; the larger `lift`, the more so.
    """
    draw = np.random.default_rng(seed)
    visitor = draw.integers(0, max(1, count // 3), count)
    begin = np.sort(draw.integers(0, days * 86400, count)) + until - days * 86400
    duration = np.minimum(draw.exponential(240, count), 7200).astype(np.int64)
    referrer = draw.choice([1, 2, 3, 6, 7], count, p=[0.3, 0.3, 0.1, 0.2, 0.1])
    campaign = draw.integers(0, 12, count)
    visits = pl.DataFrame(
        {
            "idvisit": np.arange(1, count + 1),
            "visitor": visitor,
            "begin": begin,
            "visit_total_time": duration,
            "visit_total_actions": 1 + draw.poisson(3, count),
            "referer_type": referrer,
            "campaign": campaign,
            "config_device_type": draw.choice([0, 1, 2], count, p=[0.5, 0.4, 0.1]),
            "location_country": draw.choice(["de", "fr", "pl"], count),
            "custom_dimension_1": draw.choice(["yes", "no"], count, p=[0.9, 0.1]),
        }
    ).with_columns(visitor_count_visits=pl.int_range(1, pl.len() + 1).over("visitor"))
    before = np.minimum(visits["visitor_count_visits"].to_numpy() - 1, 3)
    chance = 0.02 + lift * (0.06 * (referrer == 6) + 0.03 * before)
    converted = visits.filter(draw.random(count) < chance)
    named = {1: None, 2: "Google", 3: "example.org", 7: "Facebook"}
    is_campaign = pl.col("referer_type") == 6
    name = pl.format("campaign {}", "campaign")
    idvisitor = pl.format("{}{}", pl.lit("c0ffee"), pl.col("visitor").cast(pl.String).str.zfill(10))

    def moment(seconds: pl.Expr) -> pl.Expr:
        return pl.from_epoch(seconds).dt.strftime("%Y-%m-%d %H:%M:%S")

    visits = visits.select(
        "idvisit",
        "visit_total_time",
        "visit_total_actions",
        "visitor_count_visits",
        "referer_type",
        "config_device_type",
        "location_country",
        "custom_dimension_1",
        pl.lit("0a000001").alias("location_ip"),
        idvisitor.alias("idvisitor"),
        moment(pl.col("begin")).alias("visit_first_action_time"),
        moment(pl.col("begin") + pl.col("visit_total_time")).alias("visit_last_action_time"),
        pl.when(is_campaign)
        .then(name)
        .otherwise(pl.col("referer_type").replace_strict(named, default=None))
        .alias("referer_name"),
        pl.when(is_campaign).then(pl.lit("cpc")).alias("campaign_medium"),
        pl.when(is_campaign).then(pl.lit("google")).alias("campaign_source"),
        pl.when(is_campaign).then(name).alias("campaign_name"),
    )
    conversions = converted.select(
        "idvisit",
        idvisitor.alias("idvisitor"),
        moment(pl.col("begin") + pl.col("visit_total_time")).alias("server_time"),
        pl.lit(0).alias("idgoal"),
        pl.col("idvisit").alias("buster"),
        pl.lit("").alias("url"),
        pl.Series(draw.gamma(2, 30, converted.height).round(2)).alias("revenue"),
    )
    return visits, conversions
