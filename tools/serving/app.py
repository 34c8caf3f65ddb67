"""The HTTP application: OpenAI's images API, `/health`, `/metrics`, and a page at `/`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from edm_deploy.serving.interface import ImageService, ModelCard, Stats
from edm_deploy_tools.common.assets import ASSETS
from edm_deploy_tools.serving.answers import Answering, ClientGoneError, stream, while_connected, whole_answer
from edm_deploy_tools.serving.bodies import GenerationBody, edit_body, generation_body, picture
from edm_deploy_tools.serving.errors import HttpError, http_error
from edm_deploy_tools.serving.gate import Gate, RequestLog
from edm_deploy_tools.serving.metrics import HttpCounts, exposition

PAGE = ASSETS / "serve" / "page.html"
CLIENT_GONE = 499  # nginx's status for a client that closed its connection; nobody receives it
MOST_FIELDS = 32  # of a form
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
}


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """Settings of the application.

    Attributes:
        keys: API keys; empty for none.
        largest_body: Bytes of a request's body at most.
        log: Receives a line for each request.
    """

    keys: frozenset[str] = frozenset()
    largest_body: int = 32 << 20
    log: RequestLog = field(default_factory=RequestLog)


def create_app(services: Mapping[str, ImageService], settings: AppSettings | None = None) -> FastAPI:
    """The application that serves images of some models. Whoever opened the services closes them.

    Args:
        services: One or more models by name.
        settings: Keys and limits; None takes the defaults.
    """
    settings = settings or AppSettings()
    app = FastAPI(title="edm-deploy", openapi_url=None)
    endpoints = _Endpoints(dict(services))
    app.add_api_route("/v1/images/generations", endpoints.generations, methods=["POST"])
    app.add_api_route("/v1/images/edits", endpoints.edits, methods=["POST"])
    app.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    app.add_api_route("/health", endpoints.health, methods=["GET"])
    counts = HttpCounts(["/", "/metrics", "/health", "/v1/models", "/v1/images/generations", "/v1/images/edits"])

    async def metrics() -> Response:
        return Response(exposition(await endpoints.stats(), counts), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=SECURITY)

    async def refused(_: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)
        return HttpError(err.status_code, f"{err.detail}. The API is described in docs/serve.md.", headers=dict(err.headers or {})).response

    app.add_api_route("/metrics", metrics, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"])
    app.add_exception_handler(HTTPException, refused)
    app.add_middleware(Gate, keys=settings.keys, largest_body=settings.largest_body, log=settings.log, count=counts.add)
    return app


class _Endpoints:
    def __init__(self, services: dict[str, ImageService]) -> None:
        self._services = services
        self._cards: dict[str, ModelCard] = {}

    async def generations(self, http: Request) -> Response:
        """Images of a prompt, a label or nothing."""
        body = generation_body(await http.body())
        name, service = self._chosen(body)
        return await self._answer(http, service, Answering(name, body.request(http.state.request_id), "image_generation"), body)

    async def edits(self, http: Request) -> Response:
        """Images that start from a picture."""
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HttpError(415, "The body is no form, expected multipart/form-data with the file image. Send it as curl -F does.")
        async with http.form(max_files=1, max_fields=MOST_FIELDS) as form:
            upload = form.get("image") or form.get("image[]")
            if not isinstance(upload, UploadFile):
                raise HttpError(400, "The form has no file image, expected a PNG, JPEG or WebP file.", param="image")
            content = await upload.read()
            body = edit_body({name: text for name, text in form.items() if isinstance(text, str)})
        name, service = self._chosen(body)
        request = body.request(http.state.request_id)
        card = await self._card(name)
        height, width = request.height or card.size[0], request.width or card.size[1]
        largest = 4 * max(card.size)
        if max(height, width) > largest:  # the engine's profile is checked later, with a picture of this size in memory
            raise HttpError(400, f"size is {width}x{height}, expected sides of at most {largest} pixels for this model.", param="size")
        pixels = await asyncio.to_thread(picture, content, (height, width))
        request = replace(request, picture=pixels, strength=body.strength)
        return await self._answer(http, service, Answering(name, request, "image_edit"), body)

    async def models(self) -> Response:
        """The models, as OpenAI lists them, with what each takes."""
        cards = [await self._card(name) for name in self._services]
        data = [{"id": card.name, "object": "model", "created": 0, "owned_by": "edm-deploy", **asdict(card)} for card in cards]
        return JSONResponse({"object": "list", "data": data})

    async def health(self) -> Response:
        """200 where every model takes requests, else 503; with the state of each."""
        stats = await self.stats()
        shown = ("state", "reason", "slots", "occupied", "requests", "waiting", "running")
        ready = all(each.state == "ready" for each in stats.values())
        models = {name: {key: getattr(each, key) for key in shown} for name, each in stats.items()}
        return JSONResponse({"status": "ok" if ready else "unavailable", "models": models}, 200 if ready else 503)

    async def stats(self) -> dict[str, Stats]:
        """Statistics of every model."""
        found = await asyncio.gather(*(service.stats() for service in self._services.values()))
        return dict(zip(self._services, found, strict=True))

    async def _answer(self, http: Request, service: ImageService, answering: Answering, body: GenerationBody) -> Response:
        request = answering.request
        http.state.noted.update(model=answering.model, images=request.count, steps=request.steps, seed=request.seed, user=body.user)
        events = while_connected(http, service, request)
        try:
            await anext(events)  # Accepted, or an error that is answered with its status
            if body.stream:
                lines = stream(answering, events)
                return StreamingResponse(
                    lines, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                )
            return JSONResponse(await whole_answer(answering, events))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except Exception as err:
            answer = http_error(err)
            http.state.noted["error"] = answer.message if answer.status != 500 else f"{type(err).__name__}: {err}"[:1000]
            return answer.response

    def _chosen(self, body: GenerationBody) -> tuple[str, ImageService]:
        name = body.model if body.model is not None else next(iter(self._services)) if len(self._services) == 1 else None
        if name is None:
            raise HttpError(400, f"The body names no model, expected one of {', '.join(self._services)}.", param="model")
        if name not in self._services:
            raise HttpError(
                404, f"There is no model {name[:60]!r}, expected one of {', '.join(self._services)}.", param="model", code="model_not_found"
            )
        return name, self._services[name]

    async def _card(self, name: str) -> ModelCard:
        if name not in self._cards:
            self._cards[name] = await self._services[name].card()
        return self._cards[name]
