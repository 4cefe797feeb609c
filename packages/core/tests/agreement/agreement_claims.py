"""What must hold after every case, whatever went wrong in it. `judge` raises `AssertionError` with the first claim that does not.

Who is *lost*: a rank that died, was interrupted, or was cut off from the store. Semantics S45 and S59 promise nothing about what
such a rank gets out of the step in which that happened; the others still owe each other one outcome.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from agreement_ranks import RUN_S, Case, Record
from agreement_scenario import STARTUP_S, Fault

from commplane import errors

# Virtual time is added up in floating point, and a probe is given 10 ms where nothing is left of the deadline of all.
SLACK_S = 0.05

# S43: "within about a second". Ranks look twice a second, with pauses of up to a quarter between.
SOON_S = 1.5

# S28: what a wait of the control plane may last. The first pattern that matches the name of the round counts.
T = STARTUP_S
LIMITS: list[tuple[str, float]] = [
    (r"agreement", 2 * T),
    (r"vote on (build|canary) of \w+", 2 * T + 1),
    (r"vote on (prepare|empty|capture|registration after capture)", 2 * T),
    (r"farewell", 2 * T),
    (r".*", T),
]

# S32, S44: who caused it raises its own error, the others hear of it in an AgreementError.
OWN = {"ConfigError", "PluginNotFound", "CommplaneWarning"}


def class_of(error: BaseException | None) -> str:
    """The documented class: the first one that `commplane.errors` exports."""
    if error is None:
        return "none"
    return next((c.__name__ for c in type(error).__mro__ if c.__name__ in errors.__all__), type(error).__name__)


def judge(case: Case) -> None:
    """Raise `AssertionError` if a claim does not hold."""
    assert not case.stuck, f"somebody waits for ever: {case.stuck}"
    _nobody_waits_too_long(case)
    _every_call_ends_in_time(case)
    judge_untimed(case)
    _nobody_is_given_up_too_early(case)
    _hopeless_waits_end_soon(case)


def judge_untimed(case: Case) -> None:
    """The claims that hold however long things take: those for real processes."""
    assert not case.simulation.failures, f"an exception that nobody foresaw: {case.simulation.failures}"
    for name in dict.fromkeys(r.step for log in case.logs.values() for r in log):
        if not name.startswith(("leave", "capture")):
            _one_outcome(case, name)
    _captures_agree(case)
    _lost_ranks_only_raise(case)
    _everything_is_released(case)
    _everybody_can_explain(case)


def _hopeless_waits_end_soon(case: Case) -> None:
    """S43: for a rank that has ended, and for each other in different communicators, nobody waits much longer than a second."""
    if len(case.scenario.faults) != 1 or not case.fired:
        return
    fault, step = next(iter(case.fired.items()))
    if fault.how == "swapped":
        for record in (r for log in case.logs.values() for r in log if r.step.startswith("create") and r.ended is not None):
            took = record.ended - record.began if record.ended else 0.0
            assert took <= SOON_S, f"ranks that wait for each other raised after {took:g} s only, in {record.step}"
    if fault.how == "die" and step != "init" and not step.startswith("leave"):
        for wait in case.waits:
            if fault.rank in wait.members and wait.rank != fault.rank and wait.ended > case.died[fault.rank]:
                took = wait.ended - max(wait.began, case.died[fault.rank])
                assert took <= SOON_S, f"rank {wait.rank} waited {took:g} s in {wait.what!r} for a rank that had ended"


def lost(case: Case) -> set[int]:
    return case.simulation.dead | case.interrupted | case.cut_off


def _delays(case: Case) -> float:
    """What the store itself was late, which S28 counts apart: each call to it has a deadline of its own."""
    return sum(min(f.seconds, T) for f in case.scenario.faults if f.how == "silence")


def _nobody_waits_too_long(case: Case) -> None:
    for wait in case.waits:
        if wait.rank in case.simulation.dead:
            continue
        limit = 0.75 * T if re.search(r"/\d+ [abc]\]$", wait.who) else next(s for p, s in LIMITS if re.fullmatch(p, wait.what))
        took = wait.ended - wait.began
        assert took <= limit + _delays(case) + 1e-6, (
            f"rank {wait.rank} waited {took:.6f} s in {wait.what!r}, S28 allows {limit:g} s"
        )


def _own_lateness(case: Case, rank: int) -> float:
    """What a rank's own plugins keep it from returning, in steps that are not bounded for it."""
    phases = ("select", "prepare", "empty", "registration")
    return sum(f.seconds for f in case.fired if f.rank == rank and f.how == "late" and f.phase in phases)


