"""JAX's persistent compilation cache, switched on for short runs that would else mostly compile."""

import logging
import os
import tempfile
from pathlib import Path

import jax

_log = logging.getLogger(__name__)


def enable_compilation_cache(path: str | os.PathLike | None = None) -> Path | None:
    """Keeps compiled programs in `path`, by default `$XDG_CACHE_HOME/attrib_jax/xla` or `~/.cache/attrib_jax/xla`.

    Call it before the first compilation. Programs that compiled in under half a second are not kept. Returns the
    folder, or None with a warning where it cannot be written: everything then works, compiling each time.
    """
    if path is None:
        base = os.environ.get("XDG_CACHE_HOME")
        path = (Path(base) if base else Path("~/.cache").expanduser()) / "attrib_jax" / "xla"
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure test: a mode says nothing about a read-only mount or a full disk.
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            probe.write(b"probe")
    except OSError as error:
        _log.warning("cannot keep compiled programs in %s (%s): compiling them each time", path, error.strerror)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
