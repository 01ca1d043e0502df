"""The Flower ClientApp: translates messages to and from the `Site`, and does nothing else."""

from __future__ import annotations

import os

# Before Flower is imported: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import PlanRefused, Site
from conf.compose import load
from journeys.features import feature_spec
from journeys.sites import load_sites
from privacy.ledger import Ledger
from protocol.plan import RoundPlan
from protocol.records import read_plan, reply_records
from protocol.replies import Reply, SiteRefusal, Weights


def client_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """A ClientApp whose messages go to the site that `open_site` finds for a context."""
    app = ClientApp()

    def answer(
        message: Message, context: Context, ask: Callable[[Site, RoundPlan, Weights], Reply]
    ) -> Message:
        plan, weights = read_plan(message.content)
        site = open_site(context)
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


def _simulated_site(context: Context) -> Site:
    """The site of a simulation by `flwr run`: cut from the data that the run's overrides name."""
    if "partition-id" not in context.node_config:
        raise PlanRefused("this app runs in simulations only: the node has no partition-id")
    sites = _simulated_sites(str(context.run_config.get("overrides", "")), context.run_id)
    return sites[int(context.node_config["partition-id"])]


@lru_cache(maxsize=1)
def _simulated_sites(overrides: str, run_id: int) -> list[Site]:
    config = load(shlex.split(overrides))
    spec = feature_spec(config.data.features)
    ledgers = Path("runs") / f"flower-{run_id}" / "ledgers"
    return [
        Site(journeys, spec, Ledger(ledgers / f"{index}.jsonl"), config.seed, index)
        for index, journeys in enumerate(load_sites(config.data, config.seed))
    ]


app = client_app(_simulated_site)
