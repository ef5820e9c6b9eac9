"""Resumable work that methods share: encoding, queries, curvature, losses of a data set."""
