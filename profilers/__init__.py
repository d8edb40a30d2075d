"""Measure artifacts on a device: one interface for latency tables and for final validation.

    from dilap.profilers.devices import device
    from dilap.profilers.profiler import Case, Profiler
    from dilap.profilers.protocol import FINAL
    profiler = Profiler(device.get("host_cpu"), backend="llamacpp")
    measurements = profiler.measure([Case(path=path, workload=workload)], FINAL)

`protocol` says how often and in which order samples are taken, `intervals` how well they are known. `instruments` take
the samples, `links` reach the devices, `devices` knows them, and `tables` makes latency tables of the measurements.
"""
