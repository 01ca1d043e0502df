from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import keeper, processes
from service.processes import Command, Process, ProcessError, Supervisor, until_stopped

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"]}
TREE = """
sleep 300 & echo $! > child
sh -c 'sleep 300 & echo $! > grandchild; wait' &
setsid sh -c 'echo $$ > daemon; exec sleep 300' &
echo $$ > command
wait
"""
"""A command with a child, a grandchild, and one that has left its session."""
STUBBORN = f"trap '' TERM\n{TREE}"
"""None of them minds SIGTERM."""


def sh(script: str, log: Path | None = Path(os.devnull), name: str = "it") -> Command:
    return Command(name, ("sh", "-c", script), ENVIRONMENT, log)


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def checked(supervisor: Supervisor, true: Callable[[], object]) -> Callable[[], object]:
    def check() -> object:
        supervisor.check()
        return true()

    return check


def alive(*pids: int) -> list[int]:
    return [pid for pid, state, *_ in keeper.processes() if pid in pids and state != "Z"]


def its_keeper(process: Process) -> int:
    return process._keeper.pid


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(folder: Path, *names: str) -> list[int]:
    """What the commands wrote in files of these names, once they have."""
    texts = [folder / name for name in names]
    until(lambda: all(text.exists() and text.read_text().endswith("\n") for text in texts))
    return [int(text.read_text()) for text in texts]


def tree(folder: Path) -> list[int]:
    return numbers(folder, "command", "child", "grandchild", "daemon")


