"""4-bit decoding and encoding: bitsandbytes' kernels, and an independent reference."""
