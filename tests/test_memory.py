"""How much memory there is."""

import pytest

from tl_jax import memory


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "1000", "memory.current": "400"}, 600),
        (
            {
                "memory.max": "1000",
                "memory.current": "900",
                "memory.stat": "anon 1\ninactive_file 700",
            },
            800,
        ),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "anon 1200"}, 0),
    ],
)
def test_a_container_s_limit_counts_and_its_cached_files_do_not(tmp_path, monkeypatch, files, free):
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    found = memory.host_available()
    assert found == free if free is not None else found > 2**20
