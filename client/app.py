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
from conf.schema import Config
from journeys.site import SiteJourneys
from privacy.ledger import Ledger
from protocol.exchange import read_request, reply_parts
from protocol.records import from_records, to_records


def client_app(open_site: Callable[[Context], AbstractContextManager[Site]]) -> ClientApp:
    """A ClientApp whose messages go to the site that `open_site` opens for a context."""
    app = ClientApp()

    @app.query()
    @app.train()
    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        request = read_request(from_records(message.content))
        with open_site(context) as site:
            replies = site.answer(request)
        return Message(to_records(reply_parts(replies)), reply_to=message)

    return app


def simulated_site(journeys: SiteJourneys, ledgers: Path, seed: int, index: int) -> Site:
    """Site `index` of a simulation, its ledger in the folder `ledgers`: all is seeded and allowed.

    Protects nobody from who knows `seed`.
    """
    ledger = Ledger(ledgers / f"{index}.sqlite", durable=False)
    policy = SitePolicy.of_simulation()
    return Site(journeys.name, lambda _: journeys, policy, ledger, seed=(seed, index))


def _site_of_run(context: Context) -> AbstractContextManager[Site]:
    """The site of a simulation by `flwr run`: cut from the data that the run's overrides name."""
    if "partition-id" not in context.node_config:
        raise PlanRefused("this app runs in simulations only: the node has no partition-id")
    config, sites = _simulated_sites(str(context.run_config.get("overrides", "")))
    index = int(context.node_config["partition-id"])
    ledgers = Path("runs") / f"flower-{context.run_id}" / "ledgers"
    return closing(simulated_site(sites[index], ledgers, config.seed, index))


@lru_cache(maxsize=1)
def _simulated_sites(overrides: str) -> tuple[Config, list[SiteJourneys]]:
    # A worker of a simulation gets its journeys encoded: it needs neither Hydra nor polars.
    from conf.compose import load
    from journeys.sites import load_sites

    config = load(shlex.split(overrides))
    return config, load_sites(config.data, config.seed)


app = client_app(_site_of_run)
