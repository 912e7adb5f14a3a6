-- Schema 1 had the futures of all requests in a table, and checkpoints' folders behind links (archive.py).
CREATE TABLE answers (
    request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, result TEXT NOT NULL, created_at INTEGER NOT NULL);
CREATE INDEX answers_by_time ON answers (created_at);
INSERT INTO answers SELECT request_id, owner, result, created_at FROM futures WHERE result IS NOT NULL;
DROP TABLE futures;
