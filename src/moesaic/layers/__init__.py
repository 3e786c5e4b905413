"""The parts of a layer, each built from its description in `moesaic.config`."""
