"""The evaluation that decides between methods: retraining without pictures, and retrieval of known answers."""
