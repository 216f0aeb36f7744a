"""The environment of every test process, set before torch is imported."""

import os

from infra.confinement import SHARED_PROCESSOR_VARIABLES

for name, text in SHARED_PROCESSOR_VARIABLES.items():  # tests run beside each other
    os.environ.setdefault(name, text)
