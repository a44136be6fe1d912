"""A client beside a folder of images as people have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from .conftest import StartClient, tiny_run
from .federation import Federation

pytestmark = pytest.mark.usefixtures("preloaded")


async def test_what_of_a_folder_is_not_read_is_said_by_a_dry_run_and_by_the_log(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    """The folder has a name that is not UTF-8, and images that cannot be read are more than training takes."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xe4nner"))
    for k in range(12):
        (root / "cat" / "@eaDir").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(root / "cat" / f"{k}.png")
        (root / "cat" / "@eaDir" / f"{k}.png").write_bytes(b"thumbnail")
    (root / "cat" / "scan.dcm").write_bytes(b"DICM")
    (root / "cat" / "annexed.png").symlink_to("../.git/annex/objects/a")
    federation.run = tiny_run()
    said = [
        "cannot be read, link to nothing: 1 (cat/annexed.png)",
        "skipped, kept by a storage or operating system: 1 (cat/@eaDir)",
        "skipped, with suffix .dcm: 1 (cat/scan.dcm)",
    ]
    client = await start_client("--dry-run", "--data", str(root))
    assert await client.ended() == 4, "".join(client.text)
    text = client.out.decode()
    assert all(line in text for line in said), text
    assert "images  1 of 13 cannot be read:" in text and "cat/annexed.png: link to nothing" in text
    for line in said:
        await client.said(line)

    client = await start_client("--once", "--data", str(root))
    assert await client.ended() == 4, "".join(client.text)
    assert "1 of 13 images cannot be read, more than 1%" in str(federation.answers)
