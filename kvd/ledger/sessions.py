"""Who may ask: the sessions, and the namespaces that they have open."""

from __future__ import annotations

from kvd.ledger.books import Books
from kvd.ledger.coverage import Grid
from kvd.ledger.index import Space
from kvd.ledger.leases import SessionBook
from kvd.ledger.room import make_room_for_namespace
from kvd.ledger.terms import Limits
from kvd.types import Namespace, SessionId
from kvd.wire.errors import InvalidRequest, LimitReached, NamespaceUnknown, SessionUnknown
from kvd.wire.identity import Identity


class Sessions:
    """The books of the sessions, by number: open ones, and ended ones whose writers are not proven gone."""

    def __init__(self, books: Books, limits: Limits, max_chunk_bytes: int) -> None:
        self._books = books
        self._limits = limits
        self._max_chunk_bytes = max_chunk_bytes
        self.books: dict[SessionId, SessionBook] = {}

    def open(self, session: SessionId, tenant: str, node: int | None = None) -> None:
        """A new session, near a memory node if that is known. Raises ``InvalidRequest`` when the number is taken."""
        if session in self.books:
            raise InvalidRequest(f"session {session} exists already")
        self.books[session] = SessionBook(session, tenant, node)

    def get(self, session: SessionId) -> SessionBook:
        """The books of an open session. Raises ``SessionUnknown``."""
        book = self.books.get(session)
        if book is None or book.closed:
            raise SessionUnknown(f"session {session} is not open")
        return book

    def get_open(self, session: SessionId, namespace_id: bytes) -> tuple[SessionBook, Space]:
        """An open session and a namespace that it has opened. Raises ``SessionUnknown``, ``NamespaceUnknown``."""
        book = self.get(session)
        space = book.spaces.get(namespace_id)
        if space is None:
            raise NamespaceUnknown("the namespace is not open in this session")
        return book, space

    def close(self, book: SessionBook) -> None:
        """No further requests. The read leases have been ended; what the session writes stays in its books."""
        book.closed = True
        for space in book.spaces.values():
            space.sessions -= 1
            self._books.forget_if_empty(space)
        book.spaces.clear()
        book.cancelled.clear()

    def open_namespace(self, book: SessionBook, identity: Identity, chunk_bytes: int) -> Namespace:
        """See ``ChunkStore.open_namespace``."""
        if not 0 < chunk_bytes <= self._max_chunk_bytes:
            raise InvalidRequest(f"chunk_bytes {chunk_bytes} is not between 1 and {self._max_chunk_bytes}")
        namespace_id = identity.namespace_id(book.tenant)
        space = self._books.spaces.get(namespace_id)
        if space is not None and space.namespace.chunk_bytes != chunk_bytes:
            raise InvalidRequest(f"chunk_bytes {chunk_bytes} differs from {space.namespace.chunk_bytes}, used before")
        if namespace_id in book.spaces:
            return book.spaces[namespace_id].namespace
        if len(book.spaces) >= self._limits.max_namespaces_per_session:
            raise LimitReached(f"the session has {len(book.spaces)} namespaces open")
        if space is None:
            space = self._new(Namespace(namespace_id, book.tenant, identity, chunk_bytes))
        space.sessions += 1
        book.spaces[namespace_id] = space
        return space.namespace

    def _new(self, namespace: Namespace) -> Space:
        identity = namespace.identity
        grid = Grid(identity.num_layers, identity.num_kv_heads)
        if not make_room_for_namespace(self._books, namespace, self._limits.max_namespaces):
            raise LimitReached(f"{self._limits.max_namespaces} namespaces are in use")
        return self._books.open_space(namespace, grid)
