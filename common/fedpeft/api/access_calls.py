"""AccessService for whoever operates: tokens, identities, the audit log; part of `OperatorClient`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from typing import Protocol, TypeVar

from fedpeft.identity import roles
from fedpeft.identity.audit import AuditEntry
from fedpeft.identity.subject import Role
from fedpeft.v1 import access_service_pb2 as pb
from fedpeft.v1 import access_service_pb2_grpc as pb_grpc

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)


class Question(Protocol):
    """A request for a page of a list."""

    page_token: str


class Page(Protocol):
    """A page of a list."""

    next_page_token: str


QuestionT = TypeVar("QuestionT", bound=Question)
PageT = TypeVar("PageT", bound=Page)

MAX_NUMBER = 2**63 - 1
"""No entry of the audit log has a higher number."""


class Unary(Protocol[RequestT, ResponseT]):
    """A call with one request and one answer."""

    def __call__(self, request: RequestT, /, *, timeout: float) -> Awaitable[ResponseT]:
        """Makes it."""
        ...


class AccessCalls(ABC):
    """The calls; each raises the class of `fedpeft.errors` that the server raised."""

    _access: pb_grpc.AccessServiceStub

    @abstractmethod
    async def _ask(self, method: Unary[RequestT, ResponseT], request: RequestT) -> ResponseT:
        """Makes a call, again if the server is away for a moment."""

    async def _pages(self, method: Unary[QuestionT, PageT], request: QuestionT) -> AsyncIterator[PageT]:
        """Yields the pages of a list, each asked for when it is wanted; `request` is that of the first."""
        while True:
            page = await self._ask(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def create_token(self, name: str, role: Role, life_s: int = 0) -> pb.CreateTokenResponse:
        """Makes an enrolment token; its line is in the answer and nowhere else.

        Args:
            name: Name that it enrols.
            role: In which role.
            life_s: Seconds until it is worthless; 0 for a day.
        """
        request = pb.CreateTokenRequest(name=name, role=roles.TO_PROTO[role], life_s=life_s)
        return await self._ask(self._access.CreateToken, request)

    async def tokens(self) -> list[pb.Token]:
        """Returns the enrolment tokens that were not deleted, oldest first."""
        pages = self._pages(self._access.ListTokens, pb.ListTokensRequest())
        return [token async for page in pages for token in page.tokens]

    async def delete_token(self, token: str) -> None:
        """Makes a token worthless, by its id."""
        await self._ask(self._access.DeleteToken, pb.DeleteTokenRequest(id=token))

    async def revoke(self, name: str, role: Role, reason: str = "", *, unseen: bool = False) -> pb.Identity:
        """Refuses a name in a role until it is restored; returns the identity.

        Args:
            name: Name that is revoked.
            role: In which role.
            reason: Reason, for the audit log.
            unseen: True to revoke it also if nobody of that name and role has called or was enrolled.
        """
        request = pb.RevokeIdentityRequest(role=roles.TO_PROTO[role], name=name, reason=reason, unseen=unseen)
        return (await self._ask(self._access.RevokeIdentity, request)).identity

    async def restore(self, name: str, role: Role) -> pb.Identity:
        """Lets a revoked name in again, with certificates that begin from now on; returns the identity."""
        request = pb.RestoreIdentityRequest(role=roles.TO_PROTO[role], name=name)
        return (await self._ask(self._access.RestoreIdentity, request)).identity

    async def identities(self) -> list[pb.Identity]:
        """Returns whoever was enrolled or revoked, by role and name."""
        pages = self._pages(self._access.ListIdentities, pb.ListIdentitiesRequest())
        return [identity async for page in pages for identity in page.identities]

    async def audit(self, after: int = 0) -> AsyncIterator[AuditEntry]:
        """Yields the entries of the audit log whose number is above `after`, oldest first, a page at a time."""
        request = pb.ListAuditEntriesRequest(after=min(after, MAX_NUMBER))
        async for page in self._pages(self._access.ListAuditEntries, request):
            for one in page.entries:
                yield AuditEntry(
                    one.number,
                    one.at,
                    one.actor,
                    one.action,
                    one.object,
                    one.details,
                    one.previous_sha256,
                    one.sha256,
                )