@pytest.fixture
def parent(folder: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts another process that runs a command, and says the pids of command and keeper."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from service.processes import Command, Process
command = Command("it", ("sh", "-c", {script!r}), {ENVIRONMENT!r}, Path("/dev/null"))
print("ready", flush=True)
process = Process(command)
print(process.pid, process._keeper.pid, flush=True)
signal.pause()
"""
        ran = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(ran)
        return ran

    yield start
    for one in started:
        one.kill()
        one.wait()
        assert one.stdout is not None
        one.stdout.close()


def line(ran: subprocess.Popen[str]) -> list[str]:
    assert ran.stdout is not None
    return ran.stdout.readline().split()


# What a command gets.


def test_a_command_gets_its_arguments_its_environment_and_nothing_else(folder: Path) -> None:
    log = folder / "log"
    log.write_text("before\n")
    script = 'echo "$0" "$1"; echo $$ >&2; ls /proc/self/fd; cat; /usr/bin/env'
    command = Command("it", ("sh", "-c", script, "a b", "*"), {"PATH": "/bin:/usr/bin"}, log)
    with Process(command) as process:
        until(lambda: process.poll() is not None)
    before, arguments, pid, *others = log.read_text().splitlines()
    assert (before, arguments, pid) == ("before", "a b *", str(process.pid))
    # 3: the folder that `ls` reads. No end of the socket is among them.
    assert others[:4] == ["0", "1", "2", "3"]
    assert {entry.split("=")[0] for entry in others[4:]} <= {"PATH", "PWD", "OLDPWD", "_", "SHLVL"}


def test_without_a_log_it_writes_where_we_do(capfd: pytest.CaptureFixture[str]) -> None:
    with Process(sh("echo out; echo err >&2", log=None)) as process:
        until(lambda: process.poll() is not None)
    assert capfd.readouterr() == ("out\n", "err\n")


def test_signals_are_as_a_command_expects_them(folder: Path) -> None:
    log = folder / "log"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        with Process(sh("grep -E 'Sig(Blk|Ign)' /proc/self/status", log)) as process:
            until(lambda: process.poll() is not None)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
    # What was ignored when Python began, as under nohup, may stay so; what Python ignores does not.
    blocked, ignored = (int(word, 16) for word in log.read_text().split()[1::2])
    of_python = sum(1 << (number - 1) for number in (signal.SIGPIPE, signal.SIGXFSZ))
    status = Path("/proc/self/status").read_text()
    [ours] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")]
    assert blocked == 0
    assert ignored & ~(int(ours, 16) & ~of_python) == 0


def test_ctrl_c_reaches_neither_command_nor_keeper() -> None:
    with Process(sh("sleep 300")) as process:
        groups = {os.getpgid(process.pid), os.getpgid(its_keeper(process)), os.getpgid(0)}
        sessions = {os.getsid(process.pid), os.getsid(its_keeper(process))}
        assert len(groups) == 3
        assert len(sessions) == 1
        assert os.getsid(0) not in sessions


@pytest.mark.parametrize(
    ("script", "code"),
    [("true", 0), ("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_its_code_is_told(script: str, code: int) -> None:
    with Process(sh(script)) as process:
        until(lambda: process.poll() is not None)
        assert process.poll() == code
    assert process.poll() == code


def test_what_runs_has_no_code() -> None:
    with Process(sh("sleep 300")) as process:
        assert process.poll() is None
        assert alive(process.pid)
        # Its name shows that it is the command, not its keeper.
        assert b"keeper" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert process.poll() == 143


@pytest.mark.parametrize(
    ("argv", "log", "says"),
    [
        (("no-such-program",), None, "it: no-such-program cannot be run: No such file"),
        (("/etc/passwd", "secret"), None, "it: /etc/passwd cannot be run: Permission denied"),
        (("true",), "missing/log", r"it: missing/log: cannot be written: No such file"),
        (("true", "\0"), None, "it: cannot be started: embedded null byte"),
        (("true", "x" * 200_000), None, "it: cannot be started: .*Argument list too long"),
    ],
)
def test_what_cannot_be_run_is_an_error(
    folder: Path, argv: tuple[str, ...], log: str | None, says: str
) -> None:
    fds = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessError, match=says):
        Process(Command("it", argv, ENVIRONMENT, Path(log) if log else None))
    assert len(os.listdir("/proc/self/fd")) == len(fds)


def test_a_keeper_that_says_nothing_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = folder / "silent.py"
    silent.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(300)")
    monkeypatch.setattr(keeper, "__file__", str(silent))
    monkeypatch.setattr(processes, "_START_S", 0.5)
    with pytest.raises(ProcessError, match="it: sh cannot be run: its keeper did not start"):
        Process(sh("true", folder / "pid"))
    assert not alive(*numbers(folder, "pid"))
    silent.write_text("")
    with pytest.raises(ProcessError, match="its keeper did not start"):
        Process(sh("true"))


# Nothing outlives.


def test_killed_parent(folder: Path, parent: Callable[[str], subprocess.Popen[str]]) -> None:
    ran = parent(TREE)
    line(ran)
    pids = [*tree(folder), *map(int, line(ran))]
    assert set(alive(*pids)) == set(pids)
    ran.kill()
    until(lambda: not alive(*pids), 2.0)


def test_killed_parent_of_what_does_not_mind_sigterm(
    folder: Path, parent: Callable[[str], subprocess.Popen[str]]
) -> None:
    ran = parent(STUBBORN)
    line(ran)
    pids = [*tree(folder), *map(int, line(ran))]
    ran.kill()
    killed = time.monotonic()
    until(lambda: not alive(*pids))
    assert time.monotonic() - killed > keeper.GRACE_S - 0.5


@pytest.mark.parametrize("delay_ms", [0, 2, 5, 10, 15, 20, 30])
def test_parent_killed_at_any_moment(
    folder: Path, parent: Callable[[str], subprocess.Popen[str]], delay_ms: int
) -> None:
    marker = f"300.{os.getpid()}{delay_ms}"

    def left() -> list[bytes]:
        found = []
        for pid, state, *_ in keeper.processes():
            try:
                said = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if state != "Z" and marker.encode() in said:
                found.append(said)
        return found

    ran = parent(f"sleep {marker} & sleep {marker}; :")
    line(ran)
    time.sleep(delay_ms / 1000)
    ran.kill()
    ran.wait()
    until(lambda: not left())


def test_killed_keeper(folder: Path) -> None:
    with Process(sh(STUBBORN)) as process:
        command, child, grandchild, daemon = tree(folder)
        os.kill(its_keeper(process), signal.SIGKILL)
        # The kernel's part, before anybody looks.
        until(lambda: not alive(command, its_keeper(process)))
        until(lambda: process.poll() is not None)
        assert process.poll() == 137
        assert not alive(child, grandchild)
        # What the docstring says is not covered.
        os.kill(daemon, signal.SIGKILL)
    assert process.poll() == 137


def test_killed_command(folder: Path) -> None:
    with Process(sh(TREE)) as process:
        pids = tree(folder)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: process.poll() is not None)
        assert process.poll() == 137
        assert not alive(*pids)


def test_a_command_that_ends_leaves_nothing(folder: Path) -> None:
    started = "until [ -s grandchild ] && [ -s daemon ]; do sleep 0.01; done"
    with Process(sh(TREE.replace("\nwait\n", f"\n{started}; sleep 0.1; exit 4\n"))) as process:
        pids = tree(folder)
        until(lambda: process.poll() is not None)
        assert process.poll() == 4
        assert not alive(*pids)


def test_a_command_that_kills_its_process_group_does_not_kill_its_keeper(folder: Path) -> None:
    with Process(sh("setsid sleep 300 & echo $! > daemon; sleep 0.1; kill -9 0")) as process:
        (daemon,) = numbers(folder, "daemon")
        until(lambda: process.poll() is not None)
        assert not alive(daemon)


def test_a_keeper_that_is_asked_to_end_ends_the_command(folder: Path) -> None:
    with Process(sh(TREE)) as process:
        pids = tree(folder)
        os.kill(its_keeper(process), signal.SIGTERM)
        until(lambda: process.poll() is not None)
        assert not alive(*pids)


def test_killed_between_a_keeper_and_a_keeper(folder: Path) -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from service.processes import Command, Process
process = Process(Command("inner", ("sh", "-c", {TREE!r}), {ENVIRONMENT!r}))
time.sleep(300)
"""
    outer = Command("outer", (sys.executable, "-c", code), ENVIRONMENT, folder / "log")
    with Process(outer) as process:
        pids = tree(folder)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: process.poll() is not None)
        assert not alive(*pids)
    assert (folder / "log").read_text() == ""


