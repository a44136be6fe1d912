#!/opt/moto/bin/python
"""MinIO's programs, as far as the compose file calls them, over moto's S3, which keeps everything in memory.

minio server FOLDER     serves on port 9000; each folder of FOLDER is a bucket
mc ready local          exit code 0 if it serves
"""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from pathlib import Path

ENDPOINT = "http://127.0.0.1:9000"


def serve(folder: Path) -> None:
    """Serves until SIGTERM."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # threads, which come with the server, would take them
    import boto3
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer("0.0.0.0", 9000).start()
    password = Path(os.environ["MINIO_ROOT_PASSWORD_FILE"]).read_text()
    keys = {"aws_access_key_id": os.environ["MINIO_ROOT_USER"], "aws_secret_access_key": password}
    s3 = boto3.client("s3", endpoint_url=ENDPOINT, region_name="us-east-1", **keys)
    for bucket in folder.iterdir():
        s3.create_bucket(Bucket=bucket.name)
    print(f"buckets: {[path.name for path in folder.iterdir()]}", flush=True)
    signal.sigwait(signals)


def main() -> None:
    """Does what the program of this name would do."""
    match [Path(sys.argv[0]).name, *sys.argv[1:]]:
        case ["minio", "server", folder]:
            serve(Path(folder))
        case ["mc", "ready", "local"]:
            urllib.request.urlopen(ENDPOINT, timeout=4).close()
        case other:
            sys.exit(f"{other} is not stood in for")


if __name__ == "__main__":
    main()
