"""What the commands do, without a command line: stages, the folder in which a run grows, the proof, comparisons.

For example, as `dilap-prune` does:

    from dilap.job.prune import prune
    prune(options, devices=[host], out=Path("runs/mine"), progress=Console())
"""
