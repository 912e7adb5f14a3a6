"""A run's folder: `folder.py` writes it, `reader.py` reads it, for every viewer. Nothing else knows its files."""

# ruff: noqa: F401  # what is imported here is for those who import from this package

from skyrl.run_dir.folder import (
    ADVISORIES,
    FINGERPRINT,
    PROFILE_REQUEST,
    RECORDINGS,
    REQUEUE_FILE,
    RESULT,
    ROLLOUT_NAME,
    STOPS,
    SYSTEM_NAME,
    RunFolder,
    changed_facts,
    collect_versions,
    config_changes,
    cut_metrics,
    drop_rollouts,
    is_locked,
    keep_fingerprint,
    keep_steps,
    mark_stop,
    read_result,
    system_path,
)
from skyrl.run_dir.reader import (
    OBJECTIVE,
    RunReader,
    dumps,
    final_values,
    find_run,
    find_runs,
    is_run,
    read_metrics,
    read_rollouts,
    run_state,
)
