"""The KServe bundle: what it says, that the API server would take it, and that nothing can slip into it."""

# ruff: noqa: S108 - names of Secrets, and places inside a container
from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gemma_pack.deploy.kserve import RUNTIME_IMAGE, kserve_bundle
from gemma_pack.deploy.options import STORAGE_SCHEMES, Options
from gemma_pack.deploy.resources import Demand, plan_resources
from tests.deploy import crd
from tests.deploy.conftest import CONFIGS, DIGEST, record_of
from tests.published import published

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonschema import Draft202012Validator

    from gemma_pack.deploy.bundle import Bundle
    from gemma_pack.deploy.image import ServedImage

GOLDEN = Path(__file__).parent / "golden" / "kserve"
KINDS = {
    "ServingRuntime": ("kserve-servingruntimes.yaml", "v1alpha1"),
    "InferenceService": ("kserve-inferenceservices.yaml", "v1beta1"),
    "LLMInferenceService": ("kserve-llminferenceservices.yaml", "v1alpha2"),
}
KUBERNETES_OWN = {"DaemonSet", "Job"}


def bundle_of(image: ServedImage, *, gpu_gb: int = 85, **options: Any) -> Bundle:
    resources = plan_resources(image, Demand(gpu_memory_bytes=gpu_gb * 10**9))
    return kserve_bundle(image, resources, Options(**options))


def objects(bundle: Bundle) -> dict[str, Any]:
    """Return the parsed files by kind."""
    return {parsed["kind"]: parsed for parsed in (yaml.safe_load(file.text) for file in bundle.files)}


@pytest.fixture(scope="session")
def refused() -> Callable[[dict[str, Any]], list[str]]:
    """Return a function that says what the published CRD of an object refuses in it."""
    validators: dict[str, Draft202012Validator] = {}

    def check(manifest: dict[str, Any]) -> list[str]:
        kind = manifest["kind"]
        if kind not in validators:
            path = published(KINDS[kind][0])
            validators[kind] = crd.validator(path, KINDS[kind][1])
        return [f"{error.json_path}: {error.message}" for error in validators[kind].iter_errors(manifest)]

    return check


