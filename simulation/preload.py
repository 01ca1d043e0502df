"""What every worker needs, for the fork server to load once. Nothing else imports this module."""

from __future__ import annotations

import gc

import privacy.engines
import simulation.fleet_app

__all__ = ["privacy", "simulation"]

# What a worker's garbage collector does not look at, stays one copy in memory for all of them.
gc.collect()
gc.freeze()
