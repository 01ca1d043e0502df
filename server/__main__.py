"""A hub on the terminal: `python -m server COMMAND HUB`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before Flower is imported anywhere: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from rich.console import Console

# The imports within the commands cost seconds that the other commands need not wait for.


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Ends with 1 if the hub is not up (`status`) or a site is without it (`publish`), with 2 on
    other errors.
    """
    options = _parser().parse_args(arguments)
    # A file or a pipe, which says no width, is wide enough for every table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    command: Callable[[argparse.Namespace, Console], None] = options.run
    from conf.schema import SettingError
    from server.hub import HubError

    try:
        command(options, console)
    except (HubError, SettingError, OSError, ValueError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _init(options: argparse.Namespace, console: Console) -> None:
    from conf.hub import HubConfig
    from server.hub import create_hub

    config = HubConfig(host=options.host, federation=options.federation, port=options.port)
    create_hub(options.hub, config, _now())
    _say(
        console,
        f"{options.hub}: a new hub\n"
        f"  hub.yaml        its settings\n"
        f"  hub-ca.crt      give it to each site: by it a site knows the hub\n"
        f"  certificates/   keys; keep a copy in a safe place, show them to nobody\n"
        f"next: python -m server start {options.hub}",
    )


def _start(options: argparse.Namespace, console: Console) -> None:
    from server.start import start
    from service.logs import configure
    from service.processes import until_stopped

    configure(options.json_logs)
    hub = _hub(options)
    with until_stopped() as stopped:
        front, as_json = not options.no_front, options.json_logs
        start(hub, stopped, _teller(console), front=front, json_logs=as_json)


def _front(options: argparse.Namespace, console: Console) -> None:
    from server.front import serve_hub
    from service.logs import configure
    from service.processes import until_stopped

    configure(options.json_logs)
    with until_stopped() as stopped:
        serve_hub(_hub(options), stopped)


def _admit(options: argparse.Namespace, console: Console) -> None:
    from server.admission import admit, remove, tell_superlink
    from server.hub import SuperLinkError
    from server.runs import open_superlink

    hub = _hub(options)
    hub.config()
    if (options.key is None) == (options.remove is None):
        raise ValueError("name a site's public key, or a site to --remove")
    if options.remove is not None:
        remove(hub, options.remove)
        done = f"{options.remove}: removed; its key stays out"
    else:
        done = f"{admit(hub, options.key, options.name)}: admitted"
    try:
        tell_superlink(hub, open_superlink(hub))
    except SuperLinkError:
        done += "; it takes effect when the hub is started"
    _say(console, done)


def _status(options: argparse.Namespace, console: Console) -> None:
    from server.status import show_status

    if not show_status(console, _hub(options)):
        sys.exit(1)


def _run(options: argparse.Namespace, console: Console) -> None:
    from conf.compose import from_yaml, load
    from conf.schema import SettingError

    hub = _hub(options)
    federation = hub.config().federation
    words: list[str] = options.overrides
    resumed = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    if resumed:
        if len(words) > 1:
            raise SettingError("resume= goes alone: the run folder holds its settings")
        folder = Path(resumed[0]).resolve()
        config = from_yaml(folder / "config.yaml")
    else:
        said = {word.partition("=")[0] for word in words}
        begin = [] if "experiment" in said else ["experiment=production"]
        asked = [] if "federation" in said else [f"federation='{federation}'"]
        config = load([*begin, *asked, *words])
        folder = hub.new_run()
    from server.console import RunProgress, show_outcome
    from server.federation import JoinError
    from server.runs import train

    go_on = f"go on with: python -m server run {options.hub} resume={_short(folder)}"
    try:
        with RunProgress(console, config.rounds) as progress:
            outcome = train(hub, config, folder, progress.watch, progress.tell)
    except JoinError as error:
        _fail(f"{error}\n{go_on}", 2)
    except OSError as error:
        # Such as a full disk.
        _fail(f"{error.filename or folder}: {error.strerror or error}; {go_on}", 2)
    except KeyboardInterrupt:
        _fail(f"interrupted; {go_on}", 130)
    show_outcome(console, outcome)


def _publish(options: argparse.Namespace, console: Console) -> None:
    from protocol.replies import SiteReceipt
    from server.runs import publish_run

    answers = publish_run(_hub(options), options.run_folder.resolve(), _now())
    for answer in answers:
        match answer:
            case SiteReceipt():
                _say(console, f"{answer.site}: has it")
            case _:
                _say(console, f"{answer.site}: {answer.outcome}: {answer.reason}")
    if not all(isinstance(answer, SiteReceipt) for answer in answers):
        _fail("not every site has it; publish again when the others are there", 1)


def _renew(options: argparse.Namespace, console: Console) -> None:
    from server.certificates import renew

    hub = _hub(options)
    # Under a new name of the hub, too, if its settings have one.
    renew(hub.certificates, _now(), [hub.config().host])
    _say(console, "new certificates; the front has them at once, the SuperLink when it restarts")


def _nginx(options: argparse.Namespace, console: Console) -> None:
    from server.nginx import hub_configuration

    print(hub_configuration(_hub(options)), end="")


def _demo(options: argparse.Namespace, console: Console) -> None:
    from server.demo import demo

    report = demo(console, options.out, options.overrides)
    _say(console, f"report: {report}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m server", description="Run a hub of sites.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, meaning: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.set_defaults(run=run)
        if name != "demo":
            command.add_argument("hub", type=Path, help="the hub's folder")
        return command

    init = add("init", _init, "begin a hub: settings, an authority, certificates")
    init.add_argument("--host", required=True, help="name under which sites reach the hub")
    init.add_argument("--federation", default="shops", help="its name (default: %(default)s)")
    init.add_argument("--port", type=int, default=9092, help="for sites (default: %(default)s)")
    begin = add("start", _start, "keep the hub up: SuperLink and front; ends on SIGTERM or Ctrl-C")
    begin.add_argument(
        "--no-front", action="store_true", help="the SuperLink alone, for a hub behind nginx"
    )
    begin.add_argument("--json-logs", action="store_true", help="logs as JSON, an object a line")
    front = add("front", _front, "what sites reach, without the SuperLink (`start` has it)")
    front.add_argument("--json-logs", action="store_true", help="logs as JSON, an object a line")
    admit = add("admit", _admit, "let a site in, by its public key; or --remove one")
    admit.add_argument("key", type=Path, nargs="?", help="the site's SITE.pub")
    admit.add_argument("--name", help="the site's name (default: the file's)")
    admit.add_argument("--remove", metavar="NAME", help="let this site in no more")
    add("status", _status, "sites, runs, certificates; ends with 1 if the hub is not up")
    run = add("run", _run, "train with the sites; the words of simulate.py, or resume=RUN_FOLDER")
    run.add_argument("overrides", nargs="*", metavar="group=choice or key=value")
    publish = add("publish", _publish, "give a finished run's model and report to the sites")
    publish.add_argument("run_folder", type=Path, metavar="run", help="the run's folder")
    add("renew", _renew, "new certificates from the same authority")
    add("nginx", _nginx, "print a configuration of nginx that does what the front does")
    demo = add("demo", _demo, "a hub and three sites on this machine, from beginning to report")
    demo.add_argument("overrides", nargs="*", metavar="group=choice or key=value")
    demo.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder of the report (default: %(default)s)"
    )
    return parser


def _hub(options: argparse.Namespace) -> Any:
    from server.hub import HubFolder

    return HubFolder(options.hub)


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: _say(console, f"{time.strftime('%H:%M:%S')} {line}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _now() -> int:
    return int(time.time())


def _fail(message: str, code: int) -> Any:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
