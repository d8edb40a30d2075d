"""Ways to a device: local processes, ssh and adb; and the store of files that is kept on it."""
