"""The tables. Times are Unix seconds (UTC). Any change needs a new SCHEMA_VERSION and a step in upgrade.py."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

SCHEMA_VERSION = 3

HELD = "state IN ('live', 'suspended')"
metadata = MetaData()

run = Table(
    "run",
    metadata,
    Column("run_id", Integer, primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("orch_version", String(32), nullable=False),
    Column("name", String(200), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("created_at", Float, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("generation", Integer, nullable=False),  # the latest claim's generation; never reused
    Column("chunks_since_promotion", Integer, nullable=False),
    Column("epochs", Integer, nullable=False),  # total of all finished chunks, stored so that claims need not sum
    Column("settings", Text, nullable=False),  # all settings as JSON; amended in place
    Column("settings_version", Integer, nullable=False),
    Column("import_paths", JSON, nullable=False),  # folders to search for the user's job module
)

worker = Table(
    "worker",
    metadata,
    Column("worker_id", Integer, primary_key=True, autoincrement=False),
    Column("device", String(200)),
    Column("failures", Integer, nullable=False, default=0),
    Column("failed_at", Float),  # when the last failure was counted
    Column("early_failure", Text),  # the last failure's signature, if it came before the first step (rules/failing)
    Column("stopped", Text),  # the reason, as text for users
    Column("stop_kind", String(16)),  # a StopKind
)

job = Table(
    "job",
    metadata,
    Column("job_id", Integer, primary_key=True),
    Column("worker_id", Integer, ForeignKey("worker.worker_id"), nullable=False),
    Column("link", Integer, nullable=False),
    Column("token", String(64), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("cluster_id", String(64)),
    Column("after_job_id", Integer, ForeignKey("job.job_id")),
    Column("host", String(255)),
    Column("pid", Integer),
    Column("pid_created_at", Float),
    Column("starts", Integer, nullable=False, default=0),
    Column("submitted_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("outcome", Text),
    UniqueConstraint("worker_id", "link", name="a_chain_never_forks"),
    Index("job_by_state", "state"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("checkpoint_id", Integer, primary_key=True),
    Column("chunk_id", Integer, ForeignKey("chunk.chunk_id"), nullable=False, unique=True),
    Column("parent_id", Integer, ForeignKey("checkpoint.checkpoint_id")),
    Column("founder_id", Integer, nullable=False),  # for a founder, its own checkpoint_id
    Column("worker_id", Integer, ForeignKey("worker.worker_id"), nullable=False),
    Column("epochs", Integer, nullable=False),
    Column("score", Float, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("profile", String(200), nullable=False),
    Column("file", String(255), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("test_metrics", JSON),
    Column("tested_at", Float),
    Column("released", Boolean, nullable=False, default=False),  # nothing refers to it; its file may be deleted
    Index("checkpoint_held", "released", sqlite_where=text("released = 0"), postgresql_where=text("NOT released")),
)

entry = Table(
    "entry",
    metadata,
    Column("entry_id", Integer, primary_key=True),
    Column("checkpoint_id", Integer, ForeignKey("checkpoint.checkpoint_id"), nullable=False, unique=True),
    Column("start_position", Integer, nullable=False),
    Column("floor", Integer, nullable=False),
    Column("worked_on", Integer, nullable=False),
    Column("promoted_at", Float, nullable=False),
    Column("on_board", Boolean, nullable=False),
    Column("evicted_at", Float),
    Column("evicted_by", Integer, ForeignKey("entry.entry_id")),
    Index("entry_on_board", "on_board", sqlite_where=text("on_board = 1"), postgresql_where=text("on_board")),
)

chunk = Table(
    "chunk",
    metadata,
    Column("chunk_id", Integer, primary_key=True),
    # The entry whose position the chunk consumes. A founder's chunk consumes position 0 of the founder's own entry.
    Column("entry_id", Integer, ForeignKey("entry.entry_id", use_alter=True, name="chunk_of_entry")),
    Column("parent_id", Integer, ForeignKey("checkpoint.checkpoint_id", use_alter=True, name="chunk_of_parent")),
    Column("position", Integer, nullable=False),
    Column("profile", String(200), nullable=False),
    Column("worker_id", Integer, ForeignKey("worker.worker_id"), nullable=False),
    Column("job_id", Integer, ForeignKey("job.job_id")),
    Column("generation", Integer, nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("claimed_at", Float, nullable=False),
    Column("lease_until", Float, nullable=False),
    Column("finished_at", Float),
    Column("train_seconds", Float),
    Column("epochs", Integer),
    Column("score", Float),
    Column("suspended_file", String(255)),
    Column("suspended_sha256", String(64)),
    Column("expired_by", String(20)),  # an ExpiredBy
    Column("error", Text),  # the last error in the chunk
    Column("error_at", Float),
    Column("failures", Integer, default=0),  # how often the chunk has failed
    Index("chunk_by_entry", "entry_id", "position"),
    Index("chunk_held", "state", "entry_id", "lease_until", sqlite_where=text(HELD), postgresql_where=text(HELD)),
    Index("chunk_finished", "finished_at"),
)

epoch = Table(
    "epoch",
    metadata,
    Column("epoch_id", Integer, primary_key=True),
    Column("chunk_id", Integer, ForeignKey("chunk.chunk_id"), nullable=False),
    Column("number", Integer, nullable=False),  # counted from 1 over the whole lineage
    Column("seconds", Float, nullable=False),
    Column("metrics", JSON, nullable=False),
    UniqueConstraint("chunk_id", "number", name="no_epoch_twice"),
)

event = Table(
    "event",
    metadata,
    Column("event_id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("worker_id", Integer),
    Column("chunk_id", Integer),
    Column("entry_id", Integer),
    Column("data", JSON, nullable=False),
)
