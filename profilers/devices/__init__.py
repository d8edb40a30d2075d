"""Devices: presets, where the user has them, whether they are fit to be measured."""
