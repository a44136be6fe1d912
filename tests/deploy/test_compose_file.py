"""deploy/docker-compose.yml as it is written: what contains every service, and who can reach whom."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from .conftest import ROOT

COMPOSE = yaml.safe_load((ROOT / "deploy" / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SITES = [name for name in SERVICES if name.startswith("client-")] + ["evaluator"]
ONE_SHOTS = ("init", "tokens", "run")
SERVERS = ("server", "server-2", "server-3")

each_service = pytest.mark.parametrize("name", SERVICES)


@each_service
def test_a_service_has_no_root_no_capabilities_and_nothing_to_write_on(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(mount.split(":")[0] == "/tmp" for mount in service["tmpfs"])


@each_service
def test_a_service_has_limits_and_is_started_again(name: str) -> None:
    service = SERVICES[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["restart"] == ("on-failure" if name in ONE_SHOTS else "unless-stopped")


@each_service
def test_an_image_is_pinned_or_built_from_the_checkout(name: str) -> None:
    service = SERVICES[name]
    _, _, tag = service["image"].partition(":")
    if "build" in service:
        target = service["build"]["target"]
        assert service["image"] == f"fedpeft-{target}:${{FEDPEFT_TAG:-latest}}"
        assert re.search(rf"^FROM \S+ AS {target}$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    else:
        assert re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", tag), service["image"]


@each_service
def test_no_secret_is_in_an_environment_or_a_command(name: str) -> None:
    service = SERVICES[name]
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|TOKEN|KEY", variable):
            assert re.search("_FILE$", variable) and value.startswith("/"), f"{variable} is not the path of a file"
    assert not re.search(r"://[^/\s:]+:[^/\s@]+@", str(service)), "a URL has a password"


@each_service
def test_what_a_service_mounts_is_a_volume_or_read_only(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source, _, rest = re.sub(r"\$\{\w+:-(\w*)\}", r"\1", mount).partition(":")
        if source.startswith("."):
            assert rest.endswith(":ro") and (ROOT / "deploy" / source).exists()
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SITES)
def test_a_site_shares_a_network_with_the_server_and_with_nobody_else(name: str) -> None:
    (network,) = SERVICES[name]["networks"]
    there = [other for other, service in SERVICES.items() if network in service.get("networks", ())]
    assert sorted(there) == sorted([name, *SERVERS])
    aliases = [(SERVICES[server]["networks"][network] or {}).get("aliases", []) for server in SERVERS]
    assert aliases == [[], ["server"], ["server"]], "whichever it reaches has the name that is in its certificate"
    assert COMPOSE["networks"][network] == {"internal": True}
    assert "ports" not in SERVICES[name]


@pytest.mark.parametrize("name", SITES)
def test_a_site_mounts_what_is_its_own_and_the_backbone(name: str) -> None:
    mounts = [mount.split(":") for mount in SERVICES[name]["volumes"]]
    own = {f"site-{name.removeprefix('client-')}", name}
    assert {source for source, *_ in mounts} == own | {"backbone"}
    for other, service in SERVICES.items():
        if other not in (name, *ONE_SHOTS):
            assert not own & {mount.partition(":")[0] for mount in service.get("volumes", ())}
    writable = {source for source, _, *mode in mounts if mode != ["ro"]}
    assert writable == {name}, "only its own state is written"


def test_only_the_desk_has_a_way_out_and_its_ports_are_this_machine_s() -> None:
    assert {name for name, network in COMPOSE["networks"].items() if not network.get("internal")} == {"desk"}
    assert SERVICES["init"]["network_mode"] == "none"
    published = {name for name, service in SERVICES.items() if "ports" in service}
    assert published == {name for name, service in SERVICES.items() if "desk" in service.get("networks", ())}
    for name in published:
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_only_prometheus_reaches_the_metrics_and_only_the_server_the_database() -> None:
    by_network = {
        network: {name for name, service in SERVICES.items() if network in service.get("networks", ())}
        for network in COMPOSE["networks"]
    }
    assert by_network["metrics"] == {*SERVERS, "prometheus"}
    assert by_network["storage"] == {*SERVERS, "postgres", "minio"}
    for server in SERVERS:
        alias = SERVICES[server]["networks"]["metrics"]["aliases"][0]
        assert SERVICES[server]["environment"]["FEDPEFT_SERVER_METRICS"] == f"{alias}:9464"


def test_another_daemon_shares_database_bucket_and_authority_and_has_a_folder_of_its_own() -> None:
    first = SERVICES["server"]["environment"]
    own = [
        mount.partition(":")[0] for server in SERVERS for mount in SERVICES[server]["volumes"] if "/var/lib" in mount
    ]
    assert own == list(SERVERS)
    for server in SERVERS[1:]:
        given = SERVICES[server]["environment"]
        assert {name for name in first if given[name] != first[name]} == {"FEDPEFT_SERVER_METRICS"}
        assert "server:/first:ro" in SERVICES[server]["volumes"]
        assert "/first/identity/" in SERVICES[server]["command"][0]


def test_every_service_that_stays_says_whether_it_is_well() -> None:
    built = {"server", "client"}  # their images have a health check
    for name, service in SERVICES.items():
        in_image = "build" in service and service["build"]["target"] in built
        assert name in ONE_SHOTS or in_image or "healthcheck" in service, name


def test_the_gpu_is_reserved_and_what_cannot_be_had_everywhere_is_asked_for() -> None:
    (device,) = SERVICES["client-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"client-gpu": ["gpu"], "minio": ["s3"], "server-2": ["several"], "server-3": ["several"]}


def test_the_file_of_several_daemons_starts_them_on_a_bucket_and_has_each_scraped() -> None:
    lines = (ROOT / "deploy" / "several.env").read_text().splitlines()
    given = dict(line.split("=") for line in lines if not line.startswith("#"))
    profiles = set(given["COMPOSE_PROFILES"].split(","))
    chosen = {name for name, service in SERVICES.items() if profiles & set(service.get("profiles", ()))}
    assert chosen == {*SERVERS[1:], "minio"}
    environment = SERVICES["server"]["environment"]
    for setting in ("BLOBS", "UPDATES"):
        assert environment[f"FEDPEFT_SERVER_{setting}"] == f"${{FEDPEFT_{setting}:-}}"
        assert given[f"FEDPEFT_{setting}"].startswith("s3://fedpeft/"), "the bucket that the entry point of minio makes"
    mount = "./prometheus/targets/${FEDPEFT_TARGETS:-fedpeft}.yml:/etc/prometheus/targets/fedpeft.yml:ro"
    assert mount in SERVICES["prometheus"]["volumes"]
    scraped = {}
    for name in ("fedpeft", given["FEDPEFT_TARGETS"]):
        (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "targets" / f"{name}.yml").read_text())
        scraped[name] = group["targets"]
    assert scraped == {"fedpeft": ["server:9464"], "several": [f"{server}:9464" for server in SERVERS]}
