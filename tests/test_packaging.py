"""The wheel works outside the checkout, and shadows no other package."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import importlib.metadata, importlib.util, json, sys
import mmqwen, mmqwen_kernels
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "mmqwen": mmqwen.__file__,
    "kernels": mmqwen_kernels.__file__,
    "version": mmqwen.__version__,
    "shadow": [] if kernels is None else [str(p) for p in kernels.submodule_search_locations or []],
    "points": sorted(p.value for p in importlib.metadata.distribution("mmqwen").entry_points),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("mmqwen-*.whl"))


def test_wheel_installs_and_imports_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        + [str(wheel)],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["mmqwen"]).is_relative_to(site)
    assert Path(found["kernels"]).is_relative_to(site)
    assert not any(Path(path).is_relative_to(site) for path in found["shadow"])
    assert not any(Path(path).is_relative_to(ROOT) for path in found["shadow"])
    assert found["points"] == ["mmqwen.cli:main", "mmqwen.vllm_plugin:register"]


def test_wheel_holds_types_entry_points_and_no_folder_named_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(
            next(name for name in names if name.endswith("entry_points.txt"))
        ).decode()
    assert "mmqwen/py.typed" in names
    assert "mmqwen_kernels/py.typed" in names
    assert not any(name.startswith("kernels/") for name in names)
    assert "mmqwen = mmqwen.cli:main" in points
    assert "mmqwen = mmqwen.vllm_plugin:register" in points
    on_disk = {
        str(path.relative_to(ROOT)) for path in (ROOT / "mmqwen").rglob("*.py")
    }
    assert on_disk <= set(names), "a subpackage is missing from the wheel"


def test_import_mmqwen_is_light():
    code = (
        "import sys, mmqwen; heavy = {'torch', 'transformers', 'vllm', 'triton', 'numpy'} "
        "& set(sys.modules); assert not heavy, heavy; assert 'MultimodalQwen3Pipeline' in dir(mmqwen)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    import mmqwen

    pytest.importorskip("vllm")
    for name in mmqwen.__all__:
        assert getattr(mmqwen, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        mmqwen.nothing_such  # noqa: B018


def test_register_is_cheap_and_reentrant_in_a_fresh_process():
    pytest.importorskip("vllm")
    code = (
        "import sys; from mmqwen.vllm_plugin import register, ARCHITECTURE; register(); register();"
        "from vllm import ModelRegistry; assert ARCHITECTURE in ModelRegistry.get_supported_archs();"
        "assert 'mmqwen.vllm_plugin.model' not in sys.modules;"
        "from transformers import AutoConfig;"
        "assert AutoConfig.for_model('multimodal_qwen3').model_type == 'multimodal_qwen3'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "already registered" not in done.stderr
