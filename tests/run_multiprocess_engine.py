"""Run by test_vllm_parity: an engine in a process of its own against transformers."""

import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from engines import TOLERANCE, reference, start, worst_difference


def main() -> int:
    from vllm import SamplingParams

    checkpoint = sys.argv[1]
    torch.manual_seed(0)
    torch.manual_seed(0)
    items = {"m1": [torch.randn(3, 24), torch.randn(24)], "m2": [torch.randn(40, 40)]}
    requests = [
        {"prompt": "hello <|m1|> world <|m2|> quick <|m1|>", "multi_modal_data": items},
        {"prompt": "describe this", "multi_modal_data": items},
    ]
    outputs = start(checkpoint).generate(
        requests * 4, SamplingParams(temperature=0, max_tokens=6, logprobs=1), use_tqdm=False
    )
    model = reference(checkpoint)
    worst = max(worst_difference(output, model, items) for output in outputs)
    print("worst difference", worst)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
