"""Run the panel server on loopback: ``python -m cluster.monitoring.panels --port 3000 …``."""

import argparse
from pathlib import Path

import httpx
import uvicorn

from cluster.monitoring.panels.app import make_app
from cluster.monitoring.panels.dashboards import Library
from cluster.monitoring.panels.prometheus import TIMEOUT_S

HOST = "127.0.0.1"
MAX_CONNECTIONS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prometheus", metavar="URL", required=True)
    parser.add_argument("--folder", metavar="NAME=DIRECTORY", action="append", required=True)
    parser.add_argument("--frame-ancestor", metavar="ORIGIN", action="append", default=[])
    options = parser.parse_args()
    folders = {name: Path(path) for name, _, path in (o.partition("=") for o in options.folder)}
    http = httpx.AsyncClient(base_url=options.prometheus, timeout=TIMEOUT_S, trust_env=False)
    app = make_app(Library(folders), http, options.frame_ancestor)
    uvicorn.run(
        app, host=HOST, port=options.port, log_level="warning", access_log=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=1, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
