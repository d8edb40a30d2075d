"""Measure artifacts on a device: one interface for latency tables and for final validation.

    from dilap.profilers.profiler import Case, Profiler
    Profiler(device, backend="llamacpp").measure([Case(path=path, workload=workload)], FINAL)

`protocol` says how often and in which order, `instruments` take the samples, `links` reach the device.
"""
