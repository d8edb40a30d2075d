"""Networks in torch: load them, find and cut their prunable parts, get text for them, compare and distil them.

Beside the export graphs this is the only package that knows the architectures of model families.

    from dilap.models.load import load
    from dilap.models.anatomy import architecture_of
    architecture_of(load("smollm2-135m").model).num_parameters
"""
