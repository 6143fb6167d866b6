"""`vouchsafe serve` with the fake adaptation: `python -m tests.support.fake_server --port P`."""

from __future__ import annotations

import logging
import sys

from service.api.app import create_app
from service.config import Settings
from service.operations.server import DrainingServer
from service.processes.embedded import Embedded, leave_if_hung
from service.tasks.supervisor import Supervisor
from tests.support.adapting import FAKE

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    embedded, server = Embedded(Settings()), DrainingServer("127.0.0.1", int(sys.argv[2]))
    background = [embedded.worker(on_failure=server.stop), Supervisor(embedded.store, FAKE).run]
    app = create_app(embedded.services(background))
    try:
        server.serve_app(app)
    finally:
        leave_if_hung(embedded)
