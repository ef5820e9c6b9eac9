"""Instant attribution: a student of a slow method's scores, and an index of what it makes of the training images."""
