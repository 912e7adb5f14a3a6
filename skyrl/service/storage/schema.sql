-- The store of the service, schema 2. Times are microseconds since 1970, lists and maps are JSON.
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, owner TEXT NOT NULL, tags TEXT NOT NULL, user_metadata TEXT NOT NULL,
    sdk_version TEXT NOT NULL, project_id TEXT, display_name TEXT, folded_name TEXT NOT NULL,
    created_at INTEGER NOT NULL, last_heartbeat INTEGER NOT NULL,
    status TEXT NOT NULL DEFAULT 'active', reason TEXT, detail TEXT NOT NULL DEFAULT '{}');
CREATE INDEX sessions_by_time ON sessions (owner, created_at, session_id);
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, facts TEXT NOT NULL,
    user_metadata TEXT NOT NULL, created_at INTEGER NOT NULL, last_request_at INTEGER NOT NULL, state TEXT NOT NULL);
CREATE INDEX runs_by_time ON runs (owner, created_at);
CREATE INDEX runs_by_session ON runs (session_id);
CREATE TABLE samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, base_model TEXT NOT NULL,
    model_path TEXT, version TEXT, ephemeral_run TEXT, created_at INTEGER NOT NULL,
    clients INTEGER NOT NULL DEFAULT 0);
CREATE INDEX samplers_by_session ON samplers (session_id);
CREATE TABLE checkpoints (
    run_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, owner TEXT NOT NULL, version TEXT NOT NULL,
    created_at INTEGER NOT NULL, size_bytes INTEGER NOT NULL, public INTEGER NOT NULL DEFAULT 0, expires_at INTEGER,
    user_metadata TEXT NOT NULL, facts TEXT NOT NULL, has_optimizer INTEGER NOT NULL,
    missing INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run_id, kind, name));
CREATE INDEX checkpoints_by_time ON checkpoints (owner, created_at);
CREATE INDEX checkpoints_by_expiry ON checkpoints (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE answers (
    request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, result TEXT NOT NULL, created_at INTEGER NOT NULL);
CREATE INDEX answers_by_time ON answers (created_at);
