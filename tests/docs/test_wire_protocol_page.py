"""The page on the wire protocol names every call that there is."""

from pathlib import Path

import pytest

from fedpeft.v1 import access_service_pb2, federation_service_pb2, operator_service_pb2

PAGE = Path(__file__).resolve().parents[2] / "docs" / "wire-protocol.md"


@pytest.mark.parametrize("module", [access_service_pb2, federation_service_pb2, operator_service_pb2])
def test_every_call_is_named_under_its_service(module: object) -> None:
    services = module.DESCRIPTOR.services_by_name.values()  # type: ignore[attr-defined]
    assert services
    for service in services:
        _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {service.name}\n")
        section, _, _ = rest.partition("\n## ")
        assert [method.name for method in service.methods if f"`{method.name}`" not in section] == []
