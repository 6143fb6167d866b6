"""Pages for browsers: the front page, and the interface's description."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from service.api.description import described

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("answer.js", "question.js", "tasks.js", "page.js")

pages = APIRouter(include_in_schema=False)
docs_assets = StaticFiles(packages=[("fastapi_offline", "static")])


@pages.get("/")
async def get_page() -> HTMLResponse:
    """The front page, with style and script inline: its policy allows no others."""
    style, script = _read("page.css"), "".join(map(_read, _SCRIPTS))
    page = _read("index.html").replace("</style>", f"{style}</style>")
    page = page.replace("</script>", f"{script}</script>")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)};"
        " connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(page, headers=headers | {"Referrer-Policy": "no-referrer"})


@pages.get("/openapi.json")
async def get_openapi(request: Request) -> Response:
    """The interface's description, for programs."""
    return JSONResponse(described(request.app))


@pages.get("/docs")
async def get_docs() -> HTMLResponse:
    """The interface's description, for people; nothing is loaded from other hosts."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Vouchsafe",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon.png",
    )


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _hash(inline: str) -> str:
    """A policy's source expression for one inline script or style."""
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    return f"'sha256-{digest}'"
