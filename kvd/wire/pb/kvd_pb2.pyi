from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReserveStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESERVE_STATUS_UNSPECIFIED: _ClassVar[ReserveStatus]
    RESERVE_STATUS_GRANTED: _ClassVar[ReserveStatus]
    RESERVE_STATUS_PRESENT: _ClassVar[ReserveStatus]
    RESERVE_STATUS_BUSY: _ClassVar[ReserveStatus]
    RESERVE_STATUS_NO_ROOM: _ClassVar[ReserveStatus]
    RESERVE_STATUS_NO_PARENT: _ClassVar[ReserveStatus]

class CommitStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMIT_STATUS_UNSPECIFIED: _ClassVar[CommitStatus]
    COMMIT_STATUS_STORED: _ClassVar[CommitStatus]
    COMMIT_STATUS_PARTIAL: _ClassVar[CommitStatus]
    COMMIT_STATUS_WAITING_PARENT: _ClassVar[CommitStatus]
    COMMIT_STATUS_FAILED: _ClassVar[CommitStatus]
RESERVE_STATUS_UNSPECIFIED: ReserveStatus
RESERVE_STATUS_GRANTED: ReserveStatus
RESERVE_STATUS_PRESENT: ReserveStatus
RESERVE_STATUS_BUSY: ReserveStatus
RESERVE_STATUS_NO_ROOM: ReserveStatus
RESERVE_STATUS_NO_PARENT: ReserveStatus
COMMIT_STATUS_UNSPECIFIED: CommitStatus
COMMIT_STATUS_STORED: CommitStatus
COMMIT_STATUS_PARTIAL: CommitStatus
COMMIT_STATUS_WAITING_PARENT: CommitStatus
COMMIT_STATUS_FAILED: CommitStatus

