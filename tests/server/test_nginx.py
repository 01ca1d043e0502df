from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conf.hub import HubConfig
from server.front import FrontError, PublicPort
from server.hub import create_hub
from server.nginx import hub_configuration, nginx_configuration
from tests.server.test_front import (
    PASSED,
    PATH,
    Door,
    FromOutside,
    Upstream,
    a_port,
    listens,
    request,
    wait_until,
)

# Debian has it where only root looks.
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: nginx-light of apt")

# What nginx keeps, in a folder of its own, by a user who is not root.
_AROUND = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    include {folder}/hub.conf;
}}
"""


def command(folder: Path, configuration: str, *more: str) -> list[str]:
    (folder / "hub.conf").write_text(configuration)
    (folder / "nginx.conf").write_text(_AROUND.format(folder=folder))
    errors = str(folder / "error.log")
    return [str(NGINX), "-e", errors, "-p", str(folder), "-c", str(folder / "nginx.conf"), *more]


@needs_nginx
class TestNginx(FromOutside):
    @pytest.fixture(scope="class")
    @staticmethod
    def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
        folder = tmp_path_factory.mktemp("nginx")
        port = a_port(folder)
        with (
            Upstream(port) as upstream,
            subprocess.Popen(command(folder, nginx_configuration(port))) as process,
        ):
            try:
                wait_until(lambda: listens(port.port), "nginx does not listen")
                yield Door(port, upstream)
            finally:
                process.terminate()
                try:
                    process.wait(5)
                finally:
                    process.kill()

    def test_a_question_mark_alone_reaches_nothing(self, door: Door) -> None:
        door.upstream.begun.clear()
        assert door.ask(request(f"{PATH}?")).status == 404
        assert door.upstream.begun == []


@needs_nginx
def test_nginx_takes_what_a_hub_says(tmp_path: Path) -> None:
    hub = create_hub(tmp_path / "my hub", HubConfig(host="localhost", listen="::1"), 1_790_000_000)
    tried = subprocess.run(
        command(tmp_path, hub_configuration(hub), "-t"), capture_output=True, text=True
    )
    assert tried.returncode == 0, tried.stderr
    assert "test is successful" in tried.stderr
    assert "warn" not in tried.stderr


@needs_nginx
def test_a_superlink_that_the_authority_does_not_vouch_for_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    port, other = a_port(tmp_path), a_port(tmp_path / "other")
    impostor = replace(other, superlink_port=port.superlink_port)
    with (
        Upstream(impostor) as upstream,
        subprocess.Popen(command(tmp_path, nginx_configuration(port))) as process,
    ):
        try:
            wait_until(lambda: listens(port.port), "nginx does not listen")
            assert Door(port, upstream).ask(request(PATH)).status == 502
            assert upstream.begun == []
        finally:
            process.kill()


def a_public_port(**changes: object) -> PublicPort:
    port = PublicPort(
        "0.0.0.0", 9092, Path("/hub/server.crt"), Path("/hub/server.key"), 9093, Path("/hub/ca.crt")
    )
    return replace(port, **changes)  # type: ignore[arg-type]


def test_only_calls_on_the_list_have_a_way_to_the_superlink() -> None:
    lines = [line.strip() for line in nginx_configuration(a_public_port()).splitlines()]
    passed = [line for line in lines if line.startswith("proxy_pass ")]
    assert passed == [f"proxy_pass https://127.0.0.1:9093/v1/fleet/{call};" for call in PASSED]
    assert [line for line in lines if line.startswith("location ")] == [
        *("location / {", "location @later {"),
        *(f"location = /v1/fleet/{call} {{" for call in PASSED),
    ]


@pytest.mark.parametrize("path", ["/hub;x/a.crt", "/$hub/a.crt", '/"hub/a.crt', "/hub\n/a.crt"])
@pytest.mark.parametrize("which", ["certificate", "key", "authority"])
def test_a_path_that_means_something_to_nginx_is_refused(path: str, which: str) -> None:
    with pytest.raises(FrontError, match="nginx cannot be told this path"):
        nginx_configuration(a_public_port(**{which: Path(path)}))
