"""Programs for those who work on DiLAP, each with a script of the same name that sets everything up: `tools/test`."""
