"""The Kubernetes manifests, rendered as ``kubectl apply -k`` does, without a cluster."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.serve.schema import ServeDeploySchema

from cluster.config import parse
from cluster.config.file import load
from cluster.ray_internals import RAY_VERSION
from deployments import app
from tests.running import ROOT
from tests.serve.resources import place_all, replica_demands
from tests.serve.test_image import variables

KUBERNETES = ROOT / "deployments" / "kubernetes"
SCHEMAS = ROOT.parent / "shared" / "schemas"
KUBERNETES_VERSION = "1.33"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
MONITORED = "pools-monitored"
"""The only overlay that needs the Prometheus operator; its Serve config is that of `pools`."""
PAGE = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text("utf-8")

Object = dict[str, Any]


@cache
def render(overlay: str) -> list[Object]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the manifests, is not installed")
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def find(overlay: str, kind: str) -> list[Object]:
    return [document for document in render(overlay) if document["kind"] == kind]


def ray_service(overlay: str) -> Object:
    (service,) = find(overlay, "RayService")
    return service["spec"]


def serve_config(overlay: str) -> Object:
    return yaml.safe_load(ray_service(overlay)["serveConfigV2"])


def tandem_args(overlay: str) -> Object:
    (application,) = serve_config(overlay)["applications"]
    return application["args"]


def pod_specs(overlay: str) -> Iterator[Object]:
    cluster = ray_service(overlay)["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]
    for kind in ("Job", "StatefulSet"):
        for document in find(overlay, kind):
            yield document["spec"]["template"]["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@cache
def crd_schemas() -> dict[tuple[str, str], Object]:
    """Return the schemas of the custom resources by API version and kind."""
    if not SCHEMAS.is_dir():
        pytest.skip(f"{SCHEMAS}, which has the schemas of KubeRay and Prometheus, does not exist")
    schemas = {}
    for path in SCHEMAS.glob("*.yaml"):
        spec = yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))[
            "spec"
        ]
        for version in spec["versions"]:
            api = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            schemas[api] = forbid_unknown(version["schema"]["openAPIV3Schema"])
    return schemas


def forbid_unknown(schema: Any) -> Any:
    """Reject fields that the API server would drop without an error."""
    if isinstance(schema, list):
        return [forbid_unknown(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: forbid_unknown(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        inner.setdefault("additionalProperties", False)
    return inner


def check(document: Object, schema: Object) -> None:
    # Without a check of the schema, which has patterns that only Go accepts.
    for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
        raise error


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_resources_match_the_schemas_of_their_operators(overlay: str) -> None:
    schemas, checked = crd_schemas(), set()
    for document in render(overlay):
        api = document["apiVersion"], document["kind"]
        if api in schemas:
            # The API server checks these itself.
            body = {name: value for name, value in document.items() if name != "metadata"}
            check({**body, "metadata": {}}, schemas[api])
            checked.add(document["kind"])
    monitored = {"PodMonitor", "PrometheusRule"} if overlay == MONITORED else set()
    assert checked == {"RayService", *monitored}


def test_an_unknown_field_is_noticed() -> None:
    (service,) = find("cpu-demo", "RayService")
    wrong = {**service, "metadata": {}, "spec": {**service["spec"], "serveConfig": ""}}
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        check(wrong, crd_schemas()["ray.io/v1", "RayService"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_other_objects_match_the_schemas_of_kubernetes(overlay: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in render(overlay):
        if document["apiVersion"].split("/")[0] in ("ray.io", "monitoring.coreos.com"):
            continue
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_serve_config_builds_and_is_reachable_only_with_a_key(overlay: str) -> None:
    config = ServeDeploySchema.model_validate(serve_config(overlay))
    app.build(tandem_args(overlay))
    assert config.proxy_location == "EveryNode"
    assert config.http_options.host == "0.0.0.0"
    router = parse(tandem_args(overlay)).router
    assert not router.open
    for group in ray_service(overlay)["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volume = mounts[str(Path(router.keys_file or "").parent)]
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
        assert secrets[volume] == "tandem-keys"


@pytest.mark.parametrize("overlay", [o for o in OVERLAYS if o != MONITORED])
def test_tandem_reads_the_serve_config_where_its_key_file_is_missing(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    load(KUBERNETES / "overlays" / overlay / "serve-config.yaml")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_replaced_cluster_outlives_its_longest_answer(overlay: str) -> None:
    delay_s = ray_service(overlay)["rayClusterDeletionDelaySeconds"]
    assert delay_s > parse(tandem_args(overlay)).max_answer_s


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_runs_the_pinned_ray(overlay: str) -> None:
    assert ray_service(overlay)["rayClusterConfig"]["rayVersion"] == RAY_VERSION


def node_types(overlay: str) -> dict[str, Object]:
    """Return the worker groups as Ray's autoscaler sees them."""
    spec = ray_service(overlay)["rayClusterConfig"]
    cluster = {"metadata": {"name": "tandem", "namespace": "default"}, "spec": spec}
    types: dict[str, Object] = _derive_autoscaling_config_from_ray_cr(cluster)[
        "available_node_types"
    ]
    return {name: group for name, group in types.items() if group["max_workers"]}


