"""Generates `common/fedpeft/v1` from the protos; `--check` fails when what is committed is stale."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "common" / "fedpeft" / "v1"


def generate(out: Path) -> None:
    """Writes the messages, the gRPC stubs (for services only) and the types of both under `out`."""
    protos = sorted(PROTOS.glob("fedpeft/v1/*.proto"))
    services = [p for p in protos if p.name.endswith("_service.proto")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"]
    plugins = Path(sys.executable).parent
    mypy = [f"--plugin=protoc-gen-{name}={plugins}/protoc-gen-{name}" for name in ("mypy", "mypy_grpc")]
    subprocess.run([*protoc, *mypy, f"--python_out={out}", f"--mypy_out=quiet:{out}", *protos], check=True)
    grpc = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet,only_async:{out}"]
    subprocess.run([*protoc, *mypy, *grpc, *services], check=True)


def main() -> int:
    """Generates, or compares with what is committed."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "fedpeft" / "v1"
        names = sorted(p.name for p in fresh.iterdir())
        if "--check" in sys.argv[1:]:
            committed = sorted(p.name for p in GENERATED.iterdir() if p.name.endswith((".py", ".pyi")))
            _, mismatch, missing = filecmp.cmpfiles(fresh, GENERATED, names, shallow=False)
            extra = set(committed) - set(names) - {"__init__.py"}
            stale = sorted({*mismatch, *missing, *extra})
            if stale:
                print(f"generated code is stale: {', '.join(stale)}; run `make proto`")
            return 1 if stale else 0
        for old in GENERATED.glob("*_pb2*"):
            old.unlink()
        for name in names:
            shutil.copy(fresh / name, GENERATED / name)
        print(f"generated {len(names)} files in {GENERATED.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
