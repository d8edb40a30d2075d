"""DiLAP: prune a network to a latency budget measured on the device that will run it."""

__version__ = "0.1.0"