@pytest.mark.parametrize("count", ["min", "max"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_replicas_fit_on_the_worker_groups(overlay: str, count: str) -> None:
    nodes = [
        dict(group["resources"])
        for group in node_types(overlay).values()
        for _ in range(group["max_workers"])
    ]
    place_all(replica_demands(parse(tandem_args(overlay)), count), nodes)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_is_restricted_and_bounded(overlay: str) -> None:
    for pod in pod_specs(overlay):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_lead_to_objects_or_to_secrets_that_the_page_creates(overlay: str) -> None:
    existing = {(document["kind"], document["metadata"]["name"]) for document in render(overlay)}
    for pod in pod_specs(overlay):
        for volume in pod.get("volumes", []):
            if name := volume.get("configMap", {}).get("name"):
                assert ("ConfigMap", name) in existing
            if name := volume.get("persistentVolumeClaim", {}).get("claimName"):
                assert ("PersistentVolumeClaim", name) in existing
            if name := volume.get("secret", {}).get("secretName"):
                assert f"create secret generic {name} " in PAGE
        for container in containers(pod):
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert f"create secret generic {reference['name']} " in PAGE


def test_prometheus_scrapes_ports_that_pods_have_and_the_policy_opens() -> None:
    cluster = ray_service("pools")["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"]["containers"][0] for group in groups]
    ports = {port["name"]: port["containerPort"] for pod in pods for port in pod["ports"]}
    (monitor,) = find(MONITORED, "PodMonitor")
    scraped = {ports[endpoint["port"]] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    (policy,) = [p for p in find("pools", "NetworkPolicy") if p["metadata"]["name"] == "tandem"]
    opened = [{p["port"] for p in rule.get("ports", ())} for rule in policy["spec"]["ingress"]]
    assert scraped in opened


def test_dashboards_and_rules_come_from_the_existing_files() -> None:
    maps = {
        document["metadata"]["name"]: document["data"]
        for document in find(MONITORED, "ConfigMap")
        if document["metadata"].get("labels", {}).get("grafana_dashboard")
    }
    files = sorted((ROOT / "cluster/monitoring/grafana/dashboards").glob("*.json"))
    assert maps == {
        f"tandem-dashboard-{file.stem}": {file.name: file.read_text("utf-8")} for file in files
    }
    (rules,) = find(MONITORED, "PrometheusRule")
    groups = [
        group
        for file in sorted((ROOT / "cluster/monitoring/rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    ]
    assert rules["spec"]["groups"] == groups


def test_pods_mount_the_models_where_the_image_looks_for_them() -> None:
    home = variables()["TANDEM_HOME"]
    for overlay in OVERLAYS:
        for pod in pod_specs(overlay):
            mounts = [m for c in containers(pod) for m in c.get("volumeMounts", [])]
            paths = {mount["mountPath"] for mount in mounts if mount["name"] == "models"}
            assert paths <= {f"{home}/models"}, json.dumps(mounts)
