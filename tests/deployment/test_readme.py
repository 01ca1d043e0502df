"""The README's chapter on deployment, line by line, as a coordinator and a site would type it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.folder import SiteFolder, create
from client.ingest import ingest
from server.demo_visits import SITE, write_visits
from server.hub import HubFolder
from tests.deployment.federation import ROOT, SMALL, Federation, environment, free_ports, until

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
RUN = "2026-11-24_16-00-00"
"""The run that the README's examples name."""


def lines() -> list[str]:
    """The commands of hub and site, in the chapter's order."""
    blocks = re.findall(r"```bash (?:hub|site)\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    return "".join(blocks).splitlines()


SAYS = {
    ("server", "init"): "hub: a new hub",
    ("server", "admit"): "acme: admitted",
    ("server", "status"): "acme",
    ("server", "run"): "report: ",
    ("server", "publish"): "acme: has it",
    ("client", "status"): "connected as node",
    ("client", "budget"): "epsilon",
    ("client", "score"): "s.csv: ",
}
"""What each command says, among other things."""


def test_the_chapter_on_deployment_works(tmp_path: Path) -> None:
    folder = tmp_path
    site = folder / "acme"
    create(site, int(time.time()))
    write_visits({"acme": site}, 1500, datetime.now(UTC))
    (site / "site.yaml").write_text(SITE.format(name="acme"))
    ingest(SiteFolder(site), int(time.time()), lambda account: None)
    shutil.copy(site / "acme.pub", folder / "acme.pub")
    federation = Federation(folder, HubFolder(folder / "hub"), {"acme": site})
    try:
        for line in lines():
            follow(federation, line)
    finally:
        for process in federation.running.values():
            process.terminate()
        codes = [process.wait(timeout=30) for process in federation.running.values()]
    assert codes == [0, 0], federation.dump()


def follow(federation: Federation, line: str) -> None:
    """One command of the chapter; what names the hub and the run, names those of the test."""
    folder, hub = federation.folder, federation.hub
    words = shlex.split(line)
    assert words[:2] == ["python", "-m"], line
    words = words[2:]
    if hub.settings.exists():
        line_port = f"localhost:{hub.config().port}"
        words = [word.replace("hub.example.org:9092", line_port) for word in words]
    words = [word.replace("hub.example.org", "localhost") for word in words]
    runs = sorted(path.name for path in hub.runs.glob("*"))
    if runs:
        words = [word.replace(RUN, runs[-1]) for word in words]
    what = words[0], words[1]
    if what == ("server", "start"):
        federation.start_hub()
        return
    if what == ("client", "join"):
        federation._keep("acme", *words)
        federation.wait("acme", "key is not registered at the hub")
        return
    if what == ("server", "run") and not any(word.startswith("resume=") for word in words):
        words += SMALL
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}{federation.dump()}"
    assert SAYS[what] in done.stdout, f"{line}\n{done.stdout}"
    if what == ("server", "init"):
        shutil.copy(hub.authority, folder / "hub-ca.crt")
        ports = dict(zip(("port", "superlink_port", "health_port"), free_ports(3), strict=True))
        text = hub.settings.read_text()
        for name, port in ports.items():
            text = re.sub(rf"^{name}: \d+", f"{name}: {port}", text, flags=re.M)
        hub.settings.write_text(text)
    elif what == ("server", "admit"):
        until(
            lambda: "SuperNode connected" in federation.log("acme"),
            "the admitted site to connect",
            federation.dump,
        )
    elif what == ("server", "status"):
        assert re.search(r"acme\W+online", done.stdout), done.stdout


def test_the_demo_does_what_the_chapter_says() -> None:
    """The demo's source is read, because the demo itself runs in its own test."""
    source = (ROOT / "server" / "demo.py").read_text()
    said = re.findall(r'(?:run|kept)\(\s*"(server|client)", "(\w+)"', source)
    chapter = [tuple(shlex.split(line)[2:4]) for line in lines()]
    for command in dict.fromkeys(chapter):
        if command == ("client", "status"):
            continue
        assert command in said, command
