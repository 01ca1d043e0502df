from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console

from client import join
from client.__main__ import main
from client.audit_log import Event
from client.folder import SiteFolder, create
from client.node import NodeState
from client.status import SiteStatus, show_status
from tests.superlink import Hub, open_superlink

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    return create(tmp_path / "acme", int(time.time()))


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return write_authority(tmp_path / "ca.crt", 2090)


def write_authority(path: Path, until_year: int) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    made = x509.CertificateBuilder(
        name, name, key.public_key(), 1, datetime(2020, 1, 1), datetime(until_year, 1, 1)
    ).sign(key, SHA256())
    path.write_bytes(made.public_bytes(Encoding.PEM))
    return path


def client(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ------------------------------------------------------------------------ init


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("acme", "acme"),
        ("Acme Shop 2", "Acme Shop 2"),
        ("1e3", "1e3"),
        ("on", "on"),
        ("a.b", "a.b"),
        ("my: site", "my-site"),
        ("-x", "my-site"),
        ("x" * 64, "my-site"),
    ],
)
def test_a_site_goes_by_its_folders_name(tmp_path: Path, folder: str, name: str) -> None:
    site = create(tmp_path / folder, int(time.time()))
    assert site.config().name == name
    assert site.node.name == name
    public = (site.path / f"{name}.pub").read_bytes()
    assert public == site.node.public_key.read_bytes()
    assert stat.S_IMODE((site.path / "node" / "key").stat().st_mode) == 0o600


def test_settings_that_lie_there_say_the_name(tmp_path: Path) -> None:
    text = (ROOT / "client/templates/site.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("my-site", "Other"))
    assert create(tmp_path, int(time.time())).node.name == "Other"
    assert (tmp_path / "Other.pub").exists()


def test_init_says_what_the_coordinator_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["init", "acme"])
    said = capsys.readouterr().out
    assert "give acme/acme.pub to the coordinator" in said
    assert (tmp_path / "acme" / "acme.pub").exists()
    monkeypatch.chdir(tmp_path / "acme")
    with pytest.raises(SystemExit):
        main(["init", "."])


# ------------------------------------------------------------------------ what cannot join


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--superlink", "h:1", "--root-certificates", "ca.crt"], "nowhere: no site"),
        (["acme", "--superlink", "h", "--root-certificates", "ca.crt"], "must be HOST:PORT"),
        (["acme", "--superlink", "https://h:1", "--root-certificates", "ca.crt"], "HOST:PORT"),
        (["acme", "--superlink", "h:0", "--root-certificates", "ca.crt"], "HOST:PORT"),
        (["acme", "--superlink", "h:65536", "--root-certificates", "ca.crt"], "HOST:PORT"),
        (["acme", "--superlink", "h:1", "--root-certificates", "no.crt"], "no.crt: cannot be read"),
        (["acme", "--superlink", "h:1", "--root-certificates", "acme"], "acme: cannot be read"),
        (
            ["acme", "--superlink", "[::1]:1", "--root-certificates", "acme/acme.pub"],
            "acme.pub: holds no certificate",
        ),
        (
            ["acme", "--superlink", "h:1", "--root-certificates", "old.crt"],
            "old.crt: expired on 2021-01-01",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    site: SiteFolder,
    authority: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    write_authority(authority.with_name("old.crt"), 2021)
    monkeypatch.chdir(authority.parent)
    with pytest.raises(SystemExit) as caught:
        main(["join", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not site.authority.exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("policy.yaml", "epsilon: 3", "policy.yaml: "),
        ("site.yaml", "nam: acme", "site.yaml: "),
    ],
)
def test_a_site_that_is_not_in_order_does_not_join(
    site: SiteFolder,
    authority: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str,
    message: str,
) -> None:
    (site.path / file).write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *("join", str(site.path), "--superlink", "h:1"),
                *("--root-certificates", str(authority)),
            ]
        )
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_large_log_is_put_aside(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "LARGEST_LOG", 10)
    site.logs.mkdir()
    (site.logs / "agent.log").write_text("0123456789+")
    (site.logs / "supernode.log").write_text("0123456789")
    commands = join._commands(site, site.config(), "h:1", as_json=True)
    assert [command.log for command in commands] == [
        site.logs / "agent.log",
        site.logs / "supernode.log",
    ]
    assert {path.name for path in site.logs.iterdir()} == {"agent.log.1", "supernode.log"}
    for command in commands:
        assert command.argv[-1] == "--json-logs"
        assert command.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert command.environment["PATH"] == os.environ["PATH"]


# ------------------------------------------------------------------------ real processes


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with open_superlink(tmp_path_factory.mktemp("superlink")) as hub:
        yield hub