@pytest.mark.parametrize("scheme", STORAGE_SCHEMES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_published_crds_take_every_object(
    served: Callable[..., ServedImage], refused: Callable[[dict[str, Any]], list[str]], name: str, scheme: str
) -> None:
    parsed = objects(bundle_of(served(name), gpu_gb=48, storage_scheme=scheme, pull_secret="registry.key"))
    assert {kind: refused(parsed[kind]) for kind in KINDS} == {kind: [] for kind in KINDS}


@pytest.mark.parametrize("file", ["serving-runtime.yaml", "inference-service.yaml", "llm-inference-service.yaml"])
def test_the_crds_take_the_manifests_kept_here(refused: Callable[[dict[str, Any]], list[str]], file: str) -> None:
    assert refused(yaml.safe_load((GOLDEN / file).read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("kind", "path", "value", "complaint"),
    [
        ("InferenceService", ("spec", "predictor", "model", "storageURI"), "oci://x", "storageURI"),
        ("InferenceService", ("spec", "predictor", "model", "runtime"), 3, "is not of type 'string'"),
        ("InferenceService", ("spec", "predictor", "model", "resources", "limits", "memory"), "7 Gi", "7 Gi"),
        ("InferenceService", ("spec", "predictor", "tolerations", 0, "keys"), ["a"], "keys"),
        ("InferenceService", ("metadata", "name"), "Capital", "Capital"),
        ("ServingRuntime", ("spec", "containers", 0, "securityContext", "capabilites"), {}, "capabilites"),
        ("ServingRuntime", ("spec", "containers", 0, "startupProbe", "failureThreshold"), "360", "360"),
        ("ServingRuntime", ("spec", "containers", 0, "env", 1, "name"), "HF_HUB_OFFLINE", "HF_HUB_OFFLINE"),
        ("ServingRuntime", ("apiVersion",), "serving.kserve.io/v1", "serving.kserve.io/v1alpha1"),
    ],
)
def test_the_check_refuses_what_the_api_server_refuses(
    served: Callable[..., ServedImage],
    refused: Callable[[dict[str, Any]], list[str]],
    kind: str,
    path: tuple[Any, ...],
    value: Any,
    complaint: str,
) -> None:
    manifest = copy.deepcopy(objects(bundle_of(served()))[kind])
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert any(complaint in line for line in refused(manifest))


def test_the_files_are_those_that_were_checked(served: Callable[..., ServedImage]) -> None:
    written = {file.name: file.text for file in bundle_of(served(), pull_secret="registry-key").files}
    if os.environ.get("GEMMA_PACK_UPDATE_GOLDEN"):  # after a meant change; the diff then shows what users will apply
        for name, text in written.items():
            (GOLDEN / name).write_text(text, "utf-8")
    assert written == {path.name: path.read_text("utf-8") for path in GOLDEN.glob("*.yaml")}


def test_weights_and_server_are_pinned_by_digest(served: Callable[..., ServedImage]) -> None:
    parsed = objects(bundle_of(served()))
    model = parsed["InferenceService"]["spec"]["predictor"]["model"]
    assert model["storageUri"] == f"oci://registry.example.com:5000/team/gemma-3-270m-quantized.w4a16@{DIGEST}"
    assert "storageUris" not in model
    [container] = parsed["ServingRuntime"]["spec"]["containers"]
    assert container["image"] == RUNTIME_IMAGE
    assert "@sha256:" in RUNTIME_IMAGE


def test_runtime_and_service_find_each_other(served: Callable[..., ServedImage]) -> None:
    parsed = objects(bundle_of(served(), name="poet"))
    predictor = parsed["InferenceService"]["spec"]["predictor"]
    runtime = parsed["ServingRuntime"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"] == "poet"
    assert predictor["model"]["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert "--served-model-name=poet" in predictor["model"]["args"]


def test_the_server_runs_as_gemma_needs_it(served: Callable[..., ServedImage]) -> None:
    spec = objects(bundle_of(served()))["ServingRuntime"]["spec"]
    [container] = spec["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in spec["volumes"]}
    assert container["command"] == ["vllm", "serve", "/mnt/models"]
    assert container["args"] == ["--port=8080", "--dtype=bfloat16"]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HOME"] == "/tmp"
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
    assert volumes[mounts["/tmp"]] == {}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/health"}
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] == 30 * 60


def test_what_stands_beside_is_not_applied_with_the_rest(served: Callable[..., ServedImage]) -> None:
    bundle = bundle_of(served())
    listed = objects(bundle)["Kustomization"]["resources"]
    assert listed == ["serving-runtime.yaml", "inference-service.yaml"]
    beside = {file.name for file in bundle.files if not file.printed}
    assert beside == {"llm-inference-service.yaml", "prepull.yaml", "smoke.yaml", "kustomization.yaml"}


def test_the_llm_service_is_the_same_deployment(served: Callable[..., ServedImage]) -> None:
    parsed = objects(bundle_of(served("gemma-3-27b-it"), gpu_gb=48, pull_secret="registry-key"))
    service, predictor = parsed["LLMInferenceService"]["spec"], parsed["InferenceService"]["spec"]["predictor"]
    [container] = service["template"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert service["model"]["uri"] == predictor["model"]["storageUri"]
    assert service["model"]["name"] == parsed["InferenceService"]["metadata"]["name"]
    assert service["parallelism"] == {"tensor": 2}
    arguments = environment["VLLM_ADDITIONAL_ARGS"].split()
    assert arguments[0] == "--dtype=bfloat16"
    assert set(arguments[1:]) < set(predictor["model"]["args"])
    assert not any("tensor-parallel" in argument for argument in arguments)  # the cluster's command says it
    assert container["resources"]["limits"] == predictor["model"]["resources"]["limits"]
    assert "image" not in container
    assert "args" not in container
    assert service["template"]["affinity"] == predictor["affinity"]
    assert service["template"]["imagePullSecrets"] == [{"name": "registry-key"}]


def pods(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Return the pod templates of the objects that are Kubernetes' own."""
    return {kind: objects(bundle)[kind]["spec"]["template"] for kind in KUBERNETES_OWN}


def test_pods_are_what_the_api_server_takes(served: Callable[..., ServedImage]) -> None:
    """LLMInferenceService has a whole PodSpec in its schema, so that of the others can be held against it."""
    whole = crd.validator(published(KINDS["LLMInferenceService"][0]), "v1alpha2")
    pod = whole.evolve(schema=whole.schema["properties"]["spec"]["properties"]["template"])
    for template in pods(bundle_of(served(), pull_secret="registry-key")).values():
        assert [f"{error.json_path}: {error.message}" for error in pod.iter_errors(template["spec"])] == []
    wrong = copy.deepcopy(template["spec"])
    wrong["containers"][0]["securityContext"]["capabilites"] = {}
    assert list(pod.iter_errors(wrong))


def node_terms(pod: dict[str, Any]) -> list[dict[str, Any]]:
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    terms: list[dict[str, Any]] = required["nodeSelectorTerms"]
    return terms


def test_the_prepuller_pulls_what_is_served_where_it_is_served(served: Callable[..., ServedImage]) -> None:
    parsed = objects(bundle_of(served(), pull_secret="registry-key"))
    daemon_set, predictor = parsed["DaemonSet"]["spec"], parsed["InferenceService"]["spec"]["predictor"]
    template = daemon_set["template"]
    assert daemon_set["selector"]["matchLabels"] == template["metadata"]["labels"]
    [pull] = template["spec"]["initContainers"]
    assert predictor["model"]["storageUri"] == f"oci://{pull['image']}"
    assert pull["args"] == ["echo", "pulled"]
    [labelled] = node_terms(template["spec"])  # a node without a GPU has no such label, and asks for no weights
    assert labelled == node_terms(predictor)[0]
    assert {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["4120"]} in labelled["matchExpressions"]
    assert template["spec"]["tolerations"] == predictor["tolerations"]
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry-key"}]
    assert "nvidia.com/gpu" not in str(template["spec"]["containers"])


def test_the_embedded_base_ends_at_once_when_the_prepuller_asks(
    served: Callable[..., ServedImage], tmp_path: Path
) -> None:
    """The base's program waits for ever when KServe's sidecar calls it; as this init container it must not."""
    from gemma_pack.oci.base import DEFAULT_BASE, load_base

    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    base = next(one for one in load_base(DEFAULT_BASE) if one.platform.architecture == machine)
    with tarfile.open(base.layers[0].path) as layer:
        layer.extractall(tmp_path, filter="data")
    [pull] = pods(bundle_of(served()))["DaemonSet"]["spec"]["initContainers"]
    program = tmp_path / base.runtime["Entrypoint"][0].lstrip("/")  # type: ignore[index]  # it has one
    subprocess.run([program, *pull["args"]], check=True, capture_output=True, timeout=30)


ANSWERS = {
    "chat": b'{"choices": [{"message": {"content": "Roses are red"}}]}',
    "text": b'{"choices": [{"text": " and so on"}]}',
    "nonsense": b'{"object": "error"}',
}


@pytest.mark.parametrize(
    ("name", "answer", "failures", "code"),
    [
        ("gemma-2-9b-it", "chat", 2, 0),
        ("gemma-3-270m", "text", 0, 0),
        ("gemma-3-270m", "nonsense", 0, 1),
        ("gemma-3-270m", "text", 99, 1),
    ],
)
def test_the_smoke_job_asks_until_the_server_answers(
    served: Callable[..., ServedImage], tool: Callable[[str], str], name: str, answer: str, failures: int, code: int
) -> None:
    """Runs the Job's own script with the system's curl against a server that is not ready at once."""
    [container] = pods(bundle_of(served(name), name="poet"))["Job"]["spec"]["containers"]
    tool("curl")
    seen: list[tuple[str, dict[str, Any]]] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            ready = len(seen) > failures
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(ANSWERS[answer] if ready else b"not yet")

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        [script] = container["args"]
        for old, new in (
            ("poet-predictor:$port", f"127.0.0.1:{server.server_address[1]}"),
            ("sleep 10", "sleep 0"),
            ("$(seq 180)", "1 2 3"),
        ):
            assert old in script
            script = script.replace(old, new)
        environment = {**os.environ, "no_proxy": "127.0.0.1"}
        environment |= {entry["name"]: entry["value"] for entry in container["env"]}
        ran = subprocess.run(["sh", "-c", script], env=environment, check=False, capture_output=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert ran.returncode == code, ran.stderr
    path, body = seen[-1]
    assert path == ("/v1/chat/completions" if name.endswith("-it") else "/v1/completions")
    assert body["model"] == "poet"


def test_gpus_appear_in_every_place(served: Callable[..., ServedImage]) -> None:
    predictor = objects(bundle_of(served("gemma-3-27b-it"), gpu_gb=48))["InferenceService"]["spec"]["predictor"]
    resources = predictor["model"]["resources"]
    assert "--tensor-parallel-size=2" in predictor["model"]["args"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "2"
    assert set(resources["limits"]) == {"cpu", "memory", "nvidia.com/gpu"}  # KServe fills what is missing with little


def test_nodes_with_too_little_or_too_old_gpus_are_passed_over(served: Callable[..., ServedImage]) -> None:
    needed = plan_resources(served("gemma-2-9b-it"), Demand()).gpu_memory_bytes
    affinity = objects(bundle_of(served("gemma-2-9b-it")))["InferenceService"]["spec"]["predictor"]["affinity"]
    terms = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    labelled, unlabelled = ({rule["key"]: rule for rule in term["matchExpressions"]} for term in terms)
    assert labelled["nvidia.com/gpu.compute.major"]["operator"] == "NotIn"
    assert "7" in labelled["nvidia.com/gpu.compute.major"]["values"]
    assert "8" not in labelled["nvidia.com/gpu.compute.major"]["values"]
    more_than_mib = int(labelled["nvidia.com/gpu.memory"]["values"][0])
    assert more_than_mib << 20 < needed <= (more_than_mib + 1) << 20
    assert unlabelled == {"nvidia.com/gpu.memory": {"key": "nvidia.com/gpu.memory", "operator": "DoesNotExist"}}


@pytest.mark.parametrize("scheme", STORAGE_SCHEMES)
def test_only_a_copy_into_the_pod_asks_for_its_disk(served: Callable[..., ServedImage], scheme: str) -> None:
    model = objects(bundle_of(served(), storage_scheme=scheme))["InferenceService"]["spec"]["predictor"]["model"]
    assert model["storageUri"].startswith(f"{scheme}://registry.example.com:5000/")
    asked = model["resources"]["requests"].get("ephemeral-storage")
    assert asked == ("1Gi" if scheme == "oci+fetch" else None)


def test_a_pull_secret_is_referred_to_and_never_overwritten(served: Callable[..., ServedImage]) -> None:
    bundle = bundle_of(served(), pull_secret="registry-key", directory=Path("serving"))
    parsed = objects(bundle)
    account = parsed["ServiceAccount"]
    assert account["imagePullSecrets"] == [{"name": "registry-key"}]
    assert parsed["InferenceService"]["spec"]["predictor"]["serviceAccountName"] == account["metadata"]["name"]
    assert parsed["Secret"]["metadata"]["name"] == "registry-key"
    assert "pull-secret.yaml" not in parsed["Kustomization"]["resources"]
    assert "kind: Secret" not in bundle.text
    assert "--from-file=.dockerconfigjson=pull-secret.json" in bundle.steps[1]


def test_without_a_pull_secret_there_is_no_account(served: Callable[..., ServedImage]) -> None:
    parsed = objects(bundle_of(served()))
    assert set(parsed) == {*KINDS, *KUBERNETES_OWN, "Kustomization"}
    assert "serviceAccountName" not in parsed["InferenceService"]["spec"]["predictor"]


def test_stdout_holds_what_kubectl_apply_takes(served: Callable[..., ServedImage]) -> None:
    printed = list(yaml.safe_load_all(bundle_of(served(), pull_secret="registry-key").text))
    assert [manifest["kind"] for manifest in printed] == ["ServiceAccount", "ServingRuntime", "InferenceService"]


@pytest.mark.parametrize(("name", "path"), [("gemma-3-270m", "/v1/completions"), ("gemma-2-9b-it", "/v1/chat/")])
def test_the_last_step_asks_the_model(served: Callable[..., ServedImage], name: str, path: str) -> None:
    steps = bundle_of(served(name), name="poet").steps
    assert steps[0].startswith("kubectl apply -f serving/prepull.yaml")
    assert steps[1] == "kubectl apply -k serving"
    assert "inferenceservice/poet" in steps[2]
    assert steps[3].startswith("kubectl replace --force -f serving/smoke.yaml")
    assert "deployment/poet-predictor" in steps[4]
    assert path in steps[5]
    assert '"model": "poet"' in steps[5]


@pytest.mark.parametrize("breaking", ["\n", "\r\n", "\u0085", "\u2028", "\x0b"])
def test_a_record_cannot_add_to_a_manifest(served: Callable[..., ServedImage], breaking: str) -> None:
    evil = f"google/gemma-3-270m{breaking}metadata: {{namespace: kube-system}}"
    image = served(record=record_of(evil, 1, note=f"a{breaking}kind: Pod"))
    parsed = objects(bundle_of(image))
    assert set(parsed) == {*KINDS, *KUBERNETES_OWN, "Kustomization"}
    assert "namespace" not in parsed["InferenceService"]["metadata"]


def test_docker_hub_has_its_own_key_in_a_pull_secret(served: Callable[..., ServedImage]) -> None:
    image = served(reference=f"docker.io/team/gemma@{DIGEST}")
    secret = objects(bundle_of(image, pull_secret="hub"))["Secret"]
    assert '"https://index.docker.io/v1/"' in secret["stringData"][".dockerconfigjson"]


def test_what_was_not_proved_is_said(served: Callable[..., ServedImage]) -> None:
    assert bundle_of(served()).warnings == ()
    failed = served(record=record_of("google/gemma-3-270m", 1, verdict="fail"))
    assert "ended with: fail" in bundle_of(failed).warnings[0]
    [unproved] = bundle_of(served(record=None)).warnings
    assert "nothing in the image" in unproved
    [loose] = bundle_of(served(), server_image="docker.io/vllm/vllm-openai:latest").warnings
    assert "not pinned" in loose


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here to build the kustomization")
def test_kustomize_builds_what_stdout_shows(served: Callable[..., ServedImage], tmp_path: Path) -> None:
    bundle = bundle_of(served(), pull_secret="registry-key", directory=tmp_path)
    for file in bundle.files:
        (tmp_path / file.name).write_text(file.text, "utf-8")
    built = subprocess.run(["kubectl", "kustomize", str(tmp_path)], check=True, capture_output=True, timeout=60)

    def by_kind(text: str | bytes) -> list[dict[str, Any]]:
        return sorted(yaml.safe_load_all(text), key=lambda manifest: manifest["kind"])

    assert by_kind(built.stdout) == by_kind(bundle.text)
