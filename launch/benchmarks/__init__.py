"""The suites of `launch.benchmark`, one module each."""
