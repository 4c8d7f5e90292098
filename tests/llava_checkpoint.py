"""A LLaVA-1.5 checkpoint of random weights, made where no hub is: real config, processor, template and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from visionselector_eval.models.backbones.llava import Llava
from visionselector_eval.models.dynamic_qwen.predictor import Predictor
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.models.visionselector import Scorer

# As in the checkpoints that lmms-eval's llava_hf loads: all images first, then the text.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIZE, PATCH, WIDTH = 112, 14, 64
FUSED: dict[str, Any] = {"vision_feature_layer": [-2, 4, 2], "token_fusion": {"layers": [-2, 4, 2]}}
"""Changes that make it a checkpoint with trained token fusion."""


def save_llava(folder: Path, *, learned: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint to `folder`.

    Parameters
    ----------
    learned: with random weights of VisionSelector's scorer and of the predictor, so that every method runs.
    changes: over the fields of `LlavaConfig`.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint()))
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(seed)
    config = LlavaConfig(
        **{
            "vision_config": CLIPVisionConfig(
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=SIZE,
                patch_size=PATCH,
                initializer_range=0.2,
            ),
            "text_config": LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=128,
                num_hidden_layers=6,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(tokenizer),
                max_position_embeddings=4096,
                initializer_range=0.2,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "image_seq_length": (SIZE // PATCH) ** 2,
            **changes,
        }
    )
    model = Llava.model_class_for(config)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.7 / parameter[0].numel() ** 0.5)
        model.get_input_embeddings().weight.normal_(0, 1)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.05,
    )
    model.save_pretrained(folder)
    if learned:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        weights = load_file(path)
        scorer, predictor = Scorer(WIDTH, WIDTH // 2), Predictor(WIDTH, 32)
        weights |= {f"visual.importance_scorer.{k}": v for k, v in scorer.state_dict().items()}
        weights |= {f"model.image_score_predictor.{k}": v for k, v in predictor.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt"})
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH * getattr(model.model.multi_modal_projector, "window", 1),
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    json.loads((folder / "config.json").read_text())
    return folder
