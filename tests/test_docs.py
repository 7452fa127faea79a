"""The pages in docs/: their Python runs, their errors are those of the code, the manifest holds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from tiny import make_base

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"(?:<!-- (test|not run): (.+?) -->\n)?```python\n(.*?)```", flags=re.DOTALL)
OWN_TESTS = {
    "README.md": "test_readme.py",
    "op-alone.md": "kernels/test_op_alone.py",
    "banks.md": "test_banks.py",
    "evaluation.md": "test_evaluation.py",
    "projectors.md": "test_projectors.py",
    "serving.md": "test_vllm_references.py",
}
"""Pages whose blocks run in a test file of their own, which also looks at what they print."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """`test` or `not run` (or neither), the name or the reason, and the code of each block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


RUN_HERE = [
    page
    for page in PAGES
    if page.name not in OWN_TESTS and any(kind == "test" for kind, _, _ in blocks(page))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_python_block_runs_or_says_why_not(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len(found) == text.count("```python")
    for kind, words, code in found:
        assert kind, f"neither <!-- test: NAME --> nor <!-- not run: REASON --> before\n{code}"
        assert len(words) > 20 or kind == "test", f"{words!r} is no reason"
    names = [words for kind, words, _ in found if kind == "test"]
    assert len(names) == len(set(names))
    if page.name in OWN_TESTS and names:
        tests = (ROOT / "tests" / OWN_TESTS[page.name]).read_text(encoding="utf-8")
        assert [n for n in names if not re.search(rf"\b{n}\b", tests)] == []


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path):
    """As one script, where a tiny model has the name of the real one."""
    make_base(tmp_path / "Qwen" / "Qwen3-0.6B")
    (tmp_path / "page.py").write_text(
        "".join(code for kind, _, code in blocks(page) if kind == "test")
    )
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.strip()
    if page.name == "encoders.md":
        for line in (
            "series (10, 64)",
            "molecule (256,)",
            "user (24,) history (3, 24)",
            "sentence (2, 48)",
        ):
            assert line in done.stdout
        assert (tmp_path / "machines" / "data.jsonl").is_file()


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(
        r"\]\((?!http)([\w/.-]*\w/?)?#?([\w-]*)\)", page.read_text(encoding="utf-8")
    ):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page.name}: {target}#{anchor}"


# -- troubleshooting -----------------------------------------------------------------------------


@cache
def said() -> list[str]:
    """Each file's literal text, a … where values stand: what its errors can say."""
    texts = []
    for file in [*ROOT.glob("mmqwen/**/*.py"), *ROOT.glob("kernels/mmqwen_kernels/*.py")]:
        strings = _Strings()
        strings.visit(ast.parse(file.read_text(encoding="utf-8")))
        texts.append(" … ".join(strings.found))
    return texts


class _Strings(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append(" ".join(node.value.split()))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        self.found.append(" ".join("".join(parts).split()))


def quoted_errors() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    page = page[: page.index("## No error, but")]
    return re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)


def test_errors_are_quoted():
    assert len(quoted_errors()) > 30


@pytest.mark.parametrize("error", quoted_errors())
def test_a_quoted_error_is_one_of_the_code(error):
    pieces = [
        re.escape(piece.strip())
        for piece in error.replace("\\|", "|").split("…")
        if piece.strip(" ,;:")
    ]
    assert any(re.search(r".{0,200}?".join(pieces), text, flags=re.DOTALL) for text in said())


# -- deployment ----------------------------------------------------------------------------------

DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")

LABELS = {str: str}
META = {"name": str, "labels": LABELS, "annotations": LABELS}
PROBE = {
    "httpGet": {"path": str, "port": str}, "periodSeconds": int, "failureThreshold": int,
}  # fmt: skip
SELECTOR = {"matchLabels": LABELS}
CONTAINER = {
    "name": str, "image": str, "args": [str], "env": [{"name": str, "value": str}],
    "ports": [{"name": str, "containerPort": int}],
    "startupProbe": PROBE, "readinessProbe": PROBE, "livenessProbe": PROBE,
    "resources": {"requests": LABELS, "limits": LABELS},
    "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}  # fmt: skip
POD = {
    "terminationGracePeriodSeconds": int, "automountServiceAccountToken": bool,
    "containers": [CONTAINER],
    "volumes": [{
        "name": str, "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
        "emptyDir": {"medium": str, "sizeLimit": str},
    }],
}  # fmt: skip
SCHEMAS = {
    ("apps/v1", "Deployment"): {
        "replicas": int, "strategy": {"type": str}, "selector": SELECTOR,
        "template": {"metadata": META, "spec": POD},
    },
    ("v1", "Service"): {
        "selector": LABELS, "ports": [{"name": str, "port": int, "targetPort": str}],
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "podSelector": SELECTOR, "policyTypes": [str],
        "ingress": [{"from": [{"podSelector": SELECTOR}], "ports": [{"port": str}]}],
    },
}  # fmt: skip
"""Of Kubernetes' API, the fields that the manifest uses, with their types."""


def faults(value, schema, path="") -> list[str]:
    """Where a document is not what a schema says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no object"]
        found = []
        for key, inner in value.items():
            kind = schema.get(key, schema.get(str))
            here = f"{path}.{key}"
            found += faults(inner, kind, here) if kind else [f"{here}: no such field"]
        return found
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [
            fault for at, v in enumerate(value) for fault in faults(v, schema[0], f"{path}[{at}]")
        ]
    return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def manifest():
    (text,) = re.findall(r"```yaml\n(.*?)```", DEPLOY, flags=re.DOTALL)
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_the_manifest_has_fields_of_kubernetes(manifest):
    assert set(manifest) == {"Deployment", "Service", "NetworkPolicy"}
    for kind, document in manifest.items():
        schema = SCHEMAS[document["apiVersion"], kind]
        whole = {"apiVersion": str, "kind": str, "metadata": META, "spec": schema}
        assert faults(document, whole, kind) == []
    assert faults({"replicas": "1", "spec": {}}, SCHEMAS["apps/v1", "Deployment"]) == [
        ".replicas: '1' is no int", ".spec: no such field",
    ]  # fmt: skip


def test_the_manifest_fits_together(manifest):
    deployment, service = manifest["Deployment"]["spec"], manifest["Service"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    assert manifest["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    model, *flags = container["args"]
    options = dict(flag.removeprefix("--").split("=") for flag in flags)
    assert any(model.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])
    assert int(options["port"]) == ports["http"]
    assert int(options["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    for side in ("requests", "limits"):
        assert container["resources"][side]["nvidia.com/gpu"] == "1"


def test_mmqwen_serve_takes_the_flags_of_the_page(manifest):
    pytest.importorskip("vllm")
    from mmqwen import serve
    from mmqwen.vllm_plugin import compat

    parser, options, _ = compat.serve_command("mmqwen")
    serve._add_own_flags(options)
    (container,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    args = parser.parse_args(["serve", *container["args"]])
    assert args.max_item_bytes == 4194304
    (command,) = re.findall(r"```bash\nmmqwen (serve .*?)```", DEPLOY, flags=re.DOTALL)
    args = parser.parse_args(command.replace("\\\n", " ").split())
    assert args.api_server_count == 2


def test_the_counters_of_the_pages_are_those_of_the_server():
    pytest.importorskip("prometheus_client")
    from mmqwen.vllm_plugin import metrics

    known = {f"{counter._name}_total" for counter in metrics._counters().values()}
    serving = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"mmqwen_\w+_total", serving)) == known
    assert set(re.findall(r"mmqwen_\w+_total", DEPLOY)) == known
