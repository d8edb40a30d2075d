"""Latency tables: which probes are measured, their samples, the fitted costs, and a roofline without a device."""
