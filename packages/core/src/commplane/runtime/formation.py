"""From a list of ranks to a plan and open backends: agree, build, canary, commit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from commplane.agree import StoreBootstrap, build_backend, close_backend, joint_verdict, own_options, probe_all, setback
from commplane.api import BackendSpec, BuildContext, CommBackend, Deadline, Facts, GroupKey, ProbeRequest
from commplane.config import Config
from commplane.errors import AgreementError, CommplaneWarning, SelectionError
from commplane.plugins import PluginHost
from commplane.runtime.follow import follow
from commplane.runtime.inner import Formed, InnerMaker
from commplane.runtime.tuning import Tuning
from commplane.select import LAST_RESORT, Candidate, Draft, Offer, Plan, choose, disagreement, said

__all__ = ["Formation"]

# Of the time to open a backend, what one step of forming an inner group of it may take.
_INNER_SHARE = 0.3


class Formation:
    """One attempt to form one communicator. Every method that communicates is collective over the group.

    Args:
        plugins: the loaded plugins.
        config: the resolved settings.
        facts: of all ranks.
        key: the group.
        device: of this process for this group.
        request: what the caller asked for, compared with the other ranks' as JSON: ``backends`` by name, in the order of
            preference, empty for the order of priority; and ``options``, where `config` has been changed for this communicator.
        bootstrap: control plane of the communicator.
        who: how errors of this rank begin.
        tuning: the file of timings that the setting names, if it names one.
    """

    def __init__(
        self,
        plugins: PluginHost,
        config: Config,
        facts: Facts,
        key: GroupKey,
        device: str,
        request: Mapping[str, Any],
        bootstrap: StoreBootstrap,
        who: str,
        tuning: Tuning | None = None,
    ) -> None:
        self._plugins = plugins
        self._config = config
        self._facts = facts
        self._key = key
        self._device = device
        self._request = dict(request)
        self._bootstrap = bootstrap
        self._who = who
        self._tuning = tuning

    def run(self) -> tuple[Plan, dict[str, CommBackend], list[StoreBootstrap]]:
        """The plan, the open backends by name, and the control plane of each, in the order of the plan."""
        return self._build(self.agree())

    def agree(self) -> Draft:
        """Probe, publish, choose: the backends to build, in order, the same on every rank. Collective."""
        request = ProbeRequest(self._key, self._bootstrap.rank, {})
        verdicts = probe_all(
            self._plugins.backends(self._key.device),
            request,
            self._config.options,
            self._facts,
            self._config.startup,
            self._bootstrap.clock,
        )
        mine = {
            # Name, ranks and device are in the keys of this control plane: with another list a rank would not meet us here.
            "request": self._request,
            "backends": verdicts,
            "policy": self._plugins.has_policy,
        }
        # A probe may take its whole deadline on one rank.
        submissions = self._bootstrap.gather(mine, what="agreement", timeout=2 * self._config.startup)
        draft = choose(self._key, submissions)
        if not any(said["policy"] for said, _ in submissions.groups):
            return draft
        answer, problem = None, None
        try:
            answer = self._plugins.select_backend(request, draft.order)
            answer = None if answer is None else list(answer)
        except Exception as error:  # a site's policy that fails is a vote of the whole group
            problem = setback(error)
        reasons = joint_verdict(self._bootstrap, "commplane_select_backend", problem, self._config.startup, repr(answer))
        if reasons is not None:
            raise SelectionError(f"[{self._key.purpose}] commplane_select_backend failed: {reasons}")
        if answer is None:
            return draft
        kept = [n for n in dict.fromkeys(answer) if n in draft.order and n != LAST_RESORT]
        dropped = [
            Candidate(n, submissions[0]["backends"][n]["dist"], "policy", "left out by commplane_select_backend")
            for n in draft.order
            if n not in kept and n != LAST_RESORT
        ]
        last = [n for n in draft.order if n == LAST_RESORT]
        return Draft((*kept, *last), (*draft.refused, *dropped), draft.facts, given=True)

    def _build(self, draft: Draft) -> tuple[Plan, dict[str, CommBackend], list[StoreBootstrap]]:
        """Open what was chosen, each on all ranks or on none. Collective."""
        from commplane.agree.canary import check, verify_overrides

        registered = self._plugins.backends(self._key.device)
        digest = repr((draft.order, draft.refused))
        outcomes: list[Candidate] = []
        built: dict[str, CommBackend] = {}
        attempts: list[StoreBootstrap] = []
        offers: list[Offer] = []
        served: list[BackendSpec] = []
        try:
            for name in draft.order:
                entry = registered[name]
                spec = entry.spec
                assert isinstance(spec, BackendSpec)
                seconds = self._config.startup
                # Shorter than the attempt, so that a rank that waits in vain for one that stalls can still say for whom.
                attempt = self._bootstrap.child(f"build/{name}", who=f"{self._who[:-1]} {name}]", timeout=0.75 * seconds)
                context = BuildContext(
                    backend=name,
                    key=self._key,
                    rank=self._bootstrap.rank,
                    device=self._device,
                    bootstrap=attempt,
                    facts=self._facts,
                    deadline=Deadline(seconds, self._bootstrap.clock.now),
                    timeout=self._config.run,
                    options=own_options(spec, self._config.options),
                    inner=InnerMaker(
                        self._key, self._device, self._key.ranks[self._bootstrap.rank], attempt, self._facts, self._form_inner
                    ),
                )

                def make(spec: BackendSpec = spec, context: BuildContext = context) -> CommBackend:
                    backend = self._plugins.build_communicator(spec, context)
                    verify_overrides(spec, backend)
                    return backend

                dist = f"{entry.dist or entry.plugin} {entry.version}"
                result = build_backend(spec, dist, make, context, attempt, self._bootstrap, digest, check)
                outcomes.append(replace(result.candidate, facts=draft.facts[name]))
                if result.backend is not None:
                    built[name] = result.backend
                    attempts.append(attempt)
                    served.append(result.spec)
                    offers.extend(result.offers)
            refused = tuple(sorted(draft.refused, key=lambda c: c.name))
            plan = Plan.of(self._key, (*outcomes, *refused), served, self._config.numerics, offers)
            auto = self._config.tuning == "auto" and not draft.given  # an order that was given is kept
            plan = follow(plan, self._tuning, self._facts, self._device, self._config.options, self._bootstrap, auto=auto)
            self._warn_of_refusals(plan)
            digests = self._bootstrap.gather(plan.digest, what="commit").groups
            text = disagreement("the plan", [(digest, [self._key.ranks[i] for i in at]) for digest, at in digests])
            if text is not None:
                raise AgreementError(f"[{self._key.purpose}] {self._difference(offers) or text}")
            if not built:
                reasons = "; ".join(f"{c.name} ({c.state}): {c.reason}" for c in plan.candidates)
                raise SelectionError(
                    f"[{self._key.purpose}] no backend is left for {self._key}: {reasons or 'none is installed'}"
                )
        except BaseException:
            for name, backend in built.items():
                close_backend(name, backend, self._device)
            raise
        return plan, built, attempts

    def _form_inner(self, key: GroupKey, bootstrap: StoreBootstrap, backends: Sequence[str]) -> Formed:
        """Form a communicator of a part of the group, for a backend that is being opened. Collective over the part."""
        # Whatever fails in there is to be known before the opening backend's own time is over.
        startup = _INNER_SHARE * self._config.startup
        config = replace(self._config, startup_timeout=startup, run_timeout=self._config.run, numerics="any")
        who = f"[{key.purpose} rank {bootstrap.rank}/{len(key.ranks)}]"
        request = {"backends": list(backends)}
        return Formation(self._plugins, config, self._facts, key, self._device, request, bootstrap, who).run()

    def _difference(self, offers: Sequence[Offer]) -> str | None:
        """How the answers of the ranks' backends differ that were asked for sizes, or None. Collective, once the plans differ."""
        answers = self._bootstrap.gather(said(offers), what="commit, what differs").groups
        ranks = self._key.ranks
        text = disagreement("the sizes that a backend offers", [(answer, [ranks[i] for i in at]) for answer, at in answers])
        return text and f"{text}; CommBackend.ranges must answer alike on every rank"

    def _warn_of_refusals(self, plan: Plan) -> None:
        """One warning for each backend that was asked for by name and refused, on the group's first rank only.

        Before the commit: where warnings are errors, no rank gets the communicator.
        """
        if self._bootstrap.rank != 0:
            return
        for c in plan.candidates:
            if not c.ready and c.name in self._request["backends"]:
                hosts = self._facts.describe_hosts(plan.key.ranks)
                warnings.warn(
                    f"backend {c.name!r} was asked for but communicator {plan.key} ({hosts}) runs on "
                    f"{', '.join(plan.backends)}: {c.state}: {c.reason}",
                    CommplaneWarning,
                    stacklevel=5,
                )