class ClientNote(_message.Message):
    __slots__ = ("hello", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_min", "protocol_max", "client_name", "client_version", "pid", "ticket", "numa_node")
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    protocol_min: int
    protocol_max: int
    client_name: str
    client_version: str
    pid: int
    ticket: bytes
    numa_node: int
    def __init__(self, protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., client_name: _Optional[str] = ..., client_version: _Optional[str] = ..., pid: _Optional[int] = ..., ticket: _Optional[bytes] = ..., numa_node: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence", "missed_lookups", "missed_chunks")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MISSED_LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    MISSED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    missed_lookups: int
    missed_chunks: int
    def __init__(self, sequence: _Optional[int] = ..., missed_lookups: _Optional[int] = ..., missed_chunks: _Optional[int] = ...) -> None: ...

class ServerNote(_message.Message):
    __slots__ = ("welcome", "draining")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    draining: Draining
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "session_token", "daemon_id", "daemon_version", "heartbeat_interval_ms", "read_lease_ms", "data_port", "max_chunks_per_request", "tenant", "max_chunk_bytes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DAEMON_ID_FIELD_NUMBER: _ClassVar[int]
    DAEMON_VERSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    READ_LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNKS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session_token: bytes
    daemon_id: int
    daemon_version: str
    heartbeat_interval_ms: int
    read_lease_ms: int
    data_port: int
    max_chunks_per_request: int
    tenant: str
    max_chunk_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., session_token: _Optional[bytes] = ..., daemon_id: _Optional[int] = ..., daemon_version: _Optional[str] = ..., heartbeat_interval_ms: _Optional[int] = ..., read_lease_ms: _Optional[int] = ..., data_port: _Optional[int] = ..., max_chunks_per_request: _Optional[int] = ..., tenant: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("format_version", "model", "weights_revision", "kv_dtype", "attention_backend", "platform", "num_layers", "num_kv_heads", "head_sizes", "block_tokens", "chunk_blocks", "page_layout", "hash_algorithm", "extra")
    class ExtraEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_REVISION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PAGE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HASH_ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    model: str
    weights_revision: str
    kv_dtype: str
    attention_backend: str
    platform: str
    num_layers: int
    num_kv_heads: int
    head_sizes: str
    block_tokens: int
    chunk_blocks: int
    page_layout: str
    hash_algorithm: str
    extra: _containers.ScalarMap[str, str]
    def __init__(self, format_version: _Optional[int] = ..., model: _Optional[str] = ..., weights_revision: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., attention_backend: _Optional[str] = ..., platform: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_sizes: _Optional[str] = ..., block_tokens: _Optional[int] = ..., chunk_blocks: _Optional[int] = ..., page_layout: _Optional[str] = ..., hash_algorithm: _Optional[str] = ..., extra: _Optional[_Mapping[str, str]] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("identity", "chunk_bytes")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    chunk_bytes: int
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id",)
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "keys", "skip", "again")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    skip: int
    again: bool
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., skip: _Optional[int] = ..., again: bool = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("offsets", "generations", "segments", "promoting", "writing")
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PROMOTING_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    promoting: int
    writing: int
    def __init__(self, offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., promoting: _Optional[int] = ..., writing: _Optional[int] = ...) -> None: ...

class ReserveItem(_message.Message):
    __slots__ = ("key", "parent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "items")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: int
    items: _containers.RepeatedCompositeFieldContainer[ReserveItem]
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., items: _Optional[_Iterable[_Union[ReserveItem, _Mapping]]] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("statuses", "offsets", "generations", "segments")
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[ReserveStatus]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, statuses: _Optional[_Iterable[_Union[ReserveStatus, str]]] = ..., offsets: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ...) -> None: ...

class Stripe(_message.Message):
    __slots__ = ("layer_begin", "layer_end", "head_begin", "head_end")
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    def __init__(self, layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., head_begin: _Optional[int] = ..., head_end: _Optional[int] = ...) -> None: ...

class CommitItem(_message.Message):
    __slots__ = ("key", "stripes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STRIPES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    stripes: _containers.RepeatedCompositeFieldContainer[Stripe]
    def __init__(self, key: _Optional[bytes] = ..., stripes: _Optional[_Iterable[_Union[Stripe, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "items")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: int
    items: _containers.RepeatedCompositeFieldContainer[CommitItem]
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., items: _Optional[_Iterable[_Union[CommitItem, _Mapping]]] = ...) -> None: ...

class CommitResult(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: CommitStatus
    def __init__(self, status: _Optional[_Union[CommitStatus, str]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[CommitResult]
    def __init__(self, results: _Optional[_Iterable[_Union[CommitResult, _Mapping]]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("namespace_id", "lease_id", "keys")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    lease_id: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: int
    def __init__(self, aborted: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: int
    def __init__(self, released: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewResult(_message.Message):
    __slots__ = ("lease_id", "alive")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    alive: bool
    def __init__(self, lease_id: _Optional[int] = ..., alive: bool = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[RenewResult]
    def __init__(self, results: _Optional[_Iterable[_Union[RenewResult, _Mapping]]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TenantStats(_message.Message):
    __slots__ = ("tenant", "chunks", "bytes", "sessions", "disk_chunks", "disk_bytes", "pinned_chunks", "share")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DISK_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    chunks: int
    bytes: int
    sessions: int
    disk_chunks: int
    disk_bytes: int
    pinned_chunks: int
    share: ShareStats
    def __init__(self, tenant: _Optional[str] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., disk_chunks: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., pinned_chunks: _Optional[int] = ..., share: _Optional[_Union[ShareStats, _Mapping]] = ...) -> None: ...

class NamespaceStats(_message.Message):
    __slots__ = ("namespace_id", "tenant", "model", "chunk_bytes", "chunks", "bytes", "disk_chunks", "disk_bytes", "pinned_chunks", "share")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    tenant: str
    model: str
    chunk_bytes: int
    chunks: int
    bytes: int
    disk_chunks: int
    disk_bytes: int
    pinned_chunks: int
    share: ShareStats
    def __init__(self, namespace_id: _Optional[bytes] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., chunk_bytes: _Optional[int] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., disk_chunks: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., pinned_chunks: _Optional[int] = ..., share: _Optional[_Union[ShareStats, _Mapping]] = ...) -> None: ...

class ShareStats(_message.Message):
    __slots__ = ("soft_bytes", "hard_bytes")
    SOFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    soft_bytes: int
    hard_bytes: int
    def __init__(self, soft_bytes: _Optional[int] = ..., hard_bytes: _Optional[int] = ...) -> None: ...

class SessionStats(_message.Message):
    __slots__ = ("client", "peer", "tenant", "path", "age_s", "read_leases", "write_leases", "members", "numa_node")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    READ_LEASES_FIELD_NUMBER: _ClassVar[int]
    WRITE_LEASES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    client: str
    peer: str
    tenant: str
    path: str
    age_s: float
    read_leases: int
    write_leases: int
    members: int
    numa_node: int
    def __init__(self, client: _Optional[str] = ..., peer: _Optional[str] = ..., tenant: _Optional[str] = ..., path: _Optional[str] = ..., age_s: _Optional[float] = ..., read_leases: _Optional[int] = ..., write_leases: _Optional[int] = ..., members: _Optional[int] = ..., numa_node: _Optional[int] = ...) -> None: ...

class PoolStats(_message.Message):
    __slots__ = ("bytes", "free_bytes", "ready_bytes", "writing_bytes", "quarantined_bytes", "idle_slot_bytes", "backing", "populated_bytes", "unverified_chunks", "recovery", "nodes")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    READY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BACKING_FIELD_NUMBER: _ClassVar[int]
    POPULATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNVERIFIED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    free_bytes: int
    ready_bytes: int
    writing_bytes: int
    quarantined_bytes: int
    idle_slot_bytes: int
    backing: str
    populated_bytes: int
    unverified_chunks: int
    recovery: RecoveryStats
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStats]
    def __init__(self, bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., ready_bytes: _Optional[int] = ..., writing_bytes: _Optional[int] = ..., quarantined_bytes: _Optional[int] = ..., idle_slot_bytes: _Optional[int] = ..., backing: _Optional[str] = ..., populated_bytes: _Optional[int] = ..., unverified_chunks: _Optional[int] = ..., recovery: _Optional[_Union[RecoveryStats, _Mapping]] = ..., nodes: _Optional[_Iterable[_Union[NodeStats, _Mapping]]] = ...) -> None: ...

class NodeStats(_message.Message):
    __slots__ = ("node", "bytes", "used_bytes")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    node: int
    bytes: int
    used_bytes: int
    def __init__(self, node: _Optional[int] = ..., bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ...) -> None: ...

class RecoveryStats(_message.Message):
    __slots__ = ("warm", "reason", "chunks", "skipped", "seconds")
    class SkippedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WARM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    warm: bool
    reason: str
    chunks: int
    skipped: _containers.ScalarMap[str, int]
    seconds: float
    def __init__(self, warm: bool = ..., reason: _Optional[str] = ..., chunks: _Optional[int] = ..., skipped: _Optional[_Mapping[str, int]] = ..., seconds: _Optional[float] = ...) -> None: ...

class DiskStats(_message.Message):
    __slots__ = ("records", "live_bytes", "total_bytes", "queue_chunks", "queue_bytes", "promoting_chunks", "daily_bytes", "written_today_bytes", "drives")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMOTING_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    DAILY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_TODAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRIVES_FIELD_NUMBER: _ClassVar[int]
    records: int
    live_bytes: int
    total_bytes: int
    queue_chunks: int
    queue_bytes: int
    promoting_chunks: int
    daily_bytes: int
    written_today_bytes: int
    drives: _containers.RepeatedCompositeFieldContainer[DriveStats]
    def __init__(self, records: _Optional[int] = ..., live_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., queue_chunks: _Optional[int] = ..., queue_bytes: _Optional[int] = ..., promoting_chunks: _Optional[int] = ..., daily_bytes: _Optional[int] = ..., written_today_bytes: _Optional[int] = ..., drives: _Optional[_Iterable[_Union[DriveStats, _Mapping]]] = ...) -> None: ...

class DriveStats(_message.Message):
    __slots__ = ("directory", "state", "reason", "capacity_bytes", "live_bytes", "dead_bytes", "free_bytes", "records", "extents", "read_bytes", "written_bytes", "queue", "scanned_extents", "found_extents")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    SCANNED_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    FOUND_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    state: str
    reason: str
    capacity_bytes: int
    live_bytes: int
    dead_bytes: int
    free_bytes: int
    records: int
    extents: int
    read_bytes: int
    written_bytes: int
    queue: int
    scanned_extents: int
    found_extents: int
    def __init__(self, directory: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., live_bytes: _Optional[int] = ..., dead_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., records: _Optional[int] = ..., extents: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., queue: _Optional[int] = ..., scanned_extents: _Optional[int] = ..., found_extents: _Optional[int] = ...) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("version", "daemon_id", "uptime_s", "state", "pool", "tenants", "namespaces", "sessions", "counters", "endpoints", "disk")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DAEMON_ID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    version: str
    daemon_id: int
    uptime_s: float
    state: str
    pool: PoolStats
    tenants: _containers.RepeatedCompositeFieldContainer[TenantStats]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStats]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStats]
    counters: _containers.ScalarMap[str, int]
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    disk: DiskStats
    def __init__(self, version: _Optional[str] = ..., daemon_id: _Optional[int] = ..., uptime_s: _Optional[float] = ..., state: _Optional[str] = ..., pool: _Optional[_Union[PoolStats, _Mapping]] = ..., tenants: _Optional[_Iterable[_Union[TenantStats, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStats, _Mapping]]] = ..., sessions: _Optional[_Iterable[_Union[SessionStats, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., endpoints: _Optional[_Iterable[str]] = ..., disk: _Optional[_Union[DiskStats, _Mapping]] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("namespace_id",)
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ...) -> None: ...

class DropResponse(_message.Message):
    __slots__ = ("chunks", "kept", "records")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    kept: int
    records: int
    def __init__(self, chunks: _Optional[int] = ..., kept: _Optional[int] = ..., records: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("namespace_id", "key")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    key: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., key: _Optional[bytes] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    def __init__(self, chunks: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("namespace_id", "key")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    key: bytes
    def __init__(self, namespace_id: _Optional[bytes] = ..., key: _Optional[bytes] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    def __init__(self, chunks: _Optional[int] = ...) -> None: ...

class PinStats(_message.Message):
    __slots__ = ("namespace_id", "key", "chunks", "bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: bytes
    key: bytes
    chunks: int
    bytes: int
    def __init__(self, namespace_id: _Optional[bytes] = ..., key: _Optional[bytes] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins",)
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[PinStats]
    def __init__(self, pins: _Optional[_Iterable[_Union[PinStats, _Mapping]]] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuditResponse(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, findings: _Optional[_Iterable[str]] = ...) -> None: ...
