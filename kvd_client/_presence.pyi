"""The same as ``kvd.wire.presence.may_hold``, in C. Absent where the client was installed without a compiler."""

from collections.abc import Sequence

def may_hold(words: memoryview[int], namespace_id: bytes, keys: Sequence[bytes], /) -> int: ...
