"""A checkpoint holds what was true when it was asked for."""

import numpy as np
import orbax.checkpoint as ocp

from tl_jax.checkpointing import Checkpoints


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path, monkeypatch):
    late = []
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *_, args, **__: late.append(args))
    kernel, sums = np.arange(10.0), {"count": 1, "loss": 0.5}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"kernel": kernel}, {"timing": {"epoch": sums}})
    sums.clear()
    kernel[:] = 0
    np.testing.assert_array_equal(late[0]["state"].item["kernel"], np.arange(10.0))
    assert late[0]["position"].item == {"timing": {"epoch": {"count": 1, "loss": 0.5}}}
