"""Promise of the release gate: whatever leaves a site is in its ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from conf.compose import load
from journeys.sites import load_sites
from privacy.ledger import Ledger, Release
from protocol.exchange import read_replies, read_request
from protocol.records import from_records
from protocol.replies import Reply, SiteDescription, SiteEvaluation, SiteRefusal, SiteUpdate
from server.federation import Federation
from server.rounds import run_rounds
from simulation.fleet import Fleet
from simulation.local_grid import LocalGrid

torch.set_num_threads(1)

CONFIG = load(["debug=tiny", "model=logistic", "rounds=4", "evaluations=2", "runtime.workers=0"])

SAID = {
    SiteDescription: {"site": None, "visitors": "count"},
    SiteUpdate: {"site": None, "round": None, "weights": "weights", "epsilon": None},
    SiteEvaluation: {
        "site": None,
        "round": None,
        "histogram": "histogram",
        "noise": None,
        "epsilon": None,
    },
    SiteRefusal: {"site": None, "round": None, "reason": None},
}
"""The release behind each field of each reply. None: made of the plan, the policy, the ledger and
the released count alone."""


@dataclass
class Exchange:
    """A request as it was sent, and its reply."""

    kind: str
    run: str
    round: int
    reply: Reply
    parts: list[str]
    """Of the message that it came in, which may have held other replies."""
    asked: list[str]
    """All that its message answered."""


class Recording(LocalGrid):
    """Keeps all that passes."""

    asked: dict[str, Message]
    heard: list[Exchange]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        self.asked = {**getattr(self, "asked", {}), **dict(zip(ids, sent, strict=True))}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        heard = [one for reply in replies for one in self._exchanges(reply)]
        self.heard = [*getattr(self, "heard", []), *heard]
        return replies

    def _exchanges(self, reply: Message) -> list[Exchange]:
        request = read_request(from_records(self.asked[reply.metadata.reply_to_message_id].content))
        replies = read_replies(from_records(reply.content))
        parts = [key for record in reply.content.values() for key in record]
        return [
            Exchange(
                ask, f"{plan.federation}/{plan.run}", plan.round, replies[ask], parts, [*replies]
            )
            for ask, plan in request.plans.items()
        ]


def released(folder: Path, index: int) -> dict[tuple[str, int, str], set[str]]:
    with Ledger(folder / "ledgers" / f"{index}.sqlite", read_only=True) as ledger:
        return {
            entry.request.key: {release.name for release in entry.request.releases}
            for entry in ledger.entries()
            if entry.committed
        }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Exchange]]:
    folder = tmp_path_factory.mktemp("releases")
    sites = load_sites(CONFIG.data, CONFIG.seed)
    fleet = Fleet.store(sites, CONFIG.seed, folder / "journeys", folder / "ledgers")
    with Recording(fleet, workers=0) as grid:
        run_rounds(Federation(grid), CONFIG, len(fleet.names), folder, lambda _: None)
        heard = grid.heard
    return folder, heard


def test_every_field_of_every_reply_has_its_release(
    whole_run: tuple[Path, list[Exchange]],
) -> None:
    folder, heard = whole_run
    sites = sorted({exchange.reply.site for exchange in heard})
    ledgers = {site: released(folder, int(site.removeprefix("site "))) for site in sites}

    assert len(heard) == len(sites) * (1 + CONFIG.rounds + CONFIG.evaluations)
    for exchange in heard:
        expected = SAID[type(exchange.reply)]
        assert {field.name for field in fields(exchange.reply)} == set(expected)
        needed = {name for name in expected.values() if name is not None}
        key = (exchange.run, exchange.round, exchange.kind)
        assert needed <= ledgers[exchange.reply.site].get(key, set()), key


def test_nothing_travels_beside_a_reply(whole_run: tuple[Path, list[Exchange]]) -> None:
    _, heard = whole_run
    for exchange in heard:
        extra = ["safetensors"] if "train" in exchange.asked else []
        assert exchange.parts == [*exchange.asked, *extra]
    together = {tuple(sorted(exchange.asked)) for exchange in heard}
    assert together == {("describe",), ("train",), ("evaluate", "train"), ("evaluate",)}


def test_every_release_is_one_that_left(whole_run: tuple[Path, list[Exchange]]) -> None:
    folder, heard = whole_run
    left = {(e.reply.site, e.run, e.round, e.kind) for e in heard}
    for site in {e.reply.site for e in heard}:
        for key in released(folder, int(site.removeprefix("site "))):
            assert (site, *key) in left


def test_every_release_of_a_protected_run_carries_noise(
    whole_run: tuple[Path, list[Exchange]],
) -> None:
    folder, _ = whole_run
    with Ledger(folder / "ledgers" / "0.sqlite", read_only=True) as ledger:
        releases: list[Release] = [r for e in ledger.entries() for r in e.request.releases]
    assert {r.name for r in releases} == {"count", "weights", "histogram"}
    assert all(r.event.noise_multiplier > 0.3 for r in releases)
