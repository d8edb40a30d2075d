"""Measure artifacts on a device: one interface for latency tables and for final validation."""
