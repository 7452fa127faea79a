"""Your own encoder's rows in a prompt, offline: build a checkpoint, then generate.

    python examples/basic_usage.py --base Qwen/Qwen3-0.6B

`--base` is any Qwen3, Qwen3-MoE or Qwen2 text model, a folder or a hub id. The projectors are
fresh, so the answers say nothing about the rows until you train them (`mmqwen train`).
"""

import argparse

import numpy as np

from mmqwen import MultimodalQwen3Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    series = rng.standard_normal((5, 768), dtype=np.float32)  # five windows of a time series
    user = rng.standard_normal(512, dtype=np.float32)  # one vector for a user

    pipeline = MultimodalQwen3Pipeline(
        arguments.base,
        modalities={"series": 768, "user": 512},
        engine=arguments.engine,
        max_model_len=512,
    )
    answer = pipeline.generate(
        {
            "text": "Sensor: <|series|> Operator: <|user|> Is anything wrong?",
            "multimodal_data": {
                "multimodal_embeddings": {"series": [series], "user": [user]},
            },
        },
        max_tokens=arguments.max_tokens,
    )
    print(answer)

    for piece in pipeline.chat(
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What does this series show?"},
                    {"type": "series", "series": series},
                ],
            }
        ],
        max_tokens=arguments.max_tokens,
        stream=True,
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
