"""Build the embedded checkpoint: a Qwen2.5-VL of 0.5 M parameters that runs anywhere in milliseconds.

`python -m visionselector_eval.models.tiny.build FOLDER` writes it from nothing, deterministically. The weights are
random (seeded), scaled so that the greedy answers depend on the picture and the question: every code path of the real
thing runs, and the scores of a sweep mean nothing. The checkpoint holds a VisionSelector scorer beside the backbone,
where a released VisionSelector checkpoint holds it, and Dynamic-Qwen's predictor.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor

log = logging.getLogger(__name__)

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The prompt layout of the Qwen2.5-VL family: ChatML, a default system turn, one pad token for each picture or video.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 144 * 28 * 28,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every text is its UTF-8 bytes, plus the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=32768,
    )


WIDTH = 64  # of the LLM and of the vision tower


def config(tokens: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """LLM: width 64, 4 layers. Vision tower: width 64, 4 blocks, full attention in blocks 1 and 3."""
    ids: dict[str, Any] = {
        name: tokens.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    common = {"bos_token_id": None, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": True,
            **common,
        },
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        **common,
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill `module` in place with seeded weights of a size at which attention and answers depend on the input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            elif "embed_tokens" in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = math.prod(parameter.shape[1:])
                parameter.copy_(1.5 / math.sqrt(fan_in) * torch.randn(parameter.shape, generator=generator))


def predictor_weights(width: int = WIDTH, seed: int = 2) -> dict[str, torch.Tensor]:
    """Seeded weights of a predictor for `dynamic_qwen`, bfloat16, by their names in a checkpoint of that width."""
    predictor = Predictor(width, width // 4)
    randomise(predictor, seed)
    return {f"model.{MARK}{name}": tensor.bfloat16() for name, tensor in predictor.state_dict().items()}


def build(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint (weights in bfloat16, tokenizer, processors, chat template) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizer()
    cfg = config(tokens)
    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration(cfg)
    randomise(model, seed)
    with (
        torch.no_grad()
    ):  # a longer vector of the end token makes answers end, after a few tokens and at different ones
        model.get_input_embeddings().weight[tokens.eos_token_id] *= 3
    # Released Qwen2.5 checkpoints carry a repetition penalty: keep one, so that every test meets it.
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.05,
        eos_token_id=[tokens.eos_token_id, tokens.pad_token_id],
        pad_token_id=tokens.pad_token_id,
    )
    model.bfloat16().save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")
    video = {**IMAGE_PROCESSOR, "video_processor_type": "Qwen2VLVideoProcessor"}
    del video["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")

    width = WIDTH
    scorer = {
        f"visual.importance_scorer.{name}.{part}": torch.empty(shape)
        for name in ("q_proj", "k_proj")
        for part, shape in (("weight", (width // 2, width)), ("bias", (width // 2,)))
    }
    generator = torch.Generator().manual_seed(seed + 1)
    for tensor in scorer.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(width))
    weights = folder / "model.safetensors"
    learned = {k: v.to(torch.bfloat16) for k, v in scorer.items()} | predictor_weights(width, seed + 2)
    save_file({**load_file(weights), **learned}, weights, metadata={"format": "pt"})
    log.info("wrote %s: %d parameters", folder, model.num_parameters())


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint, e.g. models/tiny/checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    build(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
