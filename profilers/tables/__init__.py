"""Latency tables: which models are probed, what was measured, the fit, and a roofline where nothing can be."""
