"""Two logical CPUs for TensorFlow, which must be asked for before anything runs on one."""

import keras
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
