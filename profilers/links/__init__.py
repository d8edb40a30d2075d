"""Ways to a device: its own processes, ssh, adb; and the store of files that is kept there."""
