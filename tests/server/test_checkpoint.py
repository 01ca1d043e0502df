from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from journeys.durable import write_durably
from protocol.replies import Weights
from server.checkpoint import KEPT, Checkpoint, load_checkpoint, save_checkpoint


def checkpoint(round_: int) -> Checkpoint:
    rng = np.random.default_rng(round_)

    def draw() -> Weights:
        return {
            "hidden.weight": rng.normal(size=(3, 2)).astype(np.float32),
            "out.bias": rng.normal(size=1).astype(np.float32),
        }

    strategy = {f"{moment}.{n}": w for moment in "mv" for n, w in draw().items()}
    return Checkpoint(round_, 2 * round_, draw(), strategy)


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    return (
        a is not None
        and (a.round, a.records) == (b.round, b.records)
        and all(
            x.keys() == y.keys() and all(x[n].tobytes() == y[n].tobytes() for n in x)
            for x, y in [(a.weights, b.weights), (a.strategy, b.strategy)]
        )
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@lru_cache
def written(round_: int) -> dict[str, bytes]:
    """The files of a checkpoint of `round_`, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder, checkpoint(round_))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "folder", checkpoint(3))

    assert same(load_checkpoint(tmp_path / "new" / "folder"), checkpoint(3))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None


def test_the_newest_are_kept_beyond_a_thousand_rounds(tmp_path: Path) -> None:
    for round_ in (98, 99, 100, 999, 1000):
        save_checkpoint(tmp_path, checkpoint(round_))
        assert same(load_checkpoint(tmp_path), checkpoint(round_))

    assert KEPT == 2
    assert files(tmp_path) == [
        "round-000999.safetensors",
        "round-000999.sha256",
        "round-001000.safetensors",
        "round-001000.sha256",
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_flipped_bit_anywhere_is_detected_and_the_earlier_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    for round_ in (1, 2):
        for name, content in written(round_).items():
            (tmp_path / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(written(2))))
    position = data.draw(st.integers(0, len(written(2)[name]) - 1))
    damaged = bytearray(written(2)[name])
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / name).write_bytes(damaged)

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(tmp_path), checkpoint(1))
    assert "round-000002 is damaged" in caplog.text


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
@pytest.mark.parametrize("left", [0, 10])
def test_a_truncated_file_is_detected(tmp_path: Path, suffix: str, left: int) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / f"round-000002{suffix}"
    path.write_bytes(path.read_bytes()[:left])

    assert same(load_checkpoint(tmp_path), checkpoint(1))


def test_with_all_damaged_there_is_none(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "round-000001.safetensors").unlink()

    assert load_checkpoint(tmp_path) is None


STEPS = ["data tmp", "data", "digest tmp"]


@pytest.mark.parametrize("step", STEPS)
def test_a_writer_that_stops_on_the_way_leaves_the_earlier_one(tmp_path: Path, step: str) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    new = written(2)
    data, digest = new["round-000002.safetensors"], new["round-000002.sha256"]
    if step == "data tmp":
        (tmp_path / "round-000002.safetensors.tmp").write_bytes(data[: len(data) // 2])
    else:
        (tmp_path / "round-000002.safetensors").write_bytes(data)
    if step == "digest tmp":
        (tmp_path / "round-000002.sha256.tmp").write_bytes(digest[:7])

    assert same(load_checkpoint(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    assert same(load_checkpoint(tmp_path), checkpoint(2))


def test_a_repeated_round_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    for round_ in (1, 2):
        save_checkpoint(tmp_path, checkpoint(round_))
    (tmp_path / "round-000002.safetensors").write_bytes(b"damaged")

    save_checkpoint(tmp_path, checkpoint(2))

    assert same(load_checkpoint(tmp_path), checkpoint(2))


WRITER = """
import sys
from pathlib import Path
import numpy as np
from server.checkpoint import Checkpoint, save_checkpoint
for round_ in range(1, 100_000):
    weights = {"w": np.full(50_000, round_, np.float32)}
    save_checkpoint(Path(sys.argv[1]), Checkpoint(round_, 2 * round_, weights, {}))
    print(round_, flush=True)
"""


@pytest.mark.parametrize("after", [3, 8, 13])
def test_a_killed_writer_leaves_a_sound_checkpoint(tmp_path: Path, after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = 0
    while told < after:
        told = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate()
    told = max([told, *(int(line) for line in rest.split())])

    read = load_checkpoint(tmp_path)

    assert read is not None
    assert read.round in (told, told + 1)
    assert (read.weights["w"] == read.round).all()


def test_a_durable_write_replaces_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_durably(path, b"new")

    assert path.read_bytes() == b"old"
