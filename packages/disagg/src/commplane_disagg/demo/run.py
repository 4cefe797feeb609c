"""The demo from start to end: ``python -m commplane_disagg.demo.run PARENT OPTIONS`` in a network of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta

import msgspec

from commplane.errors import CommplaneError
from commplane_disagg.demo.job import DECODE_NODE, PREFILL_NODES, Job, Options, Outcome
from commplane_disagg.demo.launch import SILENT, Process, Ranks
from commplane_disagg.demo.network import isolated, loopback, namespaces, shape, with_parent

__all__ = ["NOT_REGISTERED", "demo", "in_namespaces"]

NOT_REGISTERED = 3
"""Exit code where prefill ranks could not register, which is what comes of ``--no-port-sync``."""

_GRACE = 10.0
"""Seconds beside the timeout that other ranks may go on once one has failed; their own deadlines should end them before."""


def in_namespaces(options: Options) -> int:
    """Run `demo` in a process that has a network of its own: its exit code."""
    module = [sys.executable, "-m", "commplane_disagg.demo.run"]
    command = [*isolated(), *module, str(os.getpid()), msgspec.json.encode(options).decode()]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as child:
        # Ctrl-C reaches the child too, which cleans up and ends; this process stays for its exit code.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGINT, before)


def demo(options: Options) -> int:
    """Start the ranks, wait for them, compare with one process, and say what came of it.

    Returns:
        0 if every token is that of one process; `NOT_REGISTERED`; 1 for anything else.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a host without a name is no news in a namespace
    from torch.distributed import TCPStore

    from commplane.demo import encode_text
    from commplane_disagg.demo.faults import Fault
    from commplane_disagg.demo.parts import CONFIG

    for size in (options.prefill_tp, options.decode_tp):
        CONFIG.check(size)
    count = PREFILL_NODES + 1
    network = namespaces(count) if options.network == "namespaces" else loopback(count)
    with network as nodes:
        here = "10.77.0.254" if options.network == "namespaces" else "127.0.0.1"
        _say(f"prefill on {nodes[0].address} and {nodes[1].address}, decode on {nodes[DECODE_NODE].address}")
        if options.mbit:
            for node in nodes[:PREFILL_NODES]:
                shape(node, options.mbit)
        store = TCPStore(here, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=options.timeout))
        token, prompts = secrets.token_bytes(32), tuple(tuple(encode_text(text)) for text in options.prompts)
        jobs = [
            Job(
                side=side,
                rank=rank,
                addresses=tuple(node.address for node in nodes),
                store=(here, store.port),
                token=token,
                options=options,
                prompts=prompts,
            )
            for side, size in (("prefill", options.prefill_tp), ("decode", options.decode_tp))
            for rank in range(size)
        ]
        with Ranks(jobs, nodes) as ranks:
            fault = Fault(options, ranks.processes, nodes, store)

            def meanwhile() -> None:
                if (happened := fault.look()) is not None:
                    _say(happened)

            outcomes = ranks.wait(4 * options.timeout, grace=options.timeout + _GRACE, meanwhile=meanwhile)
            return _conclude(options, ranks.processes, outcomes)


def _conclude(options: Options, processes: Sequence[Process], outcomes: Sequence[Outcome]) -> int:
    from commplane_disagg.demo.reference import expected
    from commplane_disagg.demo.report import differences, table

    prefill, decode = outcomes[: options.prefill_tp], outcomes[options.prefill_tp :]
    failed = [(process, outcome) for process, outcome in zip(processes, outcomes, strict=True) if outcome.error]
    if failed:
        for process, outcome in failed:
            _say(
                f"{process.name} {outcome.message}"
                if outcome.error == SILENT
                else f"{process.name}: {outcome.error}: {outcome.message}"
            )
        if not options.port_sync:
            _say("without the port sync each node looks for the registry at its own port; it listens at the first node's")
            return NOT_REGISTERED
        return 1
    bound = dict.fromkeys(f"{process.job.host}:{outcome.bound}" for process, outcome in zip(processes, prefill, strict=False))
    used = {outcome.used for outcome in outcomes}
    _say(f"bound: {', '.join(bound)}; used by all ranks: {processes[0].job.host}:{', '.join(map(str, sorted(used)))}")
    why = "".join(f" (not {name}: {reason})" for name, reason in prefill[0].refused.items())
    _say(f"engine: {prefill[0].engine}{why}; prefill tp {options.prefill_tp}, decode tp {options.decode_tp}\n")
    wrong = differences(prefill, decode, expected(processes[0].job.prompts, options.tokens, options.decode_tp))
    for line in table(options, prefill, decode, wrong):
        _say(line)
    rooms = len(options.prompts)
    _say(f"\n{rooms - len(wrong)} of {rooms} rooms have the tokens and the pages of one process")
    return 1 if wrong else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(parent: int, options: str) -> int:
    """The process that `in_namespaces` starts: its exit code."""
    with_parent(parent)
    try:
        return demo(msgspec.json.decode(options, type=Options))
    except CommplaneError as error:
        sys.stderr.write(f"commplane-disagg demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
