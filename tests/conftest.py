"""Eight virtual CPU devices for every test, set before jax looks for devices."""

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Eight devices share few cores here: programs in flight together can take each other's threads and wait for ever in a collective.
jax.config.update("jax_cpu_enable_async_dispatch", False)
hypothesis.settings.register_profile("repeatable", derandomize=True)  # `--hypothesis-profile=default` looks for new counterexamples
hypothesis.settings.load_profile("repeatable")
