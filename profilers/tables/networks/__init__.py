"""Latency tables of networks of convolutions, where what a layer costs depends on the widths of two groups."""