# Stopping.


def test_stop_lets_the_command_end_its_own_way_first(folder: Path) -> None:
    log = folder / "log"
    script = """
trap 'echo goodbye; exit 7' TERM
sh -c 'trap "echo child hears SIGTERM" TERM; echo > ready; while :; do sleep 0.01; done' &
while :; do sleep 0.01; done
"""
    process = Process(sh(script, log))
    until((folder / "ready").exists)
    began = time.monotonic()
    process.stop(0.5)
    assert 0.4 < time.monotonic() - began < 2.0
    assert process.poll() == 7
    assert log.read_text().splitlines()[:2] == ["goodbye", "child hears SIGTERM"]


def test_stop_is_fast_where_the_command_is(folder: Path) -> None:
    process = Process(sh(TREE))
    pids = tree(folder)
    began = time.monotonic()
    process.stop()
    assert time.monotonic() - began < 1.0
    assert not alive(*pids, its_keeper(process))
    assert process.poll() == 143
    process.stop()


@pytest.mark.parametrize("script", [STUBBORN, TREE])
def test_stop_ends_with_sigkill(folder: Path, script: str) -> None:
    process = Process(sh(script))
    pids = tree(folder)
    if script == TREE:
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: (process.pid, "T") in [found[:2] for found in keeper.processes()])
    began = time.monotonic()
    process.stop(0.2)
    assert 0.2 < time.monotonic() - began < 2.0
    assert process.poll() == 137
    assert not alive(*pids)


def test_stop_needs_no_keeper_that_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_STUCK_S", 0.3)
    process = Process(sh(TREE))
    command, child, grandchild, daemon = tree(folder)
    os.kill(its_keeper(process), signal.SIGSTOP)
    until(lambda: (its_keeper(process), "T") in [found[:2] for found in keeper.processes()])
    process.stop(0.1)
    assert not alive(command, child, grandchild, its_keeper(process))
    os.kill(daemon, signal.SIGKILL)


def test_stop_with_a_keeper_that_was_killed(folder: Path) -> None:
    process = Process(sh(TREE))
    command, child, grandchild, daemon = tree(folder)
    os.kill(its_keeper(process), signal.SIGKILL)
    process.stop()
    assert not alive(command, child, grandchild)
    assert process.poll() == 137
    os.kill(daemon, signal.SIGKILL)


# Supervising.


def test_a_supervisor_starts_in_order_and_stops_in_reverse_order(folder: Path) -> None:
    log = folder / "log"

    def command(name: str) -> Command:
        script = (
            f"trap 'echo {name} stops; exit' TERM; echo {name} runs; while :; do sleep 0.01; done"
        )
        return sh(script, log, name)

    told: list[str] = []
    with Supervisor([command("one"), command("two")], told.append) as supervisor:
        until(lambda: log.read_text().count("runs") == 2)
        assert list(supervisor.pids) == ["one", "two"]
        assert alive(*supervisor.pids.values()) == sorted(supervisor.pids.values())
        supervisor.check()
        assert supervisor.restarts == {"one": 0, "two": 0}
    assert log.read_text().splitlines()[2:] == ["two stops", "one stops"]
    assert supervisor.pids == {}
    assert told == []


