"""Files on disk: atomic writes, chunks, checkpoints, stage folders."""
