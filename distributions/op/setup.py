"""`mmqwen_kernels` alone: the op, with torch, numpy and triton.

`pip install "git+URL#subdirectory=distributions/op"`, or this folder of a clone. The package
`mmqwen` brings the same files, so an environment has one of the two, not both.
"""

from pathlib import Path

from setuptools import find_packages, setup

KERNELS = "../../kernels"
ROOT = Path(__file__).resolve().parents[2]
VERSION: dict[str, str] = {}
exec((ROOT / "mmqwen" / "_version.py").read_text(), VERSION)

setup(
    name="mmqwen-kernels",
    version=VERSION["__version__"],
    description="Rows of any width projected and placed among token embeddings, in two launches",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(KERNELS),
    package_dir={"": KERNELS},
    package_data={"mmqwen_kernels": ["py.typed"]},
    install_requires=[
        "numpy>=1.26",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
    ],
)
