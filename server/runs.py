"""A run over a hub: from a config to a report, in one process that its owner watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from conf.compose import to_yaml
from conf.schema import Config, SettingError
from journeys.durable import write_durably
from protocol.replies import SiteFailure, SiteReceipt, Weights
from server.admission import tell_superlink
from server.federation import Federation
from server.history import EvaluationReport, History, RoundReport
from server.hub import HubError, HubFolder, SuperLinkError
from server.outcome import Outcome, write_outcome
from server.publication import signed_run
from server.rounds import Watch, run_rounds
from server.superlink import LOST, SuperLink

PUBLISH_TIMEOUT_S = 60.0
"""So long a site may take to check and store a publication."""
CONFIG = "config.yaml"
"""Every setting of the run, in its folder."""


def open_superlink(hub: HubFolder) -> SuperLink:
    """The hub's SuperLink, whether or not it is up."""
    return SuperLink(f"localhost:{hub.config().superlink_port}", hub.authority.read_bytes())


def train(
    hub: HubFolder, config: Config, folder: Path, watch: Watch, tell: Callable[[str], None]
) -> Outcome:
    """Train with the sites that are admitted, and write the run's folder.

    Goes on where an interrupted run in `folder` stopped. A SuperLink that dies meanwhile is waited
    for as long as for a site to join; the run then goes on from its last round.

    Raises:
        HubError: No site is admitted, or another run is going on.
        JoinError: Too few sites came.
        SuperLinkError: The SuperLink is not there, or does not come back.
        SettingError: The config is of a simulation.
    """
    if config.job != "train" or config.runtime.name != "deployment":
        raise SettingError(
            f"job={config.job}, runtime={config.runtime.name}: a hub runs job=train with "
            "runtime=deployment; begin with experiment=production"
        )
    # Flower's strategies log each round on INFO; the round reports say it better.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with hub.held("run"):
        superlink = open_superlink(hub)
        # A run that cannot begin leaves no folder.
        _admitted(hub, superlink)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / CONFIG, to_yaml(config).encode())
        weights, final, history = _coordinate(hub, superlink, config, folder, watch, tell)
        return write_outcome(config, folder, weights, final, history, baselines={})


def _admitted(hub: HubFolder, superlink: SuperLink) -> dict[int, str]:
    """The admitted sites' names by node; the SuperLink knows them, too."""
    names = tell_superlink(hub, superlink)
    if not names:
        raise HubError(
            f"{hub.path}: no site is admitted; admit one with: "
            f"python -m server admit {hub.path} SITE.pub"
        )
    return names


def publish_run(hub: HubFolder, folder: Path, now: int) -> list[SiteReceipt | SiteFailure]:
    """Hand a finished run's model and report to every site that is connected, signed.

    Returns who has it now, and who has not and why, by name.

    Raises:
        HubError: A run is going on.
        PublicationError: The run cannot be published.
        SuperLinkError: The SuperLink is not there.
    """
    parts = signed_run(folder, hub.certificates, now)
    with hub.held("run"):
        superlink = open_superlink(hub)
        names = tell_superlink(hub, superlink)
        try:
            with superlink.open_grid() as grid:
                return Federation(grid, names).publish(parts, PUBLISH_TIMEOUT_S)
        except LOST as error:
            raise SuperLinkError("the SuperLink was lost; publish again once it is up") from error


def _coordinate(
    hub: HubFolder,
    superlink: SuperLink,
    config: Config,
    folder: Path,
    watch: Watch,
    tell: Callable[[str], None],
) -> tuple[Weights, EvaluationReport, History]:
    lost_at: float | None = None

    def progress(report: RoundReport | EvaluationReport) -> None:
        nonlocal lost_at
        lost_at = None
        watch(report)

    while True:
        try:
            names = _admitted(hub, superlink)
            with superlink.open_grid() as grid:
                return run_rounds(Federation(grid, names), config, len(names), folder, progress)
        except (*LOST, SuperLinkError) as error:
            if lost_at is None:
                if isinstance(error, SuperLinkError):
                    raise
                lost_at = time.monotonic()
                tell("the SuperLink is lost; waiting for it")
            if time.monotonic() > lost_at + config.strategy.join_timeout_s:
                raise SuperLinkError(
                    f"the SuperLink did not come back within {config.strategy.join_timeout_s:.0f} "
                    f"s; once it is up, go on with: python -m server run {hub.path} "
                    f"resume={folder}"
                ) from error
            time.sleep(1.0)
