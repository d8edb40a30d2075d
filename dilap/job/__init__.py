"""The work behind the commands, without a command line: prune, profile, export, evaluate and compare.

The commands (`dilap.cli`) and the Python interface (`dilap.job.api`) call the same functions. `dilap-prune` does this:

    from dilap.job.prune import prune
    prune(options, devices=[host], out=Path("runs/mine"), progress=Console())
"""
