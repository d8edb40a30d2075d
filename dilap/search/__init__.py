"""DiLAP's own search for the width and precision of every part under a limit on latency, and all methods' interface.

The search builds levels (widths with refitted projections, in several precisions) of every sublayer and a quadratic
model of what they cost in quality, minimises it with a differentiable latency in the objective, selects exactly, and
ends with swaps on the real KL.

    from dilap.search.method import PruneTask  # what a method is given
    from dilap.search.dilap import prune       # prune(task) -> Pruned, as for every method
"""
