"""What trackers of experiments get: every value that stands in the logs."""

import json

import pytest

from tests.helpers.persistence import run_fresh
from tests.helpers.trackers import logged, make_trainer


VALUES = ["rbn_penalty", "tid_mean_max", "tid_mean_avg", "tid_var_max", "tid_var_avg", "layer_norm_share"]


def test_tensorboard(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path / "run", "tensorboard")
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for name in VALUES:
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([entry[name] for entry in logged(trainer)])


def test_trackio(tmp_path):
    """In a process of its own, since it starts threads; without any network."""
    pytest.importorskip("trackio")
    script = """
import json, os
os.environ["TRACKIO_DIR"] = os.path.abspath("tracked")
from tests.helpers.trackers import logged, make_trainer
trainer = make_trainer("run", "trackio")
trainer.train()
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs(trainer.args.project)
print(json.dumps([logged(trainer), SQLiteStorage.get_logs(trainer.args.project, run)]))
"""
    entries, tracked = json.loads(run_fresh(script, tmp_path).stdout.splitlines()[-1])
    assert any((tmp_path / "tracked").iterdir())
    for name in VALUES:
        values = [point[f"train/{name}"] for point in tracked if f"train/{name}" in point]
        assert values == pytest.approx([entry[name] for entry in entries])
        assert len(values) == 3
