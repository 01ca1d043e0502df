"""The Flower ClientApp: translates messages to and from the `Site`, and does nothing else."""

from __future__ import annotations

import os

# Before Flower is imported: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.policy import PlanRefused, SitePolicy
from client.site import Site
from conf.compose import load
from conf.schema import Config
from journeys.features import FeatureSpec, feature_spec
from journeys.site import SiteJourneys
from journeys.sites import load_sites
from privacy.ledger import Ledger
from protocol.plan import RoundPlan
from protocol.records import read_plan, reply_records
from protocol.replies import Reply, SiteRefusal, Weights


def client_app(open_site: Callable[[Context], AbstractContextManager[Site]]) -> ClientApp:
    """A ClientApp whose messages go to the site that `open_site` opens for a context."""
    app = ClientApp()

    def answer(
        message: Message, context: Context, ask: Callable[[Site, RoundPlan, Weights], Reply]
    ) -> Message:
        plan, weights = read_plan(message.content)
        with open_site(context) as site:
            try:
                reply = ask(site, plan, weights)
            except PlanRefused as refusal:
                reply = SiteRefusal(site.name, plan.round, str(refusal))
        return Message(reply_records(reply), reply_to=message)

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        return answer(message, context, lambda site, plan, _: site.describe(plan))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, lambda site, plan, weights: site.train(plan, weights))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, lambda site, plan, weights: site.evaluate(plan, weights))

    return app


def simulated_site(
    journeys: SiteJourneys, spec: FeatureSpec, ledgers: Path, seed: int, index: int
) -> Site:
    """Site `index` of a simulation, its ledger in the folder `ledgers`: all is seeded and allowed.

    Protects nobody from who knows `seed`.
    """
    ledger = Ledger(ledgers / f"{index}.sqlite", durable=False)
    return Site(journeys, spec, SitePolicy.of_simulation(), ledger, seed=(seed, index))


def _site_of_run(context: Context) -> AbstractContextManager[Site]:
    """The site of a simulation by `flwr run`: cut from the data that the run's overrides name."""
    if "partition-id" not in context.node_config:
        raise PlanRefused("this app runs in simulations only: the node has no partition-id")
    config, sites = _simulated_sites(str(context.run_config.get("overrides", "")))
    index = int(context.node_config["partition-id"])
    ledgers = Path("runs") / f"flower-{context.run_id}" / "ledgers"
    spec = feature_spec(config.data.features)
    return closing(simulated_site(sites[index], spec, ledgers, config.seed, index))


@lru_cache(maxsize=1)
def _simulated_sites(overrides: str) -> tuple[Config, list[SiteJourneys]]:
    config = load(shlex.split(overrides))
    return config, load_sites(config.data, config.seed)


app = client_app(_site_of_run)