def children(pid: int) -> dict[str, int]:
    """The processes of a `join`: numbers of the agent's and the SuperNode's, while they run."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            argv = (entry / "cmdline").read_bytes().decode().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if above == pid and argv[1:3] == ["-m", "client"]:
            found[argv[3]] = int(entry.name)
    return found


@pytest.mark.slow
def test_a_site_joins_and_stays_whatever_dies(site: SiteFolder, hub: Hub, tmp_path: Path) -> None:
    # As before there were SuperNodes' keys.
    for path in (*site.node.path.iterdir(), site.path / "acme.pub"):
        path.unlink()
    site.node.path.rmdir()
    where = ("--superlink", hub.address, "--root-certificates", str(hub.authority))
    log = tmp_path / "join.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "client", "join", str(site.path), *where],
            cwd=ROOT,
            stderr=output,
        )

    def wait(said: str, after: int = 0) -> None:
        deadline = time.monotonic() + 60
        while said not in log.read_text()[after:]:
            logs = [path.read_text() for path in site.logs.glob("*.log")]
            assert process.poll() is None, (log.read_text(), logs)
            assert time.monotonic() < deadline, (said, log.read_text(), logs)
            time.sleep(0.02)

    try:
        wait("agent ready")
        wait("SuperNode not connected: this site's key is not registered")
        assert f"give {site.path / 'acme.pub'} to the coordinator" in log.read_text()
        assert site.authority.read_bytes() == hub.authority.read_bytes()
        id_ = hub.admit(site.node)
        wait(f"SuperNode connected as node {id_}")

        again = client("join", site.path, *where)
        assert again.returncode == 2
        assert "takes part already" in again.stderr

        found = client("status", site.path)
        assert found.returncode == 0, found.stderr
        assert f"connected as node {id_}" in found.stdout
        assert "runs since" in found.stdout

        before = children(process.pid)
        said = len(log.read_text())
        os.kill(before["carry"], signal.SIGKILL)
        os.kill(before["agent"], signal.SIGKILL)
        wait("SuperNode ended with 137; started again in", said)
        wait("agent ended with 137; started again in", said)
        wait("agent ready", said)
        wait(f"SuperNode connected as node {id_}", said)
        after = children(process.pid)
        assert after.keys() == before.keys() == {"agent", "carry"}
        assert not set(after.values()) & set(before.values())

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0, log.read_text()
        assert not hub.is_online(id_)
        assert not any(Path(f"/proc/{pid}").exists() for pid in after.values())
    finally:
        process.kill()
        process.wait()

    over = client("status", site.path)
    assert over.returncode == 1
    assert "does not run" in over.stdout
    assert "not connected: stopped" in over.stdout


# ------------------------------------------------------------------------ status


AGENT = {
    "site": "acme",
    "since": "2026-11-29T12:00:00+00:00",
    "healthy": True,
    "policy": "in order",
    "ledger": "in order",
    "epsilon": {"spent": 1.25, "left": 6.75, "delta": 1e-5},
    "rounds": 12,
    "refusals": 3,
    "last_request": "2026-11-29T13:00:00+00:00",
    "at_work": {"asked": "train", "run": "[red]spring", "round": 13, "seconds": 2.0},
    "model": None,
}


def shown(found: SiteStatus, capsys: pytest.CaptureFixture[str]) -> str:
    show_status(Console(width=140), found)
    return capsys.readouterr().out


def test_status_shows_what_the_agent_says(capsys: pytest.CaptureFixture[str]) -> None:
    refusal = Event(4, "2026-11-29T12:30:00+00:00", "refusal", {"asked": "train"}, "0")
    node = NodeState(True, "node 7", time.time())
    printed = shown(SiteStatus(AGENT, "", node, (refusal,)), capsys)
    for text in (
        "runs since 2026-11-29T12:00:00",
        "connected as node 7",
        "train of run [red]spring, round 13",
        "2026-11-29T13:00:00",
        "12 since its start",
        "3 since its start",
        "spent 1.250, left 6.750, at delta 1e-05",
        "2026-11-29T12:30:00+00:00 train",
    ):
        assert text in printed


def test_status_shows_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    silent = NodeState(True, "node 7", datetime(2026, 1, 1, tzinfo=UTC).timestamp())
    printed = shown(SiteStatus(None, "nobody listens", silent, ()), capsys)
    assert "does not run (nobody listens)" in printed
    assert "not connected: silent since 2026-01-01" in printed
    ended = NodeState(False, "the hub does not answer", silent.contact)
    assert "not connected: the hub does not answer (2026-01-01" in shown(
        SiteStatus(
            {**AGENT, "epsilon": None, "at_work": None, "last_request": None}, "", ended, ()
        ),
        capsys,
    )
    assert "not known here" in shown(SiteStatus(None, "", None, ()), capsys)


def test_status_of_no_site_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["status", str(tmp_path)])
    assert caught.value.code == 2
    assert "site.yaml: cannot be read" in capsys.readouterr().err
