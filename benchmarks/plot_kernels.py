"""Draw a result of `bench_kernels.py`, and make the table of docs/kernels.md.

    python benchmarks/plot_kernels.py benchmarks/results/kernels-X.json --out docs/images \\
        --docs docs/kernels.md

The table replaces what stands between `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEERS = ("vllm", "compiled", "torch", "graph", "grouped", "plan_torch")
KINDS = {"device_us": "device", "host_us": "host", "latency_us": "latency"}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Point = dict[str, Any]


def ours_of(point: Point) -> str:
    """The provider that stands for us: the kernels, or on a CPU the torch backend."""
    return "ours" if "ours" in point["providers"] else "plan_torch"


def median(point: Point, name: str, kind: str) -> float:
    value: float = point["providers"][name][kind]["p50"]
    return value


def best_peer(point: Point, kind: str) -> str:
    """The peer with the least median; on a CPU "plan_torch" is ours, no peer."""
    names = [n for n in PEERS if n in point["providers"] and n != ours_of(point)]
    return min(names, key=lambda n: median(point, n, kind))


def ratio(point: Point, kind: str) -> float:
    """Ours over the best peer's."""
    ours = median(point, ours_of(point), kind)
    return ours / median(point, best_peer(point, kind), kind)


def draw_ratios(report: dict[str, Any], path: Path) -> None:
    """Ours over the best peer's, all points, for each kind of time."""
    fig, axes = plt.subplots(1, len(KINDS), figsize=(9, 3.4), sharey=True)
    sizes = sorted({p["size"] for p in report["points"]})
    for ax, (kind, word) in zip(axes, KINDS.items(), strict=True):
        for size, marker in zip(sizes, "ox+^", strict=False):
            mine = [p for p in report["points"] if p["size"] == size]
            ax.scatter(
                [p["rows"] for p in mine], [ratio(p, kind) for p in mine], s=16, marker=marker,
                label=f"D = H = {size}",
            )  # fmt: skip
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", xlabel="rows in the step", title=word)
    highest = max(ratio(p, kind) for p in report["points"] for kind in KINDS)
    axes[0].set(ylabel="ours over the best peer's", ylim=(0, 1.05 * highest))
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def table(report: dict[str, Any]) -> str:
    """The table, in Markdown."""
    where = report["gpu"] if report["gpu"] != "none" else f"no GPU, {report['cpu']}"
    lines = [
        f"{where}, torch {report['torch']}, triton {report['triton']}, {report['dtype']}, commit "
        f"`{report['commit'][:12]}`, {report['date'][:10]}. Medians in us; in brackets the best "
        "peer's and its name.",
        "",
        "| D = H | modalities | rows | text | floor | device | kernels alone | host | latency |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for p in report["points"]:
        cells = {}
        for kind in KINDS:
            peer = best_peer(p, kind)
            cells[kind] = (
                f"{median(p, ours_of(p), kind):.0f} ({median(p, peer, kind):.0f} {peer}: "
                f"{ratio(p, kind):.2f})"
            )
        alone = f"{median(p, 'kernels', 'device_us'):.0f}" if "kernels" in p["providers"] else ""
        lines.append(
            f"| {p['size']} | {p['modalities']} | {p['rows']} | {p['text']} | "
            f"{p['floor_us']:.0f} | {cells['device_us']} | {alone} | {cells['host_us']} | "
            f"{cells['latency_us']} |"
        )
    return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    whole = page.read_text()
    if BEGIN not in whole or END not in whole:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    before, rest = whole.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the PNG; the result's own by default")
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    report = json.loads(args.result.read_text())
    out = args.out or args.result.parent
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kernels-ratios.png"
    draw_ratios(report, path)
    print(path)
    text = table(report)
    print(text)
    if args.docs:
        put_into(args.docs, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
