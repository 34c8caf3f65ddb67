"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def serve(
    engines: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE_DIR...",
            help="Directories written by build-engine, or NAME=DIR; the model's name is else that of its directory.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of each call of an engine. Default: 8, or the largest batch of its profile if that is less."),
    ] = None,
    pad: Annotated[
        bool,
        typer.Option(
            "--pad/--no-pad",
            help="Whether every call has as many rows as --slots, so that an image does not depend on those that share the call. "
            "--no-pad computes as many as are needed: faster on a CPU at low load.",
        ),
    ] = True,
    queue: Annotated[int, typer.Option(min=1, help="Requests of a model at once; more are answered 429.")] = 64,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="Images of a request at most.")] = 10,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Steps of a request at most.")] = 150,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=1, help="Characters of a prompt at most.")] = 4000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", metavar="FILE", help="Keys that requests need, one a line; also those in EDM_DEPLOY_API_KEYS. Default: none."
        ),
    ] = None,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that accepted requests have to finish after SIGTERM or Ctrl-C.")] = 60.0,
    source: opt.PipelineSource = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Deploy on Ray Serve: HOST:PORT, ray://HOST:PORT, auto, or local to start a cluster here."
        ),
    ] = None,
    replicas: Annotated[
        str,
        typer.Option(
            "--replicas", metavar="N|MIN:MAX", help="Replicas with the engines each, on Ray; between two numbers as the queue needs."
        ),
    ] = "1",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each replica's engines. Default: as they were built; 1 on Ray.")
    ] = None,
    together: Annotated[
        int, typer.Option("--engines-per-replica", metavar="N", min=1, help="On Ray: engines that a replica holds at once; others wait.")
    ] = 3,
    lora: opt.Loras = None,
    device: opt.EngineDevice = None,
) -> None:
    """Serve images over HTTP: OpenAI's images API, a page at /, /health and /metrics. Requests share the engine's calls step by step."""
    from edm_deploy.serving.replica import Limits
    from edm_deploy_tools.common.loras import file_and_weight
    from edm_deploy_tools.serving.app import AppSettings
    from edm_deploy_tools.serving.gate import read_keys
    from edm_deploy_tools.serving.server import HttpServer, bound_socket, named_directories, open_replicas

    named = named_directories(engines)
    settings = AppSettings(keys=read_keys(api_keys))
    limits = Limits(queue=queue, images=max_images, steps=max_steps, prompt=max_prompt)
    loras = [file_and_weight(text) for text in lora or ()]
    if ray is not None or replicas != "1":
        from edm_deploy_tools.serving.ray_command import Deployed, run_on_ray

        options = {"slots": slots, "pad": pad, "source": source, "device": opt.value(device), "threads": threads or 1, "together": together}
        run_on_ray(
            named,
            Deployed(address=ray or "local", replicas=replicas, host=host, port=port),
            limits=limits,
            keys=settings.keys,
            drain=drain,
            loras=loras,
            **options,
        )
        return
    with bound_socket(host, port) as bound:
        replicas = open_replicas(named, limits, slots=slots, pad=pad, source=source, device=opt.value(device), loras=loras, threads=threads)

        def started(url: str) -> None:
            models = ", ".join(f"{name} ({replica.model.slots} slots)" for name, replica in replicas.items())
            console.say(f"Serving {models} at {url}")

        try:
            HttpServer(replicas, bound, settings, drain=drain, started=started).serve_until_stopped()
        finally:
            for replica in replicas.values():
                replica.close()
    console.say("Stopped.")
