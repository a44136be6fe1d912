"""Provocations of errors that only a daemon with certificates gives."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import update as update_rows

from fedpeft.identity import keys
from fedpeft.identity.subject import Role
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.rpc.access import MOST_CERTIFICATES
from fedpeft_server.store import tables

from .access.test_access import signed_without_an_id
from .secured import Federation


async def used_token(secured: Federation) -> object:
    token = await secured.token("a")
    await secured.enroll(token)
    return await secured.enroll(token)


async def old_token(secured: Federation) -> object:
    token = await secured.token("a")
    with secured.server.store.db.transactions.begin() as connection:
        connection.execute(update_rows(tables.tokens).values(expires_at=1.0))
    return await secured.enroll(token)


async def unknown_token(secured: Federation) -> object:
    token = await secured.token("a")
    return await secured.enroll(replace(token, secret=bytes(32)))


async def evaluator_of_a_clients_name(secured: Federation) -> object:
    await secured.enroll(await secured.token("a"))
    return await secured.token("a", Role.EVALUATOR)


async def revoked_viewer(secured: Federation) -> object:
    viewer = await secured.enroll(await secured.token("eve", Role.VIEWER))
    await secured.revoke(Role.VIEWER, "eve")
    return await secured.daemon(viewer).operator.ListRuns(op.ListRunsRequest())


async def viewer_who_outlives_a_certificate(secured: Federation) -> object:
    viewer = secured.daemon(secured.certificate(Role.VIEWER, "eve", timedelta(seconds=2)))
    for _ in range(10):
        await viewer.operator.ListRuns(op.ListRunsRequest())
        await asyncio.sleep(0.3)
    raise AssertionError("the certificate has ended")


async def printer(secured: Federation) -> object:
    key = keys.make()
    certificate = signed_without_an_id(secured.authority, key)
    return await secured.daemon(secured.with_certificate(key, certificate)).operator.ListRuns(op.ListRunsRequest())


async def viewer_who_creates(secured: Federation) -> object:
    return await secured.daemon(secured.certificate(Role.VIEWER, "eve")).create()


async def too_many_certificates(secured: Federation) -> object:
    token, key = await secured.token("a"), keys.make()
    for _ in range(MOST_CERTIFICATES):
        await secured.enroll(token, key)
    return await secured.enroll(token, key)


async def odd_signing_request(secured: Federation) -> object:
    stub = secured.access(secured.nobody())
    return await stub.Enroll(access.EnrollRequest(secret=bytes(32), signing_request=b"no request"))
