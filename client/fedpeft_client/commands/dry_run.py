"""`--dry-run`: checks everything that a round needs, says in a few lines what would happen, and leaves no trace."""

from __future__ import annotations

from itertools import count

from fedpeft.data.sources.interface import DEEP_BITS, too_many_unreadable
from fedpeft.data.sources.inventory import Inventory
from fedpeft.errors import ClientMoved, DataInvalid, Internal
from fedpeft.formatting import counted
from fedpeft.process.logs import Log
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.agent import registration
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.limits import Forbidden
from fedpeft_client.settings import Settings
from fedpeft_client.state.processes import Processes
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.wire_checks import check_run, said
from fedpeft_client.worker.handle import Answer, WorkerProcess
from fedpeft_client.worker.reporter import Reporter
from fedpeft_client.worker.verdicts import Report, Verdict, Verdicts

_NAMED = 20
"""Unreadable images that are named; there may be a million."""
_NOT_LOADED: Answer = {"torch": "not loaded", "methods": (), "device": "", "rows": 0}
"""Facts about this side that are known before torch and the data are loaded."""

MOST_PAGES = 1000
"""Pages of runs that are read; a page holds hundreds."""


async def dry_run(
    settings: Settings,
    channel: Channel,
    worker: WorkerProcess,
    egress_log: EgressLog,
    processes: Processes,
    against: Forbidden | None,
    log: Log,
) -> None:
    """Opens every image, judges every run, prints what was found on stdout; trains nothing, registers nothing.

    Args:
        settings: The client's settings.
        channel: The server.
        worker: The process that computes.
        egress_log: The log of all that leaves the device.
        processes: The client's processes of before.
        against: Reason for which the policy allows no work now; empty if it does.
        log: Log for progress.

    Raises:
        DataInvalid: If there is no run and too many images cannot be read.
        FedpeftError: If no run suits, after everything was checked and printed; the reasons are in it.
    """

    async def asked(hello: Answer, page_token: str = "") -> pb.RegisterResponse:
        request = registration(settings, hello)
        request.page_token = page_token
        request.earlier_processes.extend(processes.earlier())
        try:
            with egress_log.record(message_entries.registration(request)):
                retry = Retry(log, channel.timing.first_answer_s, channel.timing)
                return await retry.call(lambda: channel.register(request))
        except ClientMoved as error:
            raise processes.moved(error) from None

    await asked(_NOT_LOADED)  # one that is not let in need not wait for torch to hear it
    hello = await worker.start()
    response = await asked(hello)
    _line("server", settings.server)
    _line("device", f"{hello['device']}, {counted(hello['threads'], 'thread')}, torch {hello['torch']}")
    classes = counted(len(hello["labels"]), "class", "classes")
    _line("data", f"{settings.data}: {hello['rows']:,} {hello['rows_are']} of {classes}")
    for line in Inventory.of_dict(hello["inventory"]).lines():
        _line("", line)
    if against is not None:
        _line("now", f"no work: {against.text}; next possible after {against.until:%Y-%m-%d %H:%M}")
    surveyed = await worker.ask({"op": "survey"}, Reporter(log, "opening images", worker.timing))
    _say_readable(surveyed, hello["rows_are"])
    verdicts = Verdicts(worker, log)
    there_are_runs = bool(response.runs)
    for page in count(1):
        for run in response.runs:
            check_run(run)
            print(f"\n{run.id} ({said(run.config.name)})")
            _describe(await verdicts.judge(run), settings.rank, evaluates=settings.evaluate)
        if not response.next_page_token:
            break
        if page == MOST_PAGES:
            raise Internal(f"the server's list of runs does not end within {MOST_PAGES} pages")
        response = await asked(hello, response.next_page_token)
    if misfit := verdicts.nothing_suits():
        raise misfit
    if not there_are_runs:
        _line("runs", "there is none to work for; the client would wait for one")
        _refuse_unreadable(surveyed)


def _say_readable(surveyed: Answer, rows_are: str) -> None:
    if (surveyed["bits"] or DEEP_BITS) < DEEP_BITS:
        _line("bits", f"{surveyed['bits']} of the {DEEP_BITS} bits of a channel are used; images are scaled by these")
    bad, named = surveyed["unreadable"], surveyed["named"][:_NAMED]
    if not bad:
        _line(rows_are, f"all {surveyed['images']:,} can be read")
        return
    _line("images", f"{bad:,} of {surveyed['images']:,} cannot be read:")
    for name, why in named:
        _line("", f"{name}: {why}")
    if bad > len(named):
        _line("", f"and {bad - len(named):,} more")


def _refuse_unreadable(surveyed: Answer) -> None:
    if fault := too_many_unreadable(surveyed["unreadable"], surveyed["images"]):
        raise DataInvalid(fault)


def _describe(verdict: Verdict, rank: int | None, *, evaluates: bool) -> None:
    if verdict.run is None or verdict.reasons:
        _line("would", "decline it: " + ", ".join(dict.fromkeys(reason.kind for reason in verdict.reasons)))
        return
    run, report = verdict.run, verdict.report
    _say_fit(run, report)
    if evaluates:
        _line("would", "score every committed version on these examples")
        return
    if rank is not None and run.rank is not None:
        _line("rank", _of_rank(run, run.rank, rank))
    low, high = run.upload_bounds(run.version + 1, rank)
    size = f"{high:,} bytes" if low == high else f"at most {high:,} bytes"
    _line("would", f"train in each round it is sampled for, and send {size} ({run.config.codec.encoding})")


def _of_rank(run: KnownRun, theirs: int, own: int) -> str:
    if why := run.ignores_rank(own):
        return f"{theirs}, the run's: {why}, so --rank {own} has no effect"
    return f"{own} of the run's {theirs}" if own < theirs else f"{theirs}, the run's"


def _say_fit(run: KnownRun, report: Report) -> None:
    tuned, whole = run.spec.parameters, report["model_parameters"]
    _line("model", f"{run.config.model.name}, backbone {run.fingerprint[:16]} as the run's")
    _line("method", f"{run.spec.method}: {tuned:,} of {whole:,} parameters")
    _line("examples", f"{report['examples']:,}: " + _counts(report["classes"]))
    if report["dropped"]:
        _line("dropped", f"{counted(report['dropped'], 'image')} that the label map leaves out")


def _counts(classes: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(classes.items())[:20]]
    more = len(classes) - len(shown)
    return ", ".join(shown) + (f" and {more} more classes" if more else "")


def _line(key: str, text: str) -> None:
    print(f"{key:>10}  {text}")
