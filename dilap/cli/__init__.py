"""The commands: they turn arguments into options, call a job, and print a short table or JSON.

Each file has a `main`, which pyproject.toml names: `dilap-prune` is `dilap.cli.prune:main`.
No other package of DiLAP imports from here.
"""
