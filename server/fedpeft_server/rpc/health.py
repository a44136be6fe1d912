"""gRPC's health service, whose answers say besides which protocol is spoken here and what time it is."""

from __future__ import annotations

import time
from typing import Any

from grpc_health.v1 import health, health_pb2

from fedpeft import PROTOCOL
from fedpeft.rpc.server_info import ServerInfo


class Health(health.aio.HealthServicer):
    """Answers health checks; `fedpeft doctor` reads what stands beside them."""

    clock = staticmethod(time.time)

    async def Check(self, request: Any, context: Any) -> Any:
        """Returns the health of the server."""
        context.set_trailing_metadata(ServerInfo(PROTOCOL, self.clock()).to_metadata())
        return await super().Check(request, context)

    async def List(self, request: Any, context: Any) -> Any:
        """Returns the health of the server and of each of its named parts."""
        known = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=known)
