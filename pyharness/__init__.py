"""Harness of the GELU-less INT8 Swin Transformer: distil, calibrate, convert, evaluate and measure.

Importing this package loads neither torch nor the compiled engine; `pyharness.engine` loads the engine on first use.
"""

__version__ = "0.1.0"
