"""What a run promises its visitors, in plain words."""

from __future__ import annotations

import math

from conf.schema import Config, VisitorDP


def privacy_statement(config: Config, epsilon: float | None) -> list[str]:
    """Sentences for the report and the model's manifest.

    `epsilon` is the largest privacy loss of a visitor over the sites, None where unprotected or
    where no update came.
    """
    if not isinstance(config.privacy, VisitorDP):
        return [
            "Nothing protects the visitors in this run: the model may reveal who was in the "
            "training data and what they did.",
            "Use it only on data that everyone who sees the model may see.",
        ]
    if epsilon is None:
        return [
            "No site's update came: this is the model that the run began with, and it says nothing "
            "about any visitor."
        ]
    promise = config.privacy
    return [
        f"Each visitor's journey is protected by differential privacy with epsilon {epsilon:.3f} "
        f"at delta {promise.delta:g}, over all rounds together and at each site.",
        "It means: whatever anyone concludes from the model, they would have concluded almost as "
        "likely had the visitor never been there. The odds of any conclusion about a visitor "
        f"change by at most a factor of {_factor(epsilon)}, except with probability about "
        f"{promise.delta:g}.",
        "The protected unit is the visitor (add or remove one), not the single touchpoint. A "
        "visitor of several sites is protected at each; the losses of the sites add up.",
        "The protection covers all that left a site: its updates of the model, the visitor count "
        "that weighs it, and the counts by which the model is evaluated, which come from visitors "
        "that training never saw.",
        "Each site drew its noise from its own operating system; nobody else knows it."
        if config.runtime.name == "deployment"
        else f"This was a simulation: its noise comes from seed {config.seed} and could be taken "
        "off by anyone who knows the seed. Figures marked as exact are for the eyes of who runs "
        "the simulation.",
    ]


def _factor(epsilon: float) -> str:
    factor = math.exp(epsilon)
    return f"{factor:.1f}" if factor < 100 else f"{factor:.0f}"
