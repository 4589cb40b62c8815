"""The step on aarch64, cross-built and run in emulation: python -m tests.arm."""