def _every_call_ends_in_time(case: Case) -> None:
    each = T + 2 * T + 1
    limits = {
        "init": 4 * T,
        "create": T + 2 * T + T + case.scenario.backends * 2 * each + T,
        "prepare": T + 0.75 * T + 2 * T,
        "empty": T + 2 * T,
        "use": RUN_S,
        "capture": len(case.scenario.groups) * (RUN_S + 2 * T + 0.75 * 3 * T + 2 * T),
        "close": T,
        "leave": len(case.scenario.groups) * T + 2 * T,
        "leave by exception": 0.0,
    }
    for rank, log in case.logs.items():
        for record in log:
            if record.ended is None:
                continue
            name = record.step if record.step.startswith("leave") else record.step.split()[0]
            limit = limits[name] + _own_lateness(case, rank) + _delays(case) + SLACK_S
            took = record.ended - record.began
            assert took <= limit, f"rank {rank} spent {took:g} s in {record.step}, at most {limit:g} s are allowed"


def _of(case: Case, name: str) -> dict[int, Record]:
    return {rank: record for rank, log in case.logs.items() for record in log if record.step == name}


def _one_outcome(case: Case, name: str) -> None:
    there = {rank: r for rank, r in _of(case, name).items() if rank not in lost(case)}
    if not there:
        return
    members = next(iter(there.values())).members
    shown = {rank: f"{class_of(r.error)}: {r.error}" if r.error else "success" for rank, r in there.items()}
    failed = [rank for rank, r in there.items() if r.error is not None]
    assert failed in ([], list(there)), f"{name}: some ranks fail and others do not: {shown}"
    if failed:
        classes = {class_of(r.error) for r in there.values()}
        if name == "init" or name.startswith("create"):
            own = classes & OWN
            assert len(own) <= 1 or len(case.scenario.faults) > 1, f"{name}: {shown}"
            classes -= own
            if own and len(there) == len(members) > 1 and len(case.scenario.faults) == 1:
                assert classes == {"AgreementError"} or (case.real and classes == {"PeerError"}), f"{name}: {shown}"
        assert len(classes) <= 1, f"{name}: the ranks raise different errors: {shown}"
    else:
        values = [r.value for r in there.values()]
        if name.startswith("create"):
            digests = {plan.digest for plan in values}
            assert len(digests) == 1, f"{name}: the ranks have different plans"
        if name.startswith("use"):
            total = sum(range(1, len(members) + 1))
            assert all(v == [total] * 4 for v in values), f"{name}: wanted {total}, found {values}"
        if not name.startswith("close"):
            # Of a process that was killed nothing is known, also not how far it came.
            came = _of(case, name).keys() | {r for r in case.simulation.dead if not case.logs[r]}
            assert set(members) <= came | case.cut_off, f"{name}: succeeded without ranks {sorted(set(members) - came)}"
    # One that comes when the others had given up and left comes to the same rounds.
    rounds = {rank: r.rounds for rank, r in there.items() if not _delays(case)}  # a store that is silent counts later
    assert len(set(rounds.values())) <= 1, f"{name}: the ranks came to different numbers of rounds: {rounds}; {shown}"


def _captures_agree(case: Case) -> None:
    records = {rank: r for rank, r in _of(case, "capture").items() if rank not in lost(case)}
    shown = {rank: repr(r.error) for rank, r in records.items()}
    everyone = _of(case, "capture")
    odd = {f.rank for f in case.fired if f.phase == "capture" and f.how in ("more", "fewer", "other")}
    for g, members in enumerate(case.scenario.groups):
        if any(r.error is not None for r in _of(case, f"create {g}").values()):
            continue  # it does not exist, and captures nothing
        there = [r for r in members if r in records]
        hurt = [r for r in members if r in everyone and everyone[r].body is not None and r not in case.simulation.dead]
        for rank in there:
            if hurt or not set(members) <= everyone.keys() | lost(case):
                continue
            assert records[rank].body is None
        if hurt:
            held = [r for r in there if len(records) == len(case.logs)]
            assert all(records[r].error is not None for r in held), f"a body of the capture failed on ranks {hurt}: {shown}"
    for rank, record in records.items():
        if record.body is not None:
            assert record.error is record.body, f"rank {rank} raises {record.error!r} instead of its own {record.body!r}"
        elif record.error is not None:
            assert class_of(record.error) in ("CaptureError", "PeerError"), shown
    if len(case.scenario.groups) == 1:
        errors_ = {rank: r.error is not None for rank, r in records.items()}
        assert len(set(errors_.values())) <= 1, f"a capture of one group failed on some ranks only: {shown}"
        rounds = {rank: r.rounds for rank, r in records.items() if not _delays(case)}
        assert len(set(rounds.values())) <= 1, f"capture: the ranks came to different numbers of rounds: {rounds}; {shown}"
        plans = [r.value for r in _of(case, "create 0").values() if r.error is None]
        if odd & records.keys() and plans and plans[0].backends and len(case.scenario.faults) == 1 and case.scenario.ranks > 1:
            assert all(errors_.values()), f"ranks captured different operations and nobody noticed: {shown}"


