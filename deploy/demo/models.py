"""Small models with random weights, made on the spot: real architectures, no download.

Needs ``transformers`` and ``tokenizers``, which every vLLM brings. The weights are drawn wider than a trainer would
draw them, so that attention is sharp and what comes out depends on the whole prompt: an engine that reads wrong KV
pages answers differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Kinds of model that ``make_model`` knows.
KINDS = ("llama", "qwen2", "mla", "gemma3")


@dataclass(frozen=True)
class Size:
    """Dimensions of a model. ``window`` (tokens) is used by gemma3 only; mla has one latent head of 512 + 64."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    intermediate: int = 512
    vocabulary: int = 512
    max_tokens: int = 2048
    window: int = 128


def make_model(kind: str, directory: str | Path, *, seed: int = 0, dtype: str = "bfloat16", **size: int) -> Path:
    """Writes a model of ``kind`` into ``directory`` and returns its path; another ``seed`` gives other weights.

    ``size`` holds fields of ``Size``. A directory that already holds exactly this model is left as it is. Raises
    ValueError for an unknown kind and TypeError for an unknown field.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(KINDS)}")
    directory = Path(directory)
    wanted = Size(**size)
    recipe = {"kind": kind, "seed": seed, "dtype": dtype, **asdict(wanted)}
    # Beside the directory, not in it: nothing but the weights may tell two seeds apart.
    marker = directory.parent / f"{directory.name}.recipe.json"
    if marker.exists() and json.loads(marker.read_text()) == recipe:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    _write_weights(_CONFIGS[kind](wanted), directory, seed, dtype)
    _write_tokenizer(wanted, directory)
    marker.write_text(json.dumps(recipe, indent=1))
    return directory


def _common(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": size.max_tokens,
        "initializer_range": 1.5 / size.hidden**0.5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _llama(size: Size) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_common(size))


def _qwen2(size: Size) -> PretrainedConfig:
    from transformers import Qwen2Config

    return Qwen2Config(**_common(size))


def _mla(size: Size) -> PretrainedConfig:
    from transformers import DeepseekV3Config

    fields = _common(size) | {"num_key_value_heads": size.heads}
    return DeepseekV3Config(
        **fields,
        first_k_dense_replace=size.layers,  # every layer dense: the experts are not what is looked at here
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        moe_intermediate_size=size.intermediate,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )


def _gemma3(size: Size) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(
        **_common(size),
        head_dim=size.hidden // size.heads,
        query_pre_attn_scalar=4,  # sharp attention, as above: its normed queries do not grow with the weights
        sliding_window=size.window,
        layer_types=[kinds[i % 2] for i in range(size.layers)],
    )


_CONFIGS: dict[str, Callable[[Size], PretrainedConfig]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mla": _mla,
    "gemma3": _gemma3,
}


def _write_weights(config: PretrainedConfig, directory: Path, seed: int, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None  # random weights say "end" at random: length is the caller's business
    model.save_pretrained(directory)


def _write_tokenizer(size: Size, directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += [f"w{i}" for i in range(len(words), size.vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
