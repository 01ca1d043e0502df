from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conf.hub import HubConfig
from conf.schema import SettingError
from server.hub import HubError, HubFolder, create_hub

NOW = 1_790_000_000


@pytest.fixture
def hub(tmp_path: Path) -> HubFolder:
    return create_hub(tmp_path / "hub", HubConfig(host="hub.example.org"), NOW)


def test_a_new_hub_has_settings_certificates_and_no_site(hub: HubFolder) -> None:
    assert hub.config() == HubConfig(host="hub.example.org")
    assert hub.authority.read_bytes() == (hub.certificates / "ca.crt").read_bytes()
    assert list(hub.sites.iterdir()) == []
    assert (hub.path.stat().st_mode & 0o777) == 0o700
    for key in hub.certificates.glob("*.key"):
        assert (key.stat().st_mode & 0o777) == 0o600, key


def test_a_hub_is_not_begun_twice(hub: HubFolder) -> None:
    before = hub.authority.read_bytes()
    with pytest.raises(HubError, match="is a hub already"):
        create_hub(hub.path, HubConfig(host="other.example.org"), NOW)
    assert hub.authority.read_bytes() == before


def test_without_a_hub_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="is no hub; make one with: python -m server init"):
        HubFolder(tmp_path).config()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prot: 9092", "prot: no such setting; did you mean port?"),
        ("port: 70000", "port=70000: must be 1 to 65535"),
        ("port: 9093", "two settings name one port"),
        ("host: 'https://hub'", "host=https://hub: must be a host name"),
        ("requests_per_s: 0", "requests_per_s=0.0: must be above 0"),
    ],
)
def test_settings_that_are_not_in_order_are_named(hub: HubFolder, line: str, said: str) -> None:
    name = line.partition(":")[0]
    kept = [ln for ln in hub.settings.read_text().splitlines() if not ln.startswith(f"{name}:")]
    hub.settings.write_text("\n".join([*kept, line]))
    with pytest.raises(SettingError) as error:
        hub.config()
    assert said in str(error.value)
    assert "hub.yaml" in str(error.value)


def test_runs_begun_in_one_second_have_folders_of_their_own(hub: HubFolder) -> None:
    folders = [hub.new_run()]
    for _ in range(2):
        folders[-1].mkdir()
        folders.append(hub.new_run())
    assert len(set(folders)) == 3


def test_a_second_process_is_told_who_is_at_it(hub: HubFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from server.hub import HubFolder\n"
        f"with HubFolder(Path({str(hub.path)!r})).held('run'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert hub.is_held("run")
        with (
            pytest.raises(HubError, match=f"a run is going on already, in process {other.pid}$"),
            hub.held("run"),
        ):
            pass
        with hub.held("start"):
            pass
        other.kill()
    assert not hub.is_held("run")
