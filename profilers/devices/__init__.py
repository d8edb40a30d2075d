"""Devices: the presets, where the user's own devices are, and whether they are fit to be measured."""
