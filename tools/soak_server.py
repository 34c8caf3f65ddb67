"""Send a server many requests, some cancelled and some malformed, kill its replicas meanwhile, and count lost answers and the growth of memory."""

from __future__ import annotations

import contextlib
import http.client
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import psutil
import typer

from edm_deploy.errors import InputError
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.child_process import tied
from edm_deploy_tools.common.machine import measurement_conditions
from edm_deploy_tools.serving.bench.soak import Soak, health

START_SECONDS = 600.0
FAILED = 1  # exit code


@contextlib.contextmanager
def served(engine: Path, port: int, options: Sequence[str]) -> Iterator[psutil.Process]:
    """A server in a process of its own, ready; ended by SIGTERM.

    Raises:
        InputError: It ended before it was ready.
    """
    command = [sys.executable, "-m", "edm_deploy_tools", "serve", f"model={engine}", "--port", str(port), *options]
    log = tempfile.TemporaryFile()  # noqa: SIM115  # a line for each request; closed below
    process = subprocess.Popen(tied(command), stdout=subprocess.DEVNULL, stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if process.poll() is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise InputError(f"serve ended with exit code {process.returncode}: {lines[-1] if lines else 'no message'}")
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                if health(port)["status"] == "ok":
                    break
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


app = run_app.app_with()


@app.command()
def command(
    engine: Annotated[Path, typer.Argument(help="Engine directory.")],
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 10_000,
    connections: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    cancelled: Annotated[float, typer.Option(min=0, max=1, help="Share of requests whose client goes.")] = 0.05,
    malformed: Annotated[float, typer.Option(min=0, max=1, help="Share of malformed requests.")] = 0.01,
    replicas: Annotated[int, typer.Option(min=0, help="Replicas on Ray Serve; 0 is the embedded server.")] = 0,
    kill_every: Annotated[float, typer.Option(min=0, help="On Ray: seconds between two kills of a replica; 0 kills none.")] = 60.0,
    slots: Annotated[int, typer.Option(min=1, help="Rows of each call.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each replica.")] = 1,
    fewest: Annotated[int, typer.Option("--fewest-steps", min=1, help="Fewest steps of a request.")] = 2,
    most: Annotated[int, typer.Option("--most-steps", min=1, help="Most steps of a request.")] = 8,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8765,
    max_growth_mb: Annotated[float, typer.Option(min=0, help="Growth of a process's memory after the warm-up that is accepted.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Soak a server. Exit code 1 where an answer was lost or wrong, or memory grew by more than is accepted."""
    options = ["--slots", str(slots), "--threads", str(threads), "--queue", str(4 * connections)]
    if replicas:
        options += ["--ray", "local", "--replicas", str(replicas)]
    with served(engine, port, options) as process:

        def processes() -> list[psutil.Process]:
            return [process, *process.children(recursive=True)]

        soak = Soak(port, processes, seed=seed, cancelled=cancelled, malformed=malformed)
        soak.run(
            requests,
            connections=connections,
            steps=(fewest, max(fewest, most)),
            kill_every=kill_every if replicas else 0.0,
            notify=console.note,
        )
    facts = {"engine": str(engine), "requests": requests, "connections": connections, "replicas": replicas, "slots": slots, "seed": seed}
    console.print_facts({**facts, **measurement_conditions(), **vars(soak.figures)})
    if soak.figures.failed(max_growth_mb):
        raise typer.Exit(FAILED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 where the server failed, 2 after an error, 130 after Ctrl-C."""
    return run_app.run(app, "python -m edm_deploy_tools.soak_server", arguments)


if __name__ == "__main__":
    run_app.set_passive_openmp()
    sys.exit(main())