def _lost_ranks_only_raise(case: Case) -> None:
    for rank in case.cut_off - case.simulation.dead - case.interrupted:
        for record in case.logs[rank]:
            if record.error is not None and len(case.scenario.faults) == 1:
                ok = ("PeerError", "AgreementError", "SelectionError", "CaptureError", "CommunicatorError")
                assert class_of(record.error) in ok, f"rank {rank} is cut off, and {record.step} raises {record.error!r}"


def _everything_is_released(case: Case) -> None:
    for rank, backend in case.built:
        if rank not in case.simulation.dead:
            assert backend.closes == 1, f"backend {backend.name} of rank {rank} was closed {backend.closes} times"
    for rank, workspace in case.workspaces:
        if rank not in case.simulation.dead:
            assert workspace.closes == 1, f"a workspace of rank {rank} was closed {workspace.closes} times"


def _everybody_can_explain(case: Case) -> None:
    """Where one thing went wrong, every rank that noticed names the rank, and what that rank said."""
    if len(case.scenario.faults) != 1 or not case.fired:
        return
    fault, step = next(iter(case.fired.items()))
    if fault.how in ("silence", "lost", "interrupt", "swapped") or step.startswith("leave"):
        return
    gone = lost(case)
    for rank, log in case.logs.items():
        if rank in gone or rank == fault.rank:
            continue
        for record in log:
            if fault.rank not in record.members:
                continue
            if record.error is not None:
                _names(fault, _whole_text(record.error), f"rank {rank} in {record.step}", case)
                break
            if record.step == step and record.step.startswith("create"):
                for candidate in record.value.candidates:
                    if not candidate.ready and candidate.state != "policy" and fault.phase not in ("before", "select"):
                        _names(fault, candidate.reason, f"the plan of rank {rank}", case)


def _whole_text(error: BaseException | None) -> str:
    """With the errors that it came from, as a traceback shows it."""
    return "" if error is None else f"{error}\n{_whole_text(error.__cause__)}"


def _names(fault: Fault, text: str, where: str, case: Case) -> None:
    if "none is installed" in text or (fault.how == "late" and fault.seconds < T and "waited" not in text):
        return  # something else decided: the rank was in time
    named = {int(n) for found in re.findall(r"\branks? (\d+(?:, \d+)*)", text) for n in found.split(", ")}
    if len(case.scenario.groups) > 1 and named & {r for r, log in case.logs.items() if log[-1].step == "leave by exception"}:
        return  # in another group: it names who left, and that one names who made it leave
    if case.real and "waited" in text:
        return  # on a machine this slow anybody may miss a deadline
    assert fault.rank in named, f"{where} does not name rank {fault.rank}: {text}"
    if fault.how in ("raise", "refuse") and fault.phase != "plugins":
        assert case.text_of(fault) in text, f"{where} does not give the reason of rank {fault.rank}: {text}"


def _nobody_is_given_up_too_early(case: Case) -> None:
    """Where nothing goes wrong nobody raises; a rank that is late, and comes before a deadline, is waited for."""
    if len(case.scenario.faults) > 1 or not case.scenario.backends or lost(case):
        return
    for fault in case.fired:
        # Of a running collective, or of an attempt's own rounds; with several groups, others of one may be in the next step.
        inside = fault.phase in ("registration", "capture") or len(case.scenario.groups) > 1
        building = fault.phase in ("construct", "open", "rendezvous", "canary")
        if fault.how != "late" or building or fault.seconds >= (RUN_S if inside else T):
            return
    for rank, log in case.logs.items():
        for record in log:
            assert record.error is None, f"every rank came in time, but rank {rank} raised {record.error!r}"


def shown(case: Case) -> Iterable[str]:
    """A case for people: every call of every rank."""
    for rank, log in case.logs.items():
        state = "dead" if rank in case.simulation.dead else "interrupted" if rank in case.interrupted else ""
        yield f"rank {rank} {state}"
        for r in log:
            end = "never" if r.ended is None else f"{r.ended:.4f}"
            result = class_of(r.error) + f": {r.error}" if r.error else "" if r.value is None else f"{r.value!r:.100}"
            yield f"  {r.step:20} {r.began:.4f} to {end} s, {r.rounds} rounds; {result}"
