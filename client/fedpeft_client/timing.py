"""Every duration of the client, in one value: tests replace it, users need to know none."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.rpc.timing import HOLD_S, STALL_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations, in seconds.

    Attributes:
        call_s: An ordinary call is answered in this time.
        hold_s: The server may hold the answer to AwaitRound back for so long.
        stall_s: A transfer, or the worker, without progress for so long stands still.
        first_answer_s: With `--dry-run`, whose caller waits for it: an absent server is given up after this time.
        away_s: With `--once`: the client gives up when the server has been away for this time. In any case: a worker
            that made a step and then gave no word for so long is killed.
        permanent_s: With `--once`: likewise, where somebody must mend the cause: an untrusted authority, a wrong port.
        first_fault_pause_s: Pause before a call is repeated at which the server failed; doubled each time. Some ten
            seconds in all, as a proxy before a restarted server says the same.
        quick_s: An answer that took less came at once.
        first_pause_s: Pause before an absent server is called again; it grows.
        longest_pause_s: The longest of these pauses.
        explain_every_s: The cause of a missing connection is looked for no more often.
        ticket_check_s: Between two questions whether a ticket is still good, while training.
        ticket_check_again_s: Likewise, where the server gave no word on it.
        finished_check_s: Between two looks for runs that are over.
        limits_check_s: Between two looks at the owner's limits, while they hold work up.
        load_s: Likewise, a worker that has made no step: it may be loading data or a model, or scoring a batch.
        worker_leave_s: The worker ends in this time when it is asked to, else it is killed.
        report_s: The log says how far a training is so often.
        relay_report_s: A relay says so often how far the edge's round is, and asks the edge's server as often.
        relay_away_s: A relay whose edge's server has been away for this time gives the ticket back.
        relay_look_s: A relay waits so long for that server where nothing depends on its answer.
        contact_s: The time of the server's last answer is noted no more often.
        first_hold_s: A run that fails is left out for so long, at first; then twice as long, and so on.
        longest_hold_s: The longest that it is left out.
        renewal_check_s: Between two looks at the certificate's age.
        renewal_first_pause_s: Pause before a renewal that failed is tried again; doubled each time.
        renewal_longest_pause_s: The longest of these pauses.
    """

    call_s: float = 30.0
    hold_s: float = HOLD_S
    stall_s: float = STALL_S
    first_answer_s: float = 5.0
    away_s: float = 10 * STALL_S
    permanent_s: float = 10.0
    first_fault_pause_s: float = 0.5
    quick_s: float = 1.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0
    explain_every_s: float = 60.0
    ticket_check_s: float = 10.0
    ticket_check_again_s: float = 3.0
    finished_check_s: float = 3600.0
    limits_check_s: float = 5.0
    load_s: float = 3600.0
    worker_leave_s: float = 5.0
    report_s: float = 10.0
    relay_report_s: float = 2.0
    relay_away_s: float = 300.0
    relay_look_s: float = 5.0
    contact_s: float = 5.0
    first_hold_s: float = 60.0
    longest_hold_s: float = 3600.0
    renewal_check_s: float = 30.0
    renewal_first_pause_s: float = 5.0
    renewal_longest_pause_s: float = 600.0

    @property
    def await_s(self) -> float:
        """AwaitRound is answered in this time."""
        return self.call_s + self.hold_s


TIMING = Timing()
"""The client's own."""
