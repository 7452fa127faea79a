"""`mmqwen.client` alone: what it imports of the package, and numpy.

`pip install "git+URL#subdirectory=distributions/client"`, or this folder of a clone. It holds files
of the package `mmqwen`, so an environment has one of the two, not both.
"""

import ast
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSION: dict[str, str] = {}
exec((ROOT / "mmqwen" / "_version.py").read_text(), VERSION)


def file_of(module: str) -> Path | None:
    """A module's file; None of what is no module of the package, as a name within one."""
    path = ROOT.joinpath(*module.split("."))
    found = [path / "__init__.py", path.with_suffix(".py")]
    return next((file for file in found if file.is_file()), None)


def needed(start: str) -> set[str]:
    """The modules of the package that one imports when it is imported, and what these do."""
    found: set[str] = set()
    left = [start]
    while left:
        module = left.pop()
        file = file_of(module)
        if module.split(".")[0] != "mmqwen" or file is None or module in found:
            continue
        found.add(module)
        left.append(module.rpartition(".")[0])
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


MODULES = needed("mmqwen.client")
PACKAGES = sorted(m for m in MODULES if file_of(m).name == "__init__.py")


class BuildNeeded(build_py):
    """Only the modules that the client imports."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        every = super().find_package_modules(package, package_dir)
        name = {"__init__": ""}
        return [
            one for one in every if f"{one[0]}.{name.get(one[1], one[1])}".strip(".") in MODULES
        ]


setup(
    name="mmqwen-client",
    version=VERSION["__version__"],
    description="Rows of embeddings as chat message parts for a server of mmqwen's: numpy alone",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=PACKAGES,
    package_dir={name: f"../../{name.replace('.', '/')}" for name in PACKAGES},
    package_data={"mmqwen": ["py.typed"]},
    install_requires=["numpy>=1.26"],
    cmdclass={"build_py": BuildNeeded},
)
