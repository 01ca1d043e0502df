"""Simulate a federation on this machine: `python simulate.py [group=choice] [setting=value]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before Flower is imported anywhere: software for privacy tells no one that it runs.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.compose import check_overrides, from_yaml, register, to_config
from conf.schema import Config, SettingError

HERE = Path(__file__).parent


@hydra.main(version_base=None, config_path="conf", config_name="config")
def run_composed(composed: DictConfig) -> None:
    """One run of what Hydra composed, in the folder that Hydra made."""
    try:
        run(to_config(composed), Path(HydraConfig.get().runtime.output_dir))
    except (SettingError, JourneyDataError, JoinError) as error:
        # Raised further, Hydra would print its own line and a traceback.
        sys.exit(f"error: {error}")


def run(config: Config, folder: Path) -> None:
    """Do the config's job in `folder`."""
    from rich.console import Console

    from simulation.console import RunProgress, show_outcome
    from simulation.run import simulate

    console = Console()
    with RunProgress(console, config.rounds) as progress:
        outcome = simulate(config, folder, progress.watch)
    show_outcome(console, outcome)


def main() -> None:
    """The command line."""
    arguments = sys.argv[1:]
    overrides = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    resumed = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    try:
        if resumed:
            if len(arguments) > 1:
                raise SettingError("resume= goes alone: the run folder holds its settings")
            run(from_yaml(Path(resumed[0]) / "config.yaml"), Path(resumed[0]))
            return
        check_overrides(overrides)
        register()
        run_composed()
    except SettingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
