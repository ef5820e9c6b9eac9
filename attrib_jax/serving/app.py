"""The ASGI application of the page: static files from a fixed list, and JSON for its script.

Nothing of a request names a file: training images are asked for by row id, results by random names. Uploads live in the
request that waits for them, and go with its answer.
"""

import contextlib
import importlib.resources
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from attrib_jax.serving.engine import MAX_PROMPT, MAX_UPLOAD_BYTES, Answer, Ask, Engine, png
from attrib_jax.serving.worker import BusyError, Request, Worker

_log = logging.getLogger(__name__)

_STATIC = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/app.css": ("app.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_REPORT_HEADERS = {"Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"}
# Seconds that a question about a request waits for a change.
_WAIT = 20.0


def make_app(engine: Engine, worker: Worker, hosts: list[str]) -> Starlette:
    """The application.

    Args:
      engine: answers questions, on the worker's thread.
      worker: owns the device.
      hosts: names by which the page may be asked for; `*` allows every name.
    """
    files = {
        path: ((importlib.resources.files(__package__) / "static" / name).read_bytes(), kind)
        for path, (name, kind) in _STATIC.items()
    }

    def static(path: str) -> Callable[[HTTPRequest], Any]:
        content, kind = files[path]

        async def send(request: HTTPRequest) -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

        return send

    async def about(request: HTTPRequest) -> Response:
        dataset = engine.run.dataset
        return _json(
            {
                "model": engine.model_name,
                "dataset": dataset.name,
                "images": len(engine.index.row_ids),
                "kind": engine.index.record["kind"],
                "methods": engine.methods,
                "credit": dataset.credit,
                "credit_url": dataset.credit_url,
                "model_credit": engine.model_credit,
                "max_bytes": MAX_UPLOAD_BYTES,
                "max_prompt": MAX_PROMPT,
            }
        )

    async def ask(request: HTTPRequest) -> Response:
        asked = _read_ask(request, engine.methods)
        upload = await _body(request)
        asked = asked._replace(upload=upload or None)
        if not asked.upload and not asked.prompt.strip():
            raise ValueError("the prompt is empty: write what the picture shows, or choose an image")
        return _submitted(worker.submit(lambda: engine.answer(asked)), worker)

    async def reverse(request: HTTPRequest) -> Response:
        row = _row(request)
        return _submitted(worker.submit(lambda: engine.reverse(row)), worker)

    async def look(request: HTTPRequest) -> Response:
        found = _find(request)
        seconds = _WAIT if request.query_params.get("wait") else 0.0
        with anyio.move_on_after(seconds):
            while not found.done.is_set():
                await anyio.sleep(0.02)
                if found.state == "running" and found.progress[1] > 0:
                    break
        state: dict[str, Any] = {"state": found.state, "before": worker.position(found)}
        if found.state == "running":
            state |= {"doing": found.progress[0], "share": found.progress[1]}
        if found.state == "failed":
            state["error"] = found.error
        if found.state == "done":
            state |= await anyio.to_thread.run_sync(lambda: _result(found))
        return _json(state)

    def _result(found: Request) -> dict[str, Any]:
        if not isinstance(found.result, Answer):
            return {
                "queries": [
                    {"prompt": text, "score": value, "image": _uri(image)} for text, value, image in found.result
                ]
            }
        answer = found.result
        picture = answer.picture
        shown = {
            "image": _uri(picture.image),
            "width": picture.image.shape[1],
            "height": picture.image.shape[0],
            "notes": list(picture.notes),
            "seconds": answer.seconds,
            "scored": len(answer.scores),
            "cards": engine.cards(answer.scores),
        }
        if answer.ask.upload is not None:
            # Its picture goes with the answer, so the report has to be in it.
            shown["report"] = engine.report(answer)
            worker.drop(found)
        return shown

    async def cancel(request: HTTPRequest) -> Response:
        worker.cancel(_find(request))
        return _json({"cancelled": True})

    async def report(request: HTTPRequest) -> Response:
        found = _find(request)
        if not isinstance(found.result, Answer):
            raise HTTPException(404, "this request has no report")
        text = await anyio.to_thread.run_sync(lambda: engine.report(found.result))
        headers = {**_HEADERS, **_REPORT_HEADERS, "Content-Disposition": 'attachment; filename="report.html"'}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    async def training_image(request: HTTPRequest) -> Response:
        row = _row(request)
        content = await anyio.to_thread.run_sync(lambda: png(engine.run.dataset[engine.position[row]].image))
        headers = {**_HEADERS, "Cache-Control": "private, max-age=3600"}
        return Response(content, media_type="image/png", headers=headers)

    def _find(request: HTTPRequest) -> Request:
        found = worker.find(request.path_params["name"])
        if found is None:
            raise HTTPException(404, "this request is not known, or its answer is too old: ask again")
        return found

    def _row(request: HTTPRequest) -> int:
        row = request.path_params["row"]
        if row not in engine.position:
            raise HTTPException(404, f"there is no training image with row id {row}")
        return row

    routes = [Route(path, static(path)) for path in _STATIC] + [
        Route("/api/about", about),
        Route("/api/ask", ask, methods=["POST"]),
        Route("/api/request/{name}", look),
        Route("/api/request/{name}/cancel", cancel, methods=["POST"]),
        Route("/api/request/{name}/report", report),
        Route("/api/training/{row:int}", training_image),
        Route("/api/reverse/{row:int}", reverse, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(worker.close)

    handlers = {
        ValueError: lambda request, error: _refused(400, str(error)),
        BusyError: lambda request, error: _refused(503, str(error)),
        HTTPException: lambda request, error: _refused(error.status_code, error.detail),
        Exception: _broken,
    }
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


def _read_ask(request: HTTPRequest, methods: dict[str, str]) -> Ask:
    _check_origin(request)
    query = request.query_params
    method, prompt, seed, box = (query.get(name, "") for name in ("method", "prompt", "seed", "box"))
    if method not in methods:
        raise ValueError(f"method is {method[:40]!r}; expected one of {', '.join(methods)}")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(prompt)} characters; expected at most {MAX_PROMPT}")
    if not (seed or "0").isascii() or not (seed or "0").isdigit() or int(seed or 0) >= 2**32:
        raise ValueError(f"seed is {seed[:40]!r}; expected a whole number from 0 to {2**32 - 1}")
    corners = None
    if box:
        parts = box.split(",")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
            raise ValueError(f"box is {box[:40]!r}; expected four whole numbers x0,y0,x1,y1")
        corners = tuple(map(int, parts))
    return Ask(method, prompt, int(seed or 0), corners)  # type: ignore[arg-type]


async def _body(request: HTTPRequest) -> bytes:
    """The request's body; ValueError as soon as it is too long."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_UPLOAD_BYTES:
            raise ValueError(f"the file is too large; expected at most {MAX_UPLOAD_BYTES:,} bytes")
    return bytes(content)


def _check_origin(request: HTTPRequest) -> None:
    """Refuses what another site's page sends."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "the request comes from another site's page")


def _submitted(request: Request, worker: Worker) -> Response:
    return _json({"request": request.name, "before": worker.position(request)})


def _uri(image: Any) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json", headers=_HEADERS)


def _refused(status: int, message: str) -> Response:
    return _json({"error": message}, status)


def _broken(request: HTTPRequest, error: Exception) -> Response:
    _log.error("%s failed", request.url.path, exc_info=error)
    return _refused(500, "something went wrong on the server, whose log says what")
