"""Ways to choose a config: a level for every sublayer, under a latency limit."""

METHODS = {
    "dilap": "dilap.methods.dilap:search",
    "equal_widths": "dilap.methods.equal_widths:search",
    "uniform": "dilap.methods.uniform:search",
    "layer_error": "dilap.methods.layer_error:search",
}
