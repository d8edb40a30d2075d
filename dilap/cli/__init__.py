"""The commands: arguments into dataclasses, calls, a short table or JSON."""
