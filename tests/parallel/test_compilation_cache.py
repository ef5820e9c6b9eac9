"""The compilation cache: in place where it can be, a warning where it cannot."""

import os
import subprocess
import sys
import textwrap

from attrib_jax.parallel.compilation_cache import enable_compilation_cache


def test_a_second_process_finds_the_first_ones_programs(tmp_path):
    script = textwrap.dedent(
        """
        import jax, jax.numpy as jnp
        from attrib_jax.parallel.compilation_cache import enable_compilation_cache
        print(enable_compilation_cache())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        hits = []
        listen = lambda event, **kw: hits.append(event) if "cache_hits" in event else None
        jax.monitoring.register_event_listener(listen)
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
        print(len(hits) > 0)
        """
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    lines = [subprocess.check_output(command, env=environment, text=True).split() for _ in range(2)]
    folder = str(tmp_path / "attrib_jax" / "xla")
    assert lines == [[folder, "False"], [folder, "True"]]


def test_an_unusable_folder_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    assert enable_compilation_cache(tmp_path / "file" / "xla") is None
    assert str(tmp_path / "file" / "xla") in caplog.text and "Not a directory" in caplog.text