def test_what_dies_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.1)
    told: list[str] = []
    with Supervisor([sh("sleep 300", name="a"), sh("sleep 300", name="b")], told.append) as both:
        first = both.pids
        os.kill(first["a"], signal.SIGKILL)
        until(checked(both, lambda: told))
        assert told == ["a ended with 137; started again in 0.1 s"]
        assert both.pids == {"b": first["b"]}
        until(checked(both, lambda: "a" in both.pids))
        assert both.pids["a"] != first["a"]
        assert both.pids["b"] == first["b"]
        assert both.restarts == {"a": 1, "b": 0}
        pids = both.pids.values()
        assert sorted(pids) == alive(*pids)
    assert not alive(*pids)


def test_a_killed_keeper_is_seen_and_its_command_runs_once(folder: Path) -> None:
    told: list[str] = []
    with Supervisor([sh("sleep 300")], told.append) as supervisor:
        (process,) = [kept.process for kept in supervisor._kept.values() if kept.process]
        os.kill(its_keeper(process), signal.SIGKILL)
        until(checked(supervisor, lambda: told))
        assert not alive(process.pid)
        until(checked(supervisor, lambda: supervisor.pids))
        assert alive(*supervisor.pids.values())


class Clock:
    """Stands for the module `time`, and for processes that live as long as they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.life = 0.0
        self.fails = False
        self.starts: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def process(self, command: Command) -> SimpleNamespace:
        self.starts.append(self.now)
        if self.fails:
            raise ProcessError(f"{command.name}: cannot be run")
        ends = self.now + self.life
        return SimpleNamespace(
            pid=1, poll=lambda: 1 if self.now >= ends else None, stop=lambda: None
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "Process", clock.process)
    return clock


def test_pauses_grow_to_ten_seconds_and_a_minute_of_health_forgets_them(clock: Clock) -> None:
    told: list[str] = []

    def run(seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            supervisor.check()
            clock.now += 0.1

    with Supervisor([sh("", name="agent")], told.append) as supervisor:
        run(60)
        pauses = [float(re.findall(r"in ([\d.]+) s", text)[0]) for text in told]
        assert pauses[:7] == [0.5, 1, 2, 4, 8, 10, 10]
        assert told[2] == "agent ended with 1; started again in 2 s"
        between = [b - a for a, b in zip(clock.starts, clock.starts[1:], strict=False)]
        assert between[:6] == pytest.approx([0.5, 1, 2, 4, 8, 10], abs=0.3)
        assert supervisor.restarts == {"agent": len(clock.starts) - 1}
        clock.life = 59.0
        run(10 + 60)
        assert told[-1].endswith("in 10 s")
        clock.life = 61.0
        run(10 + 62)
        assert told[-1].endswith("in 0.5 s")


def test_what_cannot_be_started_again_is_tried_again(clock: Clock) -> None:
    told: list[str] = []
    with Supervisor([sh("", name="agent")], told.append) as supervisor:
        clock.fails = True
        supervisor.check()
        clock.now += 0.6
        supervisor.check()
        assert told[1] == "agent: cannot be run; started again in 1 s"
        assert supervisor.pids == {}
        clock.fails = False
        clock.now += 1.1
        supervisor.check()
        assert supervisor.pids == {"agent": 1}


def test_if_one_cannot_be_started_none_is_left(folder: Path) -> None:
    commands = [sh("echo $$ > first; sleep 300"), Command("bad", ("no-such",), ENVIRONMENT)]
    with pytest.raises(ProcessError, match="bad"), Supervisor(commands, print):
        pytest.fail("entered")
    assert not (folder / "first").exists() or not alive(*numbers(folder, "first"))


def test_names_differ() -> None:
    with pytest.raises(ValueError, match="one name"):
        Supervisor([sh("true"), sh("false")], print)


# Being stopped.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_waiting(number: signal.Signals) -> None:
    before = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    with until_stopped() as stopped:
        assert not stopped.wait(0.01)
        assert not stopped.is_set()
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
        timer.start()
        began = time.monotonic()
        assert stopped.wait(10)
        assert time.monotonic() - began < 5
        assert stopped.is_set()
        assert stopped.wait(10)
        os.kill(os.getpid(), number)
        timer.join()
    assert stopped.wait(0)
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == before


def test_other_threads_wait_too() -> None:
    with until_stopped() as stopped:
        heard: list[bool] = []
        thread = threading.Thread(target=lambda: heard.append(stopped.wait(10)))
        thread.start()
        stopped.set()
        thread.join(5)
        assert heard == [True]
