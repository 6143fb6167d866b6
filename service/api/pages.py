"""Pages for browsers: the front page with its files, and the interface's description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from service.api.description import described

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Cache-Control": "no-cache",  # Modules of two releases never meet in one page.
    "X-Content-Type-Options": "nosniff",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageFiles(StaticFiles):
    """The page's modules, styles and example pictures."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, which browsers ask for again at each visit; 304 where it is the same."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


pages = APIRouter(include_in_schema=False)
docs_assets = StaticFiles(packages=[("fastapi_offline", "static")])
static_files = PageFiles(directory=_STATIC)


@pages.get("/")
async def get_page() -> FileResponse:
    """The front page; its policy allows nothing inline, and no other host."""
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
    return FileResponse(_STATIC / "index.html", headers=_HEADERS | headers)


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
