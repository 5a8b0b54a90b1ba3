"""A client of LMCache's multi-process server for the load generator, in an environment with it and a CPU torch.

What an engine's worker does there without a GPU: slots in shared memory are prepared, filled or read, and committed.
The geometry of the paged caches is chosen so that a chunk of 256 tokens has the bytes that are wanted.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
from typing import Any

import torch
import zmq
from lmcache.v1.gpu_connector.utils import LayoutHints
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

CHUNK_TOKENS, BLOCK_TOKENS, HEADS, HEAD_SIZE = 256, 16, 2, 128
#: Keys and values of one layer of one chunk, 16 bits each.
LAYER_BYTES = 2 * CHUNK_TOKENS * HEADS * HEAD_SIZE * 2
TIMEOUT_S = 60.0


class LMCacheStore:
    """One instance with a tensor-parallel size of one."""

    def __init__(self, url: str, client: int, chunk_bytes: int) -> None:
        layers, rest = divmod(chunk_bytes, LAYER_BYTES)
        if rest:
            raise ValueError(f"chunks are multiples of {LAYER_BYTES} bytes")
        self._chunk_bytes, self._model = chunk_bytes, f"bench-{chunk_bytes}"
        self._instance = (os.getpid() << 8) + client
        self._requests = itertools.count()
        self._client = RequestClientFactory.create(url, context=zmq.Context())
        shape = (1, 2, HEADS, BLOCK_TOKENS, HEAD_SIZE)
        caches = {f"layer.{i}": torch.zeros(shape, dtype=torch.bfloat16) for i in range(layers)}
        context = create_transfer_context(caches, instance_id=self._instance, req_client=self._client)
        hints = LayoutHints(kv_layout="HND", num_kv_heads=HEADS, tokens_per_block=BLOCK_TOKENS, head_dim=HEAD_SIZE)
        blocks = CHUNK_TOKENS // BLOCK_TOKENS
        context.register(caches, self._model, 1, blocks, TIMEOUT_S, layout_hints=hints)
        self._transfer = context.engine_driven_context

    def put(self, keys: list[bytes], data: list[memoryview]) -> int:
        """Prepares, copies, commits."""
        key = self._key(keys)
        try:
            prepared = self._transfer.prepare_store(key, self._instance)
            if prepared is None:
                raise RuntimeError("there is no shared memory")
            targets, places = prepared
            for target, place in zip(targets, places, strict=True):
                ctypes.memmove(target.data_ptr(), _address(data[place]), self._chunk_bytes)
            stored = len(targets) if self._transfer.commit_store(key, self._instance, []) else 0
        finally:
            self._end(key)
        return stored

    def get(self, keys: list[bytes], into: list[memoryview]) -> int:
        """Looks up, prepares, copies, commits."""
        key = self._key(keys)
        try:
            found = self._lookup(key)
            if not found:
                return 0
            wanted = self._key(keys[:found], key.request_id)
            sources = self._transfer.prepare_retrieve(wanted, self._instance)
            if sources is None:
                return 0
            for source, chunk in zip(sources, into, strict=False):
                ctypes.memmove(_address(chunk), source.data_ptr(), self._chunk_bytes)
            self._transfer.commit_retrieve(wanted, self._instance)
            return len(sources)
        finally:
            self._end(key)

    def exists(self, keys: list[bytes]) -> int:
        """Looks up, which locks what is there, and lets go."""
        key = self._key(keys)
        try:
            found = self._lookup(key)
            self._client.free_lookup_locks(key.no_worker_id_version(), 1).result(timeout=TIMEOUT_S)
            return found
        finally:
            self._end(key)

    def close(self) -> None:
        """Ends the connection."""
        self._transfer.close()
        self._client.close()

    def _lookup(self, key: IPCCacheServerKey) -> int:
        self._client.lookup(key.no_worker_id_version(), 1).result(timeout=TIMEOUT_S)
        while True:
            found = self._client.query_prefetch_status(key.request_id).result(timeout=TIMEOUT_S)
            if found is not None:
                return int(found)

    def _end(self, key: IPCCacheServerKey) -> None:
        self._client.end_session(key.request_id).result(timeout=TIMEOUT_S)

    def _key(self, keys: list[bytes], request: str = "") -> IPCCacheServerKey:
        tokens = [token for key in keys for token in struct.unpack("<8I", key) * (CHUNK_TOKENS // 8)]
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            num_kv_readers=1,
            worker_id=0,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens),
            request_id=request or f"{self._instance}-{next(self._requests)}",
        )


def _address(chunk: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(chunk))


def open_store(options: dict[str, Any], client: int, data: list[memoryview], into: list[memoryview]) -> LMCacheStore:
    """``options``: ``url`` of the server."""
    return LMCacheStore(options["url"], client, len(data[0]))
