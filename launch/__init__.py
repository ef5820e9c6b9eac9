"""The commands, `python -m launch.NAME`: flags, one config, one call of the library."""
