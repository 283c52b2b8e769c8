"""Write a model of Qwen3-8B's shape with seeded random weights: ``python make_model.py DIR [--shape tiny]``.

Runs inside vLLM's environment (torch, transformers). Nothing is downloaded: the tokenizer and chat template are
those of ``tests/vllm/make_model.py``, trained on the standard library's sources, so that the vocabulary has 8,192
entries instead of 151,936; every layer has the real shape. The weights' deviation, 0.06 / sqrt(hidden / 512), makes
replies depend on prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch  # type: ignore[import-not-found,unused-ignore]
from transformers import Qwen3Config, Qwen3ForCausalLM  # type: ignore[import-not-found,unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "vllm"))
from make_model import SEED, VOCAB_SIZE, write_tokenizer  # type: ignore[import-not-found,unused-ignore]

SHAPES = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
"""``tiny`` is for trying the script where there is no GPU."""


def write(folder: Path, shape: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    sizes = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=40960,
        initializer_range=0.06 / (sizes["hidden_size"] / 512) ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        **sizes,
    )
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    (folder / "shape.json").write_text(json.dumps({"shape": shape, "seed": SEED}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    options = parser.parse_args()
    write(options.folder, options.shape)
