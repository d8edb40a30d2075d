"""The commands: arguments into dataclasses, calls, a short table or JSON.

Each file has a `main`, which pyproject.toml names: `dilap-prune` is `dilap.cli.prune:main`.
Nothing else imports from here.
"""
