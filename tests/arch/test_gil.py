"""No call in the product copies payload while it holds the interpreter's lock: one such call stops every lookup.

What source can prove is checked here: calls that never belong in the product, and copies of what bears the name of
payload. ``ctypes.memmove``, ``recvmsg_into``, ``sendmsg``, ``preadv`` and xxhash let go of the lock and do the work.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.arch.sources import is_in, written

#: Slice assignments that move no payload: (module, what is assigned to).
SLICES = {
    ("kvd.memory.slabs", "self._regions"),  # a list
    ("kvd_client.copier_cupy", "ids.host"),  # a tensor of block ids; torch lets go of the lock
}

#: Names that payload goes by.
PAYLOAD = {"buffer", "data", "mapping", "memory", "payload", "segment", "slot", "source", "staging", "target", "view"}

#: Objects over mapped memory, by the names they have here, and their methods that copy or wait under the lock.
MAPPINGS = {"_map", "_table", "mapping"}
MAPPING_METHODS = {"find", "flush", "madvise", "move", "read", "readline", "resize", "rfind", "write"}

#: Codecs and packers that keep the lock for all or half of a call.
CODECS = {"blosc", "blosc2", "lz4", "msgpack"}

#: Functions that copy what they are given under the lock, whatever they belong to.
COPIERS = {"BytesIO", "bytearray", "bytes", "extend", "from_buffer_copy", "frombytes"}

#: What may be called through ``ctypes.pythonapi``, which keeps the lock.
UNDER_THE_LOCK = {"PyObject_GetBuffer", "PyBuffer_Release"}


def findings(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """Lines of module ``name`` that may copy payload under the lock, and why."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if _is_slice(target) and (name, ast.unparse(target.value)) not in SLICES:  # type: ignore[attr-defined]
                    yield node.lineno, "assignment to a slice: ctypes.memmove, or name it in SLICES if it is no memory"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, why) for why in _wrong_call(node))
        elif isinstance(node, ast.Attribute):
            yield from ((node.lineno, why) for why in _wrong_attribute(node))
        elif isinstance(node, ast.Name) and node.id == "MAP_POPULATE":
            yield node.lineno, "MAP_POPULATE: mmap takes the memory under the lock"


def _is_slice(target: ast.AST) -> bool:
    return isinstance(target, ast.Subscript) and any(isinstance(part, ast.Slice) for part in ast.walk(target.slice))


def _wrong_call(call: ast.Call) -> Iterator[str]:
    function = call.func
    base, _, name = ast.unparse(function).rpartition(".")
    copied: list[ast.expr] = call.args if name in COPIERS else []
    if isinstance(function, ast.Attribute) and name == "hex":
        copied = [function.value]
    if name == "join" and base.startswith(("b'", 'b"')):
        copied = [argument for argument in call.args if not isinstance(argument, ast.GeneratorExp)]  # of what it makes
    if found := {word for argument in copied for word in _words(argument)} & PAYLOAD:
        yield f"{name}() of {', '.join(sorted(found))} copies under the lock"
    if not isinstance(function, ast.Attribute):
        return
    if function.attr in ("tobytes", "tolist"):
        yield f".{function.attr}() copies under the lock"
    if function.attr == "madvise" and base not in ("syscalls", "_libc"):
        yield "mmap.madvise() keeps the lock while the kernel works: kvd.memory.syscalls"
    if base.split(".")[-1] in MAPPINGS and function.attr in MAPPING_METHODS:
        yield f".{function.attr}() of a mapping keeps the lock"
    if function.attr == "string_at":
        size = call.args[1] if len(call.args) == 2 else None
        if not (isinstance(size, ast.Attribute) and size.attr == "size") and not isinstance(size, ast.Constant):
            yield "string_at() of anything but a header copies under the lock"


def _wrong_attribute(attribute: ast.Attribute) -> Iterator[str]:
    if attribute.attr == "MAP_POPULATE":
        yield "MAP_POPULATE: mmap takes the memory under the lock"
    if attribute.attr in ("PyDLL", "pydll"):
        yield "ctypes.PyDLL calls under the lock: ctypes.CDLL does not"
    if ast.unparse(attribute.value).endswith("pythonapi") and attribute.attr not in UNDER_THE_LOCK:
        yield "ctypes.pythonapi calls under the lock"


