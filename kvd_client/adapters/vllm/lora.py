"""LoRA adapters in the keys of chunks.

vLLM's block hashes hold the name and the path of a request's adapter, not its weights: two engines that found different
weights under one path would exchange pages. So the key of such a request's chunks also holds a digest of the adapter's
bytes. Until it is known, and when the files have changed since (who can say which of the two the engine has loaded?),
the request shares nothing.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvd_client.adapters.vllm import weights
from kvd_client.adapters.vllm.log import complain
from kvd_client.adapters.vllm.weights import Unidentified

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

#: Most adapters that are told apart; requests of further ones share nothing.
MAX_ADAPTERS = 4096

#: An adapter's weights, and the configuration that says how they are scaled.
SUFFIXES = (*weights.SUFFIXES, ".json")

_Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Adapter:
    signature: _Signature
    digest: Future[bytes]


class Adapters:
    """The adapters that requests have named so far. Called on the engine's thread; files are read on another."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], _Adapter] = {}
        self._salts: dict[str, bytes | None] = {}
        self._reader = ThreadPoolExecutor(1, "kvd-lora")

    def salt(self, request: Request) -> bytes | None:
        """What the keys of this request are salted with: nothing without an adapter, 32 bytes with one, None while that
        is not known. The answer stays the same once it is known, until the request's ``end``."""
        lora = request.lora_request
        if lora is None:
            return b""
        salt = self._salts.get(request.request_id)
        if salt is None:
            salt = self._salts[request.request_id] = self._digest(lora)
        return salt

    def key(self, request: Request, block_hash: bytes) -> bytes:
        """The key of the chunk whose last block has this hash. Only for requests with a ``salt``."""
        salt = self.salt(request)
        assert salt is not None
        return hashlib.sha256(salt + block_hash).digest() if salt else bytes(block_hash)

    def end(self, request_id: str) -> None:
        """The request is gone."""
        self._salts.pop(request_id, None)

    def close(self) -> None:
        """Reads no further adapters."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _digest(self, lora: LoRARequest) -> bytes | None:
        name, path = (lora.lora_int_id, lora.lora_path), lora.lora_path
        try:
            signature = weights.signature(path, SUFFIXES)
            adapter = self._known.get(name)
            if adapter is None:
                if len(self._known) >= MAX_ADAPTERS:
                    return None
                digest = self._reader.submit(lambda: hashlib.sha256(weights.digest(path, SUFFIXES).encode()).digest())
                adapter = self._known[name] = _Adapter(signature, digest)
            if adapter.signature != signature:
                raise Unidentified(f"the files of {path} have changed since the engine first used them")
            return adapter.digest.result(timeout=0) if adapter.digest.done() else None
        except Unidentified as error:
            complain("lora", "kvd: requests with the adapter %s share nothing: %s", path, error)
            return None
