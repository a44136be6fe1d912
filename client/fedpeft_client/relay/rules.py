"""Eligibility of a run at a relay, and the run that the edge's server holds for it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.config import RoundsConfig, RunConfig
from fedpeft.errors import ConfigInvalid, RefusedByPolicy
from fedpeft.rounds.combinations import misfits
from fedpeft.rounds.policies import policy_of
from fedpeft_client.eligibility.policy_rules import RunDemand, broken
from fedpeft_client.eligibility.rules import Reason
from fedpeft_client.owner.policy import Policy
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.state.runs import KnownRun

POLICY = "relayed"
"""The policy of rounds whose versions come from a parent's server."""


def edge_config(config: RunConfig, options: RelayOptions) -> RunConfig:
    """Returns the run that the edge's server holds for a run of the parent's.

    It is the parent's run with rounds of its own: their number and seed are the parent's, so that clients train as
    they would there, as are its patience with a round that misses its deadline and with clients that do not come.
    """
    above = config.rounds
    rounds = RoundsConfig(
        count=above.count,
        clients=options.clients,
        quorum=options.quorum,
        deadline_s=options.deadline_of(above.deadline_s),
        max_extensions=above.max_extensions,
        wait_s=above.wait_s,
        seed=above.seed,
        policy=POLICY,
    )
    return config.model_copy(update={"rounds": rounds, "simulation": None})


def reasons_against(run: KnownRun, options: RelayOptions, policy: Policy) -> tuple[Reason, ...]:
    """Returns every reason why a relay does not work for a run; none if it does."""
    return (*_policy(run, policy), *(Reason.of(ConfigInvalid(fault)) for fault in _faults(run, options)))


def _policy(run: KnownRun, policy: Policy) -> Iterator[Reason]:
    """Asks the owner's policy; what is asked of a relay is asked of its clients. It loads no weights itself."""
    for each in broken(policy, RunDemand(run, run.config.training, weights="file")):
        yield Reason.of(RefusedByPolicy(each.local_text), each.public_text)


def _faults(run: KnownRun, options: RelayOptions) -> Iterator[str]:
    """Yields what of a run does not go with sums of several updates."""
    config, found = run.config, False
    for fault in _of_sums(run):
        found = True
        yield fault
    if not found:
        edge = edge_config(config, options)
        yield from (f"the edge could not hold the run: {field} {text}" for field, text in misfits(edge, run.spec))


def _of_sums(run: KnownRun) -> Iterator[str]:
    config = run.config
    sends = "a relay sends sums of several updates"
    if not config.aggregation.exact_sum:
        yield f"{sends}, and the run takes none: it needs exact_sum = true in [aggregation]"
    if not policy_of(config.rounds).one_version:
        name = config.rounds.policy_name
        yield f"{sends} that start from one version, and in {name} rounds each update may start from another"
    if run.spec.sections:
        yield f"{sends} of adapters alone, and the run has section {run.spec.sections[0].name!r} beside them"
    if config.privacy is not None and config.privacy.mechanism == "central":
        yield f'{sends}, and privacy.mechanism "central" hides a client in a sum of updates that are bounded each'