def _is_length(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len"


def _words(node: ast.AST) -> Iterator[str]:
    """The words of every name in an expression: ``slot`` and ``data`` of ``self._slot.data``, sizes left out, and what
    is only asked."""
    beside = {
        inner
        for part in ast.walk(node)
        for asked in ([part.test] if isinstance(part, ast.IfExp) else [part] if _is_length(part) else [])
        for inner in ast.walk(asked)
    }
    for part in ast.walk(node):
        if part in beside:
            continue
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        words = name.lower().strip("_").split("_")
        if words[-1] not in ("bytes", "size", "length", "count", "id"):
            yield from words
            yield from (word.removesuffix("s") for word in words if word != "slots")  # that is how many


def test_no_payload_is_copied_under_the_interpreters_lock() -> None:
    wrong = [
        f"{module.where}:{line}: {why}"
        for module in written("kvd", "kvd_client")
        for line, why in findings(module.tree, module.name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "self.data[a:b] = chunk",
        "view[:] = other",
        "slots[0][1:2] += x",
        "bytes(self._segment.data[a:b])",
        "bytes(path.view(location, length))",
        "bytearray(payload)",
        "out = bytes(buffers[0])",
        "bytes(payload if len(payload) else nothing)",
        "view.tobytes()",
        "view.hex()",
        "b''.join(buffers)",
        "io.BytesIO(payload)",
        "out.extend(self._staging)",
        "array.frombytes(memory)",
        "kind.from_buffer_copy(segment)",
        "mapping.madvise(mmap.MADV_WILLNEED)",
        "self._map.madvise(23)",
        "self._map.read(n)",
        "self._map.move(a, b, n)",
        "self._map.flush()",
        "mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)",
        "ctypes.string_at(address, length)",
        "ctypes.PyDLL(None).memcpy(a, b, n)",
        "ctypes.pythonapi.PyBytes_FromStringAndSize(address, n)",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert list(findings(ast.parse(line), "kvd.anywhere"))


@pytest.mark.parametrize(
    "line",
    [
        "syscalls.madvise(address, length, 23)",
        "ctypes.memmove(slot + offset, address, length)",
        "bytes(TOKEN_BYTES)",
        "bytearray(PIECE_BYTES)",
        "bytearray(layout.slot_bytes)",
        "bytearray(CHECKSUM.size * len(payloads))",
        "bytearray(0 if payload is None else PIECE_BYTES)",
        "b''.join(HEADER.pack(each) for each in segments)",
        "os.path.join(SHARED_MEMORY, name)",
        "key.hex()",
        "self._words[at] = generation",
        "part = memory[a:b]",
        "mmap.mmap(fd, size)",
        "ctypes.string_at(table_address, HEADER.size)",
    ],
)
def test_the_lint_lets_pass(line: str) -> None:
    assert not list(findings(ast.parse(line), "kvd.anywhere"))


def test_nothing_that_was_sent_is_unpickled_or_evaluated() -> None:
    wrong = [
        f"{module.where}:{found.line}: {found.target}"
        for module in written("kvd", "kvd_client")
        for found in module.imports()
        if found.target.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle")
    ]
    wrong += [
        f"{module.where}:{node.lineno}: {node.func.id}"
        for module in written("kvd", "kvd_client")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
    ]
    assert wrong == []


def test_no_codec_that_keeps_the_lock_is_used() -> None:
    wrong = [
        f"{module.where}:{found.line}: {found.target}"
        for module in written("kvd", "kvd_client")
        for found in module.imports()
        if found.target.split(".")[0] in CODECS
    ]
    assert wrong == []


def test_every_exception_of_the_slice_rule_is_still_needed() -> None:
    used = {
        (module.name, ast.unparse(target.value))  # type: ignore[attr-defined]
        for module in written("kvd", "kvd_client")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if _is_slice(target)
    }
    assert used == SLICES
    assert all(is_in(name, "kvd") or is_in(name, "kvd_client") for name, _ in SLICES)
