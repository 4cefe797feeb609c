"""``commplane-disagg serve``: the registry in the foreground, for deployments in which no rank should carry it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from commplane_disagg.port import bind_listener
from commplane_disagg.registry.addresses import url_host
from commplane_disagg.registry.auth import ENVIRONMENT, metrics_token, read_token
from commplane_disagg.registry.server import RegistryServer, allow_many_files

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on; :: takes IPv4 too (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8998, help="0 takes a free one, which is printed (default: %(default)s)")
    parser.add_argument(
        "--lease", type=float, default=10.0, metavar="SECONDS", help="a row that is not renewed ends (default: 10)"
    )
    auth = parser.add_mutually_exclusive_group()
    auth.add_argument("--token-file", metavar="FILE", help=f"the shared token; without it the variable {ENVIRONMENT} is read")
    auth.add_argument("--no-auth", action="store_true", help="let everybody who reaches the port register and read")
    parser.add_argument("--print-metrics-token", action="store_true", help="print the bearer token for /metrics and exit")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Exit code 1 if it cannot listen, or if serving ended by itself."""
    token = None if arguments.no_auth else read_token(arguments.token_file)
    if arguments.print_metrics_token:
        if token is None:
            print("with --no-auth everybody may read /metrics", file=sys.stderr)
            return 2
        print(metrics_token(token))
        return 0
    allow_many_files()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: ended.set())
    server = RegistryServer(bind_listener(arguments.host, arguments.port), token=token, lease=arguments.lease)
    with server:
        how = "without authentication" if token is None else "with the shared token"
        print(f"serving on {url_host(arguments.host)}:{server.port} {how}", flush=True)
        while not ended.wait(0.5):
            if not server.alive:
                print(f"the registry at {server.bound} ended by itself", file=sys.stderr)
                return 1
    return 0
