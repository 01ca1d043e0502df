"""Keeps a hub up: the SuperLink on the loopback address, and the front that sites reach."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from server.admission import tell_superlink
from server.hub import HubError, HubFolder
from server.monitoring import HubFigures, health
from server.runs import open_superlink
from service.health import HealthServer
from service.processes import Command, Stopped, Supervisor

LONGEST_START_S = 90.0
"""So long the SuperLink may take until it answers."""
LOOK_EACH_S = 10.0
LONGEST_SILENCE_S = 60.0
"""A SuperLink that lives but answers nobody for so long is started anew."""


def start(
    hub: HubFolder,
    stopped: Stopped,
    tell: Callable[[str], None],
    *,
    front: bool,
    json_logs: bool = False,
) -> None:
    """Start SuperLink and front, and restart what dies, until `stopped`.

    Args:
        hub: The hub.
        stopped: Ends it.
        tell: Is told what happens, a line each.
        front: False where another program, such as nginx, stands before the SuperLink.
        json_logs: The front's log as JSON.

    Raises:
        HubError: It is started already, or the SuperLink does not come up.
        SettingError: `hub.yaml` is not in order.
    """
    config = hub.config()
    superlink = open_superlink(hub)
    commands = [_superlink_command(hub), *([_front_command(hub, json_logs)] if front else [])]
    for folder in (hub.state, hub.logs):
        # A copy of a hub does without them.
        folder.mkdir(mode=0o700, exist_ok=True)
    with hub.held("start"), ExitStack() as opened:
        supervisor = opened.enter_context(Supervisor(commands, tell))
        deadline = time.monotonic() + LONGEST_START_S
        while not superlink.is_up():
            if stopped.wait(0.2):
                return
            if time.monotonic() > deadline:
                raise HubError(
                    f"the SuperLink does not answer after {LONGEST_START_S:.0f} s; see "
                    f"{hub.logs / 'superlink.log'}"
                )
            supervisor.check()
        names = tell_superlink(hub, superlink)
        if config.health_port:
            opened.enter_context(
                HealthServer(
                    config.health_port,
                    lambda: health(hub, front=front),
                    HubFigures(hub).registry(),
                )
            )
        where = f"{config.host}:{config.port}" if front else f"localhost:{config.superlink_port}"
        tell(f"{where} is up, federation {config.federation}, {len(names)} sites admitted")
        heard = time.monotonic()
        while not stopped.wait(0.5):
            supervisor.check()
            if time.monotonic() < heard + LOOK_EACH_S:
                continue
            if superlink.is_up():
                heard = time.monotonic()
            elif time.monotonic() > heard + LONGEST_SILENCE_S:
                tell(f"the SuperLink was silent for {LONGEST_SILENCE_S:.0f} s; it is ended")
                if (pid := supervisor.pids.get("superlink")) is not None:
                    os.kill(pid, signal.SIGKILL)
                heard = time.monotonic()


_SUPERLINK = """\
import logging
from flwr.superlink.cli import flower_superlink
# A line for each look of each site would fill the disk.
logging.getLogger("uvicorn.access").addFilter(lambda record: False)
logging.getLogger("flwr").setLevel(logging.WARNING)
flower_superlink()
"""


def _superlink_command(hub: HubFolder) -> Command:
    config, certificates = hub.config(), hub.certificates
    return Command(
        "superlink",
        (
            *(sys.executable, "-c", _SUPERLINK),
            *("--host", "127.0.0.1", "--port", str(config.superlink_port)),
            *("--database", str(hub.state / "state.sqlite")),
            *("--ssl-certfile", str(certificates / "server.crt")),
            *("--ssl-keyfile", str(certificates / "server.key")),
            *("--ssl-ca-certfile", str(hub.authority)),
            "--enable-supernode-auth",
            # The coordinator runs in a process of its own (`server.runs`).
            *("--isolation", "process"),
            "--disable-runtime-dependency-installation",
        ),
        _environment(hub),
        hub.logs / "superlink.log",
    )


def _front_command(hub: HubFolder, json_logs: bool) -> Command:
    options = ("--json-logs",) if json_logs else ()
    return Command(
        "front",
        (sys.executable, "-m", "server", "front", str(hub.path), *options),
        _environment(hub),
        hub.logs / "front.log",
    )


def _environment(hub: HubFolder) -> dict[str, str]:
    return {
        **os.environ,
        "FLWR_HOME": str(hub.state),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # `-m server` is found from wherever the hub is started.
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
