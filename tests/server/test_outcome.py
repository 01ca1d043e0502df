from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from conf.compose import load, to_yaml
from conf.schema import VisitorDP
from evaluation.histogram import NOISED, ScoreHistogram
from protocol.replies import SiteEvaluation, SiteFailure, SiteUpdate
from server.history import EvaluationReport, History, RoundReport
from server.outcome import write_outcome
from server.rounds import initial_weights


def test_a_site_that_was_not_evaluated_in_the_end_is_still_told_of(tmp_path: Path) -> None:
    config = replace(load(["debug=tiny", "model=logistic", "rounds=1"]), privacy=VisitorDP())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    counts = ScoreHistogram.empty(NOISED)
    counts.negative[3:6], counts.positive[4:8] = 300.0, 20.0
    history = History(tmp_path / "metrics.jsonl")
    updates = [SiteUpdate(s, 1, {}, e) for s, e in [("site 2", 1.5), ("site 10", 1.0)]]
    history.add(RoundReport(1, True, "", 1.0, 1e-5, updates, []))
    final = EvaluationReport(
        1,
        [SiteEvaluation("site 10", 1, counts, 5.0, 1.25)],
        [SiteFailure("site 2", "missing", "no reply in 9 s")],
    )
    history.add(final)

    outcome = write_outcome(config, tmp_path, initial_weights(config), final, history, {})

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == outcome.summary
    assert summary["title"].startswith("2 sites, logistic, epsilon ")
    assert list(summary["sites"]) == ["site 2", "site 10"]
    assert summary["sites"]["site 2"] == {"metrics": None, "epsilon": 1.5}
    # What the last evaluation spent counts as well.
    assert summary["sites"]["site 10"]["epsilon"] == 1.25
    assert summary["epsilon"] == 1.5
    low, high = summary["band"]["roc_auc"]
    assert low < summary["global"]["roc_auc"] < high
    assert "no reply in 9 s" in outcome.report.read_text()


def test_a_run_to_which_no_update_came_is_not_called_unprotected(tmp_path: Path) -> None:
    config = replace(load(["debug=tiny", "model=logistic", "rounds=1"]), privacy=VisitorDP())
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    history = History(tmp_path / "metrics.jsonl")
    absent = [SiteFailure("books", "missing", "no reply in 9 s")]
    history.add(RoundReport(1, False, "0 of 1 sound updates", 1.0, 1e-5, [], absent))
    final = EvaluationReport(1, [], absent)
    history.add(final)

    outcome = write_outcome(config, tmp_path, initial_weights(config), final, history, {})

    (statement,) = outcome.summary["privacy_statement"]
    assert statement.startswith("No site's update came")
    page = outcome.report.read_text()
    assert statement.partition(",")[0].replace("'", "&#39;") in page
    assert "no guarantee for anyone" not in page
