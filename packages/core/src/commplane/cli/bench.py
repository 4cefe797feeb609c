"""``commplane bench``: all eligible backends side by side in one run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from commplane.api import Collective, ReduceOp
from commplane.bench import (
    NULL,
    OverheadRow,
    Row,
    StartupRow,
    Subject,
    describe,
    form,
    form_null,
    in_words,
    measure,
    measure_overhead,
    measure_startup,
    overhead_table,
    pinnings,
    plot,
    plot_startup,
    require_plotting,
    startup_table,
    steps,
    table,
)
from commplane.cli.launch import add_ranks_option, in_ranks, positive
from commplane.cli.parse import DTYPE_ALIASES, parse_size
from commplane.errors import CommplaneError, ConfigError, PluginError, UnsupportedOperation
from commplane.runtime import Communicator, Plane, init

__all__ = ["add_commands", "check"]

_SIZES = "64,1K,8K,64K,256K,1M,4M,16M"
_OVERHEAD_SIZE = 64
_STARTUP_RANKS = "8,64,512,1024"

# The quantised norm is measured by `commplane tune`, which proves it first.
_MEASURED = [c for c in Collective if c is not Collective.ALL_REDUCE_RMS_NORM_QUANT]


def add_commands(commands: Any) -> None:
    """Define ``bench``."""
    parser = commands.add_parser("bench", help="latency of every usable backend, taking turns; table, JSON, plot")
    add_ranks_option(parser)
    parser.add_argument(
        "--groups", type=positive, default=1, metavar="N", help="make N groups of equal size that work at once (default 1)"
    )
    parser.add_argument(
        "--collectives",
        type=_collectives,
        default=[Collective.ALL_REDUCE],
        metavar="LIST",
        help=f"of {', '.join(_MEASURED)} (default all_reduce)",
    )
    parser.add_argument("--op", default="sum", choices=[str(op) for op in ReduceOp], help="reduction (default sum)")
    parser.add_argument("--out-of-place", action="store_true", help="all_reduce into a new tensor")
    parser.add_argument("--sizes", type=_sizes, metavar="LIST", help=f"bytes of a rank's input (default {_SIZES})")
    parser.add_argument("--dtypes", type=_dtypes, metavar="LIST", help="default float32,bfloat16")
    parser.add_argument(
        "--hidden", type=positive, default=4096, help="last dimension for all_reduce_rms_norm, in elements (default 4096)"
    )
    parser.add_argument(
        "--backends",
        type=_names,
        metavar="LIST",
        help="to compare with torch, a name or name:algorithm (default all that are usable)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where the tensors are (default as the setting device)")
    parser.add_argument(
        "--graph",
        action="store_true",
        help="device time of a call in a replayed CUDA graph; what cannot be captured is left out and named",
    )
    parser.add_argument(
        "--pin",
        choices=["on", "off", "both"],
        help="each rank's threads on one core (default both on CPU where ranks do not outnumber cores, else off)",
    )
    parser.add_argument(
        "--overhead",
        action="store_true",
        help=f"what lies between a user's call and the native one (default {_OVERHEAD_SIZE} bytes of float32, pinned)",
    )
    parser.add_argument(
        "--startup",
        action="store_true",
        help="what commplane.init and a communicator cost when there are many ranks, virtual ones",
    )
    parser.add_argument(
        "--startup-ranks", type=_counts, metavar="LIST", help=f"numbers of virtual ranks for --startup (default {_STARTUP_RANKS})"
    )
    parser.add_argument(
        "--c10d",
        action="store_true",
        help="dist.all_reduce through init_process_group('commplane'), beside the communicator's own call and Gloo or NCCL",
    )
    parser.add_argument("--rounds", type=positive, default=7, help="counted rounds (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency against size (wants commplane[plot])")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(call=_bench)


def _words(text: str, what: str) -> list[str]:
    words = [part.strip() for part in text.split(",") if part.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"wanted at least one {what}, found none")
    return words


def _sizes(text: str) -> list[int]:
    return [parse_size(word) for word in _words(text, "size")]


def _dtypes(text: str) -> list[str]:
    return [DTYPE_ALIASES.get(word, word) for word in _words(text, "dtype")]


def _counts(text: str) -> list[int]:
    counts = [int(word) for word in _words(text, "number of ranks")]
    if min(counts) < 2:
        raise argparse.ArgumentTypeError(f"wanted 2 ranks or more, found {min(counts)}")
    return sorted(set(counts))


def _names(text: str) -> list[str]:
    return _words(text, "backend")


def _collectives(text: str) -> list[Collective]:
    words = _words(text, "collective")
    unknown = [word for word in words if word not in _MEASURED]
    if unknown:
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(_MEASURED)}, found {', '.join(unknown)}")
    return [Collective(word) for word in dict.fromkeys(words)]


def check(options: argparse.Namespace) -> None:
    """Raise `ConfigError` at once for what would fail after minutes. Local, starts nothing."""
    for path in filter(None, (options.json, options.plot)):
        if not path.resolve().parent.is_dir():
            raise ConfigError(f"bench: the folder of {str(path)!r} does not exist")
    if options.startup_ranks is not None and not options.startup:
        raise ConfigError("bench: --startup-ranks is for --startup: add that, or use --ranks")
    if options.startup:
        _refuse_beside_startup(options)
    elif options.c10d:
        others = {
            "--overhead": options.overhead,
            "--groups": options.groups != 1,
            "--plot": options.plot is not None,
            "--collectives": options.collectives != [Collective.ALL_REDUCE],
            "--op": options.op != "sum",
            "--out-of-place": options.out_of_place,
            "--graph": options.graph,
            "--backends": options.backends is not None,
        }
        unfit = [name for name, given in others.items() if given]
        if unfit:
            raise ConfigError(
                f"bench: --c10d measures all_reduce sum of the agreed plan as a table, found {', '.join(unfit)}: leave it out"
            )
    elif options.overhead:
        others = {
            "--groups": options.groups != 1,
            "--plot": options.plot is not None,
            "--collectives": options.collectives != [Collective.ALL_REDUCE],
            "--op": options.op != "sum",
            "--out-of-place": options.out_of_place,
            "--graph": options.graph,
        }
        unfit = [name for name, given in others.items() if given]
        if unfit:
            raise ConfigError(f"bench: --overhead measures all_reduce sum as a table, found {', '.join(unfit)}: leave it out")
    if options.plot is not None:
        if options.collectives == [Collective.BARRIER]:
            raise ConfigError("bench: --plot draws against size, and a barrier has none: leave it out")
        require_plotting()


def _refuse_beside_startup(options: argparse.Namespace) -> None:
    """What --startup cannot take notice of is an error."""
    others = {
        "--overhead": options.overhead,
        "--c10d": options.c10d,
        "--groups": options.groups != 1,
        "--collectives": options.collectives != [Collective.ALL_REDUCE],
        "--op": options.op != "sum",
        "--out-of-place": options.out_of_place,
        "--sizes": options.sizes is not None,
        "--dtypes": options.dtypes is not None,
        "--backends": options.backends is not None,
        "--pin": options.pin is not None,
        "--device": options.device is not None,
        "--graph": options.graph,
    }
    unfit = [name for name, given in others.items() if given]
    if unfit:
        raise ConfigError(f"bench: --startup measures the control plane alone, found {', '.join(unfit)}: leave it out")


Progress = Callable[[str], None]
Rows = Sequence[Row] | Sequence[OverheadRow] | Sequence[StartupRow] | Sequence[Any]
Answer = tuple[dict[str, Any], Rows, str]


def _bench(options: argparse.Namespace) -> int:
    check(options)
    if options.startup:
        return _startup(options)
    code = in_ranks(options)
    if code is not None:
        return code
    if options.c10d:
        return _c10d(options)
    refused: CommplaneError | None = None
    with ExitStack() as planes:
        # What is said of a backend is measured on it, also at sizes where the times that ship give the call to another.
        plane = planes.enter_context(init(config={"tuning": "off"}))

        def progress(text: str) -> None:
            if plane.rank == 0:
                _say(options, text)

        try:
            machine, rows, text = (_overhead if options.overhead else _latency)(options, plane, planes, progress)
        except (ConfigError, PluginError, UnsupportedOperation) as error:
            refused = error  # on every rank alike: no fault, so the ranks part as they would at the end
        else:
            if plane.rank == 0:
                _show(options, machine, rows, text)
    if refused is not None:
        raise refused
    return 0


def _c10d(options: argparse.Namespace) -> int:
    """Through torch.distributed. Collective over all ranks."""
    import torch
    import torch.distributed as dist

    import commplane.c10d
    from commplane.bench.c10d import c10d_table, measure_c10d

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("commplane")
    try:
        reference = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
        dist.all_reduce(torch.zeros(1, device=device))  # makes the communicator for the device
        communicator = commplane.c10d.communicator_of(device=device)
        plane = commplane.c10d.plane_of()
        machine = describe(plane, [communicator], options.argv)
        rows = measure_c10d(
            plane,
            communicator,
            reference,
            sizes=options.sizes or _sizes("64,1K,8K,64K,1M"),
            dtypes=options.dtypes or ["float32"],
            pin=pinnings(plane, [communicator], options.pin),
            rounds=options.rounds,
            progress=lambda text: _say(options, text) if plane.rank == 0 else None,
        )
        if plane.rank == 0:
            _show(options, machine, rows, c10d_table(rows))
    finally:
        dist.destroy_process_group()
    return 0


def _say(options: argparse.Namespace, text: str) -> None:
    """Progress."""
    if not options.quiet:
        print(f"{text:<60}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _show(
    options: argparse.Namespace,
    machine: dict[str, Any],
    rows: Rows,
    text: str,
) -> None:
    """Print, and write the JSON if asked for."""
    print(f"{text}\n\non a {in_words(machine)}")
    if options.json is not None:
        answer = {"machine": machine, "rows": [r.to_json() for r in rows]}
        options.json.write_text(json.dumps(answer, indent=1) + "\n")


def _startup(options: argparse.Namespace) -> int:
    """Virtual ranks, started here. One process, no ranks of torchrun."""
    from torch.distributed import HashStore

    counts = options.startup_ranks or _counts(_STARTUP_RANKS)
    with init(store=HashStore(), rank=0, world_size=1) as plane:
        machine = describe(plane, [], options.argv) | {"ranks": max(counts)}
    rows = measure_startup(counts, runs=options.rounds, progress=lambda text: _say(options, text))
    if options.plot is not None:
        plot_startup(rows, options.plot)
    _show(options, machine, rows, startup_table(rows))
    return 0


def _latency(options: argparse.Namespace, plane: Plane, _planes: ExitStack, progress: Progress) -> Answer:
    """Collectives against torch. Collective over all ranks."""
    todo = steps(
        plane,
        collectives=options.collectives,
        op=options.op,
        dtypes=options.dtypes or ["float32", "bfloat16"],
        sizes=options.sizes or _sizes(_SIZES),
        hidden=options.hidden,
        out_of_place=options.out_of_place,
        groups=options.groups,
    )
    without: list[str] = []
    formed = _formed(options, plane, "bench", without.append)
    found = _any(formed).key.device
    if options.graph and found != "cuda":
        raise ConfigError(f"bench: --graph replays CUDA graphs and wants a group on cuda, found {found}: add --device cuda")
    machine = describe(plane, formed.values(), options.argv)
    rows = measure(
        plane,
        formed,
        todo,
        pin=options.pin,
        rounds=options.rounds,
        graph=options.graph,
        progress=progress,
        left_out=without.append,
    )
    if plane.rank == 0 and options.plot is not None and rows:
        plot(rows, options.plot)
    text = "\n".join([table(rows), *(f"left out: {line}" for line in without)])
    return machine | ({"left_out": without} if options.graph or without else {}), rows, text


def _formed(
    options: argparse.Namespace, plane: Plane, purpose: str, left_out: Callable[[str], None] = lambda _text: None
) -> dict[str, Communicator]:
    """The candidates of a run, on the device asked for, which is made the current one: this process is the user. Collective."""
    import torch

    if options.device == "cuda":
        without = [r for r, there in enumerate(plane.gather(torch.cuda.is_available(), what="bench device")) if not there]
        if without:
            raise ConfigError(f"bench: --device cuda wants a GPU that torch sees on each rank, found none on ranks {without}")
    formed = form(plane, options.backends, purpose, options.device, options.groups, left_out)
    if _any(formed).key.device == "cuda":
        torch.cuda.set_device(_any(formed).device)
    return formed


def _any(formed: dict[str, Communicator]) -> Communicator:
    """One of them, for what they have in common."""
    return next(iter(formed.values()))


def _overhead(options: argparse.Namespace, plane: Plane, planes: ExitStack, progress: Progress) -> Answer:
    """The layers of one call, with the flight recorder as it is set and, where it is on, without. Collective over all ranks."""
    todo = steps(
        plane,
        collectives=[Collective.ALL_REDUCE],
        op="sum",
        dtypes=options.dtypes or ["float32"],
        sizes=options.sizes or [_OVERHEAD_SIZE],
        hidden=1,
    )
    both = {False: plane}
    if any(plane.gather(plane.config.flight_records, what="setting flight_records")):  # each rank may have its own
        both = {True: plane, False: planes.enter_context(init(config={"flight_records": 0, "tuning": "off"}))}
    subjects = []
    for recorded, p in both.items():
        formed = _formed(options, p, "overhead")
        subjects += [Subject(name, comm, recorded) for name, comm in formed.items()]
        subjects.append(Subject(NULL, form_null(p, options.device), recorded))
    communicators = [s.communicator for s in subjects]
    machine = describe(plane, [s.communicator for s in subjects if s.backend != NULL], options.argv)
    pin = options.pin or ("on" if True in pinnings(plane, communicators, None) else "off")
    rows = []
    for step in todo:
        rows += measure_overhead(
            plane, subjects, step, pin=pinnings(plane, communicators, pin), rounds=options.rounds, progress=progress
        )
    return machine, rows, overhead_table(rows)
