"""The evaluation that decides between methods: retraining without images, and retrieval of known answers."""
