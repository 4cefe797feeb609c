"""``commplane-disagg demo``: prefill on two nodes, decode on a third, and the tokens of one process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from commplane.errors import ConfigError
from commplane_disagg.demo.job import FAULTS, Options
from commplane_disagg.demo.network import refusal
from commplane_disagg.demo.prompts import PROMPTS
from commplane_disagg.demo.run import NOT_REGISTERED, demo, in_namespaces

__all__ = ["add_arguments", "run"]

_EPILOG = f"""exit code: 0 every token and page is that of one process; 1 something failed or differs, and is shown;
{NOT_REGISTERED} prefill ranks could not register, which is what --no-port-sync is for; 130 after Ctrl-C"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.epilog = _EPILOG
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: built in)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens for each prompt (default: %(default)s)")
    parser.add_argument("--prefill-tp", type=int, default=2, metavar="N", help="prefill ranks over two nodes (default: 2)")
    parser.add_argument("--decode-tp", type=int, default=1, metavar="N", help="decode ranks on the third node (default: 1)")
    parser.add_argument(
        "--engine", default="", metavar="NAME", help="transfer engine (default: shm where all ranks can map it, else tcp)"
    )
    parser.add_argument("--no-port-sync", action="store_true", help="let each node register at its own port, as upstream did")
    parser.add_argument(
        "--network",
        choices=("auto", "namespaces", "loopback"),
        default="auto",
        help="a network namespace for each node, or a loopback address (default: namespaces where they can be made)",
    )
    parser.add_argument("--mbit", type=float, default=0.0, help="limit what each prefill node sends, megabits/s")
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    parser.add_argument("--fault", choices=FAULTS, default="", metavar="NAME", help=f"once a room has arrived: {faults}")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for any one wait (default: %(default)g)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo: its exit code."""
    network = arguments.network
    if network != "loopback":
        why = refusal()
        if why is not None and network == "namespaces":
            raise ConfigError(f"network namespaces cannot be made here: {why}; take --network loopback")
        if why is not None:
            print(f"no network namespaces here ({why}): loopback addresses stand for the nodes", flush=True)
        network = "loopback" if why is not None else "namespaces"
    options = Options(
        prompts=_read(arguments.prompts) if arguments.prompts is not None else PROMPTS,
        tokens=arguments.tokens,
        prefill_tp=arguments.prefill_tp,
        decode_tp=arguments.decode_tp,
        engine=arguments.engine,
        port_sync=not arguments.no_port_sync,
        network=network,
        mbit=arguments.mbit,
        fault=arguments.fault,
        timeout=arguments.timeout,
    )
    if network == "namespaces":
        return in_namespaces(options)
    try:
        return demo(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts in {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"no prompts in {path}: wanted one a line")
    return prompts
