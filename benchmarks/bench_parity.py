"""vLLM's log-probabilities against those of transformers, on a trained checkpoint.

    python benchmarks/bench_parity.py --checkpoint demo-out/checkpoint    # `mmqwen demo`
    python benchmarks/bench_parity.py                                     # trains one first: 25 s

Held-out digits of the demo are served by vLLM in float32 and bfloat16, each in a process of its
own; every log-probability of a prompt's text token and of four generated ones is compared with
that of the transformers model on the same device, in the same dtype and in float32. Runs from a
checkout (PYTHONPATH=.:kernels): the plugin is registered by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_kernels import HERE, about

RESULTS = HERE / "results"
DTYPES = ("float32", "bfloat16")


def serve(checkpoint: Path, samples: list[Any], dtype: str) -> tuple[list[Any], float]:
    """vLLM's outputs, and the seconds that its start took."""
    from vllm import LLM, SamplingParams

    from mmqwen.vllm_plugin import register

    register()
    options: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
        if dtype == "float32":  # FlashAttention has no float32
            options["attention_backend"] = "TRITON_ATTN"
    begin = time.perf_counter()
    llm = LLM(model=str(checkpoint), dtype=dtype, max_model_len=512, **options)
    seconds = time.perf_counter() - begin
    sampling = SamplingParams(
        temperature=0.0, max_tokens=4, logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    return llm.generate([s.prompt for s in samples], sampling, use_tqdm=False), seconds


@torch.inference_mode()
def differences(outputs: list[Any], samples: list[Any], model: Any) -> list[float]:
    """For each prompt the largest difference of any of its log-probabilities."""
    device = model.device
    placeholders = {spec.token_id for spec in model.specs.values()}
    found = []
    for output, sample in zip(outputs, samples, strict=True):
        prompt, sampled = list(output.prompt_token_ids), output.outputs[0]
        ids = torch.tensor([[*prompt, *sampled.token_ids]], device=device)
        rows = {name: items.to(device) for name, items in sample.items.items()}
        logprobs = model(ids, embeddings=rows).logits[0].float().log_softmax(-1).cpu()
        theirs = [
            (len(prompt) + k, token, sampled.logprobs[k][token].logprob)
            for k, token in enumerate(sampled.token_ids)
        ]
        theirs += [
            (at, prompt[at], output.prompt_logprobs[at][prompt[at]].logprob)
            for at in range(1, len(prompt))
            if prompt[at] not in placeholders  # masked: -inf on both sides
        ]
        found.append(max(abs(float(logprobs[at - 1, t]) - value) for at, t, value in theirs))
    return found


def work(checkpoint: Path, dtype: str, prompts: int) -> dict[str, Any]:
    """One engine against the references."""
    import vllm

    from mmqwen.demo import digits
    from mmqwen.hf import MultimodalQwen3ForConditionalGeneration

    samples = digits.load()[1][:prompts]
    outputs, start = serve(checkpoint, samples, dtype)
    right = [
        output.outputs[0].text.strip()[:1] == str(sample.label)
        for output, sample in zip(outputs, samples, strict=True)
    ]
    result: dict[str, Any] = {
        "vllm_dtype": dtype,
        "prompts": len(samples),
        "accuracy": round(sum(right) / len(right), 4),
        "engine_start_s": round(start, 1),
        "vllm": vllm.__version__,
        "against": {},
    }
    torch.backends.cuda.matmul.allow_tf32 = False
    for against in dict.fromkeys((dtype, "float32")):
        model = MultimodalQwen3ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=getattr(torch, against)
        )
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        worst = differences(outputs, samples, model)
        result["against"][against] = {"largest": max(worst), "median": median(worst)}
    return result


def main(argv: list[str] | None = None) -> int:
    """Compare in both dtypes, print the table, write the file; 1 if an engine failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of the demo; trained anew if left out")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=175, help="engines are stopped then")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        result = work(arguments.checkpoint, arguments.worker, arguments.prompts)
        arguments.output.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)  # engines take their time to end
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = arguments.output or RESULTS / f"parity-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**about(device), "results": [], "failed": []}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            from mmqwen.demo.train import train

            checkpoint = train(Path(scratch) / "checkpoint").output
            print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
        for dtype in DTYPES:
            part = Path(scratch) / f"{dtype}.json"
            command = [sys.executable, __file__, "--checkpoint", str(checkpoint)]
            command += ["--worker", dtype, "--output", str(part)]
            command += ["--prompts", str(arguments.prompts)]
            left = arguments.seconds - (time.perf_counter() - start)
            try:
                subprocess.run(command, check=True, timeout=max(left, 1))
                report["results"].append(json.loads(part.read_text()))
            except (subprocess.SubprocessError, OSError) as error:
                report["failed"].append({"vllm_dtype": dtype, "error": str(error)[-500:]})
            output.write_text(json.dumps(report, indent=1) + "\n")
    print("| vLLM | transformers | largest | median over prompts |\n|-|-|-|-|")
    for result in report["results"]:
        for against, found in result["against"].items():
            print(
                f"| {result['vllm_dtype']} | {against} | {found['largest']:.2g} | "
                f"{found['median']:.2g} |"
            )
    for failure in report["failed"]:
        print(f"FAILED: {failure}")
    print(f"{output}, {time.perf_counter() - start:.0f} s")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
