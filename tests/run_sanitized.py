"""The native helper's tests under AddressSanitizer and UBSan: `make fuzz` runs this.

    python tests/run_sanitized.py [pytest's arguments]

The helper is compiled with both, and the sanitizer's library is loaded before Python. Needs gcc, or
a clang whose library can be preloaded; without a compiler it says so and stops with 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from native_builds import VARIABLE, build, compiler  # noqa: E402

FLAGS = (
    "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-DNO_CLONES",
)  # fmt: skip


def libraries(command: list[str]) -> list[str]:
    """The compiler's AddressSanitizer, and the C++ library, whose exceptions it has to know of."""
    found = []
    for names in (("libasan.so", "libclang_rt.asan-x86_64.so"), ("libstdc++.so.6",)):
        for name in names:
            done = subprocess.run(
                [*command, f"-print-file-name={name}"], capture_output=True, text=True, check=False
            )
            if Path(done.stdout.strip()).is_absolute():
                found.append(done.stdout.strip())
                break
    return found


def main() -> int:
    command = compiler()
    preloaded = libraries(command) if command else []
    if len(preloaded) < 2:
        print("no C compiler with AddressSanitizer: the native helper was not sanitized")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            VARIABLE: str(build(Path(folder), FLAGS)),
            "LD_PRELOAD": " ".join(preloaded),
            # Python and torch leak on exit by design; only what the helper does is looked at.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        arguments = sys.argv[1:] or ["-m", "fuzz or not fuzz"]
        tests = str(HERE / "test_native.py")
        return subprocess.call(
            [sys.executable, "-m", "pytest", "-q", "-s", tests, *arguments], env=environment
        )


if __name__ == "__main__":
    sys.exit(main())
