"""DiLAP's own search: levels of every sublayer, a quadratic model of what they cost in quality, a differentiable
latency inside the objective, an exact selection, and swaps on the real KL.

    from dilap.search.method import PruneTask  # what a method is given
    from dilap.search.dilap import prune       # prune(task) -> Pruned, as every method
"""
