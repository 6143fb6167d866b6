"""A server on a port of this machine that answers from a script and keeps what it was sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Response = tuple[int, Mapping[str, str], Any]
"""Status, headers, and the body: a JSON document, or text as it is; status 0 hangs up."""


class Scripted:
    """The server; `requests` are the headers of each, with the body as `body`."""

    def __init__(self, responses: list[Response]) -> None:
        self.requests: list[dict[str, Any]] = []
        script, requests = iter(responses), self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                requests.append({**self.headers, "path": self.path, "body": body})
                status, headers, document = next(script)
                if not status:
                    self.close_connection = True
                    return
                content = document if isinstance(document, str) else json.dumps(document)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            do_GET = do_POST

            def log_message(self, format: str, *arguments: Any) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def scripted(*responses: Response) -> Iterator[Scripted]:
    """A server that gives these responses, one a request, until the end of the block."""
    found = Scripted(list(responses))
    thread = Thread(target=found.server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        found.server.server_close()
        thread.join()
