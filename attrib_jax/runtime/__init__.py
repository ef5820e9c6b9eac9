"""Storage, devices and progress: what a long run needs so that no work is lost."""
