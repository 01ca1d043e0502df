"""Refusals in a site's audit log, so few of them that nobody can fill the disk with them."""

from __future__ import annotations

import logging
import math
import threading
import time

from client.audit_log import AuditLog, AuditLogError

MOST = 100
"""Refusals that are listed within `PERIOD_S`; of more the log says how many."""
PERIOD_S = 3600.0
LONGEST_REASON = 300
"""Characters of a reason."""

log = logging.getLogger(__name__)


class Refusals:
    """Puts refusals on record. Threads may share it."""

    def __init__(self, audit_log: AuditLog) -> None:
        self.count = 0
        """All that there were."""
        self._log = audit_log
        self._mutex = threading.Lock()
        self._began = -math.inf
        self._listed = self._more = 0

    def note(self, asked: str, reason: str) -> bool:
        """Put one on record; whether it was listed, with its reason."""
        with self._mutex:
            self.count += 1
            self._turn(at_once=False)
            if self._listed == MOST:
                self._more += 1
                return False
            self._listed += 1
            self._append({"asked": asked, "reason": shown(reason)})
            return True

    def tell_of_more(self, at_once: bool = False) -> None:
        """Put on record how many there were beyond those that are listed, once it is time."""
        with self._mutex:
            self._turn(at_once)

    def _turn(self, at_once: bool) -> None:
        if not at_once and time.monotonic() < self._began + PERIOD_S:
            return
        if self._more:
            self._append({"not listed": self._more})
        self._began = time.monotonic()
        self._listed = self._more = 0

    def _append(self, content: dict[str, object]) -> None:
        try:
            self._log.append("refusal", content)
        except AuditLogError as error:
            # What is refused stays refused.
            log.error("a refusal is not on record: %s", error)


def shown(text: str) -> str:
    """Of a text from outside, what may be kept and shown."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST_REASON])
