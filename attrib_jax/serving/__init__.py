"""The page of instant attributions: one worker that owns the device, and an ASGI application around it."""
