"""The namespace of an engine: everything that must be equal for its KV pages to be of use to another engine.

Read off the engine's own configuration. What cannot be identified is not shared: the functions here raise
``Unidentified`` with the reason, and the connector logs it and stays out of the way.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvd.wire.identity import Identity
from kvd_client.adapters.vllm import weights
from kvd_client.adapters.vllm.weights import Unidentified

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvd_client.adapters.vllm.meta import Geometry

#: A chunk has at most so many tokens ...
MAX_CHUNK_TOKENS = 256
#: ... and bytes, unless a single block is larger.
MAX_CHUNK_BYTES = 32 << 20

#: Ways of loading weights that read the files found in the model's directory, as they are.
_PLAIN_LOADERS = {"auto", "hf", "safetensors", "pt", "mistral", "fastsafetensors", "npcache", "gguf", "bitsandbytes"}
#: Hashes that name a prefix safely. The others are random per process, or can collide.
_SAFE_HASHES = {"sha256", "sha256_cbor"}
#: Speculation that adds no KV pages of a second model.
_DRAFTLESS = {"ngram", "ngram_gpu", "suffix"}


def choose_chunk_blocks(block_tokens: int, block_bytes: int, chunk_tokens: int | None) -> int:
    """Blocks in a chunk: ``chunk_tokens`` when given (raises Unidentified unless a multiple of a block), else the
    largest power of two within MAX_CHUNK_TOKENS and MAX_CHUNK_BYTES, at least 1. ``block_bytes`` counts all layers and
    heads."""
    if chunk_tokens is not None:
        if chunk_tokens % block_tokens:
            raise Unidentified(f"chunk_tokens = {chunk_tokens} is not a multiple of the engine's block, {block_tokens}")
        return chunk_tokens // block_tokens
    blocks = 1
    while 2 * blocks * block_tokens <= MAX_CHUNK_TOKENS and 2 * blocks * block_bytes <= MAX_CHUNK_BYTES:
        blocks *= 2
    return blocks


def check_cacheable(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raises Unidentified when pages alone do not make a usable prefix, or when this connector cannot tell."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    if not config.cache_config.enable_prefix_caching:
        raise Unidentified("vLLM's prefix caching is off, and with it the use of KV that was computed before")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups})) or "none"
        raise Unidentified(f"a hybrid model ({len(groups)} KV cache groups: {kinds}) is not cached")
    spec = groups[0].kv_cache_spec
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec) or spec.tokens_per_state != 1 or spec.non_causal:
        raise Unidentified(f"KV caches of the kind {type(spec).__name__} are not cached")
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise Unidentified("context parallelism (DCP, PCP) is not supported")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise Unidentified("calculate_kv_scales makes every process scale its KV pages by itself")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTLESS:
        raise Unidentified(f"speculative decoding with {speculative.method} keeps KV pages of a second model")
    if config.cache_config.prefix_caching_hash_algo not in _SAFE_HASHES:
        raise Unidentified(
            f"block hashes by {config.cache_config.prefix_caching_hash_algo} do not name a prefix safely: "
            f"use --prefix-caching-hash-algo sha256"
        )


def model_name(config: VllmConfig) -> str:
    """Name of the model, without the place where this machine keeps it."""
    name: str = config.model_config.model
    return name.rstrip("/").rsplit("/", 1)[-1] if Path(name).exists() else name


def weights_revision(config: VllmConfig) -> str:
    """Commit hash of a downloaded model, digest of a local one (reads all its bytes). Raises Unidentified."""
    loader = config.load_config
    how = str(getattr(loader.load_format, "value", loader.load_format))
    if how not in _PLAIN_LOADERS:
        raise Unidentified(f"weights loaded with load_format={how} cannot be identified")
    model = config.model_config
    if (local := Path(model.model)).exists():
        return weights.digest(str(local))
    commit = getattr(model.hf_config, "_commit_hash", None)
    asked = model.revision
    if not weights.is_commit(commit) or (weights.is_commit(asked) and asked != commit):
        raise Unidentified(f"the commit of {model.model} is not known")
    return str(commit)


def _config_digest(hf_config: Any) -> str:
    """Digest of the model's configuration: rope, windows, sizes, ... Where it was found does not count."""
    return hashlib.sha256(json.dumps(_facts(hf_config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _facts(value: Any) -> Any:
    """A configuration without what says where it came from."""
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if not str(k).startswith("_") and k != "transformers_version"}
        return {k: _facts(v) for k, v in kept.items()}
    return [_facts(v) for v in value] if isinstance(value, list | tuple) else value


def _seed() -> str:
    """The first link of the chain of block hashes: PYTHONHASHSEED is in it."""
    from vllm.v1.core import kv_cache_utils

    first: bytes | None = getattr(kv_cache_utils, "NONE_HASH", None)
    if not isinstance(first, bytes):
        raise Unidentified("the engine's hash seed is not known")
    return first.hex()


def _release() -> str:
    """vLLM's release without the patch number: pages of another one may be arranged differently inside."""
    from vllm import __version__

    release = re.match(r"\d+\.\d+", __version__)
    if release is None:
        raise Unidentified(f"vLLM's version is not known: {__version__}")
    return release.group()


def build_identity(
    config: VllmConfig, geometry: Geometry, revision: str, extra: Mapping[str, str] | None = None
) -> Identity:
    """The identity of this engine's cache. To be called once the engine has its hash seed. Raises Unidentified."""
    model, cache = config.model_config, config.cache_config
    lookahead = getattr(config, "num_hash_lookahead_tokens", 0)
    return Identity(
        model=model_name(config),
        weights_revision=revision,
        kv_dtype=f"{cache.cache_dtype}/{geometry.element}",
        attention_backend=geometry.attention_backend,
        platform=geometry.platform,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_sizes=geometry.head_sizes,
        block_tokens=geometry.block_tokens,
        chunk_blocks=geometry.chunk_blocks,
        page_layout=geometry.page_layout,
        hash_algorithm=f"{cache.prefix_caching_hash_algo}:{_seed()}",
        extra={
            "engine": f"vllm {_release()}",
            "config": _config_digest(model.hf_config),
            "dtype": str(model.dtype),
            "quantization": str(model.quantization),
            "byte_order": sys.byteorder,
            "hash_lookahead": str(lookahead),
            **(extra or {}),
        },
    )
