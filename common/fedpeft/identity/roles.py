"""Roles in the protocol's terms."""

from __future__ import annotations

from fedpeft.identity.subject import Role
from fedpeft.v1 import access_service_pb2 as pb

TO_PROTO = {
    Role.OPERATOR: pb.IDENTITY_ROLE_OPERATOR,
    Role.VIEWER: pb.IDENTITY_ROLE_VIEWER,
    Role.CLIENT: pb.IDENTITY_ROLE_CLIENT,
    Role.EVALUATOR: pb.IDENTITY_ROLE_EVALUATOR,
}
OF_PROTO = {number: role for role, number in TO_PROTO.items()}
