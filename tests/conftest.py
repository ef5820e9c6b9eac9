"""Four virtual devices for every test, so that what is sharded in production is sharded here."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
