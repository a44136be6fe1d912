"""An adapter version as a file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from fedpeft_operator.console.context import context_of
from fedpeft_operator.console.pages.request_values import path_id, path_number


async def adapter(request: Request) -> Response:
    """Sends an adapter version as it is stored, its digest checked."""
    context, run, version = context_of(request), path_id(request, "run"), path_number(request, "version")
    folder = Path(tempfile.mkdtemp(prefix="fedpeft-console-"))
    try:
        async with context.connection.connect() as server:
            await server.run(run)  # a transfer may be silent for long; a server that is away is found now
            await server.download(run, folder / "adapter", version=version)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return FileResponse(
        folder / "adapter",
        media_type="application/octet-stream",
        filename=f"{run}-version-{version}.safetensors",
        background=BackgroundTask(shutil.rmtree, folder, ignore_errors=True),
    )
