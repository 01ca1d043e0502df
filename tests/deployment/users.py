"""Processes under Unix users of their own, as at a real site.

The users exist for these processes alone: each process has a view of the file system in which
/etc/passwd and /etc/group name them, and in which the interpreter and the project can be reached.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deployment.federation import ROOT, environment


@dataclass(frozen=True)
class User:
    """A user of a site's machine."""

    name: str
    id: int
    in_group: bool


GROUP, GROUP_ID = "conversion", 61000
"""The group that may reach the agent's socket."""
SITE = User("conversion-site", 61001, in_group=True)
"""Owns the site, runs its agent."""
NODE = User("conversion-node", 61002, in_group=True)
"""Runs the SuperNode."""
COLLEAGUE = User("colleague", 61003, in_group=True)
"""In the group, but not named in `agent.users`."""
STRANGER = User("stranger", 61004, in_group=False)
USERS = (SITE, NODE, COLLEAGUE, STRANGER)


_CONFINED = """\
import ctypes, os, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Users:
    """Starts processes as one of `USERS`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._temporary.chmod(0o1777)
        members = ",".join(user.name for user in USERS if user.in_group)
        passwd = [f"{one.name}:x:{one.id}:{one.id}::/nonexistent:/bin/false" for one in USERS]
        groups = [f"{one.name}:x:{one.id}:" for one in USERS]
        self._write("passwd", passwd)
        self._write("group", [*groups, f"{GROUP}:x:{GROUP_ID}:{members}"])
        self._enter = folder / "enter.sh"
        self._enter.write_text("\n".join(["set -e", "umask 022", *self._mounts(), 'exec "$@"']))

    def start(
        self, user: User, *argv: str, confined: bool = False, **more: object
    ) -> subprocess.Popen[bytes]:
        """A process of `user`, without any privilege.

        `confined`: without a network, and without memory that can be written and executed, as the
        unit of the agent has it (where the kernel can do that: Linux 6.3).
        """
        groups = f"{user.id},{GROUP_ID}" if user.in_group else f"{user.id}"
        return subprocess.Popen(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *(["--net"] if confined else []),
                *("sh", str(self._enter)),
                *("setpriv", f"--reuid={user.id}", f"--regid={user.id}", f"--groups={groups}"),
                *("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"),
                *([sys.executable, "-I", "-c", _CONFINED] if confined else []),
                *argv,
            ],
            env={
                **environment(),
                "HOME": "/nonexistent",
                "TMPDIR": str(self._temporary),
                "POLARS_SKIP_CPU_CHECK": "1",
            },
            **more,  # type: ignore[call-overload]
        )

    def why_not(self) -> str:
        """Why no process of the product can run so on this machine; empty if one can."""
        if os.geteuid() != 0:
            return "only root can start processes of other users"
        if missing := [tool for tool in ("unshare", "setpriv") if shutil.which(tool) is None]:
            return f"{missing[0]} is not installed"
        with self.start(
            NODE, sys.executable, "-c", "import client.agent_socket", stderr=subprocess.PIPE
        ) as tried:
            said = tried.communicate()[1].decode().strip()
        return f"no other user can run the project: {said}" if tried.returncode else ""

    def _write(self, name: str, lines: Sequence[str]) -> None:
        system = Path("/etc", name).read_text()
        (self._folder / name).write_text(system + "\n".join(lines) + "\n")

    def _mounts(self) -> Iterator[str]:
        def words(*said: object) -> str:
            return shlex.join(map(str, said))

        for name in ("passwd", "group"):
            yield words("mount", "--bind", self._folder / name, f"/etc/{name}")
        needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT, self._folder}
        needed |= {path.resolve() for path in needed}
        closed = {_first_closed(path): [] for path in needed if _first_closed(path) is not None}
        if not closed:
            return
        yield words("mount", "-t", "tmpfs", "tmpfs", "/mnt")
        for number, path in enumerate(sorted(needed)):
            if (above := _first_closed(path)) is not None:
                closed[above].append((path, f"/mnt/{number}"))
                yield words("mkdir", f"/mnt/{number}")
                yield words("mount", "--bind", path, f"/mnt/{number}")
        for above, paths in closed.items():
            yield words("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", above)
            for path, kept in paths:
                yield words("mkdir", "-p", path)
                yield words("mount", "--bind", kept, path)


def _first_closed(path: Path) -> Path | None:
    """The first folder on the way to `path` that other users cannot enter."""
    return next((one for one in [*path.parents][::-1] if not one.stat().st_mode & 0o001), None)
