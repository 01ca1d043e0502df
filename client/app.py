"""The Flower ClientApp: translates messages to and from the `Site`, and does nothing else."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import PlanRefused, Site
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
        return answer(message, context, Site.train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, Site.evaluate)

    return app
