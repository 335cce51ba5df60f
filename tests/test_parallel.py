import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tl_jax import parallel
from tl_jax.errors import UserError


def test_a_batch_must_divide_by_the_devices():
    parallel.check_batch_size(16)
    with pytest.raises(UserError, match=r"12 does not divide by 8 devices; 8 or 16 would"):
        parallel.check_batch_size(12)
    with pytest.raises(UserError, match=r"4 does not divide by 8 devices; 8 would"):
        parallel.check_batch_size(4)
    with pytest.raises(UserError, match=r"8 devices × 3 micro-batches; 24 or 48 would"):
        parallel.check_batch_size(32, 3)
    assert [parallel.round_up(n) for n in (1, 8, 9)] == [8, 8, 16]


def test_replicas_that_differ_are_found():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    same = jax.device_put(np.arange(4.0), NamedSharding(mesh, PartitionSpec()))
    assert parallel.replicas_agree({"a": same})
    shards = [jax.device_put(np.float32(i == 3), device) for i, device in enumerate(jax.devices())]
    differ = jax.make_array_from_single_device_arrays(
        (), NamedSharding(mesh, PartitionSpec()), shards
    )
    assert not parallel.replicas_agree({"a": same, "b": differ})


def test_the_environment_must_be_whole(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
        parallel.start()
