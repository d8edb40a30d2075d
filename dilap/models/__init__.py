"""Networks in torch: loading, what can be cut in them and how, their text, their answers as a reference, distillation.

The only room, beside the export graphs, that knows an architecture.

    from dilap.models.load import load
    from dilap.models.anatomy import architecture_of
    architecture_of(load("smollm2-135m").model).num_parameters
"""
