"""What is handed to people agrees with the product: package, generated code, image, manifests."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pb2

from kvd import config, metrics, preflight
from kvd.wire.pb import kvd_pb2, kvd_pb2_grpc
from kvd.wire.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
POD = yaml.safe_load((ROOT / "deploy/kubernetes/sidecar.yaml").read_text())["spec"]["template"]["spec"]
UNIT = (ROOT / "deploy/systemd/kvd.service").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
SOCKET_DIRECTORY = "/run/kvd"
SPILL_DIRECTORY = "/var/lib/kvd"
#: Where the pool of a daemon that is told nothing lies, and so what has to outlive its container.
POOL_MOUNT = preflight.SHARED_MEMORY
#: What a daemon needs beside its pool, at most.
BESIDE_THE_POOL_BYTES = 512 << 20


def settings_of(flags: list[str], environment: dict[str, str]) -> config.Settings:
    """What ``kvd serve FLAGS`` would run on; raises BadSetting for what the daemon would refuse.

    A directory of the image for the disk tier stands for one that is here.
    """
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
    values = dict(zip(names, flags[1::2], strict=True))
    if "spill_dir" in values:
        assert values["spill_dir"] == SPILL_DIRECTORY
        values["spill_dir"] = "/tmp"
    return config.load(values, environment, None).settings


def environment_of_the_image() -> dict[str, str]:
    """The ``KVD_`` variables that the image sets, as far as they make sense outside of it."""
    text = (ROOT / "Dockerfile").read_text()
    return dict(re.findall(r"^\s*(?:ENV )?(KVD_\w+)=(\S+)", text, re.MULTILINE))


def without_host(environment: dict[str, str]) -> dict[str, str]:
    """Without the settings that name a directory and a group of the image."""
    return {name: value for name, value in environment.items() if name not in ("KVD_SOCKET", "KVD_GROUP")}


def memory_bytes(text: str) -> int:
    """Docker's ``8704m`` and Kubernetes' ``8704Mi`` alike."""
    found = re.fullmatch(r"(\d+)(m|g|Mi|Gi)", text)
    assert found, text
    return int(found[1]) << (20 if found[2].lower().startswith("m") else 30)


def mounted(volume: str) -> str:
    """Where a volume of compose is in the container."""
    return volume.removesuffix(":ro").rpartition(":")[2]


def default_of(text: str) -> str:
    """``${NAME:-default}`` as its default."""
    found = re.fullmatch(r"\$\{\w+:-(.+)\}", text)
    return found[1] if found else text


# ---------------------------------------------------------------- the package


def test_lower_bounds_suit_the_generated_code() -> None:
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE))
    assert bounds["grpcio"] == kvd_pb2_grpc.GRPC_GENERATED_VERSION
    made_by = re.search(r"Protobuf Python Version: ([\d.]+)", inspect.getsource(kvd_pb2))
    assert made_by is not None
    assert bounds["protobuf"] == made_by[1]


def test_every_dependency_has_both_bounds() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(one for extra in extras.values() for one in extra)]
    assert [one for one in wanted if not re.fullmatch(r"[\w-]+(>=[\d.]+,<\d+|==[\d.]+)|kvd\[\w+\]", one)] == []


def test_generated_code_is_made_from_the_protocol_file(tmp_path: Path) -> None:
    made = tmp_path / "kvd.bin"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-Ikvd/wire/pb={ROOT}/proto/kvd/v1"]
        + [f"--descriptor_set_out={made}", "kvd/wire/pb/kvd.proto"],
        check=True,
        timeout=50,
    )
    (fresh,) = descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()).file
    committed = descriptor_pb2.FileDescriptorProto()
    kvd_pb2.DESCRIPTOR.CopyToProto(committed)
    for file in (fresh, committed):
        _forget_json_names(file.message_type)
    assert committed == fresh, "run `make proto`"
    for service in fresh.service:
        servicer = getattr(kvd_pb2_grpc, f"{service.name}Servicer")
        assert {name for name in vars(servicer) if not name.startswith("_")} == {m.name for m in service.method}


def _forget_json_names(messages: Any) -> None:
    for message in messages:
        for one in message.field:
            one.ClearField("json_name")
        _forget_json_names(message.nested_type)


# ---------------------------------------------------------------- the image


def test_image_and_manifests_name_this_release() -> None:
    named = [
        (file.name, tag)
        for file in (ROOT / "Dockerfile", *sorted((ROOT / "deploy").rglob("*")))
        if file.is_file() and file.suffix != ".pyc"
        for tag in re.findall(r"\bkvd:(\d[\w.]*)", file.read_text())
    ]
    assert named
    assert {tag for _, tag in named} == {VERSION}, named


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/engine.Dockerfile"])
def test_image_is_made_of_what_is_let_into_the_build(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", (ROOT / name).read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    assert [one for one in copied if not (ROOT / one).exists() or f"!{one}" not in ignored] == []


def test_image_runs_as_a_user_without_rights() -> None:
    users = re.findall(r"^USER (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert not re.match(r"root\b|0\b", users[-1])


def test_settings_of_the_image_are_settings_of_the_daemon() -> None:
    environment = environment_of_the_image()
    assert environment["KVD_SOCKET"].startswith(SOCKET_DIRECTORY)
    settings = settings_of([], without_host(environment))
    assert not settings.http.is_loopback, "a probe from outside of the container could not reach it"
    assert settings.listen.is_loopback


# ---------------------------------------------------------------- compose, Kubernetes, systemd


def test_compose_shares_only_the_directory_of_the_socket() -> None:
    services = COMPOSE["services"]
    assert f"socket:{SOCKET_DIRECTORY}" in services["kvd"]["volumes"]
    own = {mounted(volume) for volume in services["kvd"]["volumes"]} - {SOCKET_DIRECTORY}
    for name, service in services.items():
        assert name == "kvd" or f"socket:{SOCKET_DIRECTORY}:ro" in service["volumes"], name
        assert name == "kvd" or not own & {mounted(volume) for volume in service["volumes"]}, name
        assert not {"ipc", "pid", "network_mode", "privileged", "shm_size"} & service.keys(), name


def test_compose_keeps_pool_and_disk_tier_when_the_container_goes() -> None:
    volumes = {mounted(volume): volume for volume in COMPOSE["services"]["kvd"]["volumes"]}
    assert volumes[POOL_MOUNT] == f"/dev/shm:{POOL_MOUNT}", (
        "a volume of Docker's in memory ends with its last container"
    )
    assert volumes[SPILL_DIRECTORY] == f"${{KVD_SPILL_VOLUME:-spill}}:{SPILL_DIRECTORY}"
    assert "spill" in COMPOSE["volumes"]


def test_compose_gives_the_pool_its_memory() -> None:
    daemon = COMPOSE["services"]["kvd"]
    verb, *flags = (default_of(word) for word in daemon["command"])
    assert verb == "serve"
    pool_bytes = settings_of(flags, {}).pool_bytes
    assert memory_bytes(default_of(daemon["mem_limit"])) >= pool_bytes + BESIDE_THE_POOL_BYTES


def test_sidecar_shares_only_the_directory_of_the_socket() -> None:
    (daemon,), (engine,) = POD["initContainers"], POD["containers"]
    assert daemon["restartPolicy"] == "Always"
    assert {mount["mountPath"] for mount in daemon["volumeMounts"]} == {SOCKET_DIRECTORY, POOL_MOUNT, SPILL_DIRECTORY}
    shared = {mount["name"] for mount in daemon["volumeMounts"]} & {mount["name"] for mount in engine["volumeMounts"]}
    assert shared == {mount["name"] for mount in daemon["volumeMounts"] if mount["mountPath"] == SOCKET_DIRECTORY}
    assert all("emptyDir" in volume for volume in POD["volumes"])
    assert not {"hostIPC", "hostPID", "hostNetwork", "shareProcessNamespace"} & POD.keys()


def test_sidecar_gives_the_pool_its_memory() -> None:
    (daemon,) = POD["initContainers"]
    verb, *flags = daemon["args"]
    assert verb == "serve"
    pool_bytes = settings_of(flags, {}).pool_bytes
    limit = memory_bytes(daemon["resources"]["limits"]["memory"])
    assert limit >= pool_bytes + BESIDE_THE_POOL_BYTES
    assert memory_bytes(daemon["resources"]["requests"]["memory"]) == limit


def test_sidecar_keeps_pool_and_disk_tier_when_its_container_goes() -> None:
    (daemon,) = POD["initContainers"]
    settings = settings_of(daemon["args"][1:], {})
    volumes = {volume["name"]: volume["emptyDir"] for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in daemon["volumeMounts"]}
    pool, spill = mounts[POOL_MOUNT], mounts[SPILL_DIRECTORY]
    assert pool["medium"] == "Memory"
    assert memory_bytes(pool["sizeLimit"]) >= settings.pool_bytes * 65 // 64
    assert "medium" not in spill
    assert memory_bytes(spill["sizeLimit"]) > settings.spill_bytes, "what goes beyond the limit ends the pod"


def test_sidecar_has_no_rights_it_does_not_need() -> None:
    rights = POD["initContainers"][0]["securityContext"]
    assert rights["runAsNonRoot"] and rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert (rights["runAsUser"], rights["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert POD["securityContext"]["fsGroup"] == int(user[2])


def test_probes_ask_the_port_of_the_image() -> None:
    (daemon,) = POD["initContainers"]
    port = settings_of([], without_host(environment_of_the_image())).http.port
    assert [one["containerPort"] for one in daemon["ports"]] == [port]
    probes = [daemon[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe")]
    assert [(probe["path"], probe["port"]) for probe in probes] == [("/readyz", "kvd-http"), ("/healthz", "kvd-http")]
    assert "readinessProbe" not in daemon, "it would take the whole pod, engine included, out of service"


@pytest.mark.parametrize(
    "arguments",
    [COMPOSE["services"]["vllm-a"]["command"], COMPOSE["services"]["vllm-b"]["command"], POD["containers"][0]["args"]],
    ids=["compose-a", "compose-b", "kubernetes"],
)
def test_engines_are_told_of_the_connector(arguments: list[str]) -> None:
    (told,) = [one.partition("=")[2] for one in arguments if one.startswith("--kv-transfer-config=")]
    wanted = json.loads(told)
    assert wanted["kv_connector"] == "KvdConnector"
    assert (ROOT / wanted["kv_connector_module_path"].replace(".", "/") / "__init__.py").exists()


def test_unit_starts_the_daemon_with_settings_it_knows() -> None:
    (line,) = re.findall(r"^Environment=(.+)$", UNIT, re.MULTILINE)
    environment = dict(pair.split("=", 1) for pair in line.split())
    assert os.path.dirname(environment["KVD_SOCKET"]) == SOCKET_DIRECTORY
    settings_of([], without_host(environment))
    assert re.search(r"^ExecStart=/opt/kvd/bin/kvd serve$", UNIT, re.MULTILINE)
    assert re.search(r"^RuntimeDirectory=kvd$", UNIT, re.MULTILINE)
    assert re.search(r"^StateDirectory=kvd$", UNIT, re.MULTILINE)
    assert SPILL_DIRECTORY == "/var/lib/kvd", "what StateDirectory makes"


def test_image_has_a_directory_for_each_volume_of_its_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for directory in (SOCKET_DIRECTORY, SPILL_DIRECTORY):
        assert re.search(rf"install -d -o kvd -g kvd -m 07\d\d {directory}\b", text), directory


# ---------------------------------------------------------------- the documents


def test_the_operations_guide_knows_every_setting() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", OPERATIONS, re.MULTILINE)
    assert [key for key in rows if key in config.KEYS] == list(config.KEYS)


def test_the_operations_guide_knows_every_metric() -> None:
    named = {name.removesuffix("_total") for name in re.findall(r"`(kvd_[a-z_]+)", OPERATIONS)}
    made = set(re.findall(r'"(kvd_[a-z_]+)"', inspect.getsource(metrics))) - {"kvd_build"} | {"kvd_build_info"}
    assert made - named == set(), "not explained"
    assert named - made == set(), "no such metric"
