"""Generate a set while its workers and its driver are killed again and again, and compare it with a set of an uninterrupted run."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from edm_deploy.errors import InputError
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.child_process import tied
from edm_deploy_tools.common.machine import measurement_conditions
from edm_deploy_tools.images.shards import read_set, shard_files

WORKER = "ShardWorker"  # in the title of Ray's worker processes
POLL = 0.02  # seconds
FAILED = 1  # exit code


@dataclass
class Figures:
    """What was found.

    Attributes:
        images: Images of the killed set.
        distinct: Distinct ones among them, by the bytes of their files.
        different: Images that are not those of the uninterrupted run, and shards whose files differ.
        killed_drivers, killed_workers: Kills.
        seconds: Wall time of the uninterrupted and of the killed runs.
    """

    images: int = 0
    distinct: int = 0
    different: int = 0
    killed_drivers: int = 0
    killed_workers: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def command_of(engine: Path, out: Path, options: Sequence[str]) -> list[str]:
    """The command that generates a set."""
    return tied([sys.executable, "-m", "edm_deploy_tools", "generate", str(engine), "--out", str(out), *options])


def soak(engine: Path, directory: Path, *, images: int, kills: int, workers: int, seed: int, options: Sequence[str] = ()) -> Figures:
    """Make a set at once and another one with kills, and compare them.

    Args:
        engine: Engine directory.
        directory: An empty or new directory; receives `whole` and `killed`.
        images: Images of each set.
        kills: Kills of the second, of the driver and of a worker in turn; of the driver alone where there is one worker, which is in its process.
        workers: Workers of the second set; the first has one, in its process.
        seed: Of the moments of the kills.
        options: Further options of `generate`.
    """
    figures, chance = Figures(), random.Random(seed)
    shared = ["--num-images", str(images), *options]
    start = time.monotonic()
    finished(subprocess.Popen(command_of(engine, directory / "whole", shared)))
    figures.seconds["uninterrupted"] = time.monotonic() - start
    start = time.monotonic()
    killed = directory / "killed"
    shards = len(shard_files(directory / "whole"))
    moments = sorted(chance.sample(range(1, shards), min(kills, shards - 1)))
    process: subprocess.Popen[bytes] | None = None
    for number, moment in enumerate(moments):
        if process is None or process.poll() is not None:
            process = subprocess.Popen(command_of(engine, killed, [*shared, "--workers", str(workers)]))
        wait_for(process, killed, moment, chance)
        found = workers_of(process) if workers > 1 and number % 2 else []
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(found).kill()
                figures.killed_workers += 1
        elif process.poll() is None:
            process.kill()
            process.wait()
            process = None
            figures.killed_drivers += 1
    if process is None or process.poll() is not None:
        process = subprocess.Popen(command_of(engine, killed, [*shared, "--workers", str(workers)]))
    finished(process)
    figures.seconds["killed"] = time.monotonic() - start
    compare(directory / "whole", killed, figures)
    return figures


def wait_for(process: subprocess.Popen[bytes], out: Path, shards: int, chance: random.Random) -> None:
    """Wait until a folder has this many shards, and a little longer, so that the next one is being made; or until the process has ended."""
    while process.poll() is None and not (out.is_dir() and len(shard_files(out)) >= shards):
        time.sleep(POLL)
    time.sleep(chance.uniform(0, 10 * POLL))


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Ray's worker processes that hold an engine."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if WORKER in " ".join(child.cmdline()):
                    found.append(child)
    return found


def finished(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command; InputError where it fails."""
    if code := process.wait():
        raise InputError(f"generate ended with exit code {code}; its message is above.")


def compare(whole: Path, killed: Path, figures: Figures) -> None:
    """Enter how many images there are, how many are distinct, and what differs from the uninterrupted set."""
    expected = {record.index: hashlib.sha256(record.png).digest() for record in read_set(whole)}
    found = [(record.index, hashlib.sha256(record.png).digest()) for record in read_set(killed)]
    figures.images, figures.distinct = len(found), len({digest for _, digest in found})
    figures.different = sum(expected.get(index) != digest for index, digest in found) + abs(len(expected) - len(found))
    files = [{path.name: path.read_bytes() for path in shard_files(directory).values()} for directory in (whole, killed)]
    figures.different += sum(files[0].get(name) != files[1].get(name) for name in files[0].keys() | files[1].keys())


app = run_app.app_with()


@app.command()
def command(
    engine: Annotated[Path, typer.Argument(help="Engine directory.")],
    directory: Annotated[Path, typer.Option("--out", metavar="DIR", help="New directory for both sets.")],
    images: Annotated[int, typer.Option(min=2, help="Images of each set.")] = 10_000,
    kills: Annotated[int, typer.Option(min=1, help="Kills, of the driver and of a worker in turn.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Workers of the killed set; 1 is without Ray.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps.")] = 20,
    shard_images: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 0,
) -> None:
    """Kill the generation of a set again and again. Exit code 1 where an image is lost, doubled, or another one than in an uninterrupted run."""
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"--out {directory} is not empty. Choose a new directory.")
    directory.mkdir(parents=True, exist_ok=True)
    options = ["--steps", str(steps), "--shard-images", str(shard_images)]
    figures = soak(engine, directory, images=images, kills=kills, workers=workers, seed=seed, options=options)
    facts: dict[str, Any] = {
        "engine": engine,
        "workers": workers,
        "steps": steps,
        "shard_images": shard_images,
        "seed": seed,
        **measurement_conditions(),
    }
    console.print_facts({**facts, **vars(figures)})
    if figures.images != images or figures.distinct != images or figures.different:
        raise typer.Exit(FAILED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where the sets differ, 2 after an error, 130 after Ctrl-C."""
    return run_app.run(app, "python -m edm_deploy_tools.generation.soak", arguments)


if __name__ == "__main__":
    run_app.set_passive_openmp()
    sys.exit(main())
