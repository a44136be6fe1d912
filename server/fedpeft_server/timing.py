"""Every duration of the server's processes that a test or an operator may want shorter, in one value; users need none.

The parts are given it; only the programs' own modules name `TIMING`.

Durations that clients count on as well are part of the protocol: `fedpeft.rpc.timing`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations in seconds, and two factors by which a client is measured against itself.

    A client of ours says every 10 s how far it is, so that either kind of hanging is shown within a minute of its
    beginning.

    Attributes:
        silent_s: A client that is awaited makes a call, or moves a transfer, at least so often; else it hangs.
        stalled_s: Its step moves at least so often, unless its steps take longer.
        steps_missed: So many times as long as a step takes it, if that is more than `stalled_s`.
        slow_factor: A round that takes so many times as long as usual is slow,
        slow_least_s: if it is at least so much longer.
        progress_check_s: Between two looks at all awaited clients.
        session_alive_s: An instance holds its client id for so long after its last call.
        session_silent_s: A registered client counts as silent after so long without a call. It says how far it is
            every few seconds while it trains, and asks again at once when a poll, held 600 s at most, was answered.
        session_gone_s: A client that has not called for so long was switched off, and is nobody's alarm any more.
        clients_count_s: Between two counts of the registered clients by how long they have not called.
        lobby_linger_s: A client whose poll was just answered still counts as waiting for so long: it asks again.
        matching_check_s: Between two looks at the lobby without a reason: clients that lingered may have gone.
        waiting_look_s: A round that is not open after so long gets a deadline.
        watch_gather_s: Changes of a run that come within this time are told its watchers as one.
        transfer_turn_s: A transfer is served for so long before it gives way to others that wait.
        transfer_linger_s: A client that was told to ask again keeps its place in the queue for so long.
        call_wait_s: A call that comes too fast waits for so long at most; one that would wait longer is refused.
        refusal_delay_s: A refusal is held back for so long, so that who repeats it at once does so seldom.
        refusal_quiet_s: The same refusal of the same caller is logged and audited once in so long; others are counted.
        deadline_retry_s: Pause before a deadline's transition that could not be written is tried again.
        fold_retry_s: Pause before a fold that the database did not allow is tried again.
        base_version_look_s: Between two looks whether another server has made the version that an update waits for,
            which counts in the one after it.
        store_answer_s: An object store has so long, at the start, to say which adapter versions it has.
        traffic_write_s: Between two writes of traffic and presence to the database.
        payload_write_delay_s: Delay of writing traffic after a payload moved; more may move, and is written with it.
        traffic_others_s: Bytes that a download had brought before it went on here are left for so long to the daemon
            that sent them, which as a rule has written them by then.
        database_busy_s: A transaction waits for so long at most while another program holds a lock on the database, and
            for a connection to it,
        database_retry_s: and is tried again after this pause.
        database_lost_s: Longer than any statement of the server takes. After so long PostgreSQL cancels one and ends a
            transaction that only reads in which nothing happens, and a peer that does not answer is given up.
        database_idle_s: It ends a transaction that writes in which nothing happens so soon: a daemon that stands still
            is not to hold up the others.
        daemon_alive_s: Between two words of a daemon to the others on its database that it is there.
        daemon_gone_s: A daemon that was not heard for so long is gone, and nobody waits with it any more.
        follow_run_s: One takes up what another has made of a run for so long before it goes on with the next; a run
            whose commands, or fold, wait for an object store goes on by itself.
        notices_gather_s: News for the other daemons that comes within this time is told as one.
        daemons_object_s: A daemon folds nothing for so long after it told the others where it keeps files: they
            answer within `notices_gather_s`, as a rule.
        setup_retry_s: Pause before a daemon looks again what its places are.
        listen_retry_s: Pause before a daemon listens to the others again.
        lease_s: A daemon that folds the rounds of a run has the right to it for so long after it prolonged that last,
        lease_look_s: and another that would fold it looks again after this pause.
        revisions_check_s: Between two looks at the revisions of the runs that go on: a notice may be lost.
        database_check_s: Between two checks whether the database can be used, for health.
        certificate_check_s: Between two looks at the age of the server's certificate.
        certificate_files_check_s: Between two looks at its files: a command that replaced one is followed by others.
        storage_measure_s: Between two measurements of the stored bytes.
        file_trusted_s: A stored file that was verified, and looks the same, is not read again for so long.
        removal_delay_s: Files of versions that the retention removes stay for so long, for whoever was told of them.
        files_retry_s: Between two attempts to remove the files that could not be removed.
        certificate_tick_s: The second that TLS holds a certificate against is behind by so much at most, for the system
            moves it on at its ticks: a device that is let in again gets its certificate so much later.
        tokens_kept_s: An enrolment token is listed for so long after it expired; the audit log keeps it for ever.
        tokens_purge_s: Between two removals of those.
        enrolment_retry_s: Pause after a failure to keep a process for enrolment.
        enrolment_first_pause_s: Pause before that process is started again; doubled each time,
        enrolment_longest_pause_s: up to this, and short again after a life of `enrolment_well_s`.
        enrolment_well_s: A process that lived for so long was well.
        enrolment_leave_s: It ends in this time when it is asked to, else it is killed.
        enrolment_idle_s: It ends after so long without a connection; the next one starts another.
        enrolment_report_s: Between two reports of the connections that it refused.
        enrolment_call_s: It waits for so long at most for the message of a caller, or for the daemon's answer.
        enrolment_accept_retry_s: Pause when no connection can be taken, for want of open files for example.
    """

    silent_s: float = 45.0
    stalled_s: float = 45.0
    steps_missed: float = 2.0
    slow_factor: float = 2.0
    slow_least_s: float = 10.0
    progress_check_s: float = 2.0
    session_alive_s: float = 30.0
    session_silent_s: float = 120.0
    session_gone_s: float = 86_400.0
    clients_count_s: float = 30.0
    lobby_linger_s: float = 2.0
    matching_check_s: float = 1.0
    waiting_look_s: float = 60.0
    watch_gather_s: float = 0.1
    transfer_turn_s: float = 10.0
    transfer_linger_s: float = 5.0
    call_wait_s: float = 5.0
    refusal_delay_s: float = 1.0
    refusal_quiet_s: float = 60.0
    deadline_retry_s: float = 5.0
    fold_retry_s: float = 5.0
    base_version_look_s: float = 1.0
    store_answer_s: float = 10.0
    traffic_write_s: float = 5.0
    payload_write_delay_s: float = 0.5
    traffic_others_s: float = 10.0
    database_busy_s: float = 10.0
    database_retry_s: float = 0.05
    database_lost_s: float = 60.0
    database_idle_s: float = 4.0
    daemon_alive_s: float = 1.0
    daemon_gone_s: float = 4.0
    follow_run_s: float = 1.0
    notices_gather_s: float = 0.03
    daemons_object_s: float = 0.5
    setup_retry_s: float = 5.0
    listen_retry_s: float = 0.5
    lease_s: float = 4.0
    lease_look_s: float = 0.3
    revisions_check_s: float = 10.0
    database_check_s: float = 5.0
    certificate_check_s: float = 60.0
    certificate_files_check_s: float = 1.0
    storage_measure_s: float = 60.0
    file_trusted_s: float = 600.0
    removal_delay_s: float = 60.0
    files_retry_s: float = 60.0
    certificate_tick_s: float = 0.02
    tokens_kept_s: float = 30 * 86_400.0
    tokens_purge_s: float = 86_400.0
    enrolment_retry_s: float = 5.0
    enrolment_first_pause_s: float = 0.5
    enrolment_longest_pause_s: float = 30.0
    enrolment_well_s: float = 60.0
    enrolment_leave_s: float = 5.0
    enrolment_idle_s: float = 600.0
    enrolment_report_s: float = 5.0
    enrolment_call_s: float = 30.0
    enrolment_accept_retry_s: float = 0.1


TIMING = Timing()
"""The server's own."""
