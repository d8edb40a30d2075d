"""Published pruning methods for networks that are no decoders. Their interface is in `dilap.search.network_task`."""
