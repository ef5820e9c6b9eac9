"""The resumable loops that join pure functions, data and files."""
