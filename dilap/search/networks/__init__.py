"""DiLAP's own search for networks that are no decoders; see `dilap.search.networks.prune`."""
